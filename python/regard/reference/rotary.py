"""Rotary position embedding (Su et al., 2021)."""

from __future__ import annotations

from typing import Any

import numpy as np

from regard.reference._functions import unwarned
from regard.reference.dot_product import heads_first

Array = Any


@unwarned
def rotary_embedding(
    x: Array, cos: Array, sin: Array, positions: Array | None = None, interleaved: bool = False, layout: str = "bhsd"
) -> Array:
    """Each pair (a, b) of a token's dimensions turned by its angle: (a cos - b sin, b cos + a sin)  [1]_.

    Parameters
    ----------
    x : (batch, heads, len, dim), or with layout="bshd" heads and lengths exchanged
    cos, sin : float32 or x's dtype
        A table (max_positions, pairs), or (batch, len, pairs), each token's own. Dimensions from
        2 pairs on pass through.
    positions : (len,) or (batch, len) ints; the table's row of each token, 0, 1, ... where left out
    interleaved : bool
        Pairs are dimensions 2 i and 2 i + 1, or else i and i + pairs.

    .. [1] Su et al., RoFormer: Enhanced transformer with rotary position embedding, 2021
    """
    x = np.asarray(x)
    compute = np.float64 if x.dtype == np.float64 else np.float32
    c, s = (angles_of_tokens(t, positions, x.shape[1 if layout == "bshd" else 2]).astype(compute) for t in (cos, sin))
    pairs = c.shape[-1]
    if 2 * pairs > x.shape[-1]:
        raise ValueError(f"cos has {pairs} pairs, x only {x.shape[-1]} dimensions")
    y = heads_first(x, layout).copy()
    first, second = (
        (slice(0, 2 * pairs, 2), slice(1, 2 * pairs, 2)) if interleaved else (slice(0, pairs), slice(pairs, 2 * pairs))
    )
    a, b = y[..., first].astype(compute), y[..., second].astype(compute)
    y[..., first] = (a * c - b * s).astype(x.dtype)
    y[..., second] = (b * c + a * s).astype(x.dtype)
    return heads_first(y, layout)


def angles_of_tokens(table: Array, positions: Array | None, length: int) -> Array:
    """(batch or 1, 1, len, pairs): one row a token, the same for all heads."""
    table = np.asarray(table)
    if positions is not None:
        table = table[np.asarray(positions)]
    elif table.ndim == 2:
        table = table[:length]
    return table[None, None] if table.ndim == 2 else table[:, None]
