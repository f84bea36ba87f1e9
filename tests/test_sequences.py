"""attention_varlen and attention_paged: each sequence as if it were alone, and nothing read through a bad index."""

from __future__ import annotations

import re
import threading
from typing import Any

import numpy as np
import pytest
import regard
from cases import DTYPES
from helpers import as_float64, assert_near, assert_same_bits, compute_epsilon, normal
from regard import reference

LENGTHS_Q = (5, 1, 0, 49, 200, 3)
LENGTHS_KV = (5, 130, 7, 97, 200, 0)
SLOPES = np.array([0.5, 0.25, 0.125, 0.0625], np.float32)
LOWER: dict[str, Any] = {"alignment": "lower_right"}

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": dict(causal=True, **LOWER),
    "causal upper left": dict(causal=True, alignment="upper_left"),
    "window": dict(window=(20, 3), **LOWER),
    "alibi, sinks": dict(alibi_slopes=SLOPES, sinks=SLOPES, **LOWER),
    "softcap, scale": dict(softcap=5.0, scale=0.3),
    "mask": dict(mask=np.random.default_rng(1).random((6, 1, 200, 200)) < 0.6),
    "bias": dict(bias=normal(2, 4, 200, 200)),
    "dropout": dict(dropout_p=0.3, seed=7),
}


def starts(lengths: Any, dtype: Any = np.int32) -> Any:
    return np.concatenate([[0], np.cumsum(lengths)]).astype(dtype)


def packed(dtype: str = "float32", dim_qk: int = 64, dim_v: int = 64, heads_kv: int = 2) -> tuple[Any, Any, Any]:
    return (
        normal(0, sum(LENGTHS_Q), 4, dim_qk, dtype=dtype),
        normal(1, sum(LENGTHS_KV), heads_kv, dim_qk, dtype=dtype),
        normal(2, sum(LENGTHS_KV), heads_kv, dim_v, dtype=dtype),
    )


def tolerance(dtype: str) -> float:
    """Outputs are averages of values below 5; scores stay below 40: some 30 epsilon of that, and two roundings."""
    rounding = {"float16": 2.0**-9, "bfloat16": 2.0**-6}.get(dtype, 0.0)
    return 5 * (30 * compute_epsilon(dtype) + rounding)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_varlen_is_the_reference(backend: str, options: dict[str, Any]) -> None:
    query, key, value = packed()
    args = (starts(LENGTHS_Q), starts(LENGTHS_KV, np.int64))
    out, lse = regard.attention_varlen(query, key, value, *args, return_lse=True, **options)
    want, want_lse = reference.attention_varlen(*as_float64(query, key, value), *args, return_lse=True, **options)
    assert_near(out, want, tolerance("float32"), "out")
    assert_near(lse, want_lse, 4e-5, "lse")


@pytest.mark.parametrize("dtype", ["float64", "float16", "bfloat16"])
def test_varlen_dtypes(backend: str, dtype: str) -> None:
    query, key, value = packed(dtype, 48, 17, 4)
    args = (starts(LENGTHS_Q), starts(LENGTHS_KV))
    out = regard.attention_varlen(query, key, value, *args, causal=True, **LOWER)
    assert out.dtype == DTYPES[dtype]
    want = reference.attention_varlen(*as_float64(query, key, value), *args, causal=True, **LOWER)
    assert_near(out, want, tolerance(dtype))


def test_varlen_has_each_sequence_s_own_bits(backend: str) -> None:
    query, key, value = packed()
    q, k = starts(LENGTHS_Q), starts(LENGTHS_KV)
    out = regard.attention_varlen(query, key, value, q, k, causal=True, **LOWER)
    for b in range(len(LENGTHS_Q)):
        one = [x[s[b] : s[b + 1]].swapaxes(0, 1)[None] for x, s in ((query, q), (key, k), (value, k))]
        alone = regard.attention(*one, causal=True, **LOWER)
        assert_same_bits(out[q[b] : q[b + 1]], np.ascontiguousarray(alone[0].swapaxes(0, 1)), f"sequence {b}")


def test_varlen_rows_of_no_sequence_are_zero(backend: str) -> None:
    query, key, value = packed()
    out = np.full_like(query, np.nan)
    cut = np.array([0, 4, 10], np.int32)
    result, lse = regard.attention_varlen(query, key, value, cut, cut, out=out, return_lse=True)
    assert result is out
    assert (out[10:] == 0).all() and (lse[:, 10:] == -np.inf).all() and np.isfinite(out[:10]).all()


def test_varlen_weights_sum_to_out(backend: str) -> None:
    query, key, value = packed(heads_kv=4)
    q, k = starts(LENGTHS_Q), starts(LENGTHS_KV)
    out, weights = regard.attention_varlen(query, key, value, q, k, return_weights=True, dropout_p=0.2, seed=3)
    assert weights.shape == (6, 4, 200, 200)
    for b, (n, m) in enumerate(zip(LENGTHS_Q, LENGTHS_KV, strict=True)):
        assert not weights[b, :, n:].any() and not weights[b, :, :, m:].any()
        want = np.einsum("hij,jhd->ihd", *as_float64(weights[b, :, :n, :m], value[k[b] : k[b + 1]]))
        assert_near(out[q[b] : q[b + 1]], want, tolerance("float32"))


BAD_STARTS = {
    "falls": ([0, 5, 4], r"index 2"),
    "starts above 0": ([1, 5, 9], r"index 0"),
    "ends beyond": ([0, 5, 13], r"index 2.*|13"),
    "negative": ([0, -1, 9], r"-1 at index 1"),
    "least": ([0, np.iinfo(np.int64).min, 9], r"index 1"),
    "empty": ([], r"batch\+1"),
    "rank": ([[0, 5, 9]], r"batch\+1"),
    "too many": ([0, 1, 2, 3], r"one sequence of keys for each"),
}


@pytest.mark.parametrize("name", ["cu_seqlens_q", "cu_seqlens_kv"])
@pytest.mark.parametrize("bad", BAD_STARTS)
def test_bad_starts_are_refused(backend: str, name: str, bad: str) -> None:
    entries, pattern = BAD_STARTS[bad]
    x = normal(0, 12, 2, 8)
    args = {"cu_seqlens_q": np.array([0, 5, 9]), "cu_seqlens_kv": np.array([0, 5, 9])} | {
        name: np.array(entries, np.int64)
    }
    with pytest.raises(ValueError, match=f"cu_seqlens_.*{pattern}" if bad != "too many" else pattern):
        regard.attention_varlen(x, x, x, **args)


# ---- Pages -------------------------------------------------------------------------------------


def pages_of(dtype: str, size: int = 16, pages: int = 40, heads_kv: int = 2, dim_qk: int = 64, dim_v: int = 64) -> Any:
    return (
        normal(1, pages, size, heads_kv, dim_qk, dtype=dtype),
        normal(2, pages, size, heads_kv, dim_v, dtype=dtype),
    )


def table_of(lengths: Any, size: int, pages: int, dtype: Any = np.int32) -> Any:
    """Every sequence's pages in a scrambled order; what is not needed holds rubbish."""
    free = iter(np.random.default_rng(5).permutation(pages))
    width = max(-(-n // size) for n in lengths) + 1
    table = np.full((len(lengths), width), np.iinfo(dtype).min, dtype)
    for b, n in enumerate(lengths):
        table[b, : -(-n // size)] = [next(free) for _ in range(-(-n // size))]
    return table


PAGED_LENGTHS = (33, 0, 160, 1)


@pytest.mark.parametrize("len_q", [1, 3, 5, 40])
@pytest.mark.parametrize("size", [1, 7, 16, 64])
def test_paged_is_the_reference(backend: str, len_q: int, size: int) -> None:
    pages = 4 + sum(PAGED_LENGTHS) // size
    key, value = pages_of("float32", size, pages)
    table = table_of(PAGED_LENGTHS, size, pages)
    lengths = np.array(PAGED_LENGTHS)
    query = normal(0, 4, 4, len_q, 64)
    options: dict[str, Any] = dict(causal=True, alignment="lower_right", sinks=SLOPES)
    out, lse = regard.attention_paged(query, key, value, table, lengths, return_lse=True, **options)
    want, want_lse = reference.attention_paged(
        *as_float64(query, key, value), table, lengths, return_lse=True, **options
    )
    assert_near(out, want, tolerance("float32"))
    assert_near(lse, want_lse, 4e-5)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_paged_options(backend: str, options: dict[str, Any]) -> None:
    key, value = pages_of("float32")
    table = table_of((33, 160), 16, 40)
    lengths = np.array([33, 160], np.int32)
    for len_q in (2, 30):
        query = normal(0, 2, 4, len_q, 64)
        given = dict(options)
        for name in ("mask", "bias"):
            if name in given:
                given[name] = given[name][..., :len_q, :160]
        if "mask" in given:
            given["mask"] = given["mask"][:2]
        out = regard.attention_paged(query, key, value, table, lengths, **given)
        want = reference.attention_paged(*as_float64(query, key, value), table, lengths, **given)
        assert_near(out, want, tolerance("float32"), str(len_q))


@pytest.mark.parametrize("dtype", ["float64", "float16", "bfloat16"])
@pytest.mark.parametrize("stored", ["float32", "float16", "bfloat16", "float64"])
def test_paged_stores_any_float(backend: str, dtype: str, stored: str) -> None:
    key, value = pages_of(stored)
    table, lengths = table_of((33, 160), 16, 40), np.array([33, 160])
    for layout in ("bhsd", "bshd"):
        query = normal(0, 2, 2, 2, 64, dtype=dtype)
        out = regard.attention_paged(query, key, value, table, lengths, layout=layout)
        want = reference.attention_paged(*as_float64(query, key, value), table, lengths, layout=layout)
        assert out.dtype == DTYPES[dtype]
        narrow = "float32" if dtype == "float64" and stored != "float64" else dtype
        assert_near(out, want, tolerance(narrow))


@pytest.mark.parametrize("len_q", [1, 6])
@pytest.mark.parametrize("stored", ["int8", "float8_e4m3fn"])
def test_paged_stores_eight_bits_with_scales(backend: str, stored: str, len_q: int) -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes", reason="float8 arrays are ml_dtypes'")
    rng = np.random.default_rng(3)
    dtype = np.dtype(np.int8) if stored == "int8" else np.dtype(ml_dtypes.float8_e4m3fn)
    every = np.arange(256, dtype=np.uint8).view(dtype)
    every = every[np.isfinite(every.astype(np.float32))]
    key, value = (rng.choice(every, (40, 16, 2, dim)) for dim in (64, 33))
    unit = 1 / 127 if stored == "int8" else 1 / 448
    scales = [(rng.random((40, 16, 2)) * 2 * unit).astype(np.float32) for _ in range(2)]
    table, lengths = table_of((33, 160), 16, 40), np.array([33, 160])
    query = normal(0, 2, 4, len_q, 64)
    given = dict(key_scales=scales[0], value_scales=scales[1], causal=True, alignment="lower_right")
    out = regard.attention_paged(query, key, value, table, lengths, **given)
    want = reference.attention_paged(query.astype(np.float64), key, value, table, lengths, **given)
    assert_near(out, want, tolerance("float32"))


def paged_arguments() -> dict[str, Any]:
    key, value = pages_of("float32", 16, 6)
    return {
        "query": normal(0, 2, 4, 1, 64),
        "key_pages": key,
        "value_pages": value,
        "page_table": np.array([[0, 1, 2], [3, 4, 5]]),
        "key_lengths": np.array([48, 20]),
    }


BAD_PAGES: dict[str, tuple[dict[str, Any], type, str]] = {
    "negative": (dict(page_table=np.array([[0, -1, 2], [3, 4, 5]])), ValueError, r"page_table.*-1 at index \(0, 1\)"),
    "least": (
        dict(page_table=np.array([[0, 1, 2], [3, np.iinfo(np.int32).min, 5]], np.int32)),
        ValueError,
        r"page_table.*-2147483648 at index \(1, 1\)",
    ),
    "page count": (dict(page_table=np.array([[6, 1, 2], [3, 4, 5]])), ValueError, r"page_table.*6 at index \(0, 0\)"),
    "table dtype": (dict(page_table=np.zeros((2, 3))), TypeError, "page_table.*int32 or int64"),
    "table batch": (dict(page_table=np.zeros((3, 3), np.int32)), ValueError, "page_table.*batch = 2"),
    "length below 0": (dict(key_lengths=np.array([48, -1])), ValueError, "key_lengths.*-1 at index 1"),
    "length above": (dict(key_lengths=np.array([49, 0])), ValueError, r"key_lengths.*3 \* 16.*49 at index 0"),
    "no lengths": (dict(key_lengths=None), TypeError, "key_lengths.*None"),
    "scales of floats": (dict(key_scales=np.ones((6, 16, 2), np.float32)), ValueError, "key_scales.*None.*int8"),
    "no scales": (
        dict(key_pages=np.zeros((6, 16, 2, 64), np.int8), value_pages=np.zeros((6, 16, 2, 64), np.int8)),
        TypeError,
        "key_scales",
    ),
    "heads": (dict(query=normal(0, 2, 3, 1, 64)), ValueError, "key_pages.*multiple of heads_kv"),
    "page size": (dict(value_pages=normal(0, 6, 8, 2, 64)), ValueError, "value_pages.*page_size = 16"),
    "alignment": (dict(causal=True), ValueError, "alignment.*lower_right"),
}


@pytest.mark.parametrize("name", BAD_PAGES)
def test_bad_pages_are_refused(backend: str, name: str) -> None:
    changed, kind, pattern = BAD_PAGES[name]
    arguments = paged_arguments() | changed
    with pytest.raises(kind, match=re.compile(pattern, re.S)):
        regard.attention_paged(**arguments)


def test_tables_changed_by_another_thread_are_never_read_unchecked(backend: str) -> None:
    arguments = paged_arguments()
    table, lengths = arguments["page_table"], arguments["key_lengths"]
    stop = threading.Event()

    def scramble() -> None:
        while not stop.is_set():
            table[0, 1] = 2**40
            lengths[0] = 2**50
            table[0, 1] = 1
            lengths[0] = 48

    thread = threading.Thread(target=scramble)
    thread.start()
    try:
        refusals = []
        for _ in range(300):
            try:
                assert np.isfinite(regard.attention_paged(*arguments.values())).all()
            except ValueError as error:
                refusals.append(str(error))
    finally:
        stop.set()
        thread.join()
    assert all(re.match("page_table|key_lengths", message) for message in refusals)


def test_pages_may_lie_anywhere(backend: str) -> None:
    """The contract's pages as a view of a cache in layout bhsd: (batch, heads_kv, capacity, dim)."""
    cache = normal(1, 3, 2, 50, 64), normal(2, 3, 2, 50, 64)
    query = normal(0, 3, 4, 1, 64)
    lengths = np.array([50, 1, 17])
    table = np.arange(3, dtype=np.int64)[:, None]
    out = regard.attention_paged(query, *(x.swapaxes(1, 2) for x in cache), table, lengths)
    assert_same_bits(out, regard.attention(query, *cache, key_lengths=lengths))


@pytest.mark.parametrize("len_q", [1, 9])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_float64_pages_of_short_numbers(backend: str, dtype: str, len_q: int) -> None:
    """Their low halves are zero: read as float32, they would be other finite numbers."""
    key, value = (x.astype(np.float64) for x in pages_of("float32"))
    table, lengths = table_of((33, 160), 16, 40), np.array([33, 160])
    query = normal(0, 2, 2, len_q, 64, dtype=dtype)
    out = regard.attention_paged(query, key, value, table, lengths)
    want = reference.attention_paged(*as_float64(query, key, value), table, lengths)
    assert_near(out, want, tolerance(dtype))


@pytest.mark.parametrize("len_q", [1, 9])
def test_no_heads(backend: str, len_q: int) -> None:
    query = np.zeros((1, 0, len_q, 4), np.float32)
    key = normal(1, 1, 2, 3, 4)
    assert regard.attention(query, key, key).shape == query.shape
    packed_q, starts_q, starts_k = np.zeros((len_q, 0, 4), np.float32), np.array([0, len_q]), np.array([0, 3])
    out = regard.attention_varlen(packed_q, key[0].swapaxes(0, 1), key[0].swapaxes(0, 1), starts_q, starts_k)
    assert out.shape == packed_q.shape
