"""Merging attention over disjoint sets of keys (Milakov & Gimelshein, 2018)."""

from __future__ import annotations

from typing import Any

import numpy as np

from regard.reference._functions import dtypes_of, unwarned
from regard.reference.dot_product import heads_first

Array = Any


@unwarned
def merge_attention(outs: Any, lses: Any, layout: str = "bhsd") -> tuple[Array, Array]:
    """lse = log sum_i exp(lse_i), out = sum_i exp(lse_i - lse) out_i  [1]_.

    outs are the parts' (..., dim_v), lses their (...). A part whose lse is -inf saw no key and is
    left out, whatever its out holds; where all are, out is 0 and lse -inf. With layout="bshd" outs
    are (batch, len, heads, dim_v), lses still (batch, heads, len).

    .. [1] Milakov & Gimelshein, Online normalizer calculation for softmax, 2018
    """
    dtype, compute = dtypes_of(*outs)
    o = np.stack([heads_first(x, layout) if np.ndim(x) == 4 else np.asarray(x) for x in outs]).astype(compute)
    lse = np.stack([np.asarray(x) for x in lses]).astype(compute)
    top = lse.max(axis=0)
    top = np.where(top == -np.inf, 0, top)
    total = np.exp(lse - top).sum(axis=0)
    merged = (top + np.log(total)).astype(np.asarray(lses[0]).dtype)
    weights = (np.exp(lse - top) / total)[..., None]
    out = np.where(lse[..., None] == -np.inf, 0, weights * o).sum(axis=0).astype(dtype)
    return heads_first(out, layout) if out.ndim == 4 else out, merged
