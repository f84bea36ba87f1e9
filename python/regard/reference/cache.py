"""What caches store: numbers of one byte with one scale for each token and head."""

from __future__ import annotations

from typing import Any

import numpy as np

from regard.reference._functions import unwarned

Array = Any

#: The largest number of each dtype: it stands for a row's largest magnitude.
LARGEST = {"int8": 127, "float8_e4m3fn": 448}


@unwarned
def quantise(x: Array, dtype: Any) -> tuple[Array, Array]:
    """(numbers, scales) with x = numbers * scales: scale = max |x| / largest over the last axis.

    Quotients are rounded to nearest, ties to even. A row that is not finite gets the scale NaN and
    zeros, so that it reads back as NaN.
    """
    dtype = np.dtype(dtype)
    x = np.asarray(x).astype(np.float32)
    largest = np.float32(LARGEST[dtype.name])
    scales = np.abs(x).max(axis=-1, initial=0) / largest
    finite = np.isfinite(x).all(axis=-1)
    quotients = np.clip(x / np.where(scales == 0, 1, scales)[..., None], -largest, largest)
    if dtype == np.int8:
        quotients = np.rint(quotients)
    quotients = np.where((finite & (scales > 0))[..., None], quotients, 0)
    return quotients.astype(dtype), np.where(finite, scales, np.nan).astype(np.float32)


@unwarned
def dequantise(numbers: Array, scales: Array) -> Array:
    """numbers * scales in float32."""
    return np.asarray(numbers).astype(np.float32) * np.asarray(scales)[..., None]
