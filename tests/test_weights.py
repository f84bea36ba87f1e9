"""Weights held in fewer bits, and weights read from files."""

from __future__ import annotations

import json
import struct
from typing import Any

import numpy as np
import pytest
import regard
from cases import DTYPES
from helpers import EPSILON, assert_same_bits, normal
from regard import _backend, dense, nn

EDGES = (1, 2, 3, 7, 8, 9, 47, 48, 49, 95, 97, 130)
DEPTHS = (0, 1, 2, 3, 4, 5, 15, 16, 17, 127, 128, 129, 383, 385, 770, 2051)
SIXTEEN = ("float16", "bfloat16")


def layer(rows: int, inner: int, outer: int, dtype: str = "float32") -> tuple[Any, Any, Any]:
    return normal(0, rows, inner, dtype=dtype), normal(1, outer, inner, dtype=dtype), normal(2, outer, dtype=dtype)


def shapes() -> list[tuple[int, int, int]]:
    cases = [(n, 33, 50) for n in EDGES] + [(10, 33, n) for n in EDGES] + [(9, n, 49) for n in DEPTHS]
    return [*cases, (1, 4100, 100), (150, 130, 50), (70, 700, 20), (3, 5, 0), (0, 5, 3)]


# ---- int8 --------------------------------------------------------------------------------------------


def quantised(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Whole numbers from -127 to 127, and the scale of each row: what the docstring of pack_linear says."""
    x = x.astype(np.float32)
    largest = np.abs(x).max(-1, keepdims=True, initial=0.0)
    with np.errstate(divide="ignore", invalid="ignore"):
        whole = np.rint(x * (np.float32(127) / largest))
    small = largest < 1e-30
    return np.where(small, 0, whole).astype(np.int64), np.where(small, 0, largest / np.float32(127))


def int8_linear(x: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
    a, a_scale = quantised(x)
    b, b_scale = quantised(weight)
    return (a @ b.T).astype(np.float32) * (b_scale.T * a_scale) + bias.astype(np.float32)


@pytest.mark.parametrize("shape", shapes(), ids=str)
def test_int8_is_exactly_what_it_says(backend, shape):
    x, weight, bias = layer(*shape)
    # The last product and sum are float32's, in one order: no bit may differ.
    assert_same_bits(regard.linear(x, dense.pack_linear(weight, bias, "int8")), int8_linear(x, weight, bias))


@pytest.mark.parametrize("dtype", SIXTEEN)
def test_int8_of_sixteen_bit_inputs(backend, dtype):
    x, weight, bias = layer(20, 100, 60, dtype)
    out = regard.linear(x, dense.pack_linear(weight, bias, "int8"), activation="relu")
    want = np.maximum(int8_linear(x, weight, bias), 0)
    assert_same_bits(out, want.astype(DTYPES[dtype]))


def test_int8_extremes(backend):
    """Every product at its largest, of either sign: no sum saturates; rows of zeros and tiny rows give the bias."""
    bias = np.zeros(3, np.float32)
    for n in (4, 1024, 65536):
        x = np.ones((3, n), np.float32) * np.array([[1], [-1], [0]], np.float32)
        weight = np.ones((3, n), np.float32) * np.array([[1], [-1], [1e-35]], np.float32)
        out = regard.linear(x, dense.pack_linear(weight, bias, "int8"))
        assert_same_bits(out, int8_linear(x, weight, bias))
        assert abs(out[0, 0] / n - 1) < 1e-6
        assert abs(out[1, 0] / n + 1) < 1e-6
        assert (out[2] == 0).all()
        assert (out[:, 2] == 0).all()


def test_int8_error_is_about_one_per_cent(backend):
    x, weight, bias = layer(50, 768, 300)
    want = x.astype(np.float64) @ weight.T.astype(np.float64) + bias
    error = np.abs(regard.linear(x, dense.pack_linear(weight, bias, "int8")) - want)
    # Either factor is off by up to half a step of about 3.5 / 127 deviations: root mean square 0.008 of it each.
    assert np.sqrt(np.square(error).mean()) < 0.02 * want.std()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_stays_in_its_row_and_column(backend, bad):
    x, weight, bias = layer(20, 50, 60)
    want = regard.linear(x, dense.pack_linear(weight, bias, "int8"))
    x[3, 7], weight[5, 2] = bad, bad
    out = regard.linear(x, dense.pack_linear(weight, bias, "int8"))
    assert np.isnan(out[3]).all()
    assert np.isnan(out[:, 5]).all()
    rows, columns = np.arange(20) != 3, np.arange(60) != 5
    assert_same_bits(out[rows][:, columns], want[rows][:, columns])


# ---- bfloat16 ----------------------------------------------------------------------------------------


def rounded(x: np.ndarray) -> np.ndarray:
    return x.astype(DTYPES["bfloat16"]).astype(np.float32)


@pytest.mark.parametrize("shape", shapes(), ids=str)
def test_bfloat16_is_float32_of_rounded_weights(backend, shape):
    x, weight, bias = layer(*shape)
    packed = dense.pack_linear(weight, bias, "bfloat16")
    for dtype in ("float32", "float16"):
        y = x.astype(DTYPES[dtype])
        plain = dense.pack_linear(rounded(weight), bias)
        assert_same_bits(regard.linear(y, packed), regard.linear(y, plain))


@pytest.mark.parametrize("shape", shapes(), ids=str)
def test_bfloat16_times_bfloat16(backend, shape):
    x, weight, bias = layer(*shape, dtype="bfloat16")
    out = regard.linear(x, dense.pack_linear(weight, bias, "bfloat16")).astype(np.float64)
    a, w, b = (v.astype(np.float64) for v in (x, weight, bias))
    terms = np.abs(a) @ np.abs(w.T) + np.abs(b)
    # Products of two bfloat16 are exact in float32; sums err by a few of its epsilon, and the result is rounded once.
    tolerance = EPSILON["float32"] * (4 + np.sqrt(a.shape[-1])) * (terms + 1)
    tolerance += EPSILON["bfloat16"] * (np.abs(a @ w.T + b) + 1e-3)
    assert (np.abs(out - (a @ w.T + b)) <= tolerance).all()


# ---- Both --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("held", ["bfloat16", "int8"])
@pytest.mark.parametrize("dtype", ["float32", *SIXTEEN])
def test_rows_threads_and_strides_change_no_bit(backend, held, dtype):
    x, weight, bias = layer(139, 150, 100, dtype)
    packed = dense.pack_linear(weight, bias, held)
    want, threads = regard.linear(x, packed, activation="gelu"), regard.get_num_threads()
    try:
        for n in (1, 3):
            regard.set_num_threads(n)
            assert_same_bits(regard.linear(x, packed, activation="gelu"), want)
    finally:
        regard.set_num_threads(threads)
    for n in (1, 2, 3, 5, 8, 17, 64, 65):
        assert_same_bits(regard.linear(x[:n], packed, activation="gelu"), want[:n])
        assert_same_bits(regard.linear(x[-n:], packed, activation="gelu"), want[-n:])
    assert_same_bits(regard.linear(np.asfortranarray(x), packed, activation="gelu"), want)
    transposed = dense.pack_linear(np.asfortranarray(weight)[::-1][::-1], bias, held)
    assert_same_bits(transposed.packed.view(np.uint32), packed.packed.view(np.uint32))
    out = np.zeros((139, 2, 200), x.dtype)[:, 1, ::2]
    assert regard.linear(x, packed, activation="gelu", out=out) is out
    assert_same_bits(out.copy(), want)


def test_packed_bits_serve_every_instruction_set():
    _, weight, bias = layer(1, 77, 60)
    for held in ("bfloat16", "int8"):
        packed = []
        for isa in _backend.possible():
            with _backend.using(isa):
                packed.append(dense.pack_linear(weight, bias, held).packed.view(np.uint32))
        for other in packed[1:]:
            assert_same_bits(other, packed[0])


def test_memory():
    weight = normal(0, 960, 768)
    full, half, quarter = (
        dense.pack_linear(weight, None, held).packed.nbytes for held in ("float32", "bfloat16", "int8")
    )
    assert half < 0.51 * full
    assert quarter < 0.26 * full


def test_refusals():
    x, weight, bias = layer(2, 6, 5)
    with pytest.raises(ValueError, match="held: expected 'float32', 'bfloat16', 'int8', got 'int4'"):
        dense.pack_linear(weight, bias, "int4")
    for held in ("bfloat16", "int8"):
        with pytest.raises(ValueError, match=f"weight: expected .*no float64 where held = '{held}'"):
            dense.pack_linear(weight.astype(np.float64), None, held)
        with pytest.raises(TypeError, match="weight: expected the dtype of x, float64"):
            regard.linear(x.astype(np.float64), dense.pack_linear(weight, bias, held))
        with pytest.raises(ValueError, match="weight: expected shape"):
            regard.linear(x[:, :5], dense.pack_linear(normal(0, 5, 16), None, held))
        with pytest.raises(ValueError, match=r"weight: expected shape \(out_features = 5, in_features = 5\)"):
            regard.linear(x[:, :5], dense.pack_linear(weight, None, held))  # in as many words as 6 have
    with pytest.raises(ValueError, match="at most 65536 in_features"):
        dense.pack_linear(np.zeros((1, 65537), np.float32), None, "int8")


# ---- Modules -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("held", "within"), [("bfloat16", 0.02), ("int8", 0.05)])
def test_a_module_holds_its_weights_in_fewer_bits(backend, held, within):
    module = nn.TransformerEncoder(nn.TransformerEncoderLayer(64, 4, 96, batch_first=True), 2)
    state = {name: np.array(value) for name, value in module.state_dict().items()}
    x = normal(0, 3, 10, 64)
    want = module(x)
    assert module.to(weights=held) is module
    module.load_state_dict(state)
    out = module(x)
    assert 0 < np.sqrt(np.square(out - want).mean()) < within * want.std()
    assert all(module.state_dict()[name] is state[name] for name in state)
    with pytest.raises(TypeError, match=f"(input|query|src): expected dtype float32, .* held as {held}, got float64"):
        module(x.astype(np.float64))
    assert_same_bits(module.to(weights=None)(x), want)
    module(x.astype(np.float64))
    with pytest.raises(ValueError, match="weights: expected 'float32', 'bfloat16', 'int8' or None, got 'int4'"):
        module.to(weights="int4")


def test_bfloat16_weights_stay_so(backend):
    linear, x = nn.Linear(20, 30), normal(0, 4, 20)
    weight, bias = normal(1, 30, 20, dtype="bfloat16"), normal(2, 30, dtype="bfloat16")
    linear.load_state_dict({"weight": weight, "bias": bias})
    held = linear._weights(np.dtype(np.float32)).held
    assert held == "bfloat16"
    out = linear(x)
    assert_same_bits(linear.to(weights="float32")(x), out)  # which lost nothing
    assert linear._weights(np.dtype(np.float32)).held == "float32"
    linear.to(weights=None)(x.astype(np.float64))


def test_a_layer_packs_its_projections_when_loaded():
    module = nn.TransformerDecoder(nn.TransformerDecoderLayer(24, 3, 40), 1)
    module.load_state_dict(module.state_dict())
    attention = module.layers[0]
    assert set(attention.self_attn._weights(np.dtype(np.float32))) >= {"qkv"}
    assert set(attention.multihead_attn._weights(np.dtype(np.float32))) >= {"q", "kv"}


# ---- Files -------------------------------------------------------------------------------------------


def write(path: Any, header: dict[str, Any], data: bytes) -> Any:
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


@pytest.mark.parametrize("dtype", DTYPES)
def test_loading_a_file(tmp_path, backend, dtype):
    save = pytest.importorskip("safetensors.numpy", reason="writes the file").save_file
    module = nn.TransformerEncoderLayer(16, 2, 24, batch_first=True)
    state = {name: value.astype(DTYPES[dtype]) for name, value in module.state_dict().items()}
    save(state, tmp_path / "model.safetensors")
    assert nn.load(module, tmp_path / "model.safetensors") is module
    for name, value in module.state_dict().items():
        assert_same_bits(np.array(value), state[name])
        assert not value.flags.writeable
        assert not value.flags.owndata
    other = nn.TransformerEncoderLayer(16, 2, 24, batch_first=True)
    other.load_state_dict(state)
    x = normal(0, 2, 5, 16)
    assert_same_bits(module(x), other(x))


def test_files_of_pytorch(tmp_path):
    torch = pytest.importorskip("torch", reason="writes the file")
    save = pytest.importorskip("safetensors.torch", reason="writes the file").save_file
    theirs = torch.nn.Linear(5, 3).bfloat16()
    save(theirs.state_dict(), tmp_path / "linear.safetensors")
    ours = nn.load(nn.Linear(5, 3), tmp_path / "linear.safetensors")
    np.testing.assert_array_equal(np.float32(ours.weight), theirs.weight.detach().float().numpy())


def test_renaming_and_several_files(tmp_path):
    a, b = normal(0, 3, 5), normal(1, 3)
    first = write(tmp_path / "1", {"dense.w": {"dtype": "F32", "shape": [3, 5], "data_offsets": [0, 60]}}, a.tobytes())
    header = {"b": {"dtype": "F32", "shape": [3], "data_offsets": [0, 12]}, "__metadata__": {"format": "np"}}
    header["step"] = {"dtype": "I64", "shape": [], "data_offsets": [12, 20]}
    second = write(tmp_path / "2", header, b.tobytes() + bytes(8))
    names = {"dense.w": "weight", "b": "bias"}
    module = nn.load(nn.Linear(5, 3), [first, second], names.get)
    np.testing.assert_array_equal(module.weight, a)
    np.testing.assert_array_equal(module.bias, b)
    with pytest.raises(ValueError, match="unexpected: step"):
        nn.load(nn.Linear(5, 3), [first, second], names)
    nn.load(nn.Linear(5, 3), (str(first), str(second)), names, strict=False)
    with pytest.raises(ValueError, match=r"b of .* and dense\.w of .* are both x"):
        nn.load(nn.Linear(5, 3), [first, second], lambda name: "x")
    with pytest.raises(ValueError, match="missing: bias"):
        nn.load(nn.Linear(5, 3), first, names)
    assert nn.Safetensors(second).metadata == {"format": "np"}
    assert set(nn.Safetensors(second)) == {"b", "step"}


@pytest.mark.parametrize(
    ("header", "words"),
    [
        ({"w": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}, "has 8 bytes in place of 12"),
        ({"w": {"dtype": "F32", "shape": [3], "data_offsets": [0, 16]}}, "lies at bytes 0 to 16 of 12"),
        ({"w": {"dtype": "F32", "shape": [-3], "data_offsets": [0, 12]}}, "lies at bytes"),
        ({"w": {"dtype": "F32", "shape": [3]}}, "header cannot be read"),
        ({"w": 3}, "header cannot be read"),
        ([], "header cannot be read"),
    ],
    ids=str,
)
def test_files_that_are_wrong(tmp_path, header, words):
    with pytest.raises(ValueError, match=words):
        nn.Safetensors(write(tmp_path / "wrong", header, bytes(12)))


def test_files_that_are_something_else(tmp_path):
    path = tmp_path / "file"
    for content, words in (
        (b"", "expected at least 8 bytes"),
        (b"PK\x03\x04" * 20, "its header should have"),
        (struct.pack("<Q", 4) + b"\xff\xfe\xfd{", "header cannot be read"),
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=words):
            nn.load(nn.Linear(2, 2), path)
    write(path, {"weight": {"dtype": "F8_E4M3", "shape": [4], "data_offsets": [0, 4]}}, bytes(4))
    with pytest.raises(TypeError, match="expected dtype F64"):
        nn.load(nn.Linear(2, 2, bias=False), path)
