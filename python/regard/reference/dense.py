"""Linear layers and norms."""

from __future__ import annotations

from typing import Any

import numpy as np

from regard.reference._functions import ACTIVATIONS, affine, chosen, dtypes_of, mean, unwarned

Array = Any


@unwarned
def linear(x: Array, weight: Array, bias: Array | None = None, activation: str | None = None) -> Array:
    """activation(x weight^T + bias): x (..., in), weight (out, in), bias (out,)."""
    dtype, compute = dtypes_of(x, weight)
    y = affine(np.asarray(x).astype(compute), weight, bias)
    if activation is not None:
        y = chosen(ACTIVATIONS, activation)(y)
    return y.astype(dtype)


@unwarned
def layer_norm(x: Array, weight: Array | None = None, bias: Array | None = None, eps: float = 1e-5) -> Array:
    """(x - mean) / sqrt(variance + eps) * weight + bias over the last axis; variance is biased."""
    dtype, compute = dtypes_of(x)
    x = np.asarray(x).astype(compute)
    centred = x - mean(x, -1, keepdims=True)
    variance = mean(np.square(centred), -1, keepdims=True)
    return affine_of_norm(centred / np.sqrt(variance + compute(eps)), weight, bias, dtype)


@unwarned
def rms_norm(x: Array, weight: Array | None = None, eps: float = 1e-6) -> Array:
    """x / sqrt(mean(x^2) + eps) * weight over the last axis."""
    dtype, compute = dtypes_of(x)
    x = np.asarray(x).astype(compute)
    mean_square = mean(np.square(x), -1, keepdims=True)
    return affine_of_norm(x / np.sqrt(mean_square + compute(eps)), weight, None, dtype)


def affine_of_norm(y: Array, weight: Array | None, bias: Array | None, dtype: Any) -> Array:
    if weight is not None:
        y = y * np.asarray(weight).astype(y.dtype)
    if bias is not None:
        y = y + np.asarray(bias).astype(y.dtype)
    return y.astype(dtype)
