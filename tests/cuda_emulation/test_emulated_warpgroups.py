"""The kernel of whole warpgroups, emulated: sizes around its tiles' edges, and every option."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import regard
from helpers import as_float64, assert_near, assert_same_bits, normal
from regard import BlockMask, reference

GROUP_PRODUCTS = 4  # of what `counters` counts

#: Keys of a tile by head dimension; a tile of queries has 128, half of which is a warpgroup's.
KEYS = {64: 128, 128: 128, 256: 80}

SLOPES = np.array([0.5, 0.25], np.float32)
LOWER: dict[str, Any] = {"alignment": "lower_right"}

#: For a batch of 2, 2 heads that share one of keys, 70 queries and 170 keys.
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": dict(causal=True, **LOWER),
    "causal from the first key": dict(causal=True, alignment="upper_left"),
    "window": dict(window=(90, 3), **LOWER),
    "lengths": dict(query_lengths=np.array([70, 40]), key_lengths=np.array([81, 0])),
    "mask": dict(mask=np.random.default_rng(1).random((2, 1, 70, 170)) < 0.6),
    "bias": dict(bias=normal(3, 2, 70, 170)),
    "alibi, sinks": dict(alibi_slopes=SLOPES, sinks=SLOPES, **LOWER),
    "softcap, causal": dict(softcap=5.0, causal=True, **LOWER),
    "blocks": dict(
        mask=BlockMask.from_blocks(
            np.random.default_rng(3).random((1, 2, 3, 6)) < 0.5, len_q=70, len_kv=170, block_size=(32, 30)
        )
    ),
}


def on_device(cupy: Any, options: dict[str, Any]) -> dict[str, Any]:
    return {k: cupy.asarray(x) if isinstance(x, np.ndarray) else x for k, x in options.items()}


def for_reference(options: dict[str, Any]) -> dict[str, Any]:
    return {k: x.to_dense() if isinstance(x, BlockMask) else x for k, x in options.items()}


def check(cupy: Any, got: Any, want: Any, dtype: str) -> None:
    """Outputs are averages of values below 5, weights and they are rounded; float32 scores stay below 60."""
    out, lse = (cupy.asnumpy(x) for x in got)
    assert_near(out, want[0], 5 * {"float16": 2.0**-9, "bfloat16": 2.0**-6}[dtype], "out")
    assert_near(lse, want[1], 1e-4, "lse")


def counted(emulator: Any, function: Any, *args: Any, **options: Any) -> Any:
    """The call's result, which whole warpgroups have computed."""
    before = emulator.counters()[GROUP_PRODUCTS]
    result = function(*args, **options)
    assert emulator.counters()[GROUP_PRODUCTS] > before
    return result


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("tiles", "more"), [(1, -1), (1, 0), (1, 1), (2, -1), (2, 0), (2, 1), (3, 1)])
def test_edges_of_tiles_of_keys(cupy, emulator, tiles, more, causal, dtype):
    for dim, keys in KEYS.items():
        len_kv = tiles * keys + more
        query = normal(0, 1, 1, 66, dim - 8, dtype=dtype)
        key, value = normal(1, 1, 1, len_kv, dim - 8, dtype=dtype), normal(2, 1, 1, len_kv, dim, dtype=dtype)
        options: dict[str, Any] = dict(causal=causal, return_lse=True, **LOWER)
        want = reference.attention(*as_float64(query, key, value), **options)
        got = counted(emulator, regard.attention, *map(cupy.asarray, (query, key, value)), **options)
        check(cupy, got, want, dtype)


@pytest.mark.parametrize("len_q", [9, 63, 64, 65, 127, 128, 129])
def test_edges_of_tiles_of_queries(cupy, emulator, len_q):
    for dim, dim_v in ((64, 64), (192, 128), (72, 200)):
        query, key = normal(0, 1, 2, len_q, dim, dtype="bfloat16"), normal(1, 1, 1, 85, dim, dtype="bfloat16")
        value = normal(2, 1, 1, 85, dim_v, dtype="bfloat16")
        want = reference.attention(*as_float64(query, key, value), causal=True, return_lse=True, **LOWER)
        arrays = map(cupy.asarray, (query, key, value))
        got = counted(emulator, regard.attention, *arrays, causal=True, return_lse=True, **LOWER)
        check(cupy, got, want, "bfloat16")


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("dims", [(128, 128), (200, 136)], ids=str)
def test_every_option(cupy, emulator, dims, options):
    query = normal(0, 2, 2, 70, dims[0], dtype="float16")
    key, value = (normal(i + 1, 2, 1, 170, d, dtype="float16") for i, d in enumerate(dims))
    want = reference.attention(*as_float64(query, key, value), return_lse=True, **for_reference(options))
    arrays = [cupy.asarray(x) for x in (query, key, value)]
    given = on_device(cupy, options)
    found = regard.explain("attention", *arrays, **given)
    assert found.kernel == "warpgroups" and found.tiles["keys"] == KEYS[128 if dims == (128, 128) else 256]
    got = counted(emulator, regard.attention, *arrays, return_lse=True, **given)
    check(cupy, got, want, "float16")
    emulator.set_order(True, 1)
    for x, y in zip(regard.attention(*arrays, return_lse=True, **given), got, strict=True):
        assert_same_bits(cupy.asnumpy(x), cupy.asnumpy(y))


@pytest.mark.parametrize("dim", [64, 160])
def test_packed_sequences_have_the_bits_that_they_have_alone(cupy, emulator, dim):
    lengths_q, lengths_kv = (70, 9, 0, 129), (90, 170, 20, 0)
    q, kv = (np.concatenate([[0], np.cumsum(x)]).astype(np.int32) for x in (lengths_q, lengths_kv))
    rows = [normal(i, n, h, dim, dtype="bfloat16") for i, (n, h) in enumerate(((q[-1], 2), (kv[-1], 1), (kv[-1], 1)))]
    options: dict[str, Any] = dict(causal=True, return_lse=True, **LOWER)
    want = reference.attention_varlen(*as_float64(*rows), q, kv, **options)
    got = counted(emulator, regard.attention_varlen, *map(cupy.asarray, rows), q, kv, **options)
    check(cupy, got, want, "bfloat16")
    for b in (0, 1):
        one = [x[s[b] : s[b + 1]].swapaxes(0, 1)[None] for x, s in zip(rows, (q, kv, kv), strict=True)]
        alone = regard.attention(*map(cupy.asarray, one), causal=True, **LOWER)
        mine = cupy.asnumpy(got[0])[q[b] : q[b + 1]]
        assert_same_bits(mine, np.ascontiguousarray(cupy.asnumpy(alone)[0].swapaxes(0, 1)))


def test_nothing_leaks_from_behind_a_mask(cupy, emulator):
    query, key, value = (normal(i, 1, 1, 100, 256, dtype="bfloat16") for i in range(3))
    mask = np.ones((100, 100), bool)
    key[0, 0, 90], value[0, 0, 95], mask[:, [90, 95]] = np.nan, np.inf, False
    got = counted(
        emulator, regard.attention, *map(cupy.asarray, (query, key, value)), mask=cupy.asarray(mask), return_lse=True
    )
    check(cupy, got, reference.attention(*as_float64(query, key, value), mask=mask, return_lse=True), "bfloat16")
