"""Activations, gates, dtypes and the affine map, as several families use them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

Array = Any  # a NumPy array

# NaN, inf and underflow are results like others: where they show, no warning should.
unwarned = np.errstate(all="ignore")


def affine(x: Array, weight: Array, bias: Array | None) -> Array:
    y = x @ np.asarray(weight).astype(x.dtype).T
    return np.asarray(y if bias is None else y + np.asarray(bias).astype(x.dtype))


def mean(x: Array, axis: int | tuple[int, ...], keepdims: bool = False) -> Array:
    """As NumPy's, but of nothing it is NaN without a warning, which errstate does not still."""
    if x.size == 0:
        return x.sum(axis=axis, keepdims=keepdims) / x.dtype.type(0)
    return x.mean(axis=axis, keepdims=keepdims)


def relu(x: Array) -> Array:
    return np.maximum(x, x.dtype.type(0))


def sigmoid(x: Array) -> Array:
    """1 / (1 + exp(-x)), from exp(-|x|) on both sides: it neither overflows nor cancels."""
    e = np.exp(-np.abs(x))
    return np.where(x >= 0, x.dtype.type(1), e) / (1 + e)


def silu(x: Array) -> Array:
    return x * sigmoid(x)


def gelu(x: Array) -> Array:
    """x times the normal distribution function, by erfc: 1 + erf would cancel left of 0."""
    erfc = np.vectorize(math.erfc, otypes=[np.float64])(np.asarray(x, np.float64) * -math.sqrt(0.5))
    return x * (0.5 * erfc).astype(x.dtype)


def gelu_tanh(x: Array) -> Array:
    """The approximation of gelu by tanh: x (1 + tanh u) / 2 is x / (1 + e^-2u)."""
    u = x.dtype.type(math.sqrt(2 / math.pi)) * (x + x.dtype.type(0.044715) * x * x * x)
    return x * sigmoid(2 * u)


def hard_sigmoid(x: Array, alpha: float = 1 / 6, beta: float = 0.5) -> Array:
    return np.clip(x.dtype.type(alpha) * x + x.dtype.type(beta), 0, 1)


def hard_swish(x: Array) -> Array:
    return x * hard_sigmoid(x)


ACTIVATIONS = {"relu": relu, "silu": silu, "gelu": gelu, "hard_swish": hard_swish, "gelu_tanh": gelu_tanh}
GATES = {"sigmoid": sigmoid, "tanh": np.tanh, "hard_sigmoid": hard_sigmoid}


def chosen(functions: dict[str, Any], name: str) -> Any:
    if name not in functions:
        raise ValueError(f"expected one of {', '.join(functions)}, got {name!r}")
    return functions[name]


def gate_function(gate: str | tuple[str, float, float]) -> Any:
    if isinstance(gate, str):
        return chosen(GATES, gate)
    name, alpha, beta = gate
    if name != "hard_sigmoid":
        raise ValueError(f'only the gate "hard_sigmoid" has parameters, got {gate!r}')
    return lambda x: hard_sigmoid(x, alpha, beta)


def dtypes_of(*arrays: Array) -> tuple[Any, Any]:
    """The arrays' one dtype, and the one to compute in. bfloat16 is known by name: no import."""
    dtype = np.asarray(arrays[0]).dtype
    if any(np.asarray(x).dtype != dtype for x in arrays):
        raise TypeError(f"dtypes differ: {[str(np.asarray(x).dtype) for x in arrays]}")
    if dtype.name not in ("float64", "float32", "float16", "bfloat16"):
        raise TypeError(f"dtype must be float64, float32, float16 or bfloat16, got {dtype}")
    return dtype, np.float64 if dtype.name == "float64" else np.float32
