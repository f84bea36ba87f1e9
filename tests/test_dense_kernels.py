"""The dense kernels at the edges of their tiles, and what must not change a bit of their results."""

from __future__ import annotations

import math

import numpy as np
import pytest
import regard
from cases import DTYPES
from helpers import EPSILON, as_float64, assert_same_bits, compute_epsilon, normal
from regard import dense

EDGES = (1, 7, 8, 9, 47, 48, 49, 95, 96, 97, 129)
DEPTHS = (1, 3, 127, 128, 129, 257, 768)
ACTIVATIONS = {
    None: lambda y: y,
    "relu": lambda y: np.maximum(y, 0),
    "gelu": lambda y: 0.5 * y * np.vectorize(math.erfc)(-y / math.sqrt(2)),
    "silu": lambda y: y / (1 + np.exp(-y)),
    "gelu_tanh": lambda y: 0.5 * y * (1 + np.tanh(math.sqrt(2 / math.pi) * (y + 0.044715 * y**3))),
}


def layer(rows, inner, outer, dtype="float32"):
    return (
        normal(0, rows, inner, dtype=dtype),
        normal(1, outer, inner, dtype=dtype),
        normal(2, outer, dtype=dtype),
    )


def pack_as_computed(weight, bias=None):
    """Packed so that the bits of the weight as it lies come out: matrix tiles multiply bfloat16 as pairs."""
    pairs = regard._backend.cpu.tiles and weight.dtype == DTYPES["bfloat16"]
    return dense.pack_linear(weight, bias, "bfloat16" if pairs else "float32")


def check_linear(x, weight, bias, activation=None):
    """Each element errs by a few epsilon of its terms' magnitudes; activations have slopes below 1.13."""
    dtype = next(name for name, d in DTYPES.items() if d == x.dtype)
    out = regard.linear(x, weight, bias, activation)
    a, w, b = as_float64(x, weight, bias)
    want = ACTIVATIONS[activation](a @ w.T + b)
    terms = np.abs(a) @ np.abs(w.T) + np.abs(b)
    # A chain of n additions errs like a random walk: sqrt(n) epsilon, far below the bound n epsilon.
    tolerance = compute_epsilon(dtype) * (4 + np.sqrt(a.shape[-1])) * (terms + 1)
    if dtype in ("float16", "bfloat16"):
        tolerance += EPSILON[dtype] * (np.abs(want) + 1e-3)
    assert out.dtype == x.dtype
    assert out.shape == want.shape
    assert (np.abs(as_float64(out)[0] - want) <= tolerance).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_tile_edge(backend, dtype):
    for n in EDGES:
        check_linear(*layer(n, 33, 50, dtype))
        check_linear(*layer(10, 33, n, dtype))
    for depth in DEPTHS:
        check_linear(*layer(9, depth, 49, dtype))


@pytest.mark.parametrize("shape", [(360, 130, 50), (1, 4100, 100), (9, 1, 500), (8, 2049, 49)], ids=str)
def test_more_than_one_block(backend, shape):
    check_linear(*layer(*shape))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_activations(backend, activation, dtype):
    check_linear(*layer(13, 20, 51, dtype), activation)


def values_of(activation, t, dtype):
    """The activation itself: one input and a weight of 1."""
    with np.errstate(all="ignore"):
        return regard.linear(t.astype(dtype)[:, None], np.ones((1, 1), dtype), None, activation)[:, 0].astype(
            np.float64
        )


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("activation", ["gelu", "silu", "gelu_tanh"])
def test_activations_are_accurate_relative_to_their_size(backend, activation, dtype):
    t = np.concatenate([np.linspace(-12, 12, 4001), np.geomspace(1e-20, 1, 200), -np.geomspace(1e-20, 1, 200)])
    t = t.astype(dtype).astype(np.float64)
    want = np.array([scalar_activation(activation, x) for x in t])
    error = np.abs(values_of(activation, t, dtype) - want)
    # 8 ulp: exp's 2, a polynomial's 2, a division and some products. Without fused operations exp's
    # argument loses more: half an epsilon of its own size, up to 12^2 / 2.
    ulps = 8 if backend != "baseline" else 80
    nothing = 0.0
    if activation == "gelu_tanh":  # the exponential's argument is rounded at its own size; beyond its range 0 is left
        ulps, nothing = ulps + 4 * np.abs(twice_the_argument_of_tanh(t)), 1e-37
    if dtype == "float64":  # the expected value too: erfc's rounded argument costs it t^2 / 2
        ulps = ulps + t * t
    assert (error <= ulps * EPSILON[dtype] * np.abs(want) + nothing).all()


def scalar_activation(activation, x):
    if activation == "gelu":
        return x * 0.5 * math.erfc(-x * math.sqrt(0.5))
    t = twice_the_argument_of_tanh(x) if activation == "gelu_tanh" else x
    e = math.exp(-abs(t))
    return x * (1 if x >= 0 else e) / (1 + e)


def twice_the_argument_of_tanh(x):
    return 2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)


def test_special_values_of_activations(backend):
    t = np.array([np.inf, -np.inf, np.nan, 0.0, 3e38, -3e38])
    for dtype in ("float32", "float64"):
        for name in ("relu", "gelu", "silu", "gelu_tanh"):
            y = values_of(name, t, dtype)
            assert np.isnan(y[2])
            assert y[3] == 0
            assert y[5] == 0
            assert y[0] == np.inf
            assert y[4] == t.astype(dtype)[4]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 768, 97), (9, 129, 48), (50, 33, 130), (3, 5, 0), (3, 0, 5), (0, 5, 3)], ids=str)
def test_packed_weights_give_the_same_bits(backend, shape, dtype):
    x, weight, bias = layer(*shape, dtype)
    for b in (bias, None):
        packed = pack_as_computed(weight, b)
        for activation in (None, "gelu"):
            assert_same_bits(regard.linear(x, packed, activation=activation), regard.linear(x, weight, b, activation))
    assert packed.shape == weight.shape
    assert packed.dtype == weight.dtype


def test_one_packed_weight_serves_every_instruction_set():
    x, weight, bias = layer(20, 40, 100)
    packed = dense.pack_linear(weight, bias)
    for isa in regard._backend.possible():
        with regard._backend.using(isa):
            assert_same_bits(regard.linear(x, packed), regard.linear(x, weight, bias))


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_do_not_depend_on_each_other(backend, dtype):
    x, weight, bias = layer(361, 140, 100, dtype)
    packed = pack_as_computed(weight, bias)
    whole = regard.linear(x, packed, activation="silu")
    for n in (1, 2, 3, 5, 8, 17, 100):
        assert_same_bits(regard.linear(x[:n], packed, activation="silu"), whole[:n])
        assert_same_bits(regard.linear(x[-n:], weight, bias, "silu"), whole[-n:])
    # A depth of several blocks, which few rows cut elsewhere than many.
    deep, wide = normal(3, 100, 2500, dtype=dtype), normal(4, 50, 2500, dtype=dtype)
    long = regard.linear(deep, wide)
    for n in (1, 8, 9):
        assert_same_bits(regard.linear(deep[:n], wide), long[:n])
        assert_same_bits(regard.linear(deep[:n], pack_as_computed(wide)), long[:n])
    # Nor do columns on their number.
    assert_same_bits(regard.linear(x, weight[:49], bias[:49], "silu"), np.ascontiguousarray(whole[:, :49]))


def test_threads_change_no_bit(backend):
    x, weight, bias = layer(200, 300, 400)
    before = regard.get_num_threads()
    try:
        results = []
        for n in (1, 2, 3, 7):
            regard.set_num_threads(n)
            results.append((regard.linear(x, weight, bias), regard.layer_norm(x), regard.rms_norm(x)))
    finally:
        regard.set_num_threads(before)
    for other in results[1:]:
        for a, b in zip(other, results[0], strict=True):
            assert_same_bits(a, b)


@pytest.mark.parametrize("dtype", DTYPES)
def test_strides(backend, dtype):
    x, weight, bias = layer(24, 40, 70, dtype)
    want = regard.linear(x, weight, bias)
    transposed = np.asfortranarray(weight)
    assert_same_bits(regard.linear(np.asfortranarray(x), transposed, bias), want)
    assert_same_bits(regard.linear(x[::-1], weight[:, ::-1][:, ::-1], bias)[::-1].copy(), want)
    # Leading axes that do not merge, and a zero stride.
    cube = np.zeros((4, 3, 6, 80), x.dtype)[:, :2, ::2, ::2]
    cube[...] = x.reshape(4, 2, 3, 40)
    assert_same_bits(regard.linear(cube, weight, bias), want.reshape(4, 2, 3, 70))
    assert_same_bits(regard.layer_norm(cube, x[0], x[1]), regard.layer_norm(x, x[0], x[1]).reshape(cube.shape))
    repeated = np.broadcast_to(x[:1], (5, 40))
    assert_same_bits(regard.linear(repeated, weight, bias), np.repeat(want[:1], 5, 0))
    # A strided output, and one that is also the input.
    out = np.zeros((24, 2, 140), x.dtype)[:, 1, ::2]
    assert regard.linear(x, weight, bias, out=out) is out
    assert_same_bits(out.copy(), want)
    square, y = weight[:40], x.copy()
    want = regard.linear(x, square)
    assert_same_bits(regard.linear(y, square, out=y), want)


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0), (2, 0, 3)], ids=str)
def test_empty(backend, shape):
    x = np.zeros(shape, np.float32)
    n = shape[-1]
    bias = np.arange(4, dtype=np.float32)
    out = regard.linear(x, np.ones((4, n), np.float32), bias)
    assert out.shape == (*shape[:-1], 4)
    assert (out == bias).all()
    assert regard.linear(x, np.ones((0, n), np.float32)).shape == (*shape[:-1], 0)
    assert regard.layer_norm(x).shape == shape == regard.rms_norm(x).shape


def test_vectors(backend):
    x, weight, bias = layer(1, 30, 20)
    assert_same_bits(regard.linear(x[0], weight, bias), regard.linear(x, weight, bias)[0])
    assert_same_bits(regard.layer_norm(x[0]), regard.layer_norm(x)[0])


def test_ieee_values_pass_through(backend):
    x, weight, bias = layer(20, 30, 50)
    x[3, 4], x[5, 6] = np.nan, np.inf
    weight[7] = 0
    with np.errstate(all="ignore"):
        out, want = regard.linear(x, weight, bias), x @ weight.T + bias
    assert np.isnan(out[3]).all()
    assert np.isnan(out[5, 7])
    np.testing.assert_array_equal(np.isnan(out), np.isnan(want))
    np.testing.assert_array_equal(np.isinf(out), np.isinf(want))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("features", [1, 3, 15, 16, 17, 63, 64, 65, 384, 2049])
def test_norms(backend, features, dtype):
    x, residual = normal(0, 7, features, dtype=dtype), normal(1, 7, features, dtype=dtype)
    weight, bias = normal(2, features, dtype=dtype), normal(3, features, dtype=dtype)
    s, w, b = as_float64(residual, weight, bias)
    s = s + as_float64(x)[0]
    if dtype != "float64":
        s = s.astype(np.float32).astype(np.float64)  # the sum is rounded once
    centred = s - s.mean(-1, keepdims=True)
    layer = centred / np.sqrt(np.square(centred).mean(-1, keepdims=True) + 1e-5)
    rms = s / np.sqrt(np.square(s).mean(-1, keepdims=True) + 1e-6)
    # A row that nearly cancels to a constant (short ones) amplifies the rounding of s by 1 / deviation.
    amplified = compute_epsilon(dtype) * (
        1 + np.abs(s).max(-1, keepdims=True) / np.sqrt(centred.var(-1, keepdims=True) + 1e-5)
    )
    own = EPSILON[dtype] if dtype in ("float16", "bfloat16") else 0.0
    for out, want in (
        (dense.add_layer_norm(x, residual, weight, bias), layer * w + b),
        (dense.add_rms_norm(x, residual, weight), rms * w),
    ):
        assert out.dtype == x.dtype
        allowed = 8 * amplified * (np.abs(w) + np.abs(b)) * (1 + np.abs(want)) + own * np.abs(want) + own * 1e-3
        assert (np.abs(as_float64(out)[0] - want) <= allowed).all()
    zero = np.zeros_like(x)
    assert_same_bits(dense.add_layer_norm(x, zero, weight, bias), regard.layer_norm(x, weight, bias))
    assert_same_bits(dense.add_rms_norm(x, zero, weight), regard.rms_norm(x, weight))


def test_rows_of_norms_are_alone(backend):
    x = normal(0, 300, 200)
    whole = regard.layer_norm(x)
    for i in (0, 1, 163, 164, 299):
        assert_same_bits(regard.layer_norm(x[i]), whole[i])


def test_long_rows_keep_their_digits(backend):
    x = normal(0, 2, 100_000) + np.float32(100)
    s = x.astype(np.float64)
    want = (s - s.mean(-1, keepdims=True)) / np.sqrt(s.var(-1, keepdims=True) + 1e-5)
    # Nothing larger than x - mean is rounded: a few epsilon of values below 8.
    assert np.abs(regard.layer_norm(x) - want).max() <= 4 * 8 * 2.0**-23


ERRORS = {
    "x: expected an array": (TypeError, lambda x, w, b: regard.linear([1.0], w)),
    "x: expected dtype": (TypeError, lambda x, w, b: regard.linear(x.astype(int), w)),
    "x: expected shape (..., in_features = 5) where there are": (
        ValueError,
        lambda x, w, b: regard.linear(np.array(x[0, 0]), w),
    ),
    "weight: expected the dtype of x": (TypeError, lambda x, w, b: regard.linear(x, w.astype(np.float64))),
    "weight: expected shape (out_features = 3, in_features = 6)": (
        ValueError,
        lambda x, w, b: regard.linear(np.zeros((2, 6), np.float32), w),
    ),
    "bias: expected shape (out_features = 3)": (ValueError, lambda x, w, b: regard.linear(x, w, b[:2])),
    "bias: expected None": (ValueError, lambda x, w, b: regard.linear(x, dense.pack_linear(w), b)),
    "weight: expected shape (out_features = 3, in_features = 4)": (
        ValueError,
        lambda x, w, b: regard.linear(x[:, :4], dense.pack_linear(w)),
    ),
    "weight: expected the dtype of x, float64": (
        TypeError,
        lambda x, w, b: regard.linear(x.astype(float), dense.pack_linear(w)),
    ),
    "activation: expected one of None, 'relu'": (ValueError, lambda x, w, b: regard.linear(x, w, b, "gelo")),
    "out: expected shape (..., out_features = 3)": (
        ValueError,
        lambda x, w, b: regard.linear(x, w, out=np.zeros((2, 4), np.float32)),
    ),
    "out: expected a writable": (
        ValueError,
        lambda x, w, b: regard.linear(x, w, out=np.broadcast_to(b, (2, 3))),
    ),
    "weight: expected shape (features = 5)": (ValueError, lambda x, w, b: regard.layer_norm(x, b)),
    "bias: expected shape (features = 5)": (ValueError, lambda x, w, b: regard.layer_norm(x, None, b)),
    "residual: expected shape": (ValueError, lambda x, w, b: dense.add_layer_norm(x, w)),
    "eps: expected a finite number >= 0": (ValueError, lambda x, w, b: regard.rms_norm(x, eps=-1.0)),
    "weight: expected shape (out_features, in_features)": (ValueError, lambda x, w, b: dense.pack_linear(b)),
}


@pytest.mark.parametrize("message", ERRORS)
def test_errors(message):
    kind, call = ERRORS[message]
    with pytest.raises(kind) as error:
        call(np.ones((2, 5), np.float32), np.ones((3, 5), np.float32), np.ones(3, np.float32))
    assert str(error.value).startswith(message)
