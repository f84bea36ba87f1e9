"""Maps and weights of squeeze-and-excitation, and how far a result may lie from float64's: for CPU and GPU alike.

A shape is (batch, channels, reduced, height, width).
"""

from __future__ import annotations

import numpy as np
from cases import DTYPES
from helpers import EPSILON, as_float64, compute_epsilon, normal

ACTIVATIONS = ["relu", "silu", "gelu", "hard_swish", "gelu_tanh"]
GATES = ["sigmoid", "tanh", "hard_sigmoid", ("hard_sigmoid", 0.2, 0.5)]


def image(shape, layout, dtype, seed=0):
    batch, channels, _, height, width = shape
    x = normal(seed, batch, channels, height, width, dtype=dtype) + np.float32(0.5)
    x = x.astype(DTYPES[dtype])
    return x if layout == "nchw" else np.ascontiguousarray(x.transpose(0, 2, 3, 1))


def weights(shape, dtype):
    _, channels, reduced, _, _ = shape
    w_reduce = normal(1, reduced, channels) / np.sqrt(channels)
    w_expand = normal(3, channels, reduced) * 2 / np.sqrt(reduced)
    w = w_reduce, normal(2, reduced), w_expand, normal(4, channels)
    return tuple(x.astype(DTYPES[dtype]) for x in w)


def tolerance(x, dtype):
    """Means of n terms, two short dot products and a gate between -1 and 1, times x.

    The mean errs by sqrt(n) epsilon at most in practice, the products pass that on at their own
    size (a few), and a two-byte dtype rounds the output once.
    """
    n = max(1, x.size)
    relative = compute_epsilon(dtype) * (32 + np.sqrt(n))
    relative += {"float16": EPSILON["float16"], "bfloat16": EPSILON["bfloat16"]}.get(dtype, 0.0)
    return relative * np.abs(as_float64(x)[0]).max(initial=0.0)
