"""regard.onnx against ONNX's own test cases, its reference evaluator, and the operators' function bodies."""

from __future__ import annotations

import functools
import importlib
import warnings
from typing import Any

import numpy as np
import pytest
import regard
from cases import DTYPES
from helpers import EPSILON
from pairwise import covering_rows

onnx = pytest.importorskip("onnx", reason="the test cases come with the onnx package")
node_cases = pytest.importorskip("onnx.backend.test.case.node", reason="this onnx has no test cases")
helper = onnx.helper

Array = np.ndarray[Any, Any]


@functools.cache
def operator_cases() -> dict[str, Any]:
    """ONNX's cases of a single node of the two operators, not those that spell it out in other operators.

    Importing a file of cases adds them to a list; collect_testcases() would import the files of all operators.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for file in ("attention", "rotaryembedding"):
            importlib.import_module(f"{node_cases.__name__}.{file}")
    return {
        case.name: case
        for case in node_cases._NodeTestCases
        if len(case.model.graph.node) == 1 and case.model.graph.node[0].op_type in ("Attention", "RotaryEmbedding")
    }


def call(node: Any, opset: int, inputs: dict[str, Array]) -> tuple[Array, ...]:
    """The node's outputs, those that it names, through regard.onnx."""
    attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    given = [inputs[name] if name else None for name in node.input]
    if node.op_type == "RotaryEmbedding":
        return (regard.onnx.rotary_embedding(*given, opset=opset, **attributes),)
    if len(node.output) > 3 and node.output[3]:
        attributes.setdefault("qk_matmul_output_mode", 0)
    found = regard.onnx.attention(*given, opset=opset, **attributes)
    assert len(found) == 4
    return tuple(x for x, name in zip(found, (*node.output, "", "", ""), strict=False) if name)


def assert_as_given(actual: Array, wanted: Array, dtype: Any, what: str) -> None:
    assert actual.dtype == wanted.dtype and actual.shape == wanted.shape, what
    # Inputs lie between 0 and 1 or are standard normal: a few roundings of the dtype that steps are rounded to.
    tolerance = 16 * EPSILON[np.dtype(dtype).name]
    with np.errstate(invalid="ignore"):  # -inf and NaN, which must be the same
        np.testing.assert_allclose(
            actual.astype(np.float64), wanted.astype(np.float64), rtol=tolerance, atol=tolerance, err_msg=what
        )


@pytest.mark.parametrize("name", operator_cases())
def test_onnx_own_cases(backend, name):
    case = operator_cases()[name]
    (node,) = case.model.graph.node
    opset = next(o.version for o in case.model.opset_import if o.domain == "")
    names = [i.name for i in case.model.graph.input]
    assert case.data_sets
    for inputs, outputs in case.data_sets:
        found = call(node, opset, dict(zip(names, inputs, strict=True)))
        assert len(found) == len(outputs)
        for actual, wanted in zip(found, outputs, strict=True):
            assert_as_given(actual, np.asarray(wanted), inputs[0].dtype, name)


# ---- Attributes drawn pairwise, against the reference evaluator in float64 -----------------------

FACTORS: dict[str, tuple[Any, ...]] = {
    "opset and cache": (
        *((23, cache) for cache in ("", "past")),
        *((24, cache) for cache in ("", "past", "nonpad")),
        *((25, cache) for cache in ("", "past", "nonpad")),
    ),
    "lengths": ((5, 7), (6, 6), (1, 4), (9, 4)),
    "dtype": tuple(DTYPES),
    "axes": (3, 4),
    "heads": ((2, 2), (4, 2), (3, 1)),
    "dims": ((8, 8), (16, 5)),
    "attn_mask": (
        None,
        "bool qk",
        "bool k",
        "bool bhqk",
        "float qk",
        "float hqk",
        "float b1qk",
        "bool short",
        "float short",
    ),
    "is_causal": (None, 0, 1),
    "window": (None, (2, -1), (-1, 1), (2, 0), (0, 3)),
    "scale": (None, 0.25),
    "softcap": (None, 0.0, 1.5),
    "softmax_precision": (None, 1, 10, 11, 16),
    "qk_matmul_output_mode": (None, 0, 1, 2, 3),
}
ROWS = covering_rows(FACTORS)


def drawn(index: int) -> tuple[int, list[Array | None], dict[str, Any]]:
    """(opset, inputs, attributes) of a row."""
    f: dict[str, Any] = {name: FACTORS[name][value] for name, value in ROWS[index].items()}
    rng = np.random.default_rng(index)
    opset, cache = f["opset and cache"]
    (len_q, len_kv), (heads, heads_kv), (dim_qk, dim_v) = f["lengths"], f["heads"], f["dims"]
    past = 3 if cache == "past" else 0
    batch, total, dtype = 2, len_kv + past, DTYPES[f["dtype"]]

    def normal(*shape: int) -> Array:
        return rng.standard_normal(shape).astype(dtype)

    q, k, v = (
        normal(batch, heads, len_q, dim_qk),
        normal(batch, heads_kv, len_kv, dim_qk),
        normal(batch, heads_kv, len_kv, dim_v),
    )
    attributes = {
        name: f[name]
        for name in ("is_causal", "scale", "softcap", "softmax_precision", "qk_matmul_output_mode")
        if f[name] is not None
    }
    if f["axes"] == 3:
        q, k, v = (x.swapaxes(1, 2).reshape(batch, x.shape[2], -1) for x in (q, k, v))
        attributes |= {"q_num_heads": heads, "kv_num_heads": heads_kv}
    if f["window"] is not None and opset >= 25:
        attributes |= dict(zip(("left_window_size", "right_window_size"), f["window"], strict=True))
    mask = None
    if f["attn_mask"] is not None:
        kind, axes = f["attn_mask"].split()
        if axes == "short":
            shape = (len_q, total - 1 if opset >= 24 else total)
        else:
            sizes = {"b": batch, "h": heads, "q": len_q, "k": total, "1": 1}
            shape = tuple(sizes[a] for a in axes)
        mask = rng.random(shape) < 0.7 if kind == "bool" else normal(*shape)
    inputs = [q, k, v, mask, None, None, None][: 6 if opset < 24 else 7]
    if cache == "past":
        inputs[4:6] = normal(batch, heads_kv, past, dim_qk), normal(batch, heads_kv, past, dim_v)
    elif cache == "nonpad":
        inputs[6] = np.array([total - 1, max(total - 3, 1)])
    return opset, inputs, attributes


def evaluated(opset: int, inputs: list[Array | None], attributes: dict[str, Any]) -> list[Array]:
    """All four outputs as onnx.reference computes them."""
    names = ["Q", "K", "V", "attn_mask", "past_key", "past_value", "nonpad_kv_seqlen"]
    given = {name: x for name, x in zip(names, inputs, strict=False) if x is not None}
    if "attn_mask" in given and given["attn_mask"].ndim == 1:
        # The evaluator's causal branch takes len_q from the mask.
        given["attn_mask"] = np.tile(given["attn_mask"], (inputs[0].shape[-2], 1))
    outputs = ["Y", "present_key", "present_value", "qk_matmul_output"]
    node = helper.make_node("Attention", [n if n in given else "" for n in names[: len(inputs)]], outputs, **attributes)
    graph = helper.make_graph(
        [node],
        "attention",
        [helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(x.dtype), x.shape) for n, x in given.items()],
        [helper.make_empty_tensor_value_info(n) for n in outputs],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)])
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        return list(onnx.reference.ReferenceEvaluator(model).run(None, given))


@pytest.mark.parametrize("index", range(len(ROWS)))
def test_drawn_attributes(backend, index):
    opset, inputs, attributes = drawn(index)
    y, present_key, present_value, stage = regard.onnx.attention(*inputs, opset=opset, **attributes)
    wide = [x if x is None or x.dtype.kind in "bi" else x.astype(np.float64) for x in inputs]
    exact = {name: x for name, x in attributes.items() if name != "softmax_precision"}
    want = evaluated(opset, wide, exact)
    dtype = inputs[0].dtype
    assert y.dtype == dtype and y.shape == want[0].shape
    # Scores are about 10 and exp multiplies their relative error; values are about 1; 16-bit outputs round once.
    tolerance = 4 * EPSILON[dtype.name] + 200 * EPSILON["float64" if dtype == np.float64 else "float32"]
    np.testing.assert_allclose(y.astype(np.float64), want[0], rtol=0, atol=tolerance)
    if inputs[4] is None:
        assert present_key is None and present_value is None
    else:
        np.testing.assert_array_equal(present_key.astype(np.float64), want[1])
        np.testing.assert_array_equal(present_value.astype(np.float64), want[2])
    mode = attributes.get("qk_matmul_output_mode")
    if mode is None:
        assert stage is None
        return
    if mode == 0:
        # The text and the function body leave softcap out; the reference evaluator applies it.
        want = evaluated(opset, wide, {name: x for name, x in exact.items() if name != "softcap"})
    assert stage.dtype == dtype and stage.shape == want[3].shape
    np.testing.assert_allclose(stage.astype(np.float64), want[3], rtol=EPSILON[dtype.name], atol=tolerance)


# ---- What no node can say ------------------------------------------------------------------------


def example(*shape: int) -> Array:
    return np.random.default_rng(len(shape)).standard_normal(shape).astype(np.float32)


def test_other_arrays_come_back_as_their_kind(backend):
    torch = pytest.importorskip("torch", reason="an array that is not NumPy's")
    q, past = example(2, 4, 24), example(2, 3, 5, 8)
    attributes = dict(q_num_heads=3, kv_num_heads=3, is_causal=1, qk_matmul_output_mode=3)
    want = regard.onnx.attention(q, q, q, None, past, past, **attributes)
    q, past = torch.from_numpy(q), torch.from_numpy(past)
    for dtype, tolerance in ((torch.float32, 0), (torch.bfloat16, 8 * EPSILON["bfloat16"])):
        x, y = q.to(dtype), past.to(dtype)
        found = regard.onnx.attention(x, x, x, None, y, y, **attributes)
        for actual, wanted in zip(found, want, strict=True):
            assert isinstance(actual, torch.Tensor) and actual.dtype == dtype
            np.testing.assert_allclose(actual.float().numpy(), wanted, rtol=0, atol=tolerance)


def test_numbers_as_masks_are_added(backend):
    """The type list of attn_mask has the integers: they are numbers to add, not truth values."""
    x = example(1, 2, 3, 8)
    mask = np.array([[0, 1, -2], [3, 0, 0], [1, 1, 1]])
    want = regard.onnx.attention(x, x, x, mask.astype(np.float32))[0]
    for dtype in (np.int8, np.int64, np.float64, ">f4"):
        np.testing.assert_array_equal(regard.onnx.attention(x, x, x, mask.astype(dtype))[0], want)


def test_a_mask_one_wide_repeats_at_opset_23_and_hides_later(backend):
    x = example(1, 2, 3, 8)
    mask = np.full((3, 1), 0.5, np.float32)
    plain = regard.onnx.attention(x, x, x)[0]
    np.testing.assert_allclose(regard.onnx.attention(x, x, x, mask, opset=23)[0], plain, atol=8 * EPSILON["float32"])
    np.testing.assert_allclose(
        regard.onnx.attention(x, x, x, mask, opset=24)[0],
        np.repeat(x[:, :, :1], 3, axis=2),
        atol=8 * EPSILON["float32"],
    )


def test_dtypes_of_value_and_query_may_differ(backend):
    q, v = example(1, 2, 3, 8).astype(np.float16), example(1, 2, 3, 8)
    y = regard.onnx.attention(q, q, v)[0]
    assert y.dtype == np.float16
    wide = q.astype(np.float32)
    np.testing.assert_array_equal(y, regard.onnx.attention(wide, wide, v)[0].astype(np.float16))


X, PAST = example(2, 3, 4, 8), example(2, 3, 5, 8)
FLAT = example(2, 4, 24)


@pytest.mark.parametrize(
    ("error", "message", "inputs", "attributes"),
    [
        (TypeError, "V: expected an array", (X, X), {}),
        (TypeError, "Q: expected an array of 3 or 4 axes, got list", ([1], X, X), {}),
        (ValueError, "Q: expected 3 or 4 axes", (X[0, 0], X, X), {}),
        (ValueError, "K: expected 4 axes", (X, FLAT, FLAT), {}),
        (TypeError, "q_num_heads: expected a number of heads", (FLAT, FLAT, FLAT), {}),
        (ValueError, "kv_num_heads: expected a divisor", (FLAT, FLAT, FLAT), dict(q_num_heads=3, kv_num_heads=5)),
        (ValueError, "q_num_heads: expected the heads of Q, 3, got 2", (X, X, X), dict(q_num_heads=2)),
        (ValueError, "K: expected shape", (X, X[..., :7], X), {}),
        (ValueError, "attn_mask: expected a shape that broadcasts", (X, X, X, np.ones((3, 4), bool)), {}),
        (ValueError, "past_value: expected an array together with past_key", (X, X, X, None, PAST), {}),
        (ValueError, "past_key: expected shape", (X, X, X, None, PAST[..., :3], PAST), {}),
        (ValueError, "past_value: expected as many keys", (X, X, X, None, PAST, PAST[:, :, :2]), {}),
        (TypeError, "past_key: expected the dtype", (X, X, X, None, PAST.astype(np.float64), PAST), {}),
        (ValueError, "nonpad_kv_seqlen: expected None", (X, X, X, None, PAST, PAST, np.array([1, 2])), {}),
        (ValueError, "nonpad_kv_seqlen: expected None before opset 24", (X, X, X, *3 * [None], [1]), dict(opset=23)),
        (ValueError, "nonpad_kv_seqlen: expected entries from 0 to", (X, X, X, *3 * [None], np.array([1, 9])), {}),
        (ValueError, "left_window_size: expected opset 25", (X, X, X), dict(opset=24, left_window_size=1)),
        (ValueError, "right_window_size: expected -1 or a count, got -2", (X, X, X), dict(right_window_size=-2)),
        (ValueError, "opset: expected 23", (X, X, X), dict(opset=22)),
        (TypeError, "opset: expected an integer", (X, X, X), dict(opset="25")),
        (TypeError, "causal: expected an attribute of Attention", (X, X, X), dict(causal=1)),
        (TypeError, "inputs: expected at most 7", (X,) * 8, {}),
        (
            ValueError,
            "qk_matmul_output_mode: expected one of 0, 1, 2, 3, got 4",
            (X, X, X),
            dict(qk_matmul_output_mode=4),
        ),
        (ValueError, "softmax_precision: expected one of 1, 10, 11, 16, got 2", (X, X, X), dict(softmax_precision=2)),
        (TypeError, "is_causal: expected one of 0, 1, got str 'yes'", (X, X, X), dict(is_causal="yes")),
        (ValueError, "softcap: ", (X, X, X), dict(softcap=-1.0)),
        (TypeError, "scale: ", (X, X, X), dict(scale="half")),
    ],
)
def test_refusals(error, message, inputs, attributes):
    with pytest.raises(error) as caught:
        regard.onnx.attention(*inputs, **attributes)
    assert str(caught.value).startswith(message)


CACHE = example(9, 4)
TOKENS = example(2, 4, 3, 8)


def test_rotary_embedding_of_other_arrays(backend):
    torch = pytest.importorskip("torch", reason="an array that is not NumPy's")
    positions = np.array([[0, 1, 8], [5, 5, 2]])
    want = regard.onnx.rotary_embedding(TOKENS, CACHE, CACHE, positions)
    found = regard.onnx.rotary_embedding(*map(torch.from_numpy, (TOKENS, CACHE, CACHE, positions)))
    assert isinstance(found, torch.Tensor)
    np.testing.assert_array_equal(found.numpy(), want)


@pytest.mark.parametrize(
    ("error", "message", "inputs", "attributes"),
    [
        (TypeError, "sin_cache: expected an array", (TOKENS, CACHE), {}),
        (ValueError, "X: expected 3 or 4 axes", (CACHE, CACHE, CACHE), {}),
        (TypeError, "num_heads: expected a number of heads", (FLAT, CACHE, CACHE), {}),
        (ValueError, "cos_cache: expected 3 axes", (TOKENS, CACHE, CACHE), {}),
        (ValueError, "cos_cache: expected 2 axes", (TOKENS, TOKENS[0], CACHE, np.zeros((2, 3), np.int64)), {}),
        (
            ValueError,
            "cos_cache: expected a last axis of half of what is rotated, 3",
            (TOKENS, CACHE, CACHE, np.zeros((2, 3), np.int64)),
            dict(rotary_embedding_dim=6),
        ),
        (
            ValueError,
            "rotary_embedding_dim: expected an even number",
            (TOKENS, CACHE, CACHE),
            dict(rotary_embedding_dim=10),
        ),
        (ValueError, "position_ids: expected", (TOKENS, CACHE, CACHE, np.full((2, 3), 9)), {}),
        (ValueError, "position_ids: expected", (TOKENS, CACHE, CACHE, np.full((2, 3), -1)), {}),
        (ValueError, "interleaved: expected one of 0, 1", (TOKENS, CACHE, CACHE), dict(interleaved=2)),
    ],
)
def test_rotary_refusals(error, message, inputs, attributes):
    with pytest.raises(error) as caught:
        regard.onnx.rotary_embedding(*inputs, **attributes)
    assert str(caught.value).startswith(message)
