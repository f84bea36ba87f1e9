"""The kernel of whole warpgroups, emulated: sizes around its tiles' edges, and every option."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
import regard
from helpers import as_float64, assert_near, assert_same_bits, normal
from regard import BlockMask, reference
from regard.reference.cache import quantise

GROUP_PRODUCTS = 4  # of what `counters` counts

#: Keys of a tile by the dimensions of keys and values, and of one where scores are more than products; a tile of
#: queries has 128, half of which is a warpgroup's.
KEYS = {(64, 64): (128, 128), (128, 128): (128, 128), (192, 128): (128, 128), (256, 256): (80, 64)}

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
    "sinks, causal": dict(sinks=SLOPES, causal=True, **LOWER),
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
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize(("tiles", "more"), [(1, -1), (1, 0), (1, 1), (2, -1), (2, 0), (2, 1), (3, 1)])
def test_edges_of_tiles_of_keys(cupy, emulator, tiles, more, softcap, dtype):
    for (dim, dim_v), keys in KEYS.items():
        len_kv = tiles * keys[softcap is not None] + more
        query = normal(0, 1, 1, 66, dim - 8, dtype=dtype)
        key, value = normal(1, 1, 1, len_kv, dim - 8, dtype=dtype), normal(2, 1, 1, len_kv, dim_v, dtype=dtype)
        options: dict[str, Any] = dict(causal=dtype == "float16", softcap=softcap, return_lse=True, **LOWER)
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
@pytest.mark.parametrize("dims", [(128, 128), (184, 120), (200, 136)], ids=str)
def test_every_option(cupy, emulator, dims, options):
    query = normal(0, 2, 2, 70, dims[0], dtype="float16")
    key, value = (normal(i + 1, 2, 1, 170, d, dtype="float16") for i, d in enumerate(dims))
    want = reference.attention(*as_float64(query, key, value), return_lse=True, **for_reference(options))
    arrays = [cupy.asarray(x) for x in (query, key, value)]
    given = on_device(cupy, options)
    on_host = {k: x for k, x in options.items() if k.endswith("lengths")}
    found = regard.explain("attention", *arrays, **(given | on_host))
    more = bool(options.keys() & {"mask", "bias", "alibi_slopes", "softcap"})
    shape = min(x for x in KEYS if x[0] >= dims[0] and x[1] >= dims[1])
    assert found.kernel == "warpgroups" and found.tiles["keys"] == KEYS[shape][more]
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


# ---- Pages -----------------------------------------------------------------------------------------------

#: Sequences of no key, of whole pages and tiles of 80, and of parts of both.
PAGED_LENGTHS = np.array([0, 160, 201])


def in_pages(x: Any, lengths: Any, size: int) -> tuple[Any, Any]:
    """Keys or values (batch, len, heads_kv, dim) as pages in a scrambled order, and their table, with rubbish behind.

    Pages that are no sequence's hold NaN, which nobody may read.
    """
    needed = [-(-n // size) for n in lengths]
    order = np.random.default_rng(5).permutation(sum(needed) + 2)
    pages = np.full((len(order), size, *x.shape[2:]), np.nan, x.dtype)
    table = np.full((len(lengths), max(needed) + 1), np.iinfo(np.int32).min, np.int32)
    free = iter(order)
    for b, n in enumerate(lengths):
        for k in range(needed[b]):
            table[b, k] = next(free)
            piece = x[b, k * size : min((k + 1) * size, n)]
            pages[table[b, k]] = 0
            pages[table[b, k], : len(piece)] = piece
    return pages, table


def paged_problem(dtype: str, size: int, dim: int, dim_v: int, len_q: int = 40) -> tuple[list[Any], list[Any]]:
    """Query, pages and table; query, key and value without pages."""
    longest = int(PAGED_LENGTHS.max())
    query = normal(0, 3, 2, len_q, dim, dtype=dtype)
    key, value = (normal(i + 1, 3, longest, 1, d, dtype=dtype) for i, d in enumerate((dim, dim_v)))
    (keys, table), (values, _) = in_pages(key, PAGED_LENGTHS, size), in_pages(value, PAGED_LENGTHS, size)
    return [query, keys, values, table], [query, key.swapaxes(1, 2), value.swapaxes(1, 2)]


@pytest.mark.parametrize("dims", [(64, 64), (128, 72), (192, 128), (256, 136)], ids=str)
@pytest.mark.parametrize("size", [8, 16, 80, 120, 128, 512])
def test_pages_have_the_bits_of_the_same_keys_in_one_piece(cupy, emulator, size, dims):
    arrays, whole = paged_problem("bfloat16", size, *dims)
    options: dict[str, Any] = dict(causal=True, return_lse=True, **LOWER)
    want = reference.attention(*as_float64(*whole), key_lengths=PAGED_LENGTHS, **options)
    device = [cupy.asarray(x) for x in arrays]
    found = regard.explain("attention_paged", *device[:3], arrays[3], PAGED_LENGTHS, causal=True, **LOWER)
    assert found.kernel == "warpgroups" and len(found.stages) == 1  # nothing is gathered
    got = counted(emulator, regard.attention_paged, *device, cupy.asarray(PAGED_LENGTHS), **options)
    check(cupy, got, want, "bfloat16")
    alone = regard.attention(*map(cupy.asarray, whole), key_lengths=PAGED_LENGTHS, **options)
    for x, y in zip(alone, got, strict=True):
        assert_same_bits(cupy.asnumpy(x), cupy.asnumpy(y))


PAGED_OPTIONS: dict[str, dict[str, Any]] = {
    "window": dict(window=(100, 3), **LOWER),
    "mask, softcap": dict(mask=np.random.default_rng(1).random((3, 1, 40, 201)) < 0.6, softcap=5.0),
    "bias, alibi, sinks": dict(bias=normal(3, 2, 40, 201), alibi_slopes=SLOPES, sinks=SLOPES, **LOWER),
    "query lengths": dict(query_lengths=np.array([40, 0, 7])),
}


@pytest.mark.parametrize("options", PAGED_OPTIONS.values(), ids=PAGED_OPTIONS)
@pytest.mark.parametrize(("size", "dims"), [(16, (64, 64)), (48, (200, 136))], ids=str)
def test_every_option_of_pages(cupy, emulator, size, dims, options):
    arrays, whole = paged_problem("float16", size, *dims)
    want = reference.attention(*as_float64(*whole), key_lengths=PAGED_LENGTHS, return_lse=True, **options)
    device = [cupy.asarray(x) for x in arrays[:3]]
    given = on_device(cupy, options)
    got = counted(emulator, regard.attention_paged, *device, arrays[3], PAGED_LENGTHS, return_lse=True, **given)
    check(cupy, got, want, "float16")
    emulator.set_order(True, 1)
    again = regard.attention_paged(*device, arrays[3], PAGED_LENGTHS, return_lse=True, **given)
    for x, y in zip(again, got, strict=True):
        assert_same_bits(cupy.asnumpy(x), cupy.asnumpy(y))


def test_pages_that_no_box_fetches(cupy, emulator):
    # Of rows that start anywhere: gathered, and the same bits. Of twelve rows: the other kernel's.
    (query, key, value, table), _ = paged_problem("float16", 16, 64, 64)
    arrays = [cupy.asarray(x) for x in (query, key, value)]
    want = counted(emulator, regard.attention_paged, *arrays, table, PAGED_LENGTHS)
    wide = cupy.zeros((*key.shape[:3], 67), np.float16)
    odd = wide[..., :64]
    odd[...] = arrays[1]
    got = counted(emulator, regard.attention_paged, arrays[0], odd, arrays[2], table, PAGED_LENGTHS)
    assert_same_bits(cupy.asnumpy(got), cupy.asnumpy(want))
    (query, key, value, table), whole = paged_problem("float16", 12, 64, 64)
    arrays = [cupy.asarray(x) for x in (query, key, value)]
    assert regard.explain("attention_paged", *arrays, table, PAGED_LENGTHS).kernel == "tensor cores"
    before = emulator.counters()[GROUP_PRODUCTS]
    got = regard.attention_paged(*arrays, table, PAGED_LENGTHS, return_lse=True)
    assert emulator.counters()[GROUP_PRODUCTS] == before
    check(
        cupy,
        got,
        reference.attention(*as_float64(*whole), key_lengths=PAGED_LENGTHS, return_lse=True),
        "float16",
    )


@pytest.mark.parametrize("kind", ["int8", "float8_e4m3fn"])
@pytest.mark.parametrize("size", [7, 16])
def test_pages_of_eight_bits_are_gathered(cupy, emulator, size, kind):
    (query, key, value, table), _ = paged_problem("bfloat16", size, 160, 64)
    stored = np.dtype(kind) if kind == "int8" else np.dtype(ml_dtypes.float8_e4m3fn)
    (keys, k), (values, v) = (quantise(np.nan_to_num(x.astype(np.float32)), stored) for x in (key, value))
    scales = {"key_scales": k, "value_scales": v}
    want = reference.attention_paged(*as_float64(query, keys, values), table, PAGED_LENGTHS, return_lse=True, **scales)
    got = counted(
        emulator,
        regard.attention_paged,
        *map(cupy.asarray, (query, keys, values)),
        table,
        PAGED_LENGTHS,
        return_lse=True,
        **on_device(cupy, scales),
    )
    assert_near(cupy.asnumpy(got[0]), want[0], 5 * 2.0**-6)
    assert_near(cupy.asnumpy(got[1]), want[1], 20 * 2.0**-8)  # keys rounded to bfloat16: scores up to 20 err by that


@pytest.mark.parametrize("entry", [-1, 10**6])
def test_entries_of_a_device_s_page_table_are_held_to_their_range(cupy, emulator, entry):
    (query, key, value, table), _ = paged_problem("float16", 16, 64, 64)
    key, value = (cupy.asarray(np.nan_to_num(x)) for x in (key, value))
    bad = cupy.asarray(np.full_like(table, entry))
    for n in (201, 10**6, -3):
        lengths = cupy.asarray(np.full(3, n))
        before = emulator.counters()[GROUP_PRODUCTS]
        out = regard.attention_paged(cupy.asarray(query), key, value, bad, lengths)
        assert (emulator.counters()[GROUP_PRODUCTS] > before) == (n > 0)
        assert np.isfinite(cupy.asnumpy(out)).all()  # and AddressSanitizer saw no stray access
