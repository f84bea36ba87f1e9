"""linear, layer_norm and rms_norm against the reference in float64."""

from __future__ import annotations

import numpy as np
import pytest
import regard
from cases import DTYPES, every_other, last_axis_slow, misaligned, reversed_view
from helpers import EPSILON, as_float64, assert_near, assert_same_bits, compute_epsilon, normal
from regard import dense, reference

# (rows, inner, outer): transformer shapes cut small, and every tile edge in each place.
SHAPES = [
    (40, 384, 100),
    (20, 100, 1536),
    (128, 256, 64),
    (1, 768, 33),
    (1, 1, 1),
    *((n, 24, 40) for n in (2, 3, 5, 6, 7, 13, 14, 15, 16, 17, 31, 32, 33, 65)),
    *((9, n, 17) for n in (1, 2, 3, 15, 16, 17, 31, 32, 33, 63, 64, 65, 500, 1025)),
    *((9, 20, n) for n in (1, 2, 7, 8, 15, 16, 17, 31, 32, 33, 47, 48, 49, 64, 65, 96, 97, 129)),
    (0, 8, 8),
    (5, 8, 0),
]
ACTIVATIONS = [None, "relu", "gelu", "silu", "gelu_tanh"]
STRIDES = [reversed_view, every_other, last_axis_slow, misaligned]


def layers(shape, dtype):
    rows, inner, outer = shape
    return (
        normal(0, rows, inner, dtype=dtype),
        normal(1, outer, inner, dtype=dtype),
        normal(2, outer, dtype=dtype),
    )


def tolerance(x, weight, bias, dtype):
    """A dot product errs by epsilon times the sum of its terms' magnitudes, times a few.

    gelu and silu have slopes below 1.13 and round at the size of their argument. A two-byte dtype
    rounds the output once, at its own size, which that sum bounds loosely: sqrt(inner) is nearer.
    """
    a, w = (np.abs(t) for t in as_float64(x, weight))
    terms = (a @ w.T).max(initial=0.0)
    magnitude = 1 + terms + np.abs(as_float64(bias)[0]).max(initial=0.0)
    own = {"float16": EPSILON["float16"], "bfloat16": EPSILON["bfloat16"]}.get(dtype, 0.0)
    return 4 * compute_epsilon(dtype) * magnitude + own * (8 + 4 * np.sqrt(x.shape[-1]))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_linear(backend, shape, dtype):
    x, weight, bias = layers(shape, dtype)
    out = regard.linear(x, weight, bias)
    want = reference.linear(*as_float64(x, weight, bias))
    assert out.dtype == DTYPES[dtype] and out.shape == want.shape
    assert_near(out, want, tolerance(x, weight, bias, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("with_bias", [False, True])
def test_activations(backend, dtype, activation, with_bias):
    x, weight, bias = layers((33, 24, 40), dtype)
    given = bias if with_bias else None
    out = regard.linear(x, weight, given, activation)
    want = reference.linear(*as_float64(x, weight), as_float64(bias)[0] if with_bias else None, activation)
    assert_near(out, want, tolerance(x, weight, bias, dtype))


@pytest.mark.parametrize("activation", ACTIVATIONS[1:])
def test_activations_over_their_whole_range(backend, activation):
    # One input and a weight of 1: the activation itself, read off directly.
    t = np.concatenate([np.linspace(-120, 120, 4001), [0.0, -0.0, 1e-30, -1e-30, 3e38, -3e38]])
    x = t.astype(np.float32)[:, None]
    out = regard.linear(x, np.ones((1, 1), np.float32), None, activation)
    want = reference.linear(x.astype(np.float64), np.ones((1, 1)), None, activation)
    # Absolute near 0, where 1 + erf may cancel (times an argument of up to 6); relative above.
    error = np.abs(out - want)
    assert (error <= 8 * 2.0**-23 * np.maximum(np.abs(want), 1)).all()
    assert (out[t < -110] == 0).all()


@pytest.mark.parametrize("leading", [(), (3,), (2, 3), (2, 1, 4), (0, 3)], ids=str)
def test_leading_axes(backend, leading):
    x, (_, weight, bias) = normal(0, *leading, 24), layers((1, 24, 40), "float32")
    out = regard.linear(x, weight, bias)
    want = reference.linear(*as_float64(x, weight, bias))
    assert out.shape == (*leading, 40)
    assert_near(out, want, tolerance(x, weight, bias, "float32"))


@pytest.mark.parametrize("arrange", STRIDES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_strides_of_linear(backend, arrange, dtype):
    x, weight, bias = layers((37, 50, 70), dtype)
    want = regard.linear(x, weight, bias)
    assert_same_bits(regard.linear(arrange(x), arrange(weight), arrange(bias)), want)


def test_linear_accuracy(backend):
    # The same gate as attention's: float32 no worse than plain NumPy (the worst of a few orders of
    # summation: one order's largest error is a matter of luck), two-byte dtypes within 1.5 times
    # the rounding of the output.
    x, weight, bias = layers((100, 384, 90), "float32")
    want = reference.linear(*as_float64(x, weight, bias))
    rng = np.random.default_rng(0)
    orders = [np.arange(384), *(rng.permutation(384) for _ in range(5))]
    plain = max(np.abs(reference.linear(x[:, o], weight[:, o], bias) - want).max() for o in orders)
    assert np.abs(regard.linear(x, weight, bias) - want).max() <= plain + 1e-7
    for dtype in ("float16", "bfloat16"):
        arrays = layers((100, 384, 90), dtype)
        want = reference.linear(*as_float64(*arrays))
        floor = np.square(as_float64(reference.linear(*arrays))[0] - want).mean()
        error = np.square(as_float64(regard.linear(*arrays))[0] - want).mean()
        assert error <= 1.5**2 * floor


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_bad_values_stay_in_their_row_and_column(backend, bad):
    x, weight, bias = layers((40, 30, 50), "float32")
    want = reference.linear(*as_float64(x, weight, bias))
    x[17, 3] = bad
    out = regard.linear(x, weight, bias)
    assert not np.isfinite(out[17]).any()
    keep = np.arange(40) != 17
    assert_near(out[keep], want[keep], tolerance(x[keep], weight, bias, "float32"))
    assert np.isnan(regard.linear(np.full_like(x, np.nan), weight, bias, "relu")).all()


def test_sums_beyond_float32_are_infinite_with_their_sign(backend):
    x, weight = np.full((3, 40), 1e30, np.float32), np.full((5, 40), 1e30, np.float32)
    weight[1] *= -1
    out = regard.linear(x, weight)
    assert (out[:, 1] == -np.inf).all() and (np.delete(out, 1, 1) == np.inf).all()


# ---- The residual that linear adds -------------------------------------------------------------


@pytest.mark.parametrize(
    "shape", [(1, 33, 50), (7, 24, 40), (65, 20, 49), (20, 100, 130), (4, 0, 5), (0, 8, 8)], ids=str
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_residual(backend, shape, dtype):
    x, weight, bias = layers(shape, dtype)
    residual = normal(3, shape[0], shape[2], dtype=dtype)
    within = tolerance(x, weight, bias, dtype) + 8 * compute_epsilon(dtype)
    for given, activation in ((bias, None), (None, None), *((bias, a) for a in ACTIVATIONS[1:])):
        out = regard.linear(x, weight, given, activation, residual=residual)
        # Behind the activation: not within it.
        want = reference.linear(*as_float64(x, weight), None if given is None else np.float64(bias), activation)
        assert (out.dtype, out.shape) == (x.dtype, want.shape)
        assert_near(out, want + as_float64(residual)[0], within)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_residual_is_added_before_the_one_rounding(backend, dtype, activation):
    x, weight, bias = layers((30, 40, 70), dtype)
    residual = normal(3, 30, 70, dtype=dtype)
    wide = regard.linear(*(a.astype(np.float32) for a in (x, weight, bias)), activation)
    want = (wide + residual.astype(np.float32)).astype(x.dtype)
    assert_same_bits(regard.linear(x, weight, bias, activation, residual=residual), want)


@pytest.mark.parametrize("held", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_residual_of_packed_weights(backend, dtype, held):
    x, weight, bias = layers((67, 60, 50), dtype)
    residual = normal(3, 67, 50, dtype=dtype)
    packed = dense.pack_linear(weight, bias, held)
    out = regard.linear(x, packed, activation="gelu", residual=residual)
    plain = regard.linear(x, packed, activation="gelu")
    if dtype == "float32":
        assert_same_bits(out, plain + residual)
    else:  # plain is rounded once more
        size = np.abs(as_float64(plain)[0]) + np.abs(as_float64(residual)[0])
        assert (np.abs(as_float64(out)[0] - sum(as_float64(plain, residual))) <= EPSILON[dtype] * (size + 1e-6)).all()
    for n in (1, 3, 8, 64):  # bits of a row do not depend on the others
        assert_same_bits(regard.linear(x[:n], packed, activation="gelu", residual=residual[:n]), out[:n])


@pytest.mark.parametrize("dtype", DTYPES)
def test_strides_and_overlap_of_residual(backend, dtype):
    x, weight, bias = layers((37, 50, 50), dtype)
    residual = normal(3, 37, 50, dtype=dtype)
    want = regard.linear(x, weight, bias, "relu", residual=residual)
    for arrange in STRIDES:
        assert_same_bits(regard.linear(x, weight, bias, "relu", residual=arrange(residual)), want)
    shared = residual.copy()  # a residual stream, updated in place
    assert regard.linear(x, weight, bias, "relu", out=shared, residual=shared) is shared
    assert_same_bits(shared, want)
    both = x.copy()  # x, residual and out may be one
    expected = regard.linear(x, weight, bias, residual=x)
    regard.linear(both, weight, bias, out=both, residual=both)
    assert_same_bits(both, expected)
    longer = np.zeros((38, 50), x.dtype)  # out begins a row behind
    longer[:37] = residual
    regard.linear(x, weight, bias, "relu", out=longer[1:], residual=longer[:37])
    assert_same_bits(longer[1:].copy(), want)


def test_residual_with_leading_axes_and_threads(backend):
    x, (_, weight, bias) = normal(0, 3, 50, 24), layers((1, 24, 130), "float32")
    residual, threads = normal(3, 3, 50, 130), regard.get_num_threads()
    want = regard.linear(x.reshape(-1, 24), weight, bias, residual=residual.reshape(-1, 130)).reshape(residual.shape)
    try:
        for n in (1, 2, 3):
            regard.set_num_threads(n)
            assert_same_bits(regard.linear(x, weight, bias, residual=residual), want)
    finally:
        regard.set_num_threads(threads)


def test_residuals_that_do_not_fit():
    x, weight = normal(0, 5, 8), normal(1, 6, 8)
    for shape in ((5, 7), (6,), (1, 6), (4, 6), (1, 5, 6)):
        with pytest.raises(ValueError, match=r"residual: expected shape .* out_features = 6"):
            regard.linear(x, weight, residual=normal(2, *shape))
    with pytest.raises(TypeError, match="residual: expected the dtype of x, float32, got float64"):
        regard.linear(x, weight, residual=normal(2, 5, 6, dtype="float64"))


# ---- Norms -------------------------------------------------------------------------------------

NORM_SHAPES = [
    (6, 384), (3, 768), (5, 1), (5, 2), (5, 7), (5, 8), (5, 15), (5, 16), (5, 17), (5, 31), (5, 33),
    (2, 5, 100), (64,), (0, 8), (1, 5000), (200, 24),
]  # fmt: skip


def norm_tolerance(x, dtype, *affine):
    """Normalised values are below sqrt(n); a mean of n terms adds sqrt(n) epsilon at that size."""
    n = x.shape[-1]
    relative = 8 * compute_epsilon(dtype) * (4 + np.log2(n) + np.sqrt(n) / 16)
    relative += {"float16": EPSILON["float16"], "bfloat16": EPSILON["bfloat16"]}.get(dtype, 0.0)
    size = 1.0
    for a in affine:
        size = size * (1 + np.abs(as_float64(a)[0]).max(initial=0.0))
    return relative * size * min(np.sqrt(n), 6)


@pytest.mark.parametrize("shape", NORM_SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_norms(backend, shape, dtype):
    x = normal(0, *shape, dtype=dtype)
    weight, bias = normal(1, shape[-1], dtype=dtype), normal(2, shape[-1], dtype=dtype)
    within = norm_tolerance(x, dtype, weight, bias)
    for w, b in ((None, None), (weight, None), (weight, bias)):
        out = regard.layer_norm(x, w, b)
        want = reference.layer_norm(x.astype(np.float64), w, b)
        assert out.dtype == DTYPES[dtype] and out.shape == shape
        assert_near(out, want, within)
    for w in (None, weight):
        out = regard.rms_norm(x, w)
        want = reference.rms_norm(x.astype(np.float64), w)
        assert out.dtype == DTYPES[dtype] and out.shape == shape
        assert_near(out, want, within)


@pytest.mark.parametrize("eps", [1e-12, 1e-3, 1.0])
def test_eps(backend, eps):
    x = normal(0, 6, 50) * np.float32(0.1)
    for function in ("layer_norm", "rms_norm"):
        out = getattr(regard, function)(x, eps=eps)
        want = getattr(reference, function)(x.astype(np.float64), eps=eps)
        assert_near(out, want, norm_tolerance(x, "float32"))


@pytest.mark.parametrize("arrange", STRIDES)
def test_strides_of_norms(backend, arrange):
    x, weight, bias = normal(0, 9, 50), normal(1, 50), normal(2, 50)
    a = arrange(x), arrange(weight), arrange(bias)
    assert_same_bits(np.ascontiguousarray(regard.layer_norm(*a)), regard.layer_norm(x, weight, bias))
    assert_same_bits(np.ascontiguousarray(regard.rms_norm(*a[:2])), regard.rms_norm(x, weight))


def test_a_large_mean_does_not_cancel(backend):
    # E[x^2] - E[x]^2 would lose all digits here; two passes, or Welford's, do not.
    x = normal(0, 8, 300) + np.float32(3000)
    want = reference.layer_norm(x.astype(np.float64))
    # The mean itself is rounded to 3000 epsilon, and x - mean keeps that as an absolute error.
    assert_near(regard.layer_norm(x), want, 4 * 3000 * 2.0**-23)


def test_constant_and_bad_rows(backend):
    x = normal(0, 5, 40)
    x[1], x[3, 7] = 2.5, np.nan
    out, rms = regard.layer_norm(x), regard.rms_norm(x)
    assert (out[1] == 0).all()
    for y in (out, rms):
        assert np.isnan(y[3]).all() and np.isfinite(np.delete(y, 3, 0)).all()


def test_agrees_with_torch(backend):
    torch = pytest.importorskip("torch")
    f, t = torch.nn.functional, torch.from_numpy
    x, weight, bias = (a.astype(np.float64) for a in layers((20, 30, 40), "float32"))
    within = tolerance(x, weight, bias, "float64")
    y = f.linear(t(x), t(weight), t(bias))
    wants = {None: y, "relu": f.relu(y), "gelu": f.gelu(y), "silu": f.silu(y)}
    wants["gelu_tanh"] = f.gelu(y, approximate="tanh")
    for activation, want in wants.items():
        assert_near(regard.linear(x, weight, bias, activation), want.numpy(), within)
    w, b = normal(5, 30, dtype="float64"), normal(6, 30, dtype="float64")
    want = f.layer_norm(t(x), (30,), t(w), t(b)).numpy()
    assert_near(regard.layer_norm(x, w, b), want, norm_tolerance(x, "float64", w, b))
    want = f.rms_norm(t(x), (30,), t(w), 1e-6).numpy()
    assert_near(regard.rms_norm(x, w), want, norm_tolerance(x, "float64", w))
