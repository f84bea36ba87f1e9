"""The operations that `check` and `bench` run: a new one adds one row to its family's ROWS."""

from __future__ import annotations

from regard._cli.operation import Arguments, Case, Operation, dtypes, moved_bytes
from regard._cli.rows import additive, cache, channel, dense, dot_product, recurrent

__all__ = ["OPERATIONS", "Arguments", "Case", "Operation", "dtypes", "moved_bytes"]

OPERATIONS: tuple[Operation, ...] = (
    *dot_product.ROWS,
    *cache.ROWS,
    *dense.ROWS,
    *channel.ROWS,
    *additive.ROWS,
    *recurrent.ROWS,
)
