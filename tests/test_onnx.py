"""regard.onnx against ONNX's own test cases, its reference evaluator, and the operators' function bodies."""

from __future__ import annotations

import functools
import importlib
import warnings
from typing import Any

import numpy as np
import pytest
import regard
from helpers import EPSILON

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
