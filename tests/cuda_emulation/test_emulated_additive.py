"""Additive and multiplicative attention, and linear's epilogue, on device arrays, the kernels emulated."""

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
@pytest.mark.parametrize("activation", [None, "relu", "gelu", "silu"])
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
