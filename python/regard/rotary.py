"""Rotary position embedding (Su et al., 2021, "RoFormer: Enhanced transformer with rotary position embedding")."""

from __future__ import annotations

from typing import Any

import numpy as np

from regard import _arrays, _backend, _checks


def rotary_embedding(
    x: Any, cos: Any, sin: Any, positions: Any = None, interleaved: bool = False, layout: str = "bhsd", out: Any = None
) -> Any:
    """Turn pairs of each token's dimensions by angles that grow with its position.

    The pair ``(x_i, x_j)`` becomes ``(x_i cos - x_j sin, x_j cos + x_i sin)``, with the cosine and
    sine of the token's angle number i. Scores between turned queries and keys then depend on the
    distance of their positions only.

    Parameters
    ----------
    x : array, (batch, heads, len, dim)
        float32, float64, float16 or bfloat16; any strides.
    cos, sin : array of float32 or x's dtype
        With positions, a table (max_positions, pairs). Without, (batch, len, pairs) for each
        token, batch may be 1; or a table, whose first len rows then serve all sequences. pairs may
        be less than dim / 2: dimensions from 2 pairs on pass through. See regard.rotary_tables.
    positions : int32 or int64 array, (len,) or (batch, len), optional
        The table's row for each token. Copied once, then checked: from 0 to max_positions - 1; those on a GPU are
        held to that range instead.
    interleaved : bool
        False: dimension i pairs with i + pairs ("rotate half", as in GPT-NeoX and Llama in
        transformers). True: dimension 2 i pairs with 2 i + 1 (as in the paper and GPT-J).
    layout : "bhsd" or "bshd"
        The order of x's axes.
    out : array, like x, optional
        Written and returned; may overlap any input. On the CPU x itself is turned in place, without a copy.

    Returns
    -------
    array, of x's shape, kind and dtype
        Computed in float32 (float64 for float64) and rounded once.

    Raises
    ------
    TypeError, ValueError
        Naming the argument, what was expected and what came.
    """
    options = (bool(interleaved), _checks.choice("layout", layout, _checks.LAYOUTS))
    arrays = (x, cos, sin, positions)
    if out is not None:
        in_place = out is x and not _arrays.on_gpu(x)  # there, one thread would read what another has turned
        arrays = (x, *_arrays.apart_from(out, arrays[1:])) if in_place else _arrays.apart_from(out, arrays)
    result = _arrays.call("rotary_embedding", _backend.cpu.rotary_embedding, (*arrays, out), options)
    if type(result) is tuple:
        named = {"x": x, "cos": cos, "sin": sin, "positions": positions, "out": out}
        raise _checks.error("rotary_embedding", result, named, layout)
    return result[0]


def rotary_tables(
    dim: int,
    length: int,
    base: float = 10000.0,
    *,
    frequencies: Any = None,
    scaling: float = 1.0,
    dtype: Any = np.float32,
) -> tuple[np.ndarray, np.ndarray]:
    """The cosines and sines that rotary_embedding takes: of ``position * base ** (-2 i / dim)``.

    Parameters
    ----------
    dim : int
        How many dimensions are turned: even.
    length : int
        Positions 0 to length - 1 get a row each.
    base : float
        The longest wave has about 2 pi base positions. A larger base is "NTK-aware" scaling.
    frequencies : array, (dim / 2,), optional
        Radians a position for each pair, in place of ``base ** (-2 i / dim)``: for schemes that
        scale each wave by a rule of their own (YaRN, Llama 3).
    scaling : float
        Positions are divided by it (position interpolation, Chen et al., 2023).
    dtype : NumPy dtype
        Of the tables; angles are computed in float64.

    Returns
    -------
    cos, sin : ndarray, (length, dim / 2)

    Raises
    ------
    ValueError
        Naming the argument, what was expected and what came.
    """
    if dim < 0 or dim % 2 != 0:
        raise ValueError(f"dim: expected an even number >= 0, got {dim!r}")
    if length < 0:
        raise ValueError(f"length: expected a number >= 0, got {length!r}")
    if not base > 0:
        raise ValueError(f"base: expected a number > 0, got {base!r}")
    if not scaling > 0:
        raise ValueError(f"scaling: expected a number > 0, got {scaling!r}")
    if frequencies is None:
        waves = float(base) ** (-np.arange(0, dim, 2, dtype=np.float64) / max(dim, 1))
    else:
        waves = np.asarray(frequencies, np.float64)
        if waves.shape != (dim // 2,):
            raise ValueError(f"frequencies: expected shape (dim / 2 = {dim // 2},), got {_checks.describe(waves)}")
    angles = np.arange(length, dtype=np.float64)[:, None] / scaling * waves
    return np.cos(angles).astype(dtype), np.sin(angles).astype(dtype)
