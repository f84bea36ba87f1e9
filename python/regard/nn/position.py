"""Positional encodings: added to embeddings (Vaswani et al., 2017), or turning queries and keys (Su et al., 2021)."""

from __future__ import annotations

from typing import Any

import numpy as np

from regard._checks import describe
from regard.nn.module import Memory, Module, normal
from regard.rotary import rotary_embedding, rotary_tables


def sinusoids(length: int, dim: int) -> np.ndarray:
    """(length, dim): sin and cos of position / 10000^(2i / dim) in even and odd columns."""
    angles = np.arange(length)[:, None] / 10000.0 ** (np.arange(0, dim, 2) / dim)
    table = np.empty((length, dim))
    table[:, 0::2] = np.sin(angles)
    table[:, 1::2] = np.cos(angles[:, : dim // 2])
    return table


class PositionalEncoding(Module):
    """Adds to each position of a sequence a vector of its own.

    Parameters
    ----------
    d_model : int
        Width of the vectors.
    max_len : int
        The longest sequence.
    learned : bool
        The vectors are a weight, (max_len, d_model), in place of sinusoids, which are no parameter.
    batch_first : bool
        Arrays are (batch, len, d_model) instead of (len, batch, d_model).
    """

    def __init__(
        self,
        d_model: int,
        max_len: int = 5000,
        learned: bool = False,
        batch_first: bool = False,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(device, dtype)
        self.d_model, self.max_len, self.learned, self.batch_first = d_model, max_len, learned, batch_first
        if learned:
            self.add_parameter("weight", (max_len, d_model), normal(1.0, max_len, d_model))

    def _pack(self, dtype: Any, memory: Memory) -> Any:
        if self.learned:
            return self._parameters["weight"].put(memory, dtype)
        return memory.put(type(self).__name__, sinusoids(self.max_len, self.d_model), dtype)

    def forward(self, x: Any, start: int = 0) -> Any:
        """x plus the vectors of positions start, start + 1, ...

        x is (len, batch, d_model), batch first where so made, or (len, d_model).
        """
        table = self._weights_for("x", x)
        axis = 1 if self.batch_first and x.ndim == 3 else 0
        if x.ndim not in (2, 3) or x.shape[-1] != self.d_model or not 0 <= start <= self.max_len - x.shape[axis]:
            raise ValueError(
                f"x: expected d_model = {self.d_model} and positions from start = {start} "
                f"within max_len = {self.max_len}, got {describe(x)}"
            )
        rows = table[start : start + x.shape[axis]]
        return x + (rows[:, None] if x.ndim == 3 and axis == 0 else rows)


class RotaryEmbedding(Module):
    """Turns pairs of each token's dimensions by angles that grow with its position; for queries and keys.

    Scores between queries and keys so turned depend on the distance of their positions only.

    Parameters
    ----------
    dim : int
        How many dimensions of each head are turned: even. Those after them pass through.
    max_positions : int
        Positions are 0 to max_positions - 1. The table of their angles, (max_positions, dim / 2) cosines
        and as many sines, is made once and shared by all copies of the module.
    base : float
        Pair i turns by ``base ** (-2 i / dim)`` radians a position.
    interleaved : bool
        False: dimension i pairs with i + dim / 2 ("rotate half"). True: 2 i pairs with 2 i + 1.
    scaling : float
        Positions are divided by it (position interpolation, Chen et al., 2023).
    frequencies : array, (dim / 2,), optional
        Radians a position for each pair, in place of those of base.

    Notes
    -----
    There are no weights: nothing of it is in a state dict. See regard.rotary_tables and
    regard.rotary_embedding.

    References
    ----------
    Su et al., "RoFormer: Enhanced transformer with rotary position embedding", 2021.
    """

    _float32_serves_16_bit = ("cpu", "gpu")  # in 16 bits neighbouring angles coincide

    def __init__(
        self,
        dim: int,
        max_positions: int = 4096,
        base: float = 10000.0,
        interleaved: bool = False,
        *,
        scaling: float = 1.0,
        frequencies: Any = None,
    ) -> None:
        super().__init__()
        if dim <= 0 or dim % 2:
            raise ValueError(f"dim: expected an even number > 0, got {dim!r}")
        if max_positions <= 0:
            raise ValueError(f"max_positions: expected a number > 0, got {max_positions!r}")
        self.dim, self.max_positions, self.base, self.interleaved = dim, max_positions, base, interleaved
        self.scaling = scaling
        self.frequencies = None if frequencies is None else np.array(frequencies, np.float64)
        rotary_tables(dim, 0, base, frequencies=self.frequencies, scaling=scaling)  # refuses what does not fit

    def __deepcopy__(self, memo: Any) -> RotaryEmbedding:
        return self  # nothing to change apart: layers of a stack share one table

    def _pack(self, dtype: Any, memory: Memory) -> Any:
        tables = rotary_tables(
            self.dim, self.max_positions, self.base, frequencies=self.frequencies, scaling=self.scaling, dtype=dtype
        )
        return tuple(memory.put(type(self).__name__, x, dtype) for x in tables)

    def tables(self, x: Any) -> tuple[Any, Any]:
        """Cosines and sines, (max_positions, dim / 2) each, for turning arrays of x's dtype."""
        cos, sin = self._weights_for("x", x)
        return cos, sin

    def forward(self, x: Any, positions: Any = None, layout: str = "bhsd", out: Any = None) -> Any:
        """x turned.

        Parameters
        ----------
        x : array, (batch, heads, len, >= dim)
            With layout="bshd" (batch, len, heads, >= dim).
        positions : int32 or int64 array, (len,) or (batch, len), optional
            Of each token; default 0, 1, ...
        out : array, like x, optional
            Written and returned; x itself is turned in place.

        Returns
        -------
        array, of x's shape and dtype

        Raises
        ------
        TypeError, ValueError
            Naming the argument, what was expected and what came.
        """
        cos, sin = self.tables(x)
        if x.ndim == 4:
            length = x.shape[1 if layout == "bshd" else 2]
            if x.shape[-1] < self.dim or (positions is None and length > self.max_positions):
                raise ValueError(
                    f"x: expected at least dim = {self.dim} dimensions and, without positions, at most "
                    f"max_positions = {self.max_positions} tokens, got {describe(x)} as {layout}"
                )
        return rotary_embedding(x, cos, sin, positions, self.interleaved, layout, out)
