"""Packed and paged sequences, block masks and returned weights on device arrays, the kernels emulated."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
import regard
from cases import DTYPES
from helpers import as_float64, assert_near, assert_same_bits, compute_epsilon, normal
from regard import BlockMask, reference
from regard.reference.cache import quantise

# Packed sequences for both kernels: up to 8 queries, and more; none, no keys, several tiles.
LENGTHS_Q = (5, 1, 0, 49, 8, 70, 9)
LENGTHS_KV = (5, 130, 7, 97, 0, 70, 140)
SLOPES = np.array([0.5, 0.25, 0.125, 0.0625], np.float32)
LOWER: dict[str, Any] = {"alignment": "lower_right"}

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": dict(causal=True, **LOWER),
    "window": dict(window=(20, 3), **LOWER),
    "sinks": dict(sinks=SLOPES),
    "alibi, sinks": dict(alibi_slopes=SLOPES, sinks=SLOPES, **LOWER),
    "softcap, mask, bias": dict(
        softcap=5.0, mask=np.random.default_rng(1).random((7, 1, 70, 140)) < 0.6, bias=normal(2, 4, 70, 140)
    ),
    "lengths": dict(query_lengths=np.array([5, 0, 0, 30, 8, 70, 2]), key_lengths=np.array([2, 130, 0, 65, 0, 3, 140])),
    "dropout": dict(dropout_p=0.3, seed=7),
}


def starts(lengths: Any, dtype: Any = np.int32) -> Any:
    return np.concatenate([[0], np.cumsum(lengths)]).astype(dtype)


Q, KV = starts(LENGTHS_Q), starts(LENGTHS_KV, np.int64)


def packed(dtype: str, dim_qk: int = 64, dim_v: int = 64, heads_kv: int = 2) -> list[Any]:
    shapes = ((Q[-1], 4, dim_qk), (KV[-1], heads_kv, dim_qk), (KV[-1], heads_kv, dim_v))
    return [normal(i, *shape, dtype=dtype) for i, shape in enumerate(shapes)]


def tolerance(dtype: str) -> float:
    """Outputs are averages of values below 5; scores stay below 40: some 30 epsilon of that, and two roundings."""
    rounding = {"float16": 2.0**-9, "bfloat16": 2.0**-6}.get(dtype, 0.0)
    return 5 * (30 * compute_epsilon(dtype) + rounding)


def on_device(cupy: Any, options: dict[str, Any]) -> dict[str, Any]:
    return {k: cupy.asarray(x) if isinstance(x, np.ndarray) else x for k, x in options.items()}


def check(cupy: Any, got: Any, want: Any, dtype: str) -> None:
    out, lse = (cupy.asnumpy(x) for x in got)
    assert out.dtype == DTYPES[dtype] and lse.dtype == np.float32
    assert_near(out, want[0], tolerance(dtype), "out")
    assert_near(lse, want[1], 1e-4, "lse")  # logits up to 40, in float32


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_varlen_is_the_reference(cupy, options, dtype):
    arrays = packed(dtype)
    want = reference.attention_varlen(*as_float64(*arrays), Q, KV, return_lse=True, **options)
    near = "bfloat16" if dtype == "bfloat16" else "float32"
    device = [cupy.asarray(x) for x in arrays]
    host = {k: x for k, x in options.items() if k in ("query_lengths", "key_lengths")}
    given = on_device(cupy, options)
    got = regard.attention_varlen(*device, Q, KV, return_lse=True, **(given | host))
    check(cupy, got, want, near)
    if options.get("alignment") is None:  # the same bits whether the host knows the lengths or not
        unknown = (
            regard.attention_varlen(*device, cupy.asarray(Q), cupy.asarray(KV), return_lse=True, **given)
            if "mask" not in options
            else got
        )
        for x, y in zip(unknown, got, strict=True):
            assert_same_bits(cupy.asnumpy(x), cupy.asnumpy(y))


@pytest.mark.parametrize("dtype", ["float64", "float16"])
def test_varlen_dtypes(cupy, dtype):
    arrays = packed(dtype, 44, 17, 4)
    want = reference.attention_varlen(*as_float64(*arrays), Q, KV, return_lse=True, causal=True, **LOWER)
    got = regard.attention_varlen(*map(cupy.asarray, arrays), Q, KV, return_lse=True, causal=True, **LOWER)
    check(cupy, got, want, dtype)


def test_varlen_has_each_sequence_s_own_bits(cupy, dtype):
    query, key, value = packed(dtype)
    device = [cupy.asarray(x) for x in (query, key, value)]
    out = cupy.asnumpy(regard.attention_varlen(*device, Q, KV, causal=True, **LOWER))
    for b in range(len(LENGTHS_Q)):
        one = [x[s[b] : s[b + 1]].swapaxes(0, 1)[None] for x, s in ((query, Q), (key, KV), (value, KV))]
        alone = cupy.asnumpy(regard.attention(*map(cupy.asarray, one), causal=True, **LOWER))
        assert_same_bits(out[Q[b] : Q[b + 1]], np.ascontiguousarray(alone[0].swapaxes(0, 1)), f"sequence {b}")


def test_varlen_rows_of_no_sequence_are_zero(cupy, dtype):
    arrays = [cupy.asarray(x) for x in packed(dtype)]
    cut = np.array([0, 4, 10], np.int32)
    for given in (cut, cupy.asarray(cut)):
        out, lse = (cupy.asnumpy(x) for x in regard.attention_varlen(*arrays, given, given, return_lse=True))
        assert (out[10:] == 0).all() and (lse[:, 10:] == -np.inf).all()
        assert np.isfinite(out[:10].astype(np.float32)).all() and (out[:10] != 0).any()


@pytest.mark.parametrize("bad", [[0, 5, 4, 9], [3, 5, 9, 12], [0, 5, 999, 9], [0, -7, 9, 2**40]])
def test_starts_on_the_device_are_held_to_their_range(cupy, bad):
    query, key, value = (cupy.asarray(normal(i, 12, 2, 16)) for i in range(3))
    out = regard.attention_varlen(query, key, value, *(cupy.asarray(np.int64(bad)) for _ in range(2)))
    assert cupy.asnumpy(out).shape == (12, 2, 16)  # AddressSanitizer saw no stray access
    with pytest.raises(ValueError, match="cu_seqlens_q: expected entries"):
        regard.attention_varlen(query, key, value, np.int64(bad), np.int64(bad))


# ---- Pages -----------------------------------------------------------------------------------------------

PAGED_LENGTHS = np.array([33, 0, 160, 1])


def table_of(lengths: Any, size: int, pages: int) -> Any:
    """Every sequence's pages in a scrambled order; what is not needed holds rubbish."""
    free = iter(np.random.default_rng(5).permutation(pages))
    width = max(-(-n // size) for n in lengths) + 1
    table = np.full((len(lengths), width), np.iinfo(np.int32).min, np.int32)
    for b, n in enumerate(lengths):
        table[b, : -(-n // size)] = [next(free) for _ in range(-(-n // size))]
    return table


def pages_of(dtype: str, size: int, dim_qk: int = 64, dim_v: int = 64) -> tuple[Any, Any, Any]:
    pages = 4 + int(PAGED_LENGTHS.sum()) // size
    key, value = normal(1, pages, size, 2, dim_qk, dtype=dtype), normal(2, pages, size, 2, dim_v, dtype=dtype)
    return key, value, table_of(PAGED_LENGTHS, size, pages)


@pytest.mark.parametrize("len_q", [1, 3, 40])
@pytest.mark.parametrize("size", [1, 7, 16, 64])
def test_paged_is_the_reference(cupy, dtype, size, len_q):
    key, value, table = pages_of(dtype, size)
    query = normal(0, 4, 4, len_q, 64, dtype=dtype)
    options: dict[str, Any] = dict(causal=True, sinks=SLOPES if size != 16 else None, return_lse=True, **LOWER)
    want = reference.attention_paged(*as_float64(query, key, value), table, PAGED_LENGTHS, **options)
    arrays = [cupy.asarray(x) for x in (query, key, value)]
    options = on_device(cupy, options)
    got = regard.attention_paged(*arrays, table, PAGED_LENGTHS, **options)
    check(cupy, got, want, dtype)
    unknown = regard.attention_paged(*arrays, cupy.asarray(table), cupy.asarray(PAGED_LENGTHS), **options)
    for x, y in zip(unknown, got, strict=True):  # the same bits whether the host knows the lengths or not
        assert_same_bits(cupy.asnumpy(x), cupy.asnumpy(y))


@pytest.mark.parametrize("len_q", [2, 20])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("stored", [*DTYPES, "int8", "float8_e4m3fn"])
def test_pages_of_any_type(cupy, tensor_cores, stored, dtype, len_q):
    eight_bits = stored in ("int8", "float8_e4m3fn")
    key, value, table = pages_of("float32" if eight_bits else stored, 16, 40, 24)
    query = normal(0, 4, 4, len_q, 40, dtype=dtype)
    scales = {}
    if stored == "float8_e4m3fn" and not cupy.__file__.endswith("stand_in/cupy/__init__.py"):
        pytest.skip("CuPy has no float8: caches hold it as bytes (test_a_cache_attends)")
    if eight_bits:
        kind = np.int8 if stored == "int8" else ml_dtypes.float8_e4m3fn
        (key, key_scales), (value, value_scales) = quantise(key, kind), quantise(value, kind)
        scales = {"key_scales": key_scales, "value_scales": value_scales}
    want = reference.attention_paged(
        *as_float64(query, key, value), table, PAGED_LENGTHS, return_lse=True, **scales, **LOWER, causal=True
    )
    got = regard.attention_paged(
        *map(cupy.asarray, (query, key, value)),
        table,
        PAGED_LENGTHS,
        return_lse=True,
        **on_device(cupy, scales),
        **LOWER,
        causal=True,
    )
    out, lse = (cupy.asnumpy(x) for x in got)
    assert_near(out, want[0], tolerance(dtype))
    # Tensor cores take 8-bit keys rounded to the query's type: scores up to 20 err by that.
    rounded = eight_bits and len_q > 8 and dtype in ("float16", "bfloat16")
    assert_near(lse, want[1], 20 * {"float16": 2.0**-11, "bfloat16": 2.0**-8}[dtype] if rounded else 1e-4)


def test_a_page_table_on_the_device_without_pages(cupy):
    """There is no page to hold its entries to: sequences with keys are refused, or, told on the device, see none."""
    query, pages = cupy.asarray(normal(0, 1, 2, 20, 16, dtype="float16")), cupy.zeros((0, 8, 1, 16), np.float16)
    table = cupy.asarray(np.zeros((1, 2), np.int64))
    with pytest.raises(ValueError, match=r"key_lengths: expected .*and 0 without pages, got 9 at index 0"):
        regard.attention_paged(query, pages, pages, table, np.array([9]))
    for lengths in (np.array([0]), cupy.asarray(np.array([9]))):
        assert not cupy.asnumpy(regard.attention_paged(query, pages, pages, table, lengths)).any()


def test_a_page_table_on_the_device_is_held_to_its_range(cupy):
    key, value, table = pages_of("float16", 16)
    for entry, n in ((-1, 40), (10**6, 40), (0, 10**6), (0, -3)):
        bad, lengths = np.full_like(table, entry), np.full(4, n)
        for len_q in (2, 20):
            query = cupy.asarray(normal(0, 4, 4, len_q, 64, dtype="float16"))
            out = regard.attention_paged(
                query, cupy.asarray(key), cupy.asarray(value), cupy.asarray(bad), cupy.asarray(lengths)
            )
            assert np.isfinite(cupy.asnumpy(out)).all()
    with pytest.raises(ValueError, match="page_table: expected entries"):
        regard.attention_paged(query, cupy.asarray(key), cupy.asarray(value), np.full_like(table, -1), PAGED_LENGTHS)
    with pytest.raises(ValueError, match="alignment: expected"):
        regard.attention_paged(
            query, cupy.asarray(key), cupy.asarray(value), cupy.asarray(table), cupy.asarray(PAGED_LENGTHS), causal=True
        )


@pytest.mark.parametrize("stored", ["float16", "int8"])
def test_the_order_of_lanes_does_not_matter(cupy, emulator, stored):
    key, value, table = pages_of("float16", 7)
    scales = {}
    if stored == "int8":
        (key, k), (value, v) = (quantise(x, np.int8) for x in (key, value))
        scales = on_device(cupy, {"key_scales": k, "value_scales": v})
    arrays = [cupy.asarray(x) for x in (key, value)]

    def run(len_q):
        query = cupy.asarray(normal(0, 4, 4, len_q, 64, dtype="float16"))
        return cupy.asnumpy(regard.attention_paged(query, *arrays, table, PAGED_LENGTHS, **scales))

    want = [run(2), run(40)]
    for seed in (1, 2):
        emulator.set_order(True, seed)
        for x, y in zip((run(2), run(40)), want, strict=True):
            assert_same_bits(x, y)


# ---- Shared memory -----------------------------------------------------------------------------------------

CARDS = {"sm_75": (75, 65536), "sm_86": (86, 101376), "sm_90": (90, 232448)}


@pytest.mark.parametrize("card", CARDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [128, 600, 1100])
def test_no_kernel_takes_more_shared_memory_than_the_card_has(cupy, emulator, dim, dtype, card):
    emulator.set_device(*CARDS[card])
    query, key, value = ((normal(i, 1, 1, n, dim) / 8).astype(DTYPES[dtype]) for i, n in enumerate((2, 30, 30)))
    out = regard.attention(*map(cupy.asarray, (query, key, value)))
    assert_near(cupy.asnumpy(out), reference.attention(*as_float64(query, key, value)), tolerance(dtype))


@pytest.mark.parametrize(("dtype", "keys"), [("float32", 64 * 1024), ("float64", 32 * 1024)])
def test_splits_as_long_as_any(cupy, emulator, dtype, keys):
    emulator.set_device(*CARDS["sm_75"])
    query, key, value = (normal(i, 1, 1, n, 16, dtype=dtype) for i, n in enumerate((1, keys, keys)))
    out = regard.attention(*map(cupy.asarray, (query, key, value)))
    assert_near(cupy.asnumpy(out), reference.attention(*as_float64(query, key, value)), tolerance(dtype))


def test_a_shorter_sequence_may_have_more_splits(cupy):
    """Up to 8255 keys go in splits of 128, up to 65 of them; 8300 keys are 52 splits of 160."""
    query, key, value = (normal(i, 2, 1, n, 8) for i, n in enumerate((1, 8300, 8300)))
    lengths = np.array([8255, 8300])
    want = reference.attention(*as_float64(query, key, value), key_lengths=lengths)
    got = regard.attention(*map(cupy.asarray, (query, key, value)), key_lengths=lengths)
    assert_near(cupy.asnumpy(got), want, tolerance("float32"))


# ---- Block masks and weights --------------------------------------------------------------------------------


@pytest.mark.parametrize("block_size", [(64, 64), (128, 96), (16, 5), (7, 200), (1, 1)], ids=str)
@pytest.mark.parametrize("len_q", [3, 150])
def test_block_masks(cupy, len_q, block_size, dtype):
    batch = 2 if len_q == 3 else 1  # emulated products take their time
    query = normal(0, batch, 2, len_q, 64, dtype=dtype)
    key, value = (normal(i, batch, 1, 170, 64, dtype=dtype) for i in (1, 2))
    grid = tuple(-(-n // s) for n, s in zip((len_q, 170), block_size, strict=True))
    for shape in ((1, 1), (batch, 2)):
        blocks = np.random.default_rng(3).random((*shape, *grid)) < 0.5
        blocks[..., 0, :] = False  # queries that see nothing
        mask = BlockMask.from_blocks(blocks, len_q=len_q, len_kv=170, block_size=block_size)
        for options in ({}, dict(causal=True, sinks=SLOPES[:2], **LOWER)):
            want = reference.attention(*as_float64(query, key, value), mask=mask.to_dense(), return_lse=True, **options)
            arrays = [cupy.asarray(x) for x in (query, key, value)]
            check(cupy, regard.attention(*arrays, mask=mask, return_lse=True, **on_device(cupy, options)), want, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim_v", [8, 200])
def test_weights(cupy, dim_v, dtype):
    query, key = normal(0, 2, 4, 70, 24, dtype=dtype), normal(1, 2, 2, 90, 24, dtype=dtype)
    value = normal(2, 2, 2, 90, dim_v, dtype=dtype)
    mask = np.random.default_rng(0).random((70, 90)) < 0.7
    mask[5] = False
    key[1, :, 60], mask[:, 60] = np.nan, False
    options = dict(mask=mask, causal=True, sinks=SLOPES, dropout_p=0.2, seed=5, **LOWER)
    out, weights = regard.attention(
        *map(cupy.asarray, (query, key, value)), return_weights=True, **on_device(cupy, options)
    )
    want, want_weights = reference.attention(*as_float64(query, key, value), return_weights=True, **options)
    assert_near(cupy.asnumpy(out), want, tolerance(dtype) / 0.8)
    assert_near(cupy.asnumpy(weights), want_weights, tolerance(dtype))


def test_weights_of_packed_and_paged_sequences(cupy):
    arrays = packed("float16")
    got = regard.attention_varlen(*map(cupy.asarray, arrays), Q, KV, return_weights=True)
    want = reference.attention_varlen(*as_float64(*arrays), Q, KV, return_weights=True)
    for x, y in zip(got, want, strict=True):
        assert_near(cupy.asnumpy(x), y, tolerance("float16"))
    with pytest.raises(NotImplementedError, match="return_weights with cu_seqlens on the device"):
        regard.attention_varlen(*map(cupy.asarray, arrays), *map(cupy.asarray, (Q, KV)), return_weights=True)
    key, value, table = pages_of("float16", 16)
    query = normal(0, 4, 4, 5, 64, dtype="float16")
    got = regard.attention_paged(*map(cupy.asarray, (query, key, value)), table, PAGED_LENGTHS, return_weights=True)
    want = reference.attention_paged(*as_float64(query, key, value), table, PAGED_LENGTHS, return_weights=True)
    for x, y in zip(got, want, strict=True):
        assert_near(cupy.asnumpy(x), y, tolerance("float16"))
