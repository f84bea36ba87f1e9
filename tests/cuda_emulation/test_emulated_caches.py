"""rotary_embedding, merge_attention and the caches on device arrays, the kernels emulated."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
import regard
from cases import DTYPES, every_other
from helpers import EPSILON, as_float64, assert_near, assert_same_bits, compute_epsilon, normal
from regard import reference
from regard.reference.cache import dequantise, quantise

STORAGE = {**DTYPES, "int8": np.dtype(np.int8), "float8_e4m3fn": np.dtype(ml_dtypes.float8_e4m3fn)}


def rounding(dtype: str, size: float) -> float:
    return size * (4 * compute_epsilon(dtype) + (EPSILON[dtype] if dtype in ("float16", "bfloat16") else 0))


# ---- Rotary ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("dim", "pairs"), [(64, 32), (7, 2), (2, 1), (5, 0)])
def test_rotary(cupy, dim, pairs, interleaved, dtype):
    x = normal(0, 2, 3, 9, dim, dtype=dtype)
    cos, sin = regard.rotary_tables(2 * pairs, 40)
    positions = np.random.default_rng(1).integers(0, 40, (2, 9))
    want = reference.rotary_embedding(*as_float64(x, cos, sin), positions, interleaved=interleaved)
    device = [cupy.asarray(a) for a in (x, cos, sin)]
    out = cupy.asnumpy(regard.rotary_embedding(*device, positions, interleaved))
    assert out.dtype == x.dtype
    assert_near(out, want, rounding(dtype, 8))
    assert_same_bits(cupy.asnumpy(regard.rotary_embedding(*device, cupy.asarray(positions), interleaved)), out)
    moved = regard.rotary_embedding(cupy.asarray(every_other(x)), *device[1:], positions, interleaved)
    assert_same_bits(cupy.asnumpy(moved), out)
    swapped = cupy.asarray(np.ascontiguousarray(x.swapaxes(1, 2)))
    other = regard.rotary_embedding(swapped, *device[1:], positions, interleaved, layout="bshd")
    assert_same_bits(np.ascontiguousarray(cupy.asnumpy(other).swapaxes(1, 2)), out)
    for given, where, layout in ((device[0].copy(), None, "bhsd"), (swapped, swapped.copy(), "bshd")):
        to = given if where is None else where  # x itself, and memory of its own
        assert regard.rotary_embedding(given, *device[1:], positions, interleaved, layout, out=to) is to
        turned = cupy.asnumpy(to)
        assert_same_bits(turned if layout == "bhsd" else np.ascontiguousarray(turned.swapaxes(1, 2)), out)
    plain = regard.rotary_embedding(*device, interleaved=interleaved)
    assert_near(
        cupy.asnumpy(plain),
        reference.rotary_embedding(*as_float64(x, cos, sin), interleaved=interleaved),
        rounding(dtype, 8),
    )


def test_positions_on_the_device_are_held_to_their_range(cupy):
    x, tables = normal(0, 1, 1, 3, 8), regard.rotary_tables(8, 5)
    device = [cupy.asarray(a) for a in (x, *tables)]
    got = cupy.asnumpy(regard.rotary_embedding(*device, cupy.asarray(np.int64([-3, 2, 2**40]))))
    assert_same_bits(got, cupy.asnumpy(regard.rotary_embedding(*device, np.int64([0, 2, 4]))))
    with pytest.raises(ValueError, match="positions: expected entries from 0"):
        regard.rotary_embedding(*device, np.int64([0, 2, 5]))
    with pytest.raises(TypeError, match="cos: expected an array on the device of x"):
        regard.rotary_embedding(device[0], *tables)


# ---- Merging -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 3, 5, 64), (4, 7), (17, 33), (1, 1, 1, 1, 8), (5, 0), (0, 8)], ids=str)
@pytest.mark.parametrize("count", [1, 2, 9])
def test_merge(cupy, count, shape, dtype):
    outs = [normal(i, *shape, dtype=dtype) for i in range(count)]
    lses = [5 * normal(100 + i, *shape[:-1]) for i in range(count)]
    for i, x in enumerate(lses):
        x[..., i % 3 :: 3] = -np.inf
    outs[0][lses[0] == -np.inf] = np.nan  # weighs nothing
    got = regard.merge_attention([cupy.asarray(x) for x in outs], [cupy.asarray(x) for x in lses])
    want = reference.merge_attention(as_float64(*outs), as_float64(*lses))
    out, lse = (cupy.asnumpy(x) for x in got)
    assert out.dtype == DTYPES[dtype] and lse.dtype == np.float32
    assert_near(out, want[0], rounding(dtype, 5 * (4 + count)))
    assert_near(lse, want[1], 1e-5)
    if count == 1 and shape[0] != 2:
        seen = lses[0] != -np.inf
        assert_same_bits(out[seen], outs[0][seen])
    stacked = regard.merge_attention(cupy.asarray(np.stack(outs)), cupy.asarray(np.stack(lses)))
    assert_same_bits(cupy.asnumpy(stacked[0]), out)


def test_merge_the_parts_of_a_whole(cupy):
    query, key, value = (cupy.asarray(normal(i, 2, 4, n, 32)) for i, n in enumerate((9, 150, 150)))
    whole = regard.attention(query, key, value, return_lse=True)
    parts = [
        regard.attention(query, key[:, :, s], value[:, :, s], return_lse=True) for s in (slice(0, 70), slice(70, 150))
    ]
    for x, y in zip(regard.merge_attention(*zip(*parts, strict=True)), whole, strict=True):
        assert_near(cupy.asnumpy(x), cupy.asnumpy(y), 1e-5)
    with pytest.raises(TypeError, match="lses: expected arrays on the device of the first"):
        regard.merge_attention([whole[0]], [cupy.asnumpy(whole[1])])
    with pytest.raises(ValueError, match="outs: expected each part to have the shape"):
        regard.merge_attention([whole[0], whole[0][:1]], [whole[1], whole[1]])


# ---- Caches ----------------------------------------------------------------------------------------------------


def held(cupy: Any, x: Any, dtype: str) -> np.ndarray:
    """Stored numbers, as NumPy sees them."""
    numbers = cupy.asnumpy(x)
    return numbers.view(STORAGE[dtype]) if dtype == "float8_e4m3fn" else numbers


@pytest.mark.parametrize("given", DTYPES)
@pytest.mark.parametrize("dtype", STORAGE)
def test_append_stores_what_the_cpu_stores(cupy, dtype, given):
    like = cupy.asarray(np.zeros(1, np.float32))
    cache, cpu = regard.KVCache(2, 3, 40, 33, 20, dtype, like), regard.KVCache(2, 3, 40, 33, 20, dtype)
    for start, length in ((0, 1), (1, 17), (18, 22)):
        key, value = (normal(start + i, 2, 3, length, dim, dtype=given) for i, dim in enumerate((33, 20)))
        key *= np.array(10.0, key.dtype) ** (np.arange(length) % 5 - 2)[:, None].astype(key.dtype)
        value[..., length // 2, :] = 0
        if length > 20:
            key[0, 1, 3, 7], key[1, 0, 4, 0] = np.nan, np.inf
        lengths = None if length < 20 else np.array([length, 4])
        cpu.append(key, value, lengths)
        cache.append(cupy.asarray(key), cupy.asarray(value), lengths)
        assert (cache.lengths == cpu.lengths).all()
    for b, n in enumerate(cpu.lengths):
        for x, y in ((cache.key, cpu.key), (cache.value, cpu.value)):
            assert_same_bits(held(cupy, x, dtype)[b, :, :n], y[b, :, :n])
        for x, y in ((cache.key_scales, cpu.key_scales), (cache.value_scales, cpu.value_scales)):
            if y is not None:
                assert_same_bits(cupy.asnumpy(x)[b, :, :n], y[b, :, :n])


@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "float8_e4m3fn"])
def test_a_cache_attends(cupy, dtype, layout):
    cos, sin = regard.rotary_tables(16, 60)
    swap = (lambda x: np.ascontiguousarray(x.swapaxes(1, 2))) if layout == "bshd" else lambda x: x
    caches = [
        regard.KVCache(2, 2, 60, 32, 24, dtype, like, cos=cos, sin=sin, interleaved=True)
        for like in (None, cupy.asarray(np.zeros(1, np.float16)))
    ]
    for step, length in enumerate((12, 1, 1, 20)):
        key, value = (normal(9 * step + i, 2, 2, length, dim) for i, dim in enumerate((32, 24)))
        query = normal(9 * step + 2, 2, 4, length, 32)
        lengths = np.array([length, 1 + length // 2])
        caches[0].append(swap(key), swap(value), lengths, layout=layout)
        caches[1].append(cupy.asarray(swap(key)), cupy.asarray(swap(value)), lengths, layout=layout)
        want = caches[0].attend(swap(query), causal=True, layout=layout)
        got = caches[1].attend(cupy.asarray(swap(query)), causal=True, layout=layout)
        if step == 1:
            for cache in caches:
                cache.reorder([1, 0])
                cache.truncate([6, 11])
        near = 5e-2 if dtype == "bfloat16" else 1e-3  # angles round apart: now and then to the next stored number
        assert_near(cupy.asnumpy(got), as_float64(want)[0], 0.05 if dtype == "float8_e4m3fn" else near)


@pytest.mark.parametrize("dtype", ["float16", "int8", "float8_e4m3fn"])
def test_a_paged_cache(cupy, dtype):
    like = cupy.asarray(np.zeros(1, np.float16))
    caches = [regard.PagedKVCache(12, 5, 2, 16, 8, dtype, x) for x in (None, like)]
    numbers = [cache.new_sequence() for cache in caches]
    key, value = normal(0, 1, 2, 13, 16, dtype="float16"), normal(1, 1, 2, 13, 8, dtype="float16")
    for on, cache, number in zip((np.asarray, cupy.asarray), caches, numbers, strict=True):
        cache.append(number, on(key), on(value))
        fork = cache.fork(number, 12)  # shares a page that is then copied
        cache.append(
            [number, fork], *(on(np.concatenate([x[:, :, :3], x[:, :, 3:6]])) for x in (key, value)), np.array([3, 2])
        )
    query = normal(2, 2, 4, 2, 16, dtype="float16")
    want = caches[0].attend(query, caches[0].sequences, causal=True)
    got = caches[1].attend(cupy.asarray(query), caches[1].sequences, causal=True)
    assert_near(cupy.asnumpy(got), as_float64(want)[0], 2.0**-8)
    for x, y in ((caches[1].key_pages, caches[0].key_pages), (caches[1].value_pages, caches[0].value_pages)):
        table, n = caches[0].page_table(numbers[0])[0], 16
        a, b = (p[table].reshape(-1, *p.shape[2:])[:n] for p in (held(cupy, x, dtype), y))
        assert_same_bits(a.copy(), b.copy())


@pytest.mark.parametrize("size", [1e-4, 1.0, 100.0])
@pytest.mark.parametrize("stored", ["int8", "float8_e4m3fn"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize(("dim_qk", "dim_v"), [(33, 20), (64, 64), (136, 200)])
def test_few_queries_over_8_bits_by_tensor_cores(cupy, tensor_cores, dim_qk, dim_v, dtype, stored, size):
    caches = [
        regard.KVCache(2, 2, 300, dim_qk, dim_v, stored, like) for like in (None, cupy.asarray(np.zeros(1, np.float32)))
    ]
    key, value = normal(0, 2, 2, 300, dim_qk), np.float32(size) * normal(1, 2, 2, 300, dim_v)
    value[:, 1] *= 1e-3  # of some heads
    query = normal(2, 2, 12, 2, dim_qk, dtype=dtype)
    for on, cache in zip((np.asarray, cupy.asarray), caches, strict=True):
        cache.append(on(key), on(value), np.array([300, 147]))
    want = reference.attention(
        *as_float64(query, dequantise(caches[0].key, caches[0].key_scales)),
        *as_float64(dequantise(caches[0].value, caches[0].value_scales)),
        causal=True, alignment="lower_right", key_lengths=np.array([300, 147]),
    )  # fmt: skip
    got = as_float64(cupy.asnumpy(caches[1].attend(cupy.asarray(query), causal=True)))[0]
    # Weights and output are rounded to 16 bits; values are normal numbers times their size.
    near = size * 4 * EPSILON[dtype] * np.array([1, 1e-3])[None, :, None, None]
    near = np.repeat(near, 6, axis=1) + (6e-8 if dtype == "float16" else 0)  # float16's smallest number
    assert (np.abs(got - want) <= near).all()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_float8_nan_reaches_those_who_see_it(cupy, tensor_cores, dtype):
    cache = regard.KVCache(1, 2, 40, 16, dtype="float8_e4m3fn", like=cupy.asarray(np.zeros(1, np.float32)))
    cache.append(cupy.asarray(normal(0, 1, 2, 40, 16)), cupy.asarray(normal(1, 1, 2, 40, 16)))
    for held_numbers, head, column in ((cache.key, 0, 3), (cache.value, 1, 5)):
        held_numbers[0, head, 39, column] = cupy.asarray(np.uint8(0xFF))
    out = cupy.asnumpy(cache.attend(cupy.asarray(normal(2, 1, 4, 2, 16, dtype=dtype)), causal=True)).astype(float)
    assert np.isfinite(out[:, :, 0]).all()  # the first of two queries does not see the last key
    assert np.isnan(out[0, :2, 1]).all()
    assert np.isnan(out[0, 2:, 1, 5]).all() and np.isfinite(np.delete(out[0, 2:, 1], 5, axis=-1)).all()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize(
    ("value_scales", "far"),
    [([2.0**-16, 2.0**10], None), ([2.0**-16, 1e30], None), ([2.0**-16, 2.0**10], -40.0), ([-1e-6, -1e-6], 0.0)],
    ids=["masked", "masked far larger", "of little weight", "negative"],
)
def test_small_values_beside_large_ones(cupy, tensor_cores, value_scales, far, dtype):
    pages = np.full((1, 2, 1, 8), 127, np.int8)
    options = {
        "key_scales": np.ones((1, 2, 1), np.float32),
        "value_scales": np.array(value_scales, np.float32).reshape(1, 2, 1),
        "mask": np.array([True, far is not None]).reshape(1, 1, 1, 2),
        "bias": np.array([0, far or 0], np.float32).reshape(1, 1, 1, 2),
    }
    query = np.zeros((1, 1, 1, 8), STORAGE[dtype])
    want = reference.attention_paged(*as_float64(query), pages, pages, np.array([[0]]), np.array([2]), **options)
    device = {k: cupy.asarray(x) for k, x in options.items()}
    arrays = [cupy.asarray(x) for x in (query, pages, pages)]
    got = regard.attention_paged(*arrays, np.array([[0]]), np.array([2]), **device)
    assert_near(cupy.asnumpy(got), want, 4 * EPSILON[dtype] * float(np.abs(want).max()))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_an_infinite_key_has_the_same_bits_wherever_it_lies(cupy, tensor_cores, dtype):
    query, key, value = (normal(i, 1, 2, n, 8, dtype=dtype) for i, n in enumerate((1, 40, 40)))
    query[...] = 1
    key[0, :, 3, 0] = -np.inf
    device = [cupy.asarray(x) for x in (query, key, value)]
    out = cupy.asnumpy(regard.attention(*device))
    assert np.isfinite(out.astype(np.float32)).all()
    moved = regard.attention(device[0], *(cupy.asarray(every_other(x)) for x in (key, value)))
    assert_same_bits(cupy.asnumpy(moved), out)


def test_a_product_beyond_the_largest_number_before_its_scale(cupy, tensor_cores):
    query = np.zeros((1, 1, 1, 64), STORAGE["bfloat16"])
    query[..., :2] = 2.0**121
    pages = np.zeros((1, 2, 1, 64), np.int8)
    pages[0, 0, 0, :2] = -127
    values = np.array([1, 2], np.int8).reshape(1, 2, 1, 1)
    scales = {"key_scales": np.float32([2.0**-126, 1]), "value_scales": np.ones(2, np.float32)}
    scales = {name: x.reshape(1, 2, 1) for name, x in scales.items()}
    want = reference.attention_paged(*as_float64(query), pages, values, np.array([[0]]), np.array([2]), **scales)
    arrays = [cupy.asarray(x) for x in (query, pages, values)]
    device = {name: cupy.asarray(x) for name, x in scales.items()}
    got = regard.attention_paged(*arrays, np.array([[0]]), np.array([2]), **device)
    assert_near(cupy.asnumpy(got), want, 2 * EPSILON["bfloat16"])


def test_errors_leave_the_cache_as_it_was(cupy):
    cache = regard.KVCache(1, 2, 4, 8, like=cupy.asarray(np.zeros(1, np.float32)))
    key = normal(0, 1, 2, 3, 8)
    with pytest.raises(TypeError, match="key: expected an array on the device of key_cache"):
        cache.append(key, key)
    with pytest.raises(ValueError, match="value: expected shape"):
        cache.append(cupy.asarray(key), cupy.asarray(key[..., :7]))
    with pytest.raises(ValueError, match="append: expected at most capacity = 4"):
        cache.append(*(cupy.asarray(normal(0, 1, 2, 5, 8)) for _ in range(2)))
    assert cache.lengths.tolist() == [0]
    cache.append(cupy.asarray(key), cupy.asarray(key))
    assert cache.lengths.tolist() == [3]
    place = cupy.asarray(np.zeros(1, np.int64))
    for call, name in ((cache.reorder, "indices"), (cache.truncate, "lengths")):
        with pytest.raises(TypeError, match=f"{name}: expected an array on the CPU, where caches keep their lengths"):
            call(place)
    assert cache.lengths.tolist() == [3]
    want = quantise(key, np.int8)[0]  # the reference's own conversion, beside the CPU's in the tests above
    eight = regard.KVCache(1, 2, 4, 8, dtype="int8", like=cupy.asarray(key))
    eight.append(cupy.asarray(key), cupy.asarray(key))
    assert_same_bits(cupy.asnumpy(eight.key)[:, :, :3].copy(), want)
