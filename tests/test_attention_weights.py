"""Returned weights, scores after each stage, dropout and block masks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import regard
from cases import DTYPES
from helpers import EPSILON, as_float64, assert_near, assert_same_bits, normal, output_tolerance
from hypothesis import given, settings
from hypothesis import strategies as st
from regard import dot_product, reference

SLOPES = np.array([0.5, 0.25, 0.125, 0.0625], np.float32)
SHAPES = [(1, 1), (3, 200), (49, 97), (130, 64)]


def arrays(len_q: int, len_kv: int, dtype: str = "float32") -> Any:
    return (
        normal(0, 2, 4, len_q, 40, dtype=dtype),
        normal(1, 2, 2, len_kv, 40, dtype=dtype),
        normal(2, 2, 2, len_kv, 24, dtype=dtype),
    )


def options_of(len_q: int, len_kv: int) -> dict[str, Any]:
    return dict(
        mask=np.random.default_rng(3).random((2, 1, len_q, len_kv)) < 0.7,
        bias=normal(3, 4, 1, len_kv),
        window=(50, 20),
        alignment="lower_right",
        softcap=8.0,
        sinks=normal(4, 4),
        key_lengths=np.array([len_kv, len_kv // 2]),
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_weights_are_the_reference_s(backend: str, shape: tuple[int, int], dtype: str) -> None:
    query, key, value = arrays(*shape, dtype)
    for options in ({}, options_of(*shape), dict(dropout_p=0.25, seed=5)):
        out, lse, weights = regard.attention(query, key, value, return_lse=True, return_weights=True, **options)
        _, _, want = reference.attention(
            *as_float64(query, key, value), return_lse=True, return_weights=True, **options
        )
        assert weights.dtype == DTYPES[dtype] and lse.dtype == np.float32
        # Scores below 16 err by some 30 epsilon, weights by as much of themselves, then they round.
        epsilon = EPSILON["float64" if dtype == "float64" else "float32"]
        error = 60 * epsilon + (EPSILON[dtype] if DTYPES[dtype].itemsize == 2 else 0)
        np.testing.assert_allclose(
            as_float64(weights)[0], want, rtol=error, atol=2.0**-24 if dtype == "float16" else 1e-37
        )
        assert_same_bits(out, regard.attention(query, key, value, **options), "out does not depend on what is returned")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_mean_of_heads(backend: str, shape: tuple[int, int], dtype: str) -> None:
    query, key, _ = arrays(*shape, dtype)
    for options in ({}, options_of(*shape)):
        mean = dot_product.scores(query, key, stage="weights", mean_of_heads=True, **options)
        _, weights = reference.attention(*as_float64(query, key, key), return_weights=True, **options)
        assert mean.dtype == DTYPES[dtype]
        epsilon = EPSILON["float64" if dtype == "float64" else "float32"]
        error = 60 * epsilon + (EPSILON[dtype] if DTYPES[dtype].itemsize == 2 else 0)
        np.testing.assert_allclose(
            as_float64(mean)[0], weights.mean(axis=1), rtol=error, atol=2.0**-24 if dtype == "float16" else 1e-37
        )
        one = dot_product.scores(query[:, :1], key[:, :1], stage="weights", mean_of_heads=True)
        assert_same_bits(one[:, None], dot_product.scores(query[:, :1], key[:, :1], stage="weights"), "one head")


def test_weights_of_special_rows(backend: str) -> None:
    query, key, value = arrays(6, 9)
    key[0, 0, 3] = np.nan
    query[1, 2, 4] *= 1e30
    mask = np.ones((2, 4, 6, 9), bool)
    mask[0, :2, 1] = False
    mask[0, 0, 2, 3] = False
    _, weights = regard.attention(query, key, value, mask=mask, return_weights=True)
    with np.errstate(all="ignore"):
        _, want = reference.attention(*as_float64(query, key, value), mask=mask, return_weights=True)
    assert_near(weights, want, 1e-5)


@pytest.mark.parametrize("stage", ["scaled", "capped", "masked", "weights"])
def test_scores_after_each_stage(backend: str, stage: str) -> None:
    query, key, value = arrays(49, 97)
    options = options_of(49, 97)
    scores = dot_product.scores(query, key, stage=stage, **options)
    q, k, v = as_float64(query, key, value)
    want = q @ k.repeat(2, axis=1).swapaxes(2, 3) / np.sqrt(40)
    if stage != "scaled":
        want = 8 * np.tanh(want / 8)
    if stage == "masked":
        distance = np.arange(97) - np.arange(49)[:, None] - (options["key_lengths"] - 49)[:, None, None, None]
        seen = options["mask"] & (distance >= -50) & (distance <= 20)
        seen = seen & (np.arange(97) < options["key_lengths"][:, None, None, None])
        want = np.where(seen, want + options["bias"], -np.inf)
    if stage == "weights":
        _, want = reference.attention(q, k, v, return_weights=True, **options)
    assert_near(scores, want, 1e-5)


# ---- Dropout -----------------------------------------------------------------------------------


def test_philox_gives_the_published_words() -> None:
    """Random123's known answers for Philox4x32-10 (kat_vectors)."""
    words = reference.dot_product.random_words
    assert [hex(int(w)) for w in words(0, np.zeros(4, np.uint64))] == [
        "0x6627e8d5",
        "0xe169c58d",
        "0xbc57ac4c",
        "0x9b00dbd8",
    ]
    ones = np.full(4, 0xFFFFFFFF, np.uint64)
    assert [hex(int(w)) for w in words(2**64 - 1, ones)] == ["0x408f276d", "0x41c83b0e", "0xa20bc7c6", "0x6d5451fd"]


@pytest.mark.parametrize("shape", [(1, 70), (50, 131), (130, 2)], ids=str)
@pytest.mark.parametrize("p", [0.1, 0.5, 1.0])
def test_dropout_is_the_reference_s(backend: str, shape: tuple[int, int], p: float) -> None:
    query, key, value = arrays(*shape)
    options: dict[str, Any] = dict(dropout_p=p, seed=2**63 + 12345, causal=True, alignment="lower_right")
    out, lse = regard.attention(query, key, value, return_lse=True, **options)
    want = reference.attention(*as_float64(query, key, value), **options)
    scale = 1 / (1 - p) if p < 1 else 1
    assert_near(out, want, scale * output_tolerance(query, key, value, {}, "float32"))
    del options["dropout_p"], options["seed"]
    _, plain = regard.attention(query, key, value, return_lse=True, **options)
    assert_same_bits(lse, plain, "lse is of the softmax before dropout")


def test_dropout_depends_on_seed_and_place_alone(backend: str) -> None:
    query, key, value = arrays(60, 110)
    first = regard.attention(query, key, value, dropout_p=0.5, seed=1)
    assert_same_bits(regard.attention(query, key, value, dropout_p=0.5, seed=1), first)
    assert (regard.attention(query, key, value, dropout_p=0.5, seed=2) != first).any()
    assert (
        regard.attention(query, key, value, dropout_p=0.5) != regard.attention(query, key, value, dropout_p=0.5)
    ).any()
    with regard._backend.using(regard._backend.possible()[0]):
        _, weights = regard.attention(query, key, value, dropout_p=0.5, seed=1, return_weights=True)
    _, mine = regard.attention(query, key, value, dropout_p=0.5, seed=1, return_weights=True)
    assert ((weights == 0) == (mine == 0)).all(), "every instruction set drops the same"


def test_dropout_keeps_the_share_it_should() -> None:
    ones = np.zeros((1, 8, 200, 4), np.float32)
    _, weights = regard.attention(ones, ones, ones, dropout_p=0.3, seed=99, return_weights=True)
    kept = (weights != 0).mean()
    # 320,000 draws: five standard deviations are 0.004.
    assert abs(kept - 0.7) < 0.004
    assert abs(np.corrcoef((weights[0, 0] != 0).ravel(), (weights[0, 1] != 0).ravel())[0, 1]) < 0.03


@pytest.mark.parametrize(
    ("options", "error", "pattern"),
    [
        (dict(dropout_p=-0.1), ValueError, "dropout_p.*0 to 1.*-0.1"),
        (dict(dropout_p=1.5), ValueError, "dropout_p.*0 to 1"),
        (dict(dropout_p=float("nan")), ValueError, "dropout_p"),
        (dict(dropout_p="half"), TypeError, "dropout_p.*str"),
        (dict(dropout_p=0.5, seed=-1), ValueError, "seed.*-1"),
        (dict(dropout_p=0.5, seed=2**64), ValueError, "seed"),
        (dict(dropout_p=0.5, seed=1.5), TypeError, "seed.*1.5"),
        (dict(seed=-1), ValueError, "seed.*-1"),
        (dict(seed="x"), TypeError, "seed.*'x'"),
        (dict(window=(float("inf"), 0), alignment="lower_right"), ValueError, "window.*inf"),
        (dict(scale=10**400), ValueError, "scale.*finite"),
        (dict(alignment=[1]), ValueError, r"alignment.*upper_left.*\[1\]"),
    ],
)
def test_bad_numbers_are_refused(options: dict[str, Any], error: type, pattern: str) -> None:
    with pytest.raises(error, match=pattern):
        regard.attention(*arrays(3, 4), **options)


# ---- Block masks -------------------------------------------------------------------------------


@st.composite
def block_problems(draw: st.DrawFn) -> tuple[Any, regard.BlockMask]:
    len_q, len_kv = draw(st.integers(1, 150)), draw(st.integers(1, 200))
    size = draw(st.sampled_from([(1, 1), (3, 5), (16, 16), (64, 64), (48, 96), (128, 128), (500, 7)]))
    batch, heads = draw(st.sampled_from([1, 2])), draw(st.sampled_from([1, 4]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    blocks = rng.random((batch, heads, -(-len_q // size[0]), -(-len_kv // size[1]))) < draw(
        st.sampled_from([0.1, 0.5, 1])
    )
    return arrays(len_q, len_kv), regard.BlockMask.from_blocks(blocks, len_q=len_q, len_kv=len_kv, block_size=size)


@settings(max_examples=60, deadline=None)
@given(problem=block_problems(), causal=st.booleans())
def test_block_mask_is_its_dense_mask(problem: tuple[Any, regard.BlockMask], causal: bool) -> None:
    (query, key, value), blocks = problem
    options = dict(causal=causal, alignment="lower_right")
    out, lse = regard.attention(query, key, value, mask=blocks, return_lse=True, **options)
    want, want_lse = reference.attention(
        *as_float64(query, key, value), mask=blocks.to_dense(), return_lse=True, **options
    )
    assert_near(out, want, output_tolerance(query, key, value, {}, "float32"))
    assert_near(lse, want_lse, 1e-5)
    _, weights = regard.attention(query, key, value, mask=blocks, return_weights=True, **options)
    assert not weights[np.broadcast_to(~blocks.to_dense(), weights.shape)].any()


def test_block_mask_on_every_instruction_set(backend: str) -> None:
    blocks = np.random.default_rng(0).random((4, 3, 4)) < 0.5
    mask = regard.BlockMask.from_blocks(blocks, len_q=150, len_kv=200, block_size=(64, 64))
    for len_q in (150, 3):
        query, key, value = arrays(len_q, 200)
        if len_q == 3:
            mask = regard.BlockMask.from_blocks(blocks[:, :1], len_q=3, len_kv=200, block_size=(64, 64))
        out = regard.attention(query, key, value, mask=mask, alibi_slopes=SLOPES, alignment="lower_right")
        want = reference.attention(
            *as_float64(query, key, value), mask=mask, alibi_slopes=SLOPES, alignment="lower_right"
        )
        assert_near(out, want, 2e-5)


def test_dense_and_back() -> None:
    blocks = np.random.default_rng(0).random((2, 1, 3, 4)) < 0.5
    mask = regard.BlockMask.from_blocks(blocks, len_q=300, len_kv=500)
    assert mask.density == blocks.mean()
    assert (mask.to_dense() == blocks.repeat(128, 2)[:, :, :300].repeat(128, 3)[..., :500]).all()
    again = regard.BlockMask.from_dense(mask.to_dense())
    assert (again.row_offsets == mask.row_offsets).all() and (again.columns == mask.columns).all()
    with pytest.raises(ValueError, match="read-only"):
        mask.columns[0] = 7


GOOD: dict[str, Any] = dict(row_offsets=[0, 1, 3], columns=[0, 0, 1], shape=(1, 1, 20, 20), block_size=(10, 10))


@pytest.mark.parametrize(
    ("changed", "error", "pattern"),
    [
        (dict(row_offsets=[0, 1]), ValueError, r"row_offsets.*= 3"),
        (dict(row_offsets=[1, 1, 3]), ValueError, "row_offsets.*from 0 to 3"),
        (dict(row_offsets=[0, 4, 3]), ValueError, "row_offsets.*fall at index 2"),
        (dict(columns=[0, 0, 2]), ValueError, r"columns.*0 to 1.*2 at index 2"),
        (dict(columns=[0, -1, 1]), ValueError, "columns.*-1 at index 1"),
        (dict(columns=[0, 1, 1]), ValueError, "columns.*rising"),
        (dict(columns=[0.0, 0, 1]), TypeError, "columns.*float64"),
        (dict(shape=(20, 20)), ValueError, "shape"),
        (dict(shape=(1, 1, 20, 2**63)), ValueError, rf"shape: expected integers below 2\^63, got {2**63}"),
        (dict(shape=(2**70, 0, 20, 20), row_offsets=[0]), ValueError, rf"shape: .* got {2**70}"),
        (dict(block_size=(0, 10)), ValueError, "block_size"),
        (dict(block_size=(10,)), ValueError, "block_size"),
    ],
)
def test_bad_block_masks_are_refused(changed: dict[str, Any], error: type, pattern: str) -> None:
    regard.BlockMask(**GOOD)
    with pytest.raises(error, match=pattern):
        regard.BlockMask(**(GOOD | changed))


def test_dense_masks_that_cut_blocks_are_refused() -> None:
    dense = np.ones((2, 200, 300), bool)
    dense[1, 130, 290] = False
    with pytest.raises(ValueError, match=r"mask.*block.*\(0, 1, 130, 290\)"):
        regard.BlockMask.from_dense(dense)


@pytest.mark.parametrize("changed", [dict(len_q=2**63), dict(len_kv=2**70)])
def test_block_masks_beyond_counting_are_refused(changed: dict[str, int]) -> None:
    sizes = {"len_q": 4, "len_kv": 4, **changed}
    with pytest.raises(ValueError, match=rf"^{next(iter(changed))}: expected integers below 2\^63, got \d+$"):
        regard.BlockMask.from_blocks(np.ones((1, 1), bool), **sizes, block_size=(2**80, 2**80))


def test_a_block_mask_of_no_blocks_from_lists() -> None:
    query, key, value = arrays(2, 3)
    mask = regard.BlockMask([0, 0], [], shape=(1, 1, 2, 3))
    assert mask.columns.dtype == np.int64 and (regard.attention(query, key, value, mask=mask) == 0).all()
    for empty in (np.zeros(0), [[]]):
        with pytest.raises(TypeError, match="columns: expected a 1-D array of whole numbers, got float64"):
            regard.BlockMask([0, 0], empty, shape=(1, 1, 2, 3))


@pytest.mark.parametrize("size", [(0, 2), (2,), 3])
def test_bad_block_sizes_are_refused(size: Any) -> None:
    for make in (
        lambda: regard.BlockMask.from_dense(np.ones((4, 4), bool), block_size=size),
        lambda: regard.BlockMask.from_blocks(np.ones((1, 1), bool), len_q=4, len_kv=4, block_size=size),
    ):
        with pytest.raises(ValueError, match="block_size"):
            make()


@pytest.mark.parametrize("size", [(2**63 - 1, 4), (4, 2**63 - 1), (2**64, 2**70)])
def test_blocks_may_be_larger_than_all_there_is(size: tuple[int, int]) -> None:
    query, key, value = arrays(2, 3)
    mask = regard.BlockMask([0, 1], [0], shape=(1, 1, 2, 3), block_size=size)
    assert_same_bits(regard.attention(query, key, value, mask=mask), regard.attention(query, key, value))


def test_block_mask_of_another_shape_is_refused() -> None:
    with pytest.raises(ValueError, match=r"mask.*len_q = 3.*BlockMask\(shape=\(1, 1, 20, 20\)"):
        regard.attention(*arrays(3, 20), mask=regard.BlockMask(**GOOD))
