"""The ONNX operators on device arrays of either framework, the kernels emulated: against the CPU's results."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import regard
from cases import DTYPES
from helpers import EPSILON, assert_near, assert_same_bits, normal

RNG = np.random.default_rng(0)
BOOL = RNG.random((2, 1, 9, 15)) < 0.7
FLOAT = RNG.standard_normal((9, 13))

#: name: (axes, past, attn_mask, nonpad_kv_seqlen, opset, attributes)
#: 2 sequences of 9 queries and 12 keys, 4 heads over 2.
CASES: dict[str, tuple[Any, ...]] = {
    "three axes": (3, 0, None, None, 25, {"is_causal": 1, "q_num_heads": 4, "kv_num_heads": 2, "scale": 0.3}),
    "past and a mask": (4, 3, BOOL, None, 23, {"is_causal": 1}),
    "past and a band": (4, 3, BOOL, None, 25, {"left_window_size": 2, "right_window_size": 1}),
    "a band alone": (
        3,
        3,
        None,
        None,
        25,
        {"left_window_size": 2, "is_causal": 1, "q_num_heads": 4, "kv_num_heads": 2},
    ),
    "lengths": (4, 0, None, np.array([12, 5]), 24, {"is_causal": 1}),
    "a short mask": (4, 3, BOOL[..., :13], None, 24, {"softcap": 2.0}),
    "short numbers": (4, 3, FLOAT, None, 24, {}),
    "whole numbers": (4, 0, np.arange(12) % 3, None, 23, {"qk_matmul_output_mode": 3}),
    "double": (4, 0, None, None, 23, {"softmax_precision": 11, "qk_matmul_output_mode": 3}),
}


def inputs_of(name: str, dtype: str) -> list[Any]:
    axes, past, mask, lengths, opset, _ = CASES[name]
    q, k, v = (normal(i, 2, h, n, d, dtype=dtype) for i, (h, n, d) in enumerate(((4, 9, 16), (2, 12, 16), (2, 12, 8))))
    if axes == 3:
        q, k, v = (np.ascontiguousarray(x.swapaxes(1, 2)).reshape(2, x.shape[2], -1) for x in (q, k, v))
    if mask is not None and mask.dtype == np.float64:
        mask = mask.astype(DTYPES[dtype])
    before = [normal(5 + i, 2, 2, past, d, dtype=dtype) if past else None for i, d in enumerate((16, 8))]
    return [q, k, v, mask, *before, lengths][: 6 if opset < 24 else 7]


def on(gpu: Any, inputs: list[Any]) -> list[Any]:
    return [None if x is None else gpu.asarray(x) for x in inputs]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_attention(gpu, name, dtype):
    inputs, (opset, attributes) = inputs_of(name, dtype), CASES[name][4:]
    want = regard.onnx.attention(*inputs, opset=opset, **attributes)
    device = on(gpu, inputs)
    got = regard.onnx.attention(*device, opset=opset, **attributes)
    assert type(got[0]) is type(device[0]) and got[0].dtype == device[0].dtype
    near = 4 * EPSILON[dtype] + 200 * EPSILON["float64" if dtype == "float64" else "float32"]
    for place, (x, y) in enumerate(zip(got, want, strict=True)):
        assert (x is None) == (y is None)
        if y is None:
            continue
        x = gpu.asnumpy(x)
        assert x.shape == y.shape
        if place in (1, 2):
            assert_same_bits(x, y)
        else:
            assert x.dtype == y.dtype
            assert_near(x, y.astype(np.float64), near)
    if CASES[name][3] is not None:  # on the host they are checked
        again = regard.onnx.attention(*device[:6], inputs[6], opset=opset, **attributes)
        assert_same_bits(gpu.asnumpy(again[0]), gpu.asnumpy(got[0]))
        with pytest.raises(ValueError, match="nonpad_kv_seqlen: expected entries from 0 to"):
            regard.onnx.attention(*device[:6], np.array([1, 13]), opset=opset)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["past and a band", "lengths", "short numbers", "a short mask"])
def test_scores(gpu, name, dtype):
    inputs, opset = inputs_of(name, dtype), CASES[name][4]
    for mode in (0, 1, 2):
        attributes = {**CASES[name][5], "qk_matmul_output_mode": mode, "softcap": 2.0, "scale": -0.4}
        want = regard.onnx.attention(*inputs, opset=opset, **attributes)[3].astype(np.float64)
        got = gpu.asnumpy(regard.onnx.attention(*on(gpu, inputs), opset=opset, **attributes)[3])
        assert got.dtype == inputs[0].dtype and got.shape == want.shape
        assert np.isneginf(want).any() == (mode == 2)
        # Sums of 16 products of about 1, in another order, and one rounding of scores below 8.
        assert_near(got, want, 8 * EPSILON[dtype] + 64 * EPSILON["float64" if dtype == "float64" else "float32"])


def test_dtypes_differ_and_nothing_is_there(gpu):
    q, v = normal(0, 1, 2, 3, 8, dtype="float16"), normal(1, 1, 2, 3, 8)
    got = regard.onnx.attention(*on(gpu, [q, q, v]))[0]
    assert_near(gpu.asnumpy(got), regard.onnx.attention(q, q, v)[0].astype(np.float64), 4 * EPSILON["float16"])
    for shape in ((0, 3, 16), (2, 0, 16)):
        x = normal(0, *shape)
        empty = regard.onnx.attention(*on(gpu, 3 * [x]), q_num_heads=2, kv_num_heads=2)[0]
        assert tuple(empty.shape) == shape


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("interleaved", [0, 1])
def test_rotary_embedding(gpu, interleaved, dtype):
    x = normal(0, 2, 5, 3 * 8, dtype=dtype)
    tables = [normal(i, 11, 2, dtype=dtype) for i in (1, 2)]
    positions = np.array([[0, 1, 2, 3, 10], [5, 5, 2, 0, 1]])
    attributes = {"interleaved": interleaved, "num_heads": 3, "rotary_embedding_dim": 4}
    want = regard.onnx.rotary_embedding(x, *tables, positions, **attributes)
    for where in (np.asarray, gpu.asarray):
        got = regard.onnx.rotary_embedding(*on(gpu, [x, *tables]), where(positions), **attributes)
        assert tuple(got.shape) == x.shape
        assert_near(gpu.asnumpy(got), want.astype(np.float64), 8 * EPSILON[dtype])
    heads, angles = normal(3, 2, 3, 5, 8, dtype=dtype), [normal(i, 2, 5, 4, dtype=dtype) for i in (4, 5)]
    want = regard.onnx.rotary_embedding(heads, *angles, interleaved=interleaved)
    got = regard.onnx.rotary_embedding(*on(gpu, [heads, *angles]), interleaved=interleaved)
    assert_near(gpu.asnumpy(got), want.astype(np.float64), 8 * EPSILON[dtype])


X = normal(0, 2, 3, 4, 8)
PAST = normal(1, 2, 3, 5, 8)


@pytest.mark.parametrize(
    ("message", "inputs", "attributes"),
    [
        ("V: expected an array", (X, X), {}),
        ("Q: expected 3 or 4 axes", (X[0, 0], X, X), {}),
        ("K: expected shape", (X, X[..., :7], X), {}),
        ("K: expected 4 axes", (X, X[0], X), {}),
        ("attn_mask: expected a shape that broadcasts", (X, X, X, np.ones((3, 4), bool)), {}),
        ("past_key: expected shape", (X, X, X, None, PAST[..., :3], PAST), {}),
        ("past_key: expected the dtype", (X, X, X, None, PAST.astype(np.float64), PAST), {}),
        ("past_value: expected as many keys", (X, X, X, None, PAST, PAST[:, :, :2]), {}),
        ("softcap: ", (X, X, X), {"softcap": -1.0}),
        ("qk_matmul_output_mode: expected one of", (X, X, X), {"qk_matmul_output_mode": 4}),
    ],
)
def test_refusals(gpu, message, inputs, attributes):
    """As on the CPU."""
    with pytest.raises((TypeError, ValueError)) as caught:
        regard.onnx.attention(*on(gpu, list(inputs)), **attributes)
    assert str(caught.value).startswith(message)
    with pytest.raises(type(caught.value)) as on_the_cpu:
        regard.onnx.attention(*inputs, **attributes)
    assert str(on_the_cpu.value).startswith(message)


def test_arrays_elsewhere_are_refused(gpu):
    q = gpu.asarray(X)
    with pytest.raises(TypeError, match="K: expected an array of Q's kind, on its device, got float32 array"):
        regard.onnx.attention(q, X, q)
    with pytest.raises(TypeError, match="attn_mask: expected an array of Q's kind, on its device"):
        regard.onnx.attention(q, q, q, np.ones((4, 4), bool))
    with pytest.raises(TypeError, match="sin_cache: expected an array of X's kind, on its device"):
        regard.onnx.rotary_embedding(q, gpu.asarray(X[:, 0, :, :4]), X[:, 0, :, :4])
    with pytest.raises(NotImplementedError, match=r"onnx\.attention: no kernel for arrays of"):
        regard.onnx.attention(X, q, q)
