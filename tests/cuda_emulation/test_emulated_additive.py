"""Additive, location-sensitive and multiplicative attention, and linear's epilogue, on device arrays, emulated."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import regard
from cases import DTYPES, every_other
from helpers import EPSILON, as_float64, assert_near, assert_same_bits, compute_epsilon, normal
from regard import reference

# (batch, len_q, len_kv, dim_q, dim_k, dim, dim_v): one split and several, rows above 8, edges of tiles; no key.
SHAPES = [(2, 5, 40, 12, 20, 16, 24), (1, 19, 300, 70, 33, 65, 130), (3, 1, 1, 1, 1, 1, 1), (1, 2, 0, 4, 4, 4, 4)]


def near(dtype: str, depth: int, size: float = 5) -> float:
    """Sums of `depth` terms in compute precision, a softmax on them, and one rounding."""
    own = 2 * EPSILON[dtype] if dtype in ("float16", "bfloat16") else 0.0
    return size * (compute_epsilon(dtype) * (40 + 8 * depth) + own)


def arguments(shape: tuple[int, ...], dtype: str) -> tuple[list[Any], dict[str, Any]]:
    batch, len_q, len_kv, dim_q, dim_k, dim, dim_v = shape
    sizes = ((batch, len_q, dim_q), (batch, len_kv, dim_k), (batch, len_kv, dim_v))
    arrays = [normal(i, *n, dtype=dtype) for i, n in enumerate(sizes)]
    weights = {"v": (dim,), "w_query": (dim, dim_q), "w_key": (dim, dim_k), "bias": (dim,)}
    scaled = {k: normal(9 + i, *n) / np.sqrt(n[-1]) for i, (k, n) in enumerate(weights.items())}
    return arrays, {k: x.astype(DTYPES[dtype]) for k, x in scaled.items()}


def on(cupy: Any, options: dict[str, Any]) -> dict[str, Any]:
    return {k: cupy.asarray(x) for k, x in options.items()}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_additive(cupy, shape, dtype):
    arrays, weights = arguments(shape, dtype)
    mask = np.random.default_rng(2).random((shape[0], shape[1], shape[2])) < 0.7
    mask[:, 0, shape[2] // 2 :] = False
    lengths = np.linspace(shape[2], shape[2] // 3, shape[0]).astype(np.int64)
    wide = {k: as_float64(x)[0] for k, x in weights.items()}
    want = reference.additive_attention(
        *as_float64(*arrays), **wide, mask=mask, key_lengths=lengths, return_weights=True
    )
    given = on(cupy, weights | {"mask": mask})
    got = regard.additive_attention(*map(cupy.asarray, arrays), **given, key_lengths=lengths, return_weights=True)
    out, attended = (cupy.asnumpy(x) for x in got)
    assert out.dtype == attended.dtype == DTYPES[dtype]
    assert_near(out, want[0], near(dtype, max(shape[3:6])))
    assert_near(attended, want[1], near(dtype, max(shape[3:6]), 1))
    moved = regard.additive_attention(
        *(cupy.asarray(every_other(x)) for x in arrays), **given, key_lengths=cupy.asarray(lengths)
    )
    assert_same_bits(cupy.asnumpy(moved), out)
    # A query alone, a decoder's step, has the bits that it has among others.
    given["mask"] = given["mask"][:, :1]
    one = map(cupy.asarray, (arrays[0][:, :1], *arrays[1:]))
    assert_same_bits(cupy.asnumpy(regard.additive_attention(*one, **given, key_lengths=lengths)), out[:, :1].copy())


def test_additive_without_projections_and_with_nothing_seen(cupy):
    (query, key, value), v = (normal(i, 2, n, 16) for i, n in enumerate((9, 30, 30))), normal(5, 16)
    mask = np.ones((2, 9, 30), bool)
    mask[1, 4] = False
    key[0, 7], value[0, 7], mask[0, :, 7] = np.nan, np.inf, False
    got = regard.additive_attention(
        *map(cupy.asarray, (query, key, value)), v=cupy.asarray(v), mask=cupy.asarray(mask), return_weights=True
    )
    want = reference.additive_attention(query, key, value, v=v, mask=mask, return_weights=True)
    for x, y in zip(got, want, strict=True):
        assert_near(cupy.asnumpy(x), y, 1e-4)
    with pytest.raises(ValueError, match="query: expected shape"):
        regard.additive_attention(*map(cupy.asarray, (query[..., :5], key, value)), v=cupy.asarray(v))


# (batch, len_q, len_kv, dim_q, dim_k, dim, dim_v, channels, filters, width): a decoder's step, and more; one split of
# the keys and several, windows of even width and wider than the keys; no key.
LOCATED = [
    (2, 1, 40, 12, 20, 16, 24, 2, 5, 7),
    (1, 3, 150, 7, 9, 33, 20, 1, 17, 4),
    (2, 2, 5, 8, 8, 65, 8, 3, 66, 31),
    (1, 1, 1, 1, 1, 1, 1, 1, 1, 1),
    (2, 2, 0, 4, 4, 4, 4, 2, 3, 3),
]


def located(shape: tuple[int, ...], dtype: str) -> tuple[list[Any], dict[str, Any]]:
    """query, key, value and previous weights; the weights of the layer."""
    batch, len_q, len_kv, *_, dim, _, channels, filters, width = shape
    arrays, weights = arguments(shape[:7], dtype)
    previous = np.abs(normal(20, batch, len_q, channels, len_kv)) / max(len_kv, 1)
    kernel = normal(21, filters, channels, width) / np.sqrt(channels * width)
    more = {"w_location": normal(22, dim, filters) / np.sqrt(filters), "location_kernel": kernel}
    more["location_bias"] = normal(23, filters)
    return [*arrays, previous.astype(DTYPES[dtype])], weights | {k: x.astype(DTYPES[dtype]) for k, x in more.items()}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", LOCATED, ids=str)
def test_location_sensitive(cupy, shape, dtype):
    arrays, weights = located(shape, dtype)
    mask = np.random.default_rng(2).random(shape[:3]) < 0.7
    mask[0, -1] = False
    wide = {k: as_float64(x)[0] for k, x in weights.items()}
    want = reference.location_sensitive_attention(*as_float64(*arrays), **wide, mask=mask)
    given = on(cupy, weights | {"mask": mask})
    got = [cupy.asnumpy(x) for x in regard.location_sensitive_attention(*map(cupy.asarray, arrays), **given)]
    depth = max(*shape[3:6], shape[8], shape[7] * shape[9])
    for x, w, size in zip(got, want, (5, 1), strict=True):
        assert x.dtype == DTYPES[dtype]
        assert_near(x, w, near(dtype, depth, size))
    moved = regard.location_sensitive_attention(
        *(cupy.asarray(every_other(x)) for x in arrays), **on(cupy, {k: every_other(x) for k, x in weights.items()}),
        mask=given["mask"],
    )  # fmt: skip
    for x, w in zip(moved, got, strict=True):
        assert_same_bits(cupy.asnumpy(x), w)
    step = [x[:, :1] if n in (0, 3) else x for n, x in enumerate(arrays)]
    alone = regard.location_sensitive_attention(*map(cupy.asarray, step), **on(cupy, weights | {"mask": mask[:, :1]}))
    for x, w in zip(alone, got, strict=True):
        assert_same_bits(cupy.asnumpy(x), w[:, :1].copy())


def test_location_sensitive_with_fewer_arguments(cupy):
    """Keys that were projected beforehand, one channel, previous weights that all queries share."""
    (query, key, value, _), weights = located((2, 3, 70, 16, 16, 16, 9, 1, 4, 5), "float16")
    given = {k: weights[k] for k in ("v", "w_location", "location_kernel")} | {
        "location_kernel": weights["location_kernel"][:, 0]
    }
    previous = np.abs(normal(5, 2, 70, dtype="float16"))
    for repeated in (previous, np.repeat(previous[:, None], 3, 1)):
        want = reference.location_sensitive_attention(query, key, value, repeated, **given)
        got = regard.location_sensitive_attention(*map(cupy.asarray, (query, key, value, repeated)), **on(cupy, given))
        for x, w in zip(got, want, strict=True):
            assert_near(cupy.asnumpy(x), as_float64(w)[0], near("float16", 16))


def test_more_queries_than_are_located_at_a_time(cupy):
    arrays, weights = located((1, 26, 700, 2, 2, 3, 2, 1, 2, 3), "float32")
    want = reference.location_sensitive_attention(*arrays, **weights)
    got = regard.location_sensitive_attention(*map(cupy.asarray, arrays), **on(cupy, weights))
    for x, w in zip(got, want, strict=True):
        assert_near(cupy.asnumpy(x), w, near("float32", 3))


def test_location_sensitive_errors_name_the_argument(cupy):
    arrays, weights = located((2, 3, 7, 4, 4, 4, 4, 2, 3, 3), "float32")
    device = list(map(cupy.asarray, arrays))
    with pytest.raises(TypeError, match="previous_weights: expected an array on the device of query"):
        regard.location_sensitive_attention(*device[:3], arrays[3], **on(cupy, weights))
    with pytest.raises(ValueError, match="previous_weights: expected shape"):
        regard.location_sensitive_attention(*device[:3], device[3][:, :, :1], **on(cupy, weights))
    with pytest.raises(ValueError, match="w_location: expected shape"):
        regard.location_sensitive_attention(*device, **on(cupy, weights | {"w_location": normal(0, 4, 5)}))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("projected", [False, True])
@pytest.mark.parametrize("len_q", [1, 20])
def test_multiplicative(cupy, len_q, projected, dtype):
    query, key, value = (normal(i, 2, n, d, dtype=dtype) for i, (n, d) in enumerate(((len_q, 24), (70, 24), (70, 40))))
    query = (query / 3).astype(query.dtype)
    w = (normal(4, 24, 24) / 5).astype(DTYPES[dtype]) if projected else None
    mask = np.random.default_rng(2).random((len_q, 70)) < 0.7
    lengths = np.array([70, 33])
    for weights in (False, True):
        got = regard.multiplicative_attention(
            *map(cupy.asarray, (query, key, value)), w=None if w is None else cupy.asarray(w), mask=cupy.asarray(mask),
            key_lengths=lengths, return_weights=weights,
        )  # fmt: skip
        want = reference.multiplicative_attention(
            *as_float64(query, key, value), w=None if w is None else as_float64(w)[0], mask=mask, key_lengths=lengths,
            return_weights=weights,
        )  # fmt: skip
        for x, y in zip(got, want, strict=True) if weights else ((got, want),):
            assert_near(cupy.asnumpy(x), y, near(dtype, 24))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", [None, "relu", "gelu", "silu", "gelu_tanh"])
@pytest.mark.parametrize("lead", [(), (5,), (2, 3, 4), (0, 3)], ids=str)
def test_linear(cupy, lead, activation, dtype):
    x, weight = normal(0, *lead, 33, dtype=dtype), (normal(1, 17, 33) / 6).astype(DTYPES[dtype])
    bias, residual = normal(2, 17, dtype=dtype), normal(3, *lead, 17, dtype=dtype)
    want = reference.linear(*as_float64(x, weight, bias), activation) + as_float64(residual)[0]
    device = [cupy.asarray(a) for a in (x, weight, bias)]
    got = regard.linear(*device, activation, residual=cupy.asarray(residual))
    assert_near(cupy.asnumpy(got), want, near(dtype, 33, 4))  # the product and the sum are rounded
    out = cupy.asarray(every_other(residual)) if lead else cupy.asarray(residual)
    assert regard.linear(*device, activation, residual=out, out=out) is out
    assert_same_bits(cupy.asnumpy(out), cupy.asnumpy(got))
    plain = regard.linear(*device[:2])
    assert_near(cupy.asnumpy(plain), reference.linear(*as_float64(x, weight)), near(dtype, 33, 4))


def test_the_order_of_lanes_does_not_matter(cupy, emulator):
    arrays, weights = arguments(SHAPES[1], "float16")

    def run():
        return [
            cupy.asnumpy(x)
            for x in regard.additive_attention(*map(cupy.asarray, arrays), **on(cupy, weights), return_weights=True)
        ]

    want = run()
    for seed in (1, 2):
        emulator.set_order(True, seed)
        for x, y in zip(run(), want, strict=True):
            assert_same_bits(x, y)
