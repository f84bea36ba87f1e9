"""Weights, states and tolerances of recurrent layers, for the tests of every backend."""

from __future__ import annotations

from typing import Any

import numpy as np
from cases import DTYPES
from helpers import EPSILON, compute_epsilon, normal

GATES = {"gru": 3, "lstm": 4}


def layer(cell: str, features: int, hidden: int, dtype: str, bias: bool = True) -> dict[str, Any]:
    """Weights of the size that PyTorch's initial ones have."""
    rows = GATES[cell] * hidden
    size = np.asarray(1 / np.sqrt(max(hidden, 1)), DTYPES[dtype])
    weights = {
        "w_input": normal(1, rows, features, dtype=dtype) * size,
        "w_hidden": normal(2, rows, hidden, dtype=dtype) * size,
    }
    if bias:
        weights |= {"b_input": normal(3, rows, dtype=dtype), "b_hidden": normal(4, rows, dtype=dtype)}
    return weights


def states(cell: str, batch: int, hidden: int, dtype: str) -> dict[str, Any]:
    names = ("h0",) if cell == "gru" else ("h0", "c0")
    return {name: normal(5 + i, batch, hidden, dtype=dtype) for i, name in enumerate(names)}


def near(dtype: str, hidden: int, features: int) -> float:
    """Absolute: states are below 1, cells of these cases below 4.

    A gate's argument errs by sqrt(n) epsilon of n terms of some size 1; sigmoid and tanh have slopes of at most 1, and
    what a state has erred is carried on by factors that are below 1 on average: some three steps' errors add up.
    """
    tolerance = 8 * compute_epsilon(dtype) * (4 + np.sqrt(hidden + features))
    return float(tolerance + (2 * EPSILON[dtype] if dtype in ("float16", "bfloat16") else 0))
