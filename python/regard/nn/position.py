"""Positional encodings that are added to embeddings (Vaswani et al., 2017)."""

from __future__ import annotations

from typing import Any

import numpy as np

from regard._checks import describe
from regard.nn.module import Module, normal


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

    def _pack(self, dtype: Any) -> Any:
        if self.learned:
            return self._parameters["weight"].as_numpy(dtype)
        return sinusoids(self.max_len, self.d_model).astype(dtype)

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
