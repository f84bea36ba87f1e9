"""Pooling, excitation, CBAM and norms on device arrays, the kernels emulated, against the reference."""

from __future__ import annotations

import numpy as np
import pytest
import regard
from cases import DTYPES, every_other, reversed_view
from helpers import EPSILON, as_float64, assert_near, assert_same_bits, compute_epsilon, normal
from maps import ACTIVATIONS, GATES, image, tolerance, weights
from regard import reference

# (batch, channels, reduced, height, width): vectors of 16 bytes and 32 of them, below, at and above; and corners.
SHAPES = [
    (2, 64, 4, 14, 14),
    (2, 17, 3, 9, 5),
    (1, 1, 1, 1, 1),
    (3, 16, 16, 1, 33),
    (1, 33, 8, 3, 129),
    (1, 40, 5, 20, 16),
    (1, 300, 32, 2, 2),
    (0, 8, 2, 4, 4),
]


def channels_last(x):
    return np.moveaxis(np.ascontiguousarray(np.moveaxis(x, 1, -1)), -1, 1)


def on_device(cupy, arrays):
    return [None if x is None else cupy.asarray(x) for x in arrays]


@pytest.mark.parametrize("operation", ["global_average_pool", "global_max_pool"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_pools(cupy, shape, dtype, operation):
    x = image(shape, "nchw", dtype)
    out = cupy.asnumpy(getattr(regard, operation)(cupy.asarray(x)))
    assert out.dtype == x.dtype
    assert_near(out, as_float64(getattr(reference, operation)(as_float64(x)[0]))[0], tolerance(x, dtype))
    # The same bits whatever lies side by side.
    for arrange in (channels_last, reversed_view, every_other):
        assert_same_bits(cupy.asnumpy(getattr(regard, operation)(cupy.asarray(arrange(x)))), out)
    last = cupy.asarray(np.ascontiguousarray(np.moveaxis(x, 1, -1)))
    assert_same_bits(cupy.asnumpy(getattr(regard, operation)(last, layout="nhwc")), out)


def test_pools_of_nan_and_of_nothing(cupy):
    x = image(SHAPES[0], "nchw", "float32")
    x[1, 3, 2, 2] = np.nan
    maximum = cupy.asnumpy(regard.global_max_pool(cupy.asarray(x)))
    assert np.isnan(maximum[1, 3]) and np.isnan(maximum).sum() == 1
    empty = cupy.asarray(np.zeros((2, 3, 0, 4), np.float32))
    assert np.isnan(cupy.asnumpy(regard.global_average_pool(empty))).all()
    assert (cupy.asnumpy(regard.global_max_pool(empty)) == -np.inf).all()


@pytest.mark.parametrize("operation", ["squeeze_excitation", "channel_attention"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_excitation(cupy, shape, dtype, operation):
    x, w = image(shape, "nchw", dtype), weights(shape, dtype)
    call = getattr(regard, operation)
    out = cupy.asnumpy(call(cupy.asarray(x), *on_device(cupy, w)))
    want = getattr(reference, operation)(*as_float64(x, *w))
    assert out.shape == x.shape and out.dtype == x.dtype
    assert_near(out, want, tolerance(x, dtype))
    for arrange in (channels_last, every_other):
        assert_same_bits(cupy.asnumpy(call(cupy.asarray(arrange(x)), *on_device(cupy, w))), out)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("gate", GATES, ids=str)
def test_activations_and_gates(cupy, activation, gate):
    x, w = image(SHAPES[1], "nchw", "float32"), list(weights(SHAPES[1], "float32"))
    w[1] = w[3] = None
    options = dict(activation=activation, gate=gate)
    out = regard.squeeze_excitation(cupy.asarray(x), *on_device(cupy, w), **options)
    want = reference.squeeze_excitation(*(None if a is None else as_float64(a)[0] for a in (x, *w)), **options)
    assert_near(cupy.asnumpy(out), want, tolerance(x, "float32"))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kernel", [1, 3, 7])
def test_cbam_and_its_parts(cupy, shape, dtype, kernel):
    x, w = image(shape, "nchw", dtype), weights(shape, dtype)
    w_spatial = (normal(5, 1, 2, kernel, kernel) / kernel).astype(x.dtype)
    b_spatial = normal(6, 1).astype(x.dtype)
    taps = normal(7, kernel).astype(x.dtype)
    names = ("w_reduce", "b_reduce", "w_expand", "b_expand", "w_spatial", "b_spatial")
    given = dict(zip(names, (*w, w_spatial, b_spatial), strict=True))
    on = dict(zip(names, on_device(cupy, given.values()), strict=True))
    exact = dict(zip(names, as_float64(*given.values()), strict=True))
    near = 4 * tolerance(x, dtype)  # a weight passes through two gates and a convolution of up to 98 terms

    out = regard.cbam(cupy.asarray(x), **on)
    assert_near(cupy.asnumpy(out), reference.cbam(as_float64(x)[0], **exact), near)
    assert_same_bits(cupy.asnumpy(regard.cbam(cupy.asarray(channels_last(x)), **on)), cupy.asnumpy(out))
    out = regard.spatial_attention(cupy.asarray(x), on["w_spatial"], on["b_spatial"])
    want = reference.spatial_attention(as_float64(x)[0], exact["w_spatial"], exact["b_spatial"])
    assert_near(cupy.asnumpy(out), want, near)
    out = regard.efficient_channel_attention(cupy.asarray(x), cupy.asarray(taps))
    want = reference.efficient_channel_attention(*as_float64(x, taps))
    assert_near(cupy.asnumpy(out), want, near)


def test_a_map_may_be_rescaled_in_place_and_in_either_layout(cupy):
    x, w = image(SHAPES[0], "nchw", "float32"), weights(SHAPES[0], "float32")
    want = cupy.asnumpy(regard.squeeze_excitation(cupy.asarray(x), *on_device(cupy, w)))
    on = cupy.asarray(x)
    assert regard.squeeze_excitation(on, *on_device(cupy, w), out=on) is on
    assert_same_bits(cupy.asnumpy(on), want)
    last = cupy.asarray(np.ascontiguousarray(np.moveaxis(x, 1, -1)))
    out = regard.squeeze_excitation(last, *on_device(cupy, w), layout="nhwc")
    assert_same_bits(np.ascontiguousarray(np.moveaxis(cupy.asnumpy(out), -1, 1)), want)


def test_errors_name_the_argument(cupy):
    x, w = image(SHAPES[0], "nchw", "float32"), weights(SHAPES[0], "float32")
    with pytest.raises(TypeError, match="w_reduce: expected an array on the device of x"):
        regard.squeeze_excitation(cupy.asarray(x), *w)
    with pytest.raises(ValueError, match="b_reduce: expected shape"):
        regard.squeeze_excitation(cupy.asarray(x), *on_device(cupy, (w[0], w[3], w[2], w[1])))


def test_managed_memory_is_a_device_s(torch_cuda, monkeypatch):
    """As DLPack counts it: memory that the driver moves between host and device."""
    x = normal(0, 3, 100)
    want = torch_cuda.asnumpy(regard.layer_norm(torch_cuda.asarray(x)))
    monkeypatch.setattr(torch_cuda.CudaTensor, "__dlpack_device__", lambda self: (13, 0))
    assert_same_bits(torch_cuda.asnumpy(regard.layer_norm(torch_cuda.asarray(x))), want)


def test_what_no_kernel_does_is_named(cupy):
    """Hidden units beyond a block's shared memory: NotImplementedError with the operation, as for a missing kernel."""
    hidden = 1 << 20
    w = [np.zeros(s, np.float32) for s in ((hidden, 1), (hidden,), (1, hidden), (1,))]
    with pytest.raises(NotImplementedError, match=r"^squeeze_excitation: no CUDA kernel for so many hidden units"):
        regard.squeeze_excitation(cupy.zeros((1, 1, 2, 2), np.float32), *on_device(cupy, w))


# ---- Norms -----------------------------------------------------------------------------------------------

ROWS = [(1,), (3, 1), (2, 3, 7), (4, 8), (3, 16), (2, 100), (5, 1024), (2, 1025), (1, 5000), (0, 8)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", ROWS, ids=str)
def test_norms(cupy, shape, dtype):
    x = (normal(0, *shape) * 3 + 1).astype(DTYPES[dtype])
    weight, bias = (normal(i, shape[-1], dtype=dtype) for i in (1, 2))
    near = compute_epsilon(dtype) * (32 + 4 * np.sqrt(shape[-1]))
    near += EPSILON[dtype] if dtype in ("float16", "bfloat16") else 0.0
    for scale, offset in ((None, None), (weight, None), (weight, bias)):
        exact = [None if a is None else as_float64(a)[0] for a in (scale, offset)]
        want = reference.layer_norm(as_float64(x)[0], *exact)
        size = max(1.0, np.abs(want).max(initial=0.0))
        out = regard.layer_norm(cupy.asarray(x), *on_device(cupy, (scale, offset)))
        assert_near(cupy.asnumpy(out), want, near * size)
        moved = regard.layer_norm(cupy.asarray(every_other(x)), *on_device(cupy, (scale, offset)))
        assert_same_bits(cupy.asnumpy(moved), cupy.asnumpy(out))
    want = reference.rms_norm(as_float64(x)[0], as_float64(weight)[0])
    out = regard.rms_norm(cupy.asarray(x), cupy.asarray(weight))
    assert_near(cupy.asnumpy(out), want, near * max(1.0, np.abs(want).max(initial=0.0)))


def test_a_norm_far_from_zero_keeps_its_digits(cupy):
    x = (normal(0, 3, 700) + np.float32(1e4)).astype(np.float32)
    out = cupy.asnumpy(regard.layer_norm(cupy.asarray(x)))
    assert_near(out, reference.layer_norm(x.astype(np.float64)), 1e-5)


def test_the_order_of_lanes_does_not_matter(cupy, emulator):
    x, w = image(SHAPES[0], "nchw", "float16"), weights(SHAPES[0], "float16")
    rows = normal(1, 4, 300)

    def run():
        maps = [cupy.asarray(x), cupy.asarray(channels_last(x))]
        made = [regard.channel_attention(m, *on_device(cupy, w)) for m in maps]
        return [cupy.asnumpy(y) for y in (*made, regard.layer_norm(cupy.asarray(rows)))]

    want = run()
    for seed in (1, 2):
        emulator.set_order(True, seed)
        for a, b in zip(run(), want, strict=True):
            assert_same_bits(a, b)
