"""Few queries over many keys: the path that reads K and V once for the heads that share them, and splits long ones."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import regard
from helpers import as_float64, assert_near, assert_same_bits, lse_tolerance, normal, output_tolerance
from regard import reference

LENGTHS = (1, 15, 16, 17, 63, 64, 65, 130, 2047, 2048, 2049, 4100)
LOWER: dict[str, Any] = {"alignment": "lower_right"}


def arrays(
    len_q: int, len_kv: int, heads: int = 4, heads_kv: int = 2, dim: int = 64, dim_v: int = 64, dtype: str = "float32"
) -> Any:
    return (
        normal(0, 2, heads, len_q, dim, dtype=dtype),
        normal(1, 2, heads_kv, len_kv, dim, dtype=dtype),
        normal(2, 2, heads_kv, len_kv, dim_v, dtype=dtype),
    )


def check(query: Any, key: Any, value: Any, dtype: str = "float32", **options: Any) -> None:
    out, lse = regard.attention(query, key, value, return_lse=True, **options)
    want, want_lse = reference.attention(*as_float64(query, key, value), return_lse=True, **options)
    assert_near(out, want, output_tolerance(query, key, value, options, dtype), "out")
    assert_near(lse, want_lse, lse_tolerance(query, key, want_lse, options, dtype), "lse")


@pytest.mark.parametrize("len_q", [1, 2, 4])
@pytest.mark.parametrize("len_kv", LENGTHS)
def test_lengths(backend: str, len_q: int, len_kv: int) -> None:
    check(*arrays(len_q, len_kv))


DIMENSIONS = [(1, 1), (7, 3), (8, 24), (16, 130), (24, 40), (48, 112), (65, 64), (96, 80), (576, 512), (192, 128)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("dims", DIMENSIONS)
def test_dimensions(backend: str, dims: tuple[int, int], dtype: str) -> None:
    for heads in (1, 2, 4):
        check(*arrays(1, 70, heads, 1, *dims, dtype), dtype)


@pytest.mark.parametrize("dtype", ["float64", "float16", "bfloat16"])
@pytest.mark.parametrize("len_kv", [33, 2100])
def test_dtypes(backend: str, dtype: str, len_kv: int) -> None:
    check(*arrays(1, len_kv, 8, 2, 128, 128, dtype), dtype=dtype)


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
@pytest.mark.parametrize("group", [1, 2, 3, 5, 6, 7, 9])
def test_heads_that_share_keys(backend: str, group: int, dtype: str) -> None:
    """Groups of every remainder are right, and a head has the bits that it has alone."""
    query, key, value = arrays(3, 81, group, 1, 40, 56, dtype)
    check(query, key, value, dtype, causal=True, **LOWER)
    together = regard.attention(query, key, value)
    for head in range(group):
        assert_same_bits(together[:, head : head + 1], regard.attention(query[:, head : head + 1], key, value))


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
@pytest.mark.parametrize("len_q", range(4, 11))
def test_several_queries(backend: str, len_q: int, dtype: str) -> None:
    """Around the number of queries from which blocks serve, over fewer and more keys than that number hangs on.

    Rows go in fours where they see the same keys, which on a diagonal they do not. Heads that share keys make items.
    """
    shapes = ((1, 1, 70), (3, 3, 1023), (12, 1, 81), (2, 1, 1024), (5, 1, 1100))
    for heads, heads_kv, len_kv in shapes:
        query, key, value = arrays(len_q, len_kv, heads, heads_kv, 24, 40, dtype)
        for options in ({}, dict(causal=True, **LOWER), dict(window=(3, 2), **LOWER)):
            check(query, key, value, dtype, **options)
            together = regard.attention(query, key, value, **options)
            alone = regard.attention(query[:, -1:], key[:, -1:], value[:, -1:], **options)
            assert_same_bits(together[:, -1:], alone, "one head alone")


SLOPES = np.array([0.5, 0.25, 0.125, 0.0625], np.float32)
RNG = np.random.default_rng(9)
OPTIONS: dict[str, dict[str, Any]] = {
    "causal": dict(causal=True, **LOWER),
    "causal upper left": dict(causal=True, alignment="upper_left"),
    "window": dict(window=(70, 0), **LOWER),
    "window across a split": dict(window=(100, 0), **LOWER, key_lengths=np.array([2100, 2050])),
    "lengths": dict(key_lengths=np.array([2060, 3]), query_lengths=np.array([1, 2]), causal=True, **LOWER),
    "no keys": dict(key_lengths=np.array([0, 2100]), sinks=SLOPES),
    "mask": dict(mask=RNG.random((2, 4, 3, 2100)) < 0.5),
    "mask that hides all": dict(mask=np.zeros((1, 1, 1, 2100), bool)),
    "mask of the last split": dict(mask=(np.arange(2100) >= 2048)[None, None, None]),
    "bias": dict(bias=normal(4, 4, 3, 2100)),
    "alibi": dict(alibi_slopes=SLOPES, **LOWER),
    "softcap": dict(softcap=3.0, bias=normal(4, 1, 3, 2100)),
    "sinks": dict(sinks=SLOPES),
    "scale": dict(scale=-0.7),
    "scale 0": dict(scale=0.0),
    "dropout": dict(dropout_p=0.4, seed=11),
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_options(backend: str, options: dict[str, Any]) -> None:
    check(*arrays(3, 2100), **options)


@pytest.mark.parametrize("len_q", [2, 9])
def test_a_sink_of_minus_infinity_is_none(backend: str, len_q: int) -> None:
    query, key, value = arrays(len_q, 33)
    sinks = np.full(4, -np.inf, np.float32)
    mask = np.ones((1, 1, len_q, 33), bool)
    mask[..., 0, :] = False
    out, lse = regard.attention(query, key, value, mask=mask, sinks=sinks, return_lse=True)
    assert (out[:, :, 0] == 0).all() and (lse[:, :, 0] == -np.inf).all()
    plain, plain_lse = regard.attention(query, key, value, mask=mask, return_lse=True)
    assert_near(out, plain, 1e-6)
    assert_near(lse[:, :, 1:], plain_lse[:, :, 1:], 1e-6)


@pytest.mark.parametrize("place", [0, 100, 2060])
@pytest.mark.parametrize("number", [np.nan, np.inf, 3e38])
def test_special_values_reach_only_their_rows(backend: str, place: int, number: float) -> None:
    query, key, value = arrays(2, 2100)
    value[0, 1, place, 5] = number
    key[1, 0, place] = number
    mask = np.ones((2, 1, 2, 2100), bool)
    mask[:, :, 1, place] = False
    out = regard.attention(query, key, value, mask=mask)
    with np.errstate(all="ignore"):
        want = reference.attention(*as_float64(query, key, value), mask=mask)
    assert np.isfinite(out[:, :, 1]).all()
    assert_near(out[:, :, 1], want[:, :, 1], 1e-5)
    assert (np.isnan(out) == np.isnan(want)).all()


def test_bits_depend_on_one_head_alone(backend: str) -> None:
    query, key, value = arrays(2, 2500, heads=8, heads_kv=2)
    out = regard.attention(query, key, value, causal=True, **LOWER)
    threads = regard.get_num_threads()
    try:
        for n in (1, 3):
            regard.set_num_threads(n)
            assert_same_bits(regard.attention(query, key, value, causal=True, **LOWER), out, f"{n} threads")
    finally:
        regard.set_num_threads(threads)
    for h in (0, 3, 7):
        one = query[1:, h : h + 1], key[1:, h // 4 : h // 4 + 1], value[1:, h // 4 : h // 4 + 1]
        assert_same_bits(regard.attention(*one, causal=True, **LOWER), out[1:, h : h + 1], f"head {h} alone")
    strided = [np.asfortranarray(x) for x in (query, key, value)]
    assert_same_bits(regard.attention(*strided, causal=True, **LOWER), out, "strides")
