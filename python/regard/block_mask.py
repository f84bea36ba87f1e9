"""Block-sparse masks for attention."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from regard import _checks


class BlockMask:
    """Which blocks of keys each block of queries sees. Blocks that are not seen cost nothing.

    The rows of a CSR matrix: the blocks of keys that block row r of queries sees are
    ``columns[row_offsets[r]:row_offsets[r + 1]]``. Rows run over (batch, heads, blocks of queries).
    Pass it to :func:`regard.attention` as ``mask``; it combines with all other options.

    Parameters
    ----------
    row_offsets : int array, (batch * heads * ceil(len_q / block_q) + 1,)
        Rising, from 0 to len(columns).
    columns : int array
        Blocks of keys, rising within a row, below ceil(len_kv / block_kv).
    shape : (batch, heads, len_q, len_kv)
        batch and heads may be 1: the mask then serves all of them.
    block_size : (block_q, block_kv)
        Queries and keys of a block; the last blocks may be cut short. Multiples of 48 queries and 96
        keys suit the kernels best, 64 and 128 well.

    Raises
    ------
    TypeError, ValueError
        Naming the argument, what was expected and what came.
    """

    def __init__(
        self,
        row_offsets: Any,
        columns: Any,
        *,
        shape: tuple[int, int, int, int],
        block_size: tuple[int, int] = (128, 128),
    ) -> None:
        if len(shape) != 4:
            raise ValueError(f"shape: expected (batch, heads, len_q, len_kv), got {shape!r}")
        batch, heads, len_q, len_kv = (_length("shape", n) for n in shape)
        self.shape = (batch, heads, len_q, len_kv)
        self.block_size = block_q, block_kv = _block_size(block_size)
        self.row_offsets = _indices("row_offsets", row_offsets)
        self.columns = _indices("columns", columns)
        rows = batch * heads * -(-len_q // block_q)
        if self.row_offsets.shape != (rows + 1,):
            raise ValueError(
                f"row_offsets: expected shape (batch * heads * ceil(len_q / block_q) + 1 = {rows + 1},), "
                f"got {self.row_offsets.shape}"
            )
        steps = np.diff(self.row_offsets)
        ends = (int(self.row_offsets[0]), int(self.row_offsets[-1]))
        if (steps < 0).any() or ends != (0, self.columns.size):
            raise ValueError(
                f"row_offsets: expected rising entries from 0 to {self.columns.size}, the length of columns, got {ends}"
                if not (steps < 0).any()
                else f"row_offsets: expected rising entries, got a fall at index {int(np.argmax(steps < 0)) + 1}"
            )
        width = -(-len_kv // block_kv)
        outside = (self.columns < 0) | (self.columns >= width)
        if outside.any():
            k = int(np.argmax(outside))
            raise ValueError(
                f"columns: expected entries from 0 to {width - 1}, the last block of keys, "
                f"got {int(self.columns[k])} at index {k}"
            )
        falls = np.diff(self.columns) <= 0
        starts = self.row_offsets[1:-1]
        falls[starts[(starts > 0) & (starts < self.columns.size)] - 1] = False
        if falls.any():
            raise ValueError(f"columns: expected rising entries within a row, got none at {int(np.argmax(falls)) + 1}")

    @classmethod
    def from_blocks(
        cls, blocks: Any, *, len_q: int, len_kv: int, block_size: tuple[int, int] = (128, 128)
    ) -> BlockMask:
        """From a bool array of blocks, ([[batch,] heads,] ceil(len_q / block_q), ceil(len_kv / block_kv))."""
        blocks = np.asarray(blocks)
        block_size = _block_size(block_size)
        len_q, len_kv = _length("len_q", len_q), _length("len_kv", len_kv)
        wanted = tuple(-(-n // b) for n, b in zip((len_q, len_kv), block_size, strict=True))
        if blocks.dtype != bool:
            raise TypeError(f"blocks: expected dtype bool, got {blocks.dtype}")
        if not 2 <= blocks.ndim <= 4 or blocks.shape[-2:] != wanted:
            raise ValueError(f"blocks: expected shape ([[batch,] heads,] {wanted[0]}, {wanted[1]}), got {blocks.shape}")
        blocks = blocks.reshape((1,) * (4 - blocks.ndim) + blocks.shape)
        rows, columns = np.nonzero(blocks.reshape(math.prod(blocks.shape[:3]), wanted[1]))
        offsets = np.searchsorted(rows, np.arange(math.prod(blocks.shape[:3]) + 1))
        return cls(offsets, columns, shape=(*blocks.shape[:2], len_q, len_kv), block_size=block_size)

    @classmethod
    def from_dense(cls, mask: Any, *, block_size: tuple[int, int] = (128, 128)) -> BlockMask:
        """From a bool mask of single queries and keys, ([[batch,] heads,] len_q, len_kv).

        Raises
        ------
        ValueError
            A block is seen in part: there a block mask cannot stand for the mask.
        """
        mask = np.asarray(mask)
        if mask.dtype != bool:
            raise TypeError(f"mask: expected dtype bool, got {mask.dtype}")
        if not 2 <= mask.ndim <= 4:
            raise ValueError(f"mask: expected shape ([[batch,] heads,] len_q, len_kv), got {mask.shape}")
        len_q, len_kv = mask.shape[-2:]
        block_q, block_kv = block_size = _block_size(block_size)
        blocks = mask[..., ::block_q, ::block_kv]
        made = cls.from_blocks(blocks, len_q=len_q, len_kv=len_kv, block_size=block_size)
        different = made.to_dense() != mask.reshape(made.shape)
        if different.any():
            place = tuple(int(i) for i in np.argwhere(different)[0])
            raise ValueError(
                f"mask: expected all of a block of {block_size} to be the same, "
                f"got both in the block of (batch, head, query, key) = {place}"
            )
        return made

    def to_dense(self) -> np.ndarray:
        """The same as a bool mask of single queries and keys, of shape `shape`."""
        batch, heads, len_q, len_kv = self.shape
        block_q, block_kv = self.block_size
        rows, width = -(-len_q // block_q), -(-len_kv // block_kv)
        blocks = np.zeros((batch * heads * rows, width), bool)
        blocks[np.repeat(np.arange(len(blocks)), np.diff(self.row_offsets)), self.columns] = True
        by_block = blocks.reshape(batch, heads, rows, width)
        return by_block.repeat(block_q, axis=2)[:, :, :len_q].repeat(block_kv, axis=3)[..., :len_kv]

    @property
    def density(self) -> float:
        """The share of all blocks that are seen."""
        batch, heads, len_q, len_kv = self.shape
        blocks = batch * heads * -(-len_q // self.block_size[0]) * -(-len_kv // self.block_size[1])
        return self.columns.size / blocks if blocks else 0.0

    def __repr__(self) -> str:
        return f"BlockMask(shape={self.shape}, block_size={self.block_size}, density={self.density:.3g})"

    def _arguments(self) -> tuple[Any, ...]:
        """As the binding takes it."""
        batch, heads, len_q, len_kv = self.shape
        # A block larger than all there is, is all there is.
        block_q, block_kv = (min(block, max(n, 1)) for block, n in zip(self.block_size, self.shape[2:], strict=True))
        return (self.row_offsets, self.columns, block_q, block_kv, batch, heads, len_q, len_kv)


def _length(argument: str, n: Any) -> int:
    """What the kernels can count to."""
    length = _checks.count(argument, n)
    if length >= 2**63:
        raise ValueError(f"{argument}: expected integers below 2^63, got {length}")
    return length


def _block_size(block_size: Any) -> tuple[int, int]:
    if not isinstance(block_size, (tuple, list)) or len(block_size) != 2:
        raise ValueError(f"block_size: expected (block_q, block_kv), got {block_size!r}")
    block_q, block_kv = (_checks.count("block_size", n, 1) for n in block_size)
    return block_q, block_kv


def _indices(name: str, given: Any) -> np.ndarray:
    x = np.asarray(given)
    if x.shape == (0,) and not hasattr(given, "dtype"):
        x = x.astype(np.int64)  # an empty list
    if x.dtype.kind not in "iu" or x.ndim != 1:
        raise TypeError(f"{name}: expected a 1-D array of whole numbers, got {x.dtype} of shape {x.shape}")
    x = x.astype(np.int64)  # a copy: nobody else changes it
    x.flags.writeable = False
    return x
