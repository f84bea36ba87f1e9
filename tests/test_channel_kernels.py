"""Pools, channel, spatial and efficient attention, and CBAM against the reference in float64.

tests/test_channel.py has what average pooling and squeeze-and-excitation promise; here is what is common to the family.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import regard
from cases import DTYPES, every_other, last_axis_slow, misaligned, reversed_view
from helpers import EPSILON, as_float64, assert_near, assert_same_bits, compute_epsilon, normal
from regard import reference

# (batch, channels, reduced, height, width, kernel): around vectors of 2 to 16 lanes, blocks of 32 to 256
# positions, single positions and channels, maps above and below what one thread takes whole.
SHAPES = [
    (2, 64, 4, 14, 14, 7),
    (1, 17, 3, 9, 5, 3),
    (1, 1, 1, 1, 1, 7),
    (3, 16, 16, 1, 33, 5),
    (1, 3, 1, 15, 1, 1),
    (2, 33, 8, 3, 43, 3),
    (1, 31, 10, 16, 16, 7),
    (1, 15, 3, 16, 17, 3),
    (1, 256, 16, 2, 2, 3),
    (2, 80, 5, 41, 43, 7),
    (0, 8, 2, 4, 4, 3),
    (2, 8, 0, 4, 4, 3),
]
LARGE = (2, 80, 5, 41, 43, 7)  # 551 KiB an image in float32: its pieces are shared out to threads


class Operation(NamedTuple):
    weights: tuple[str, ...]
    call: Callable[..., Any]  # of x, the weights' dictionary, options
    reference: Callable[..., Any]


def _positional(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda x, w, **options: function(x, *w.values(), **options)


def _by_name(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda x, w, **options: function(x, **w, **options)


MLP = ("w_reduce", "b_reduce", "w_expand", "b_expand")
SPATIAL = ("w_spatial", "b_spatial")
OPERATIONS = {
    "squeeze_excitation": Operation(
        MLP, _positional(regard.squeeze_excitation), _positional(reference.squeeze_excitation)
    ),
    "channel_attention": Operation(
        MLP, _positional(regard.channel_attention), _positional(reference.channel_attention)
    ),
    "spatial_attention": Operation(
        SPATIAL, _positional(regard.spatial_attention), _positional(reference.spatial_attention)
    ),
    "cbam": Operation((*MLP, *SPATIAL), _by_name(regard.cbam), _by_name(reference.cbam)),
    "efficient_channel_attention": Operation(
        ("w",),
        _positional(regard.efficient_channel_attention),
        _positional(reference.efficient_channel_attention),
    ),
}


def image(shape, layout="nchw", dtype="float32", seed=0):
    batch, channels, _, height, width, _ = shape
    x = (normal(seed, batch, channels, height, width) + np.float32(0.5)).astype(DTYPES[dtype])
    return x if layout == "nchw" else np.ascontiguousarray(x.transpose(0, 2, 3, 1))


def weights(operation, shape, dtype="float32"):
    _, channels, reduced, _, _, kernel = shape
    every = {
        "w_reduce": normal(1, reduced, channels) / np.sqrt(channels),
        "b_reduce": normal(2, reduced),
        "w_expand": normal(3, channels, reduced) * 2 / np.sqrt(max(reduced, 1)),
        "b_expand": normal(4, channels),
        "w_spatial": normal(5, 1, 2, kernel, kernel) / kernel,
        "b_spatial": normal(6, 1),
        "w": normal(7, kernel),
    }
    return {name: every[name].astype(DTYPES[dtype]) for name in OPERATIONS[operation].weights}


def tolerance(x, dtype):
    """As in test_channel.py, twice: CBAM has two gates, and its second network sees the first's result."""
    relative = 2 * compute_epsilon(dtype) * (32 + np.sqrt(max(1, x.size)))
    relative += {"float16": EPSILON["float16"], "bfloat16": EPSILON["bfloat16"]}.get(dtype, 0.0)
    return relative * np.abs(as_float64(x)[0]).max(initial=0.0)


def in_float64(w):
    return {name: None if x is None else x.astype(np.float64) for name, x in w.items()}


@pytest.fixture(params=OPERATIONS)
def operation(request):
    return request.param


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_agrees_with_the_reference(backend, operation, shape, dtype, layout):
    x, w = image(shape, layout, dtype), weights(operation, shape, dtype)
    out = OPERATIONS[operation].call(x, w, layout=layout)
    want = OPERATIONS[operation].reference(x.astype(np.float64), in_float64(w), layout=layout)
    assert out.shape == x.shape and out.dtype == DTYPES[dtype]
    assert_near(out, want, tolerance(x, dtype))


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_global_max_pool(backend, shape, dtype, layout):
    x = image(shape, layout, dtype)
    out = regard.global_max_pool(x, layout=layout)
    assert_same_bits(out, reference.global_max_pool(x, layout=layout))


@pytest.mark.parametrize("gate", ["sigmoid", "tanh", "hard_sigmoid", ("hard_sigmoid", 0.2, 0.4)], ids=str)
def test_gates(backend, operation, gate):
    shape = (2, 24, 6, 5, 7, 3)
    x = image(shape)
    w = {name: a * np.float32(3) for name, a in weights(operation, shape).items()}  # saturates both sides
    out = OPERATIONS[operation].call(x, w, gate=gate)
    want = OPERATIONS[operation].reference(x.astype(np.float64), in_float64(w), gate=gate)
    assert_near(out, want, 20 * tolerance(x, "float32"))


@pytest.mark.parametrize("name", ["channel_attention", "cbam"])
@pytest.mark.parametrize("activation", ["relu", "silu", "gelu", "hard_swish", "gelu_tanh"])
def test_activations(backend, name, activation):
    shape = (2, 24, 6, 5, 7, 3)
    x, w = image(shape), weights(name, shape)
    out = OPERATIONS[name].call(x, w, activation=activation)
    want = OPERATIONS[name].reference(x.astype(np.float64), in_float64(w), activation=activation)
    assert_near(out, want, tolerance(x, "float32"))


def test_biases_may_be_absent(backend, operation):
    shape = (2, 24, 6, 5, 7, 3)
    x, w = image(shape), weights(operation, shape)
    none = {name: None if name.startswith("b_") else a for name, a in w.items()}
    zero = {name: np.zeros_like(a) if name.startswith("b_") else a for name, a in w.items()}
    call = OPERATIONS[operation].call
    assert_same_bits(call(x, none), call(x, zero))


def same_values_elsewhere(x):
    """x's values under all kinds of strides, (batch, channels, height, width) as it is."""
    yield "channels last", np.ascontiguousarray(x.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)
    wide = np.full((x.shape[0], x.shape[1] + 1, x.shape[2] + 2, x.shape[3] + 3), np.nan, x.dtype)
    inside = wide[:, :-1, 1:-1, 1:-2]
    inside[...] = x
    yield "a crop", inside
    for arrange in (reversed_view, every_other, last_axis_slow, misaligned):
        yield arrange.__name__, arrange(x)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", [(2, 37, 5, 9, 7, 5), LARGE], ids=str)
def test_strides_layouts_threads_and_batch_leave_every_bit(backend, operation, shape, dtype):
    call = OPERATIONS[operation].call
    x, w = image(shape, dtype=dtype), weights(operation, shape, dtype)
    want = call(x, w)
    for name, y in same_values_elsewhere(x):
        assert_same_bits(np.ascontiguousarray(call(y, w)), want, name)
    nhwc = call(image(shape, "nhwc", dtype), w, layout="nhwc")
    assert_same_bits(np.ascontiguousarray(nhwc.transpose(0, 3, 1, 2)), want, "nhwc")
    slow = {name: last_axis_slow(a) for name, a in w.items()}
    assert_same_bits(call(x, slow), want, "weights of other strides")
    assert_same_bits(call(x[1:], w), want[1:], "one image")
    threads = regard.get_num_threads()
    try:
        for n in (1, 2, 5):
            regard.set_num_threads(n)
            assert_same_bits(call(x, w), want, f"{n} threads")
    finally:
        regard.set_num_threads(threads)


@pytest.mark.parametrize("pool", [regard.global_average_pool, regard.global_max_pool])
@pytest.mark.parametrize("shape", [(2, 37, 5, 9, 7, 5), LARGE], ids=str)
def test_pools_do_not_depend_on_strides_and_layouts(backend, pool, shape):
    x = image(shape)
    want = pool(x)
    for name, y in same_values_elsewhere(x):
        assert_same_bits(pool(y), want, name)
    assert_same_bits(pool(image(shape, "nhwc"), layout="nhwc"), want, "nhwc")
    assert_same_bits(pool(x[1:]), want[1:], "one image")


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("shape", [(2, 24, 6, 9, 7, 3), (2, 8, 3, 3, 3, 3), LARGE], ids=str)
def test_out_may_be_x_or_overlap_it(backend, operation, shape, layout):
    call = OPERATIONS[operation].call
    w = weights(operation, shape)
    x = image(shape, layout)
    want = call(x, w, layout=layout)

    out = np.full_like(x, 7)
    assert call(x, w, layout=layout, out=out) is out
    assert_same_bits(out, want)

    same = x.copy()
    assert call(same, w, layout=layout, out=same) is same
    assert_same_bits(same, want, "in place")

    shared = np.zeros(x.size + 5, x.dtype)
    before, after = shared[5:].reshape(x.shape), shared[:-5].reshape(x.shape)
    before[...] = x
    call(before, w, layout=layout, out=after)
    assert_same_bits(after, want, "shifted by five elements")

    backwards = x.copy()
    call(backwards, w, layout=layout, out=backwards[:, ::-1, ::-1])
    assert_same_bits(np.ascontiguousarray(backwards[:, ::-1, ::-1]), want, "onto itself, reversed")


def test_a_result_has_the_memory_order_of_x(backend, operation):
    shape = (2, 24, 6, 5, 7, 3)
    x = image(shape, "nhwc").transpose(0, 3, 1, 2)
    out = OPERATIONS[operation].call(x, weights(operation, shape))
    assert out.strides == x.strides


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_nan_and_inf_stay_in_their_image(backend, operation, layout, value):
    shape = (3, 24, 6, 9, 7, 3)
    x, w = image(shape, layout), weights(operation, shape)
    call = OPERATIONS[operation].call
    want = call(x, w, layout=layout)
    x[1, 3, 4, 5] = value
    out = call(x, w, layout=layout)
    assert_same_bits(out[[0, 2]], want[[0, 2]])
    expected = OPERATIONS[operation].reference(x.astype(np.float64), in_float64(w), layout=layout)
    np.testing.assert_array_equal(np.isnan(out[1]), np.isnan(expected[1]))


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("place", [(0, 0), (0, 15), (4, 0), (8, 6)])
def test_the_maximum_of_nan_is_nan(backend, layout, place):
    x = normal(0, 2, 5, 9, 17)
    x[1, 3, place[0], place[1]] = np.nan
    x[0, 2, 0, :2] = np.inf, -np.inf  # their sum is NaN, their maximum is not
    y = x if layout == "nchw" else np.ascontiguousarray(x.transpose(0, 2, 3, 1))
    assert_same_bits(regard.global_max_pool(y, layout=layout), x.max(axis=(2, 3)))


def test_pools_of_nothing(backend):
    x = np.zeros((2, 3, 0, 4), np.float32)
    assert np.isnan(regard.global_average_pool(x)).all()
    assert (regard.global_max_pool(x) == -np.inf).all()
    assert regard.global_max_pool(np.zeros((2, 0, 3, 4), np.float32)).shape == (2, 0)


@pytest.mark.parametrize("empty", [(0, 8, 4, 4), (2, 8, 0, 4), (2, 8, 4, 0)])
def test_maps_of_nothing(backend, operation, empty):
    w = weights(operation, (1, 8, 2, 1, 1, 3))
    assert OPERATIONS[operation].call(np.zeros(empty, np.float32), w).shape == empty


IMAGE = np.zeros((2, 8, 5, 5), np.float32)
SE = (
    np.zeros((2, 8), np.float32),
    np.zeros(2, np.float32),
    np.zeros((8, 2), np.float32),
    np.zeros(8, np.float32),
)
KERNEL = np.zeros((1, 2, 3, 3), np.float32)
CBAM = dict(zip(MLP, SE, strict=True))
READ_ONLY = np.zeros_like(IMAGE)
READ_ONLY.flags.writeable = False
ERRORS = {
    "max_rank": (lambda: regard.global_max_pool(IMAGE[0]), ValueError, r"^x: .*batch"),
    "max_type": (lambda: regard.global_max_pool([1.0]), TypeError, r"^x: "),
    "max_layout": (
        lambda: regard.global_max_pool(IMAGE, "chwn"),
        ValueError,
        r"^layout: .*'nchw', 'nhwc'.*'chwn'",
    ),
    "dtype": (
        lambda: regard.channel_attention(IMAGE, SE[0].astype(np.float64), *SE[1:]),
        TypeError,
        r"^w_reduce: expected the dtype of x, float32",
    ),
    "integers": (
        lambda: regard.spatial_attention(IMAGE.astype(np.int32), KERNEL),
        TypeError,
        r"^x: .*float32",
    ),
    "reduce": (
        lambda: regard.channel_attention(IMAGE, SE[0][:, :7], *SE[1:]),
        ValueError,
        r"^w_reduce: .*reduced = 2, channels = 8.*\(2, 7\)",
    ),
    "no_reduce": (
        lambda: regard.cbam(IMAGE, **{**CBAM, "w_reduce": None}, w_spatial=KERNEL),
        TypeError,
        r"^w_reduce: ",
    ),
    "no_spatial": (lambda: regard.cbam(IMAGE, **CBAM, w_spatial=None), TypeError, r"^w_spatial: "),
    "even_kernel": (
        lambda: regard.spatial_attention(IMAGE, KERNEL[:, :, :2, :2]),
        ValueError,
        r"^w_spatial: .*kernel must be odd",
    ),
    "oblong_kernel": (
        lambda: regard.cbam(IMAGE, **CBAM, w_spatial=KERNEL[..., :1]),
        ValueError,
        r"^w_spatial: ",
    ),
    "planes": (
        lambda: regard.spatial_attention(IMAGE, KERNEL[:, :1]),
        ValueError,
        r"^w_spatial: .*1, 2, kernel",
    ),
    "spatial_bias": (
        lambda: regard.spatial_attention(IMAGE, KERNEL, np.zeros(2, np.float32)),
        ValueError,
        r"^b_spatial: ",
    ),
    "even_eca": (
        lambda: regard.efficient_channel_attention(IMAGE, np.zeros(4, np.float32)),
        ValueError,
        r"^w: .*kernel must be odd",
    ),
    "activation": (
        lambda: regard.channel_attention(IMAGE, *SE, activation="elu"),
        ValueError,
        r"^activation: .*'relu'.*'elu'",
    ),
    "gate": (
        lambda: regard.cbam(IMAGE, **CBAM, w_spatial=KERNEL, gate="softmax"),
        ValueError,
        r"^gate: .*'softmax'",
    ),
    "gate_slope": (
        lambda: regard.channel_attention(IMAGE, *SE, gate=("hard_sigmoid", np.nan, 0.5)),
        ValueError,
        r"^gate: .*finite",
    ),
    "gate_words": (
        lambda: regard.channel_attention(IMAGE, *SE, gate=("hard_sigmoid", "a", 0.5)),
        ValueError,
        r"^gate: ",
    ),
    "out_shape": (
        lambda: regard.channel_attention(IMAGE, *SE, out=np.zeros((2, 8, 5, 4), np.float32)),
        ValueError,
        r"^out: ",
    ),
    "out_dtype": (
        lambda: regard.channel_attention(IMAGE, *SE, out=IMAGE.astype(np.float64)),
        TypeError,
        r"^out: ",
    ),
    "out_read_only": (
        lambda: regard.channel_attention(IMAGE, *SE, out=READ_ONLY),
        ValueError,
        r"^out: .*writable",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_name_the_argument(backend, name):
    call, error, message = ERRORS[name]
    with pytest.raises(error, match=message):
        call()


# ---- PyTorch ----


def torch_cbam(torch, x, w):
    f = torch.nn.functional

    def mlp(pooled):
        return f.linear(f.relu(f.linear(pooled, w["w_reduce"], w["b_reduce"])), w["w_expand"], w["b_expand"])

    y = x * torch.sigmoid(mlp(x.mean((2, 3))) + mlp(x.amax((2, 3))))[:, :, None, None]
    planes = torch.stack([y.mean(1), y.amax(1)], dim=1)
    return y * torch.sigmoid(f.conv2d(planes, w["w_spatial"], w["b_spatial"], padding="same"))


def test_cbam_agrees_with_torch(backend):
    torch = pytest.importorskip("torch")
    shape = (2, 24, 6, 9, 7, 7)
    x, w = image(shape, dtype="float64"), weights("cbam", shape, "float64")
    tensors = {name: torch.from_numpy(a) for name, a in w.items()}
    want = torch_cbam(torch, torch.from_numpy(x), tensors).numpy()
    assert_near(regard.cbam(x, **w), want, tolerance(x, "float64"))


def test_efficient_channel_attention_agrees_with_torch(backend):
    torch = pytest.importorskip("torch")
    x, w = normal(0, 2, 24, 9, 7, dtype="float64"), normal(1, 5, dtype="float64")
    t = torch.from_numpy(x)
    conv = torch.nn.functional.conv1d(t.mean((2, 3))[:, None], torch.from_numpy(w)[None, None], padding=2)
    want = (t * torch.sigmoid(conv[:, 0])[:, :, None, None]).numpy()
    assert_near(regard.efficient_channel_attention(x, w), want, tolerance(x, "float64"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_tensors_keep_kind_and_memory_format(backend, dtype):
    torch = pytest.importorskip("torch")
    shape = (2, 24, 6, 9, 7, 3)
    x = torch.from_numpy(image(shape)).to(getattr(torch, dtype)).to(memory_format=torch.channels_last)
    w = {n: torch.from_numpy(a).to(x.dtype) for n, a in weights("cbam", shape).items()}
    out = regard.cbam(x, **w)
    assert isinstance(out, torch.Tensor) and out.dtype == x.dtype
    assert out.is_contiguous(memory_format=torch.channels_last)
    want = torch_cbam(torch, x.float(), {n: a.float() for n, a in w.items()}).to(x.dtype)
    assert_near(out.float().numpy(), want.double().numpy(), tolerance(x.float().numpy(), dtype))
    same = x.clone()
    assert regard.cbam(same, **w, out=same) is same
    assert torch.equal(same, out)
