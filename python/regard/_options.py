"""The options that every kind of dot-product attention has, as the binding takes them, and the call itself."""

from __future__ import annotations

import math
import operator
import os
from typing import Any

from regard import _arrays, _backend, _checks
from regard.block_mask import BlockMask

ALIGNMENTS = {None: 0, "upper_left": 1, "lower_right": 2}
PRECISIONS = {"highest": 0, "high": 1, "medium": 2}


def window_sides(causal: bool, window: Any) -> tuple[int, int]:
    """Counts either side of the diagonal, -1 = unlimited. Causal is a window with no right side."""
    if window is None:
        return -1, 0 if causal else -1
    try:
        left, right = (-1 if side is None else int(side) for side in window)
        refused = any(side is not None and (side < 0 or side != int(side)) for side in window)
    except (OverflowError, TypeError, ValueError):
        refused = True
    if refused:
        raise ValueError(f"window: expected {_checks.VALUES['window']}, got {window!r}")
    return min(left, 2**62), 0 if causal else min(right, 2**62)


def checked_softcap(softcap: float) -> float:
    """It, if it is a number above 0."""
    _checks.number("softcap", softcap)
    if not softcap > 0:
        raise ValueError(f"softcap: expected {_checks.VALUES['softcap']}, got {softcap!r}")
    return softcap


def dropout(p: float, seed: int | None) -> tuple[float, int]:
    """Checked probability and seed; a seed from the system where none is given."""
    _checks.number("dropout_p", p)
    if not 0 <= p <= 1:
        raise ValueError(f"dropout_p: expected {_checks.VALUES['dropout_p']}, got {p!r}")
    if seed is None:
        return p, int.from_bytes(os.urandom(8), "little")
    try:
        number = operator.index(seed)
    except TypeError:
        raise TypeError(f"seed: expected None or an int from 0 to 2^64 - 1, got {seed!r}") from None
    if not 0 <= number < 2**64:
        raise ValueError(f"seed: expected None or an int from 0 to 2^64 - 1, got {seed!r}")
    return p, number


def parsed(
    query: Any,
    mask: Any,
    causal: bool,
    window: Any,
    alignment: str | None,
    scale: float | None,
    softcap: float | None,
    dropout_p: float,
    seed: int | None,
    precision: str,
) -> tuple[Any, tuple[Any, ...]]:
    """(bool mask or None, (block mask, left, right, alignment, scale, softcap, dropout_p, seed, precision))."""
    products = _checks.choice("precision", precision, PRECISIONS)
    diagonal = _checks.choice("alignment", alignment, ALIGNMENTS)
    if softcap is not None:
        checked_softcap(softcap)
    left, right = (-1, 0 if causal else -1) if window is None else window_sides(causal, window)
    if dropout_p != 0.0 or seed is not None:
        dropout_p, seed = dropout(dropout_p, seed)
    if scale is None:
        if not hasattr(query, "ndim") and hasattr(query, "__dlpack__"):  # the caller's own kind, which only gives
            query = _arrays.numpy_view("attention", query)
        dim = query.shape[-1] if getattr(query, "ndim", 0) and not isinstance(query, type) else 1
        scale = 1.0 / math.sqrt(dim or 1)
    blocks = None
    if type(mask) is BlockMask:
        mask, blocks = None, mask._arguments()
    return mask, (blocks, left, right, diagonal, scale, softcap or 0.0, dropout_p, seed or 0, products)


def attend(
    operation: str,
    names: tuple[str, ...],
    inputs: tuple[Any, ...],
    out: Any,
    numbers: tuple[Any, ...],
    stated: tuple[Any, Any, Any],
    layout: str = "",
) -> Any:
    """Call the binding of that name, and word its refusal: out, or a tuple of all that was asked for.

    `names` are those of `inputs`; `stated` are mask, scale and softcap as the caller gave them.
    """
    if out is not None:
        inputs = _arrays.apart_from(out, inputs)
    try:
        result = _arrays.call(operation, getattr(_backend.cpu, operation), (*inputs, out), numbers)
    except TypeError:
        _checks.number("scale", 1.0 if stated[1] is None else stated[1])
        raise
    if type(result) is tuple:
        arguments = dict(zip((*names, "out"), (*inputs, out), strict=True))
        arguments |= dict(zip(("mask", "scale", "softcap"), stated, strict=True))
        raise _checks.error(operation, result, arguments, layout)
    return tuple(result) if len(result) > 1 else result[0]
