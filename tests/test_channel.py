"""global_average_pool and squeeze_excitation against the reference in float64."""

from __future__ import annotations

import numpy as np
import pytest
import regard
from cases import DTYPES, every_other, last_axis_slow, misaligned, reversed_view
from helpers import EPSILON, as_float64, assert_near, assert_same_bits, normal
from maps import ACTIVATIONS, GATES, image, tolerance, weights
from regard import reference

# (batch, channels, reduced, height, width): networks' shapes cut small, odd ones, and edges.
SHAPES = [
    (2, 64, 4, 14, 14),
    (1, 96, 4, 7, 7),
    (2, 17, 3, 9, 5),
    (1, 1, 1, 1, 1),
    (3, 16, 16, 1, 33),
    (1, 40, 10, 31, 17),
    (1, 33, 8, 3, 129),
    (1, 3, 1, 130, 65),
    (1, 512, 32, 2, 2),
    (0, 8, 2, 4, 4),
]


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_global_average_pool(backend, shape, dtype, layout):
    x = image(shape, layout, dtype)
    out = regard.global_average_pool(x, layout=layout)
    want = reference.global_average_pool(x.astype(np.float64), layout=layout)
    assert out.shape == shape[:2] and out.dtype == DTYPES[dtype]
    assert_near(out, want, tolerance(x, dtype))


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_squeeze_excitation(backend, shape, dtype, layout):
    x, w = image(shape, layout, dtype), weights(shape, dtype)
    out = regard.squeeze_excitation(x, *w, layout=layout)
    want = reference.squeeze_excitation(x.astype(np.float64), *w, layout=layout)
    assert out.shape == x.shape and out.dtype == DTYPES[dtype]
    assert_near(out, want, tolerance(x, dtype))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("gate", GATES, ids=str)
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_activations_and_gates(backend, activation, gate, layout):
    shape = (2, 24, 6, 5, 7)
    x, w = image(shape, layout, "float32"), weights(shape, "float32")
    # Wide enough for every gate to saturate on both sides.
    w = (w[0], w[1] * 3, w[2] * 3, w[3] * 3)
    options = dict(activation=activation, gate=gate, layout=layout)
    out = regard.squeeze_excitation(x, *w, **options)
    want = reference.squeeze_excitation(x.astype(np.float64), *w, **options)
    assert_near(out, want, 10 * tolerance(x, "float32"))  # weights 3 times as large, twice


@pytest.mark.parametrize("arrange", [reversed_view, every_other, last_axis_slow, misaligned])
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_strides(backend, arrange, layout):
    shape = (2, 24, 6, 9, 7)
    x, w = image(shape, layout, "float32"), weights(shape, "float32")
    pooled = regard.global_average_pool(x, layout=layout)
    out = regard.squeeze_excitation(x, *w, layout=layout)
    assert_same_bits(regard.global_average_pool(arrange(x), layout=layout), pooled)
    moved = regard.squeeze_excitation(arrange(x), *(arrange(a) for a in w), layout=layout)
    assert_same_bits(np.ascontiguousarray(moved), out)


def test_no_channels_of_some(backend):
    x = normal(0, 2, 4, 4, 3)[..., :0]
    mlp = [np.zeros(shape, np.float32) for shape in ((2, 0), (2,), (0, 2), (0,))]
    assert regard.squeeze_excitation(x, *mlp, layout="nhwc").shape == x.shape
    assert regard.efficient_channel_attention(x, np.ones(3, np.float32), layout="nhwc").shape == x.shape
    assert regard.spatial_attention(x, np.ones((1, 2, 3, 3), np.float32), layout="nhwc").shape == x.shape


def test_an_image_of_stride_0(backend):
    one = normal(0, 1, 24, 1, 1)
    x = np.broadcast_to(one, (3, 24, 20, 11))
    w = weights((3, 24, 6, 20, 11), "float32")
    want = reference.squeeze_excitation(x.astype(np.float64), *w)
    assert_near(regard.squeeze_excitation(x, *w), want, tolerance(x, "float32"))
    assert_near(
        regard.global_average_pool(x),
        np.broadcast_to(one[..., 0, 0].astype(np.float64), (3, 24)),
        tolerance(x, "float32"),
    )


def test_layouts_agree(backend):
    shape = (2, 24, 6, 9, 7)
    w = weights(shape, "float32")
    nchw, nhwc = image(shape, "nchw", "float32"), image(shape, "nhwc", "float32")
    a = regard.squeeze_excitation(nchw, *w, layout="nchw")
    b = regard.squeeze_excitation(nhwc, *w, layout="nhwc").transpose(0, 3, 1, 2)
    assert_near(a, as_float64(b)[0], 2 * tolerance(nchw, "float32"))


@pytest.mark.parametrize("in_place", [False, True])
def test_out(backend, in_place):
    shape = (2, 24, 6, 9, 7)
    x, w = image(shape, "nchw", "float32"), weights(shape, "float32")
    want = regard.squeeze_excitation(x, *w)
    out = x if in_place else np.full_like(x, 7)
    assert regard.squeeze_excitation(x, *w, out=out) is out
    assert_same_bits(out, want)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_large_images_average_accurately(backend, dtype):
    # float32 sums of 2^18 terms of one sign: naive summation would lose four digits.
    x = (normal(0, 1, 2, 512, 512) * np.float32(0.1) + 3).astype(DTYPES[dtype])
    want = reference.global_average_pool(x.astype(np.float64))
    own = {"float16": EPSILON["float16"], "bfloat16": EPSILON["bfloat16"]}.get(dtype, 0.0)
    # Blocked sums err by about the logarithm of n, times epsilon; 64 leaves room for blocks.
    assert_near(regard.global_average_pool(x), want, 3 * (64 * 2.0**-23 + own))


def test_nan_stays_in_its_image(backend):
    shape = (3, 24, 6, 9, 7)
    x, w = image(shape, "nchw", "float32"), weights(shape, "float32")
    want = regard.squeeze_excitation(x, *w)
    x[1, 5, 2, 3] = np.nan
    out = regard.squeeze_excitation(x, *w)
    assert_same_bits(out[[0, 2]], want[[0, 2]])
    assert np.isnan(out[1]).all()  # the gate of every channel saw it, through relu too
    pooled = regard.global_average_pool(x)
    assert np.isnan(pooled).sum() == 1 and np.isnan(pooled[1, 5])


def test_agrees_with_torch(backend):
    torch = pytest.importorskip("torch")
    shape = (2, 24, 6, 9, 7)
    x, w = image(shape, "nchw", "float64"), weights(shape, "float64")
    t = [torch.from_numpy(a) for a in (x, *w)]
    f = torch.nn.functional
    hidden = f.relu(f.linear(t[0].mean((2, 3)), t[1], t[2]))
    want = t[0] * torch.sigmoid(f.linear(hidden, t[3], t[4]))[:, :, None, None]
    assert_near(regard.squeeze_excitation(x, *w), want.numpy(), tolerance(x, "float64"))
