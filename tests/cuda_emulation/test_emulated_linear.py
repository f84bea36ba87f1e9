"""Linear layers with weights held as int8, the kernels emulated: every bit is the definition's."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import regard
from cases import DTYPES, every_other, reversed_view
from helpers import assert_near, assert_same_bits, normal
from regard import dense, nn
from test_emulated_nn import assert_agree, near, torch, with_random_weights  # noqa: F401
from test_weights import int8_linear, layer, quantised

FLOATS = ["float32", "float16", "bfloat16"]
#: rows, in_features, out_features around the edges of every kernel: 8 rows, 16 bytes, 64 deep, 32 x 64 and 128 x 128.
SHAPES = [
    *((n, 33, 50) for n in (1, 2, 7, 8, 9, 31, 32, 33)),
    *((n, k, 9) for n in (3, 10) for k in (0, 1, 15, 16, 17, 63, 64, 65, 511, 512, 513)),
    *((n, 20, o) for n in (5, 12) for o in (0, 1, 7, 8, 9, 63, 64, 65)),
    (0, 5, 3),
    (130, 100, 257),
    (257, 300, 129),
    (2, 4100, 3),
]


def packed_on(gpu: Any, weight: np.ndarray, bias: np.ndarray | None, held: str = "int8") -> dense.PackedLinear:
    return dense.pack_linear(gpu.asarray(weight), None if bias is None else gpu.asarray(bias), held)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_int8_is_exactly_what_it_says(cupy, shape):
    x, weight, bias = layer(*shape)
    out = regard.linear(cupy.asarray(x), packed_on(cupy, weight, bias))
    assert_same_bits(cupy.asnumpy(out), int8_linear(x, weight, bias))


def test_without_matrix_units_of_bytes(cupy, emulator):
    emulator.set_device(75, 65536)
    test_int8_is_exactly_what_it_says(cupy, (20, 50, 30))
    kernels = regard.explain("linear", cupy.zeros((20, 50), np.float32), packed_on(cupy, normal(0, 30, 50), None))
    assert kernels.kernel == "int8 rows"


@pytest.mark.parametrize("held", ["float32", "int8"])
def test_out_may_hold_the_bias_of_a_packed_weight(cupy, held):
    """It is the caller's array itself: the first row of the result would be the bias of the others."""
    x, weight, bias = layer(3, 20, 20)
    out = cupy.zeros((3, 20), np.float32)
    out[0] = cupy.asarray(bias)
    packed = dense.pack_linear(cupy.asarray(weight), out[0], held)
    expected = cupy.asnumpy(regard.linear(cupy.asarray(x), packed))
    regard.linear(cupy.asarray(x), packed, out=out)
    assert_same_bits(cupy.asnumpy(out), expected)


@pytest.mark.parametrize("rows", [3, 20])
@pytest.mark.parametrize("dtype", FLOATS)
def test_either_framework_and_every_dtype(gpu, dtype, rows):
    """x of any dtype meets a weight of any other, and the CPU has the same bits."""
    weight, bias = normal(1, 60, 100), normal(2, 60)
    packed, cpu = packed_on(gpu, weight, bias), dense.pack_linear(weight, bias, "int8")
    x = normal(0, rows, 100, dtype=dtype)
    assert_same_bits(gpu.asnumpy(regard.linear(gpu.asarray(x), packed)), regard.linear(x, cpu))
    x = normal(0, rows, 100)
    weight, bias = weight.astype(DTYPES[dtype]), bias.astype(DTYPES[dtype])
    got = gpu.asnumpy(regard.linear(gpu.asarray(x), packed_on(gpu, weight, bias)))
    assert_same_bits(got, regard.linear(x, dense.pack_linear(weight, bias, "int8")))
    assert_same_bits(got, int8_linear(x, weight, bias))


@pytest.mark.parametrize("rows", [4, 40])
@pytest.mark.parametrize("activation", [None, "relu", "gelu", "silu", "gelu_tanh"])
def test_what_follows_the_product(cupy, activation, rows):
    x, weight, bias = layer(rows, 70, 30)
    residual = normal(3, rows, 30)
    want = regard.linear(x, dense.pack_linear(weight, bias, "int8"), activation=activation, residual=residual)
    on, out = cupy.asarray(residual), cupy.zeros((rows, 30), np.float32)
    packed = packed_on(cupy, weight, bias)
    assert regard.linear(cupy.asarray(x), packed, activation=activation, residual=on, out=out) is out
    assert_near(cupy.asnumpy(out), want.astype(np.float64), near("float32"))
    assert regard.linear(cupy.asarray(x), packed, activation=activation, residual=on, out=on) is on
    assert_same_bits(cupy.asnumpy(on), cupy.asnumpy(out))
    plain = regard.linear(cupy.asarray(x), packed_on(cupy, weight, None))
    assert_same_bits(cupy.asnumpy(plain), int8_linear(x, weight, np.zeros(30, np.float32)))


@pytest.mark.parametrize("dtype", FLOATS)
def test_rows_strides_and_the_order_of_lanes_change_no_bit(cupy, emulator, dtype):
    x, weight, bias = layer(35, 150, 70, dtype)
    packed = packed_on(cupy, weight, bias)
    want = cupy.asnumpy(regard.linear(cupy.asarray(x), packed))
    for n in (1, 8, 9, 20):
        assert_same_bits(cupy.asnumpy(regard.linear(cupy.asarray(x[:n]), packed)), want[:n])
    for arrange in (every_other, reversed_view, np.asfortranarray):
        assert_same_bits(cupy.asnumpy(regard.linear(cupy.asarray(arrange(x)), packed)), want)
        again = packed_on(cupy, arrange(weight), bias)
        assert_same_bits(cupy.asnumpy(again.packed), cupy.asnumpy(packed.packed))
    deep = regard.linear(cupy.asarray(x.reshape(5, 7, 150).swapaxes(0, 1)), packed)
    assert_same_bits(cupy.asnumpy(deep), want.reshape(5, 7, 70).swapaxes(0, 1).copy())
    emulator.set_order(True, 3)
    assert_same_bits(cupy.asnumpy(regard.linear(cupy.asarray(x), packed)), want)
    assert_same_bits(cupy.asnumpy(regard.linear(cupy.asarray(x[:3]), packed_on(cupy, weight, bias))), want[:3])


@pytest.mark.parametrize("rows", [3, 12])
def test_extremes(cupy, rows):
    """The largest sums of either sign, rows of zeros and tiny ones, and what is not finite stays where it is."""
    ones = np.ones((rows, 65536), np.float32) * np.resize(np.array([1, -1, 0], np.float32), rows)[:, None]
    weight = np.ones((3, 65536), np.float32) * np.array([[1], [-1], [1e-35]], np.float32)
    out = regard.linear(cupy.asarray(ones), packed_on(cupy, weight, None))
    assert_same_bits(cupy.asnumpy(out), int8_linear(ones, weight, np.zeros(3, np.float32)))
    x, weight, bias = layer(rows, 50, 60)
    want = int8_linear(x, weight, bias)
    for bad in (np.nan, np.inf, -np.inf):
        x[1, 7], weight[5, 2] = bad, bad
        got = cupy.asnumpy(regard.linear(cupy.asarray(x), packed_on(cupy, weight, bias)))
        assert np.isnan(got[1]).all() and np.isnan(got[:, 5]).all()
        sound = np.ix_(np.arange(rows) != 1, np.arange(60) != 5)
        assert_same_bits(got[sound], want[sound])


def test_what_is_held(cupy):
    weight = normal(0, 7, 20)
    packed = packed_on(cupy, weight, None)
    assert packed.packed.dtype == np.int8 and packed.packed.shape == (7, 32) and packed.shape == (7, 20)
    whole, scale = quantised(weight)
    assert_same_bits(cupy.asnumpy(packed.packed)[:, :20], whole.astype(np.int8))
    assert not cupy.asnumpy(packed.packed)[:, 20:].any()
    assert_same_bits(cupy.asnumpy(packed.scale), scale[:, 0])


def test_refusals(cupy):
    x, weight, bias = (cupy.asarray(a) for a in layer(2, 6, 5))
    packed = dense.pack_linear(weight, bias, "int8")
    with pytest.raises(ValueError, match=r"weight: expected shape \(out_features = 5, in_features = 4\)"):
        regard.linear(cupy.asarray(normal(0, 2, 4)), packed)
    with pytest.raises(TypeError, match="weight: expected the dtype of x, float64"):
        regard.linear(x.astype(np.float64), packed)
    with pytest.raises(ValueError, match="bias: expected None, because the packed weight holds its own"):
        regard.linear(x, packed, bias)
    with pytest.raises(ValueError, match="residual: expected shape"):
        regard.linear(x, packed, residual=x)
    with pytest.raises(TypeError, match="residual: expected an array on the device of x"):
        regard.linear(x, packed, residual=normal(0, 2, 5))
    with pytest.raises(TypeError, match="x: expected dtype float32"):
        regard.linear(x.astype(np.int64), packed)
    for wrong, error, words in (
        (weight.astype(np.float64), ValueError, "weight: expected .*no float64 where held = 'int8'"),
        (weight.astype(np.int64), TypeError, "weight: expected dtype float32"),
        (cupy.zeros((1, 65537), np.float32), ValueError, "at most 65536 in_features"),
    ):
        with pytest.raises(error, match=words):
            dense.pack_linear(wrong, None, "int8")
    with pytest.raises(TypeError, match="bias: expected an array on the device of weight"):
        dense.pack_linear(weight, normal(0, 5), "int8")
    with pytest.raises(ValueError, match="bias: expected shape"):
        dense.pack_linear(weight, cupy.asarray(normal(0, 6)), "int8")


# ---- Modules -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("rows", [2, 11])
def test_linear_modules(cupy, dtype, rows):
    module = with_random_weights(nn.Linear(50, 70)).to(weights="int8")
    x = normal(0, rows, 50, dtype=dtype)
    got = assert_agree(cupy, module, dtype, x)
    assert_same_bits(cupy.asnumpy(got), module(x))
    # One packed weight, made of float32, serves inputs of every dtype.
    assert module._packed[x.dtype, 0] is module._packed[np.dtype(np.float32), 0]


@pytest.mark.parametrize("dtype", FLOATS)
def test_layers_that_hold_linear_ones(cupy, dtype):
    x, memory = normal(0, 2, 9, 32, dtype=dtype), normal(1, 2, 5, 32, dtype=dtype)
    # A step's rounding may move a number to the next whole one: up to 1 / 254 of a row's largest.
    size = 1 if dtype != "float32" else 400
    heads = with_random_weights(nn.MultiheadAttention(32, 4, batch_first=True)).to(weights="int8")
    assert_agree(cupy, heads, dtype, x, x, x, size=4 * size)
    assert_agree(cupy, heads, dtype, x, memory, memory, need_weights=False, size=4 * size)
    layer = with_random_weights(nn.TransformerDecoderLayer(32, 4, 64, batch_first=True)).to(weights="int8")
    assert_agree(cupy, layer, dtype, x, memory, size=16 * size)


def test_generation(cupy):
    layer = nn.TransformerDecoderLayer(16, 2, 24, batch_first=True, norm_first=True)
    stack, table, head = map(
        with_random_weights, (nn.TransformerDecoder(layer, 2), nn.Embedding(11, 16), nn.Linear(16, 11))
    )
    head.bias = 3 * normal(5, 11)
    for module in (stack, head):
        module.to(weights="int8")

    def generated(put: Any) -> Any:
        decoder = nn.CachedDecoder(
            stack, put(normal(1, 2, 5, 16)), embed=lambda tokens, _: table(put(tokens)), project=head, max_len=12
        )
        return nn.generate(decoder, [[1], [2]], max_new_tokens=8)

    assert [g.tokens for g in generated(cupy.asarray)] == [g.tokens for g in generated(np.asarray)]


def test_modules_of_pytorch_s_tensors(cupy, request):
    """Weights loaded from a device's memory are quantised there."""
    fake = request.getfixturevalue("torch")
    module, host = nn.Linear(20, 7), with_random_weights(nn.Linear(20, 7)).to(weights="int8")
    module.load_state_dict({name: fake.Tensor(cupy.asarray(w)) for name, w in host.state_dict().items()})
    cupy.cuda.copied.clear()
    module.to(weights="int8")
    for dtype in FLOATS:
        x = normal(0, 3, 20, dtype=dtype)
        got = module(fake.Tensor(cupy.asarray(x)))
        assert type(got) is fake.Tensor
        assert_same_bits(cupy.asnumpy(got.of), host(x))
    assert [way for way, _ in cupy.cuda.copied] == ["to the device", "to the host"] * 3  # no weight


def test_explain(cupy, emulator):
    emulator.set_clocks(1e9, 1e12)
    packed = packed_on(cupy, normal(0, 130, 64), None)
    few = regard.explain("linear", cupy.asarray(normal(1, 2, 64)), packed)
    assert few.kernel == "int8 rows" and "int8 dot products" in few.left_out
    assert few.tiles == {"rows": 8, "outputs": 8}
    assert few.bytes == 2 * 64 * 4 + 130 * 64 + 130 * 4 + 2 * 130 * 4
    for rows, tile in ((20, {"rows": 32, "outputs": 64}), (130, {"rows": 128, "outputs": 128})):
        many = regard.explain("linear", cupy.asarray(normal(1, rows, 64)), packed)
        assert many.kernel == "int8 tensor cores" and many.tiles == tile and not many.left_out
        assert [launch.source.rpartition("/")[2] for launch in many.stages] == ["linear_bytes.cu"] * 2
        assert many.memory == rows * (64 + 4)
