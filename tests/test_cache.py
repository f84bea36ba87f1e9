"""KVCache: what append stores, what attend sees, and that an error changes nothing."""

from __future__ import annotations

import copy
import threading
import tracemalloc

import ml_dtypes
import numpy as np
import pytest
import regard
from cases import DTYPES, STRIDES
from helpers import as_float64, assert_near, assert_same_bits, normal, output_tolerance
from regard import reference
from regard.reference.cache import dequantise, quantise

STORAGE = {**DTYPES, "int8": np.dtype(np.int8), "float8_e4m3fn": np.dtype(ml_dtypes.float8_e4m3fn)}
QUANTISED = ("int8", "float8_e4m3fn")


def tokens(seed, batch, heads, length, dim_qk, dim_v, dtype="float32"):
    return normal(seed, batch, heads, length, dim_qk, dtype=dtype), normal(
        seed + 1, batch, heads, length, dim_v, dtype=dtype
    )


def tables(dim, length):
    return dict(zip(("cos", "sin"), regard.rotary_tables(dim, length), strict=True))


def state(cache):
    arrays = (cache.key, cache.value, cache.key_scales, cache.value_scales, cache.lengths)
    return [None if x is None else x.tobytes() for x in arrays]


def stored(x, dtype):
    """(numbers, scales) that a cache of `dtype` holds for x: NumPy's own conversion rounds to nearest even too."""
    if dtype in QUANTISED:
        return quantise(x, STORAGE[dtype])
    with np.errstate(over="ignore"):
        wide = x if x.dtype == np.float64 and dtype == "float64" else x.astype(np.float32)
        return wide.astype(STORAGE[dtype]), None


@pytest.mark.parametrize("given", DTYPES)
@pytest.mark.parametrize("dtype", STORAGE)
def test_append_converts_bit_for_bit(backend, dtype, given):
    cache = regard.KVCache(2, 3, 40, 33, 20, dtype)
    for start, length in ((0, 1), (1, 17), (18, 22)):
        key, value = tokens(start, 2, 3, length, 33, 20, given)
        key *= np.array(10.0, key.dtype) ** (np.arange(length) % 5 - 2)[:, None].astype(key.dtype)
        value[..., length // 2, :] = 0
        cache.append(key, value)
        place = (slice(None), slice(None), slice(start, start + length))
        for x, numbers, scales in ((key, cache.key, cache.key_scales), (value, cache.value, cache.value_scales)):
            want, want_scales = stored(x, dtype)
            assert numbers.dtype == STORAGE[dtype]
            assert_same_bits(numbers[place].copy(), want, f"{dtype} from {given}")
            if want_scales is not None:
                assert_same_bits(scales[place].copy(), want_scales)
    assert cache.lengths.tolist() == [40, 40]


@pytest.mark.parametrize("dtype", QUANTISED)
def test_quantisation(backend, dtype):
    x = np.concatenate([normal(0, 1, 1, 200, 64) * 10.0 ** normal(1, 1, 1, 200, 1), np.zeros((1, 1, 2, 64))], 2)
    x = x.astype(np.float32)
    x[0, 0, 0, :5] = [np.nan, 1, 2, 3, 4]
    x[0, 0, 1, 7] = -np.inf
    x[0, 0, 2] = 1e-44  # subnormal, and so is the scale
    x[0, 0, 3] = 3e38
    x[0, 0, 4] = np.arange(64) - 31.5  # ties
    x[0, 0, 4, 0] = 127
    x[0, 0, 5] = np.arange(64) * 7.0
    x[0, 0, 5, 63] = 448
    cache = regard.KVCache(1, 1, 202, 64, dtype=dtype)
    cache.append(x, x[:, :, ::-1])
    numbers, scales = quantise(x, STORAGE[dtype])
    assert_same_bits(cache.key[:, :, :202].copy(), numbers)
    assert_same_bits(cache.key_scales[:, :, :202].copy(), scales)
    assert_same_bits(cache.value[:, :, 201::-1].copy(), numbers)
    back = dequantise(cache.key, cache.key_scales)[0, 0]
    assert np.isnan(back[:2]).all() and (back[200:] == 0).all()
    # Half a step of int8; of float8 half a unit in the last of 4 bits, or of the least number.
    error = np.abs(back[3:200].astype(np.float64) - x[0, 0, 3:200])
    top = np.abs(x[0, 0, 3:200].astype(np.float64)).max(axis=-1, keepdims=True)
    half = (
        top / 254 if dtype == "int8" else np.maximum(np.abs(x[0, 0, 3:200].astype(np.float64)) / 16, top / 448 / 1024)
    )
    assert (error <= half * (1 + 1e-5)).all()


def test_every_float8_and_int8_number_is_itself(backend):
    every = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn)
    every = every[np.isfinite(every.astype(np.float32))]
    cache = regard.KVCache(1, 1, 1, every.size, dtype="float8_e4m3fn")
    cache.append(*[every.astype(np.float32).reshape(1, 1, 1, -1)] * 2)
    assert cache.key_scales.item() == 1
    assert_same_bits(cache.key.ravel(), every)
    whole = np.arange(-127, 128)
    cache = regard.KVCache(1, 1, 1, whole.size, dtype="int8")
    cache.append(*[whole.astype(np.float32).reshape(1, 1, 1, -1)] * 2)
    assert_same_bits(cache.key.ravel(), whole.astype(np.int8))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_strides_and_layouts_of_what_is_appended(backend, dtype):
    key, value = tokens(0, 2, 3, 9, 24, 40)
    want = regard.KVCache(2, 3, 12, 24, 40, dtype)
    want.append(key, value)
    for name in ("reversed", "every_other", "last_axis_slow", "padded_rows", "misaligned"):
        cache = regard.KVCache(2, 3, 12, 24, 40, dtype)
        cache.append(STRIDES[name](key), STRIDES[name](value))
        assert state(cache) == state(want), name
    cache = regard.KVCache(2, 3, 12, 24, 40, dtype)
    cache.append(*(np.ascontiguousarray(x.swapaxes(1, 2)) for x in (key, value)), layout="bshd")
    assert state(cache) == state(want)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("interleaved", [False, True])
def test_rotary_inside_append(backend, dtype, interleaved):
    cos, sin = regard.rotary_tables(20, 50)
    made = regard.KVCache(2, 3, 50, 24, dtype=dtype, cos=cos, sin=sin, interleaved=interleaved)
    given = regard.KVCache(2, 3, 50, 24, dtype=dtype, interleaved=interleaved)
    own = np.random.default_rng(0).integers(0, 50, (2, 50))
    places = regard.KVCache(2, 3, 50, 24, dtype=dtype, cos=cos, sin=sin, interleaved=interleaved)
    for start, length in ((0, 9), (9, 1), (10, 31)):
        key, value = tokens(start, 2, 3, length, 24, 24, dtype)
        made.append(key, value)
        given.append(key, value, cos=cos[start:][None, :length], sin=sin[start:][None, :length])
        assert_same_bits(given.key, made.key)
        places.append(key, value, positions=own[:, start : start + length])
        now = (slice(None), slice(None), slice(start, start + length))
        want = regard.rotary_embedding(key, cos, sin, np.arange(start, start + length), interleaved)
        assert_same_bits(made.key[now].copy(), want)
        assert_same_bits(made.value[now].copy(), value)
        want = regard.rotary_embedding(key, cos, sin, own[:, start : start + length], interleaved)
        assert_same_bits(places.key[now].copy(), want)


def test_rotary_then_int8(backend):
    cos, sin = regard.rotary_tables(16, 50)
    cache = regard.KVCache(1, 2, 50, 16, dtype="int8", cos=cos, sin=sin)
    key, value = tokens(0, 1, 2, 50, 16, 16)
    cache.append(key, value)
    numbers, scales = quantise(regard.rotary_embedding(key, cos, sin), np.int8)
    assert_same_bits(cache.key, numbers)
    assert_same_bits(cache.key_scales, scales)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
def test_generation_equals_attention_over_everything(backend, dtype, layout):
    """A prompt of unequal lengths, then steps: each row as one call of the reference gives it."""
    rng = np.random.default_rng(3)
    batch, heads, heads_kv, total = 3, 4, 2, 40
    key, value = tokens(0, batch, heads_kv, total, 32, 16, dtype)
    query = normal(5, batch, heads, total, 32, dtype=dtype)
    cache = regard.KVCache(batch, heads_kv, total, 32, 16, dtype)
    lengths = np.zeros(batch, np.int64)

    def arranged(x):
        return np.ascontiguousarray(x.swapaxes(1, 2)) if layout == "bshd" else x

    for step in (np.array([7, 1, 0]), np.array([1, 1, 1]), np.array([3, 0, 5]), np.array([1, 1, 1])):
        longest = int(step.max())
        new = [np.zeros((batch, x.shape[1], longest, x.shape[3]), x.dtype) for x in (query, key, value)]
        for b in range(batch):
            now = slice(lengths[b], lengths[b] + step[b])
            for to, x in zip(new, (query, key, value), strict=True):
                to[b, :, : step[b]] = x[b, :, now]
        lengths += step
        cache.append(arranged(new[1]), arranged(new[2]), step.astype(rng.choice([np.int32, np.int64])), layout=layout)
        assert cache.lengths.tolist() == lengths.tolist()
        out = cache.attend(arranged(new[0]), causal=True, query_lengths=step, layout=layout)
        for b in range(batch):
            rows = (slice(b, b + 1), slice(None), slice(0, lengths[b]))
            want = reference.attention(*as_float64(query[rows], key[rows], value[rows]), causal=True)
            want = want[0, :, lengths[b] - step[b] :]
            got = arranged(out)[b, :, : step[b]]
            near = output_tolerance(query, key, value, {}, dtype)
            assert_near(got, want, near, f"sequence {b}")


def test_attend_takes_the_options_of_attention(backend):
    cache = regard.KVCache(2, 2, 64, 16)
    key, value = tokens(0, 2, 2, 50, 16, 16)
    cache.append(key, value, np.array([50, 31]))
    query = normal(7, 2, 4, 3, 16)
    mask = np.random.default_rng(0).random((3, 50)) > 0.3
    options = dict(mask=mask, softcap=3.0, window=(20, 0), alibi_slopes=np.full(4, 0.1, np.float32), scale=0.4)
    want = regard.attention(query, key, value, key_lengths=np.array([50, 31]), alignment="lower_right", **options)
    assert_same_bits(cache.attend(query, **options), want)
    out, lse = cache.attend(query, return_lse=True, alignment="lower_right")
    assert out.shape == query.shape and lse.shape == (2, 4, 3)
    empty = regard.KVCache(2, 2, 64, 16)
    assert (empty.attend(query) == 0).all()
    for options, kind, message in (
        (dict(alignment="upper_left"), ValueError, "alignment: expected None or 'lower_right'"),
        (dict(key_lengths=np.array([1, 1])), TypeError, "key_lengths: expected None, because the cache has it"),
        (dict(layout="sbhd"), ValueError, "layout: expected one of"),
        (dict(mask=np.ones((3, 64), bool)), ValueError, "mask: expected a shape that broadcasts"),
    ):
        with pytest.raises(kind, match=message):
            cache.attend(query, **options)


@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
@pytest.mark.parametrize("given", DTYPES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", *QUANTISED])
def test_a_query_of_any_dtype_over_a_cache_of_any(backend, dtype, given, layout):
    cache = regard.KVCache(3, 2, 64, 24, 40, dtype)
    key, value = tokens(0, 3, 2, 50, 24, 40)
    lengths = np.array([50, 7, 31])
    cache.append(key, value, lengths)
    query = normal(7, 3, 4, 2, 24, dtype=given)
    arranged = np.ascontiguousarray(query.swapaxes(1, 2)) if layout == "bshd" else query
    options = dict(causal=True, return_lse=True)
    out, lse = cache.attend(arranged, layout=layout, **options)
    held = [
        x.astype(np.float64) if scales is None else dequantise(x, scales).astype(np.float64)
        for x, scales in ((cache.key, cache.key_scales), (cache.value, cache.value_scales))
    ]
    want, want_lse = reference.attention(
        query.astype(np.float64), *(x[:, :, :50] for x in held), key_lengths=lengths, alignment="lower_right", **options
    )
    assert out.dtype == DTYPES[given]
    # Over another dtype the arithmetic may be that of float32, whatever the query is.
    computed = "float32" if given == "float64" else given
    near = output_tolerance(query, held[0], held[1], {}, computed)
    assert_near(np.ascontiguousarray(out.swapaxes(1, 2)) if layout == "bshd" else out, want, near)
    assert_near(lse, want_lse, 1e-4)


@pytest.mark.parametrize("dtype", QUANTISED)
def test_values_that_are_not_finite_show_through_quantisation(backend, dtype):
    cache = regard.KVCache(2, 1, 9, 8, dtype=dtype)
    key, value = tokens(0, 2, 1, 9, 8, 8)
    value[0, 0, 4, 3] = np.nan
    key[0, 0, 8, 1] = np.inf
    cache.append(key, value)
    query = normal(3, 2, 1, 9, 8)
    out = cache.attend(query, causal=True)
    assert np.isfinite(out[0, :, :4]).all() and np.isnan(out[0, :, 4:]).all() and np.isfinite(out[1]).all()


@pytest.mark.parametrize("dtype", STORAGE)
@pytest.mark.parametrize("capacity", [0, 5])
def test_an_empty_cache(backend, dtype, capacity):
    cache = regard.KVCache(2, 2, capacity, 8, dtype=dtype)
    for given in ("float32", "bfloat16"):
        out, lse = cache.attend(normal(0, 2, 4, 3, 8, dtype=given), return_lse=True)
        assert (as_float64(out)[0] == 0).all() and (lse == -np.inf).all()


def test_a_step_allocates_no_more_than_its_own_tokens():
    cache = regard.KVCache(1, 8, 8192, 128)
    key = np.zeros((1, 8, 8000, 128), np.float32)
    cache.append(key, key)
    query = normal(0, 1, 8, 1, 128)
    step = query[:, :8]
    cache.append(step, step)
    cache.attend(query)
    tracemalloc.start()
    try:
        cache.append(step, step)
        cache.attend(query)
        assert tracemalloc.get_traced_memory()[1] < cache.nbytes / 1000
    finally:
        tracemalloc.stop()


def test_truncate_and_go_on(backend):
    key, value = tokens(0, 2, 1, 20, 8, 8)
    cache = regard.KVCache(2, 1, 20, 8)
    cache.append(key, value)
    cache.truncate(np.array([20, 5]))
    cache.truncate([11, 5])
    cache.append(key[:, :, 11:13], value[:, :, 11:13], [2, 0])
    assert cache.lengths.tolist() == [13, 5]
    query = normal(9, 2, 1, 1, 8)
    want = regard.attention(query, key, value, key_lengths=np.array([13, 5]))
    assert_same_bits(cache.attend(query), want)
    cache.truncate(cache.lengths[1] - 2)  # a number of NumPy's
    assert cache.lengths.tolist() == [3, 3]
    cache.truncate(0)
    assert (cache.attend(query) == 0).all()


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_reorder(backend, dtype):
    key, value = tokens(0, 4, 2, 9, 8, 12)
    lengths = np.array([9, 2, 0, 5])
    cache = regard.KVCache(4, 2, 10, 8, 12, dtype)
    cache.append(key, value, lengths)
    arrays = [None if x is None else x.copy() for x in (cache.key, cache.value, cache.key_scales, cache.value_scales)]
    for order in ([0, 1, 2, 3], [1, 0, 3, 2], [3, 3, 0, 0], [0, 1, 2, 1, 3, 3], [5, 0, 1], [2, 2, 1], []):
        query = normal(1, cache.batch, 4, 1, 8)
        cache.attend(query)
        cache.reorder(np.array(order, np.int32))
        assert cache.batch == len(order)
        query = normal(1, cache.batch, 4, 1, 8)
        assert_same_bits(cache.attend(query), copy.deepcopy(cache).attend(query))
        arrays = [None if x is None else x[order] for x in arrays]
        lengths = lengths[order]
        assert cache.lengths.tolist() == lengths.tolist()
        for b, n in enumerate(lengths):
            now = (cache.key, cache.value, cache.key_scales, cache.value_scales)
            for x, want in zip(now, arrays, strict=True):
                assert x is None or x[b, :, :n].tobytes() == want[b, :, :n].tobytes()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_a_deep_copy_goes_its_own_way(dtype):
    query = normal(0, 2, 4, 1, 16)
    cache, same = (regard.KVCache(2, 2, 9, 16, dtype=dtype) for _ in range(2))
    for x in (cache, same):
        x.append(normal(1, 2, 2, 5, 16), normal(2, 2, 2, 5, 16))
    before = cache.attend(query)
    other = copy.deepcopy(cache)
    for x in (other, same):
        x.append(normal(3, 2, 2, 3, 16), normal(4, 2, 2, 3, 16))
    assert_same_bits(other.attend(query), same.attend(query))
    assert_same_bits(cache.attend(query), before)


def test_a_batch_grown_by_reorder_goes_on():
    key, value = tokens(0, 2, 2, 7, 8, 8)
    cache = regard.KVCache(2, 2, 12, 8)
    cache.append(key, value, [7, 3])
    cache.reorder([1, 0, 1])
    more = tokens(1, 3, 2, 5, 8, 8)
    cache.append(*more)
    assert cache.lengths.tolist() == [8, 12, 8]
    with pytest.raises(ValueError, match="capacity = 12"):
        cache.append(*more, [0, 1, 0])
    query = normal(2, 3, 2, 2, 8)
    out = cache.attend(query, causal=True)
    for b, (source, n) in enumerate(((1, 3), (0, 7), (1, 3))):
        whole = [np.concatenate([x[source, :, :n], y[b]], 1)[None] for x, y in zip((key, value), more, strict=True)]
        want = regard.attention(query[b : b + 1], *whole, causal=True, alignment="lower_right")
        assert_same_bits(out[b : b + 1], want)


def test_storage_follows_like_and_dtype():
    assert regard.KVCache(1, 1, 1, 1).dtype == "float32"
    assert regard.KVCache(1, 1, 1, 1, like=np.zeros(1, np.float16)).dtype == "float16"
    assert regard.KVCache(1, 1, 1, 1, like=np.zeros(1, ml_dtypes.bfloat16)).dtype == "bfloat16"
    for dtype in (np.int8, np.dtype(np.int8), "int8"):
        cache = regard.KVCache(2, 3, 5, 7, 4, dtype=dtype, like=np.zeros(1, np.float32))
        assert cache.dtype == "int8" and cache.nbytes == 2 * 3 * 5 * (7 + 4 + 4 + 4)
    assert regard.KVCache(1, 1, 1, 1, dtype=ml_dtypes.float8_e4m3fn).dtype == "float8_e4m3fn"
    for name in ("key", "value"):
        assert not getattr(cache, name).flags.writeable
        assert getattr(cache, name).ctypes.data % 64 == 0
    cache.lengths[0] = 5
    assert cache.lengths.tolist() == [0, 0]
    assert "dtype='int8'" in repr(cache)


def test_torch_in_torch_out(backend):
    torch = pytest.importorskip("torch")
    for dtype in (torch.float32, torch.bfloat16):
        key, value, query = (torch.from_numpy(normal(i, 2, 2, n, 16)).to(dtype) for i, n in enumerate((9, 9, 1)))
        cache = regard.KVCache(2, 2, 30, 16, like=key)
        assert cache.dtype == str(dtype).partition(".")[2]
        cache.append(key[:, :, :8], value[:, :, :8], torch.tensor([8, 3]))
        cache.append(key[:, :, 8:], value[:, :, 8:])
        assert cache.lengths.tolist() == [9, 4]
        out = cache.attend(query)
        assert isinstance(out, torch.Tensor) and out.dtype == dtype and out.shape == query.shape
        want = regard.attention(query[:1], key[:1], value[:1])
        assert torch.equal(out[:1], want)


K, V = tokens(0, 2, 3, 5, 8, 6)
I8 = np.iinfo(np.int64)
ERRORS = {
    "beyond capacity": (lambda c: c.append(*tokens(0, 2, 3, 9, 8, 6)), ValueError,
                        r"at most capacity = 12 tokens a sequence, got 14 \(5 held and 9 new\) for sequence 0"),
    "one beyond capacity": (lambda c: c.append(*tokens(0, 2, 3, 10, 8, 6), [0, 10]), ValueError, "for sequence 1"),
    "other heads": (lambda c: c.append(K[:, :2], V), ValueError, r"key: expected shape \(batch = 2, heads_kv = 3"),
    "other batch": (lambda c: c.append(K[:1], V[:1]), ValueError, r"key: expected shape \(batch = 2"),
    "other batch bshd": (lambda c: c.append(K[:1].swapaxes(1, 2), V.swapaxes(1, 2), layout="bshd"), ValueError,
                         r"key: expected shape \(batch = 2, len = 5, heads_kv = 3"),
    "other dim_qk": (lambda c: c.append(K[..., :7], V), ValueError, "key: expected shape .*dim_qk = 8"),
    "other dim_v": (lambda c: c.append(K, K), ValueError, "value: expected shape .*dim_v = 6"),
    "other length": (lambda c: c.append(K, V[:, :, :4]), ValueError, "value: expected shape .*len = 5"),
    "three axes": (lambda c: c.append(K[0], V), ValueError, "key: expected shape"),
    "a list": (lambda c: c.append(K.tolist(), V), TypeError, "key: expected an array"),
    "none": (lambda c: c.append(K, None), TypeError, "value: expected an array"),
    "ints": (lambda c: c.append(K, V.astype(int)), TypeError, "value: expected dtype float32"),
    "int8 keys": (lambda c: c.append(K.astype(np.int8), V), TypeError, "key: expected dtype float32"),
    "a layout": (lambda c: c.append(K, V, layout="sbhd"), ValueError, "layout: expected one of"),
    "a negative length": (lambda c: c.append(K, V, [3, -1]), ValueError,
                          "lengths: expected entries from 0 to len = 5, got -1 at index 1"),
    "a length beyond": (lambda c: c.append(K, V, np.array([6, 1])), ValueError, "got 6 at index 0"),
    "the least int": (lambda c: c.append(K, V, np.array([0, I8.min])), ValueError, f"got {I8.min} at index 1"),
    "the largest int": (lambda c: c.append(K, V, np.array([0, I8.max])), ValueError, f"got {I8.max} at index 1"),
    "float lengths": (lambda c: c.append(K, V, [1.0, 2.0]), TypeError, "lengths: expected dtype int32 or int64"),
    "uint64 lengths": (lambda c: c.append(K, V, np.array([1, 2], np.uint64)), TypeError, "lengths: expected dtype"),
    "bool lengths": (lambda c: c.append(K, V, np.array([True, True])), TypeError, "lengths: expected dtype"),
    "lengths for one": (lambda c: c.append(K, V, [3]), ValueError, r"lengths: expected shape \(batch = 2,\)"),
    "positions only": (lambda c: c.append(K, V, positions=np.arange(5)), ValueError, "positions: expected None"),
    "cos only": (lambda c: c.append(K, V, cos=np.ones((9, 4), np.float32)), TypeError, "sin: expected an array"),
    "positions beyond": (lambda c: c.append(K, V, positions=np.array([0, 1, 2, 9, 4]), **TABLES), ValueError,
                         "positions: expected entries from 0 to max_positions - 1, .* = 9, got 9 at index 3"),
    "a table too short": (lambda c: c.append(K, V, **TABLES), ValueError,
                          r"cos: expected a table of at least 10 positions, .* got float32 array of shape \(9, 4\)"),
    "a table too short for some": (lambda c: c.append(K, V, [1, 5], cos=TABLES["cos"][:7], sin=TABLES["sin"][:7]),
                                   ValueError, r"cos: expected a table of at least 8 positions"),
    "a list of positions": (lambda c: c.append(K, V, positions=[0, 1], **TABLES), TypeError,
                            r"positions: expected .* \(batch = 2, len = 5\) or \(len = 5,\), got list \[0, 1\]"),
    "too many pairs": (lambda c: c.append(K, V, **tables(10, 30)), ValueError, "cos: expected shape"),
    "truncate beyond": (lambda c: c.truncate([5, 4]), ValueError, "to the length held = 3, got 4 at index 1"),
    "truncate below 0": (lambda c: c.truncate([-1, 0]), ValueError, "got -1 at index 0"),
    "truncate all below 0": (lambda c: c.truncate(-1), ValueError, "lengths: expected an integer >= 0, got -1"),
    "truncate to half": (lambda c: c.truncate(0.5), TypeError, "lengths: expected an integer"),
    "truncate to NumPy's half": (lambda c: c.truncate(np.float64(0.5)), TypeError, "lengths: expected an integer >= 0"),
    "truncate far beyond": (lambda c: c.truncate(2**70), ValueError, "lengths: .* to the length held = 5, got"),
    "truncate to a class": (lambda c: c.truncate(np.int64), TypeError, "lengths: expected an integer >= 0, got type"),
    "truncate beyond by NumPy's": (lambda c: c.truncate(np.int64(4)), ValueError,
                                   "to the length held = 3, got 4 at index 1"),
    "reorder beyond": (lambda c: c.reorder([0, 2]), ValueError,
                       "indices: expected entries from 0 to batch - 1 = 1, got 2"),
    "reorder below 0": (lambda c: c.reorder([0, -1]), ValueError, "got -1 at index 1"),
    "reorder by two axes": (lambda c: c.reorder([[0], [1]]), ValueError, r"indices: expected shape \(n = 2,\)"),
    "reorder by a number": (lambda c: c.reorder(np.int64(0)), ValueError, r"indices: expected shape \(n = 1,\)"),
    "reorder by a class": (lambda c: c.reorder(np.int64), TypeError, "indices: expected dtype .*, got type"),
    "reorder by floats": (lambda c: c.reorder(np.zeros(2)), TypeError, "indices: expected dtype"),
}  # fmt: skip
TABLES = tables(8, 9)


@pytest.mark.parametrize("dtype", ["float32", "float8_e4m3fn"])
@pytest.mark.parametrize("name", ERRORS)
def test_an_error_names_the_argument_and_changes_nothing(name, dtype):
    call, kind, message = ERRORS[name]
    cache = regard.KVCache(2, 3, 12, 8, 6, dtype)
    cache.append(K, V, [5, 3])
    before = state(cache)
    with pytest.raises(kind, match=message):
        call(cache)
    assert state(cache) == before


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_a_query_that_does_not_fit_is_named(dtype):
    cache = regard.KVCache(2, 3, 12, 8, 6, dtype)
    cache.append(K, V)
    for shape in ((1, 3, 1, 8), (2, 3, 1, 7), (2, 4, 1, 8), (2, 3, 8)):
        with pytest.raises(ValueError, match=r"query: expected shape \(batch = 2, heads, len_q, dim_qk = 8\)"):
            cache.attend(normal(0, *shape))
    with pytest.raises(ValueError, match=r"\(batch = 2, len_q, heads, dim_qk = 8\) where heads is a multiple"):
        cache.attend(normal(0, 2, 3, 1, 8), layout="bshd")
    with pytest.raises(TypeError, match="query: expected an array"):
        cache.attend(None)


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_options_that_a_cache_decides_may_be_none(dtype):
    cache = regard.KVCache(1, 3, 12, 8, 6, dtype)
    cache.append(K[:1], V[:1])
    query = normal(5, 1, 3, 1, 8)
    pool = regard.PagedKVCache(4, 4, 3, 8, 6, dtype)
    sequence = pool.new_sequence()
    pool.append([sequence], K[:1], V[:1])
    for name in ("key_lengths", "key_scales", "value_scales"):
        assert_same_bits(cache.attend(query, **{name: None}), cache.attend(query))
        assert_same_bits(
            pool.attend(query, range(sequence, sequence + 1), **{name: None}), pool.attend(query, [sequence])
        )
        for attend in (cache.attend, lambda q, **more: pool.attend(q, [sequence], **more)):
            with pytest.raises(TypeError, match=f"{name}: expected None, because the cache has it"):
                attend(query, **{name: np.ones(1, np.int64)})


def test_constructor_errors():
    for arguments, kind, message in (
        ((-1, 1, 1, 1), ValueError, "batch: expected an integer >= 0, got -1"),
        ((1, 1.5, 1, 1), TypeError, "heads_kv: expected an integer"),
        ((1, 1, 1, 0), ValueError, "dim_qk: expected an integer >= 1, got 0"),
        ((1, 1, 1, 1, None, "int32"), TypeError, "dtype: expected one of float32, "),
        ((1, 1, 1, 1, None, None, np.zeros(1, int)), TypeError, "dtype: expected one of float32, "),
        ((1, 1, 1, 1, None, None, [1.0]), TypeError, "like: expected an array"),
        ((1, 1, 1, 1, None, None, np.ndarray), TypeError, "like: expected an array, got type"),
        ((2**70, 1, 1, 4), ValueError, f"KVCache: expected sizes whose memory can be addressed, got batch = {2**70}, "),
        ((0, 1, 1 << 62, 4), ValueError, f"batch = 0, heads_kv = 1, capacity = {1 << 62}, dim_qk = 4, dim_v = 4$"),
        ((1, 1, 1, 4, 1 << 60), ValueError, f"dim_v = {1 << 60}$"),
        ((1, 1, 1 << 56, 4), MemoryError, rf"no memory for an array of float32, shape \(1, 1, {1 << 56}, 4\)"),
    ):
        with pytest.raises(kind, match=message):
            regard.KVCache(*arguments)
    cos, sin = regard.rotary_tables(8, 9)
    for tables, kind, message in (
        (dict(cos=cos), TypeError, "sin: expected an array"),
        (dict(cos=cos, sin=sin[:3]), ValueError, "sin: expected the shape of cos"),
        (dict(cos=np.float32, sin=sin), TypeError, r"cos: expected an array \(max_positions, pairs\), got type"),
        (dict(cos=cos[0], sin=sin[0]), ValueError, r"cos: expected shape \(max_positions, pairs\)"),
        (dict(cos=np.ones((3, 5)), sin=np.ones((3, 5))), ValueError, "cos: expected shape"),
    ):
        with pytest.raises(kind, match=message):
            regard.KVCache(1, 1, 1, 8, **tables)


def test_lengths_changed_meanwhile_are_refused_or_right(backend):
    """Another thread writes lengths far outside: a call works on its own copy, or refuses it."""
    cache, lengths, stop, refused = regard.KVCache(2, 3, 12, 8, 6), np.array([5, 3]), threading.Event(), []

    def disturb():
        while not stop.is_set():
            lengths[1] = I8.max
            lengths[1] = 3

    thread = threading.Thread(target=disturb)
    thread.start()
    try:
        for _ in range(300):
            cache.truncate(0)
            try:
                cache.append(K, V, lengths)
                assert cache.lengths.tolist() == [5, 3]
                cache.truncate(lengths)
            except ValueError as error:
                refused.append(str(error))
            assert cache.lengths.tolist() in ([0, 0], [5, 3])
    finally:
        stop.set()
        thread.join()
    assert all("lengths: expected entries" in message for message in refused)
