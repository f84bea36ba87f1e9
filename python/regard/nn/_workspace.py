"""Memory for what a forward pass needs only until its end: one stack a thread, kept between calls.

Fresh pages cost a quarter of a microsecond each, some milliseconds for a batch; a second pass of the same size finds
its memory where the first one left it. Threads have stacks of their own, so that they may call at once.
"""

from __future__ import annotations

import contextlib
import math
import threading
from types import TracebackType
from typing import Any

import numpy as np

from regard import _arrays

#: Bytes that a thread keeps between calls, at most.
_KEPT = 1 << 30
#: Arrays begin at multiples of a cache line.
_LINE = 64


class _Stack(threading.local):
    def __init__(self) -> None:
        self.chunks: list[np.ndarray] = []
        self.used = 0  # of the last chunk
        self.depth = 0


_stack = _Stack()


class Scratch:
    """A scope: arrays taken within it are free again at its end.

    >>> with Scratch() as take:
    ...     hidden = take((4, 8), np.dtype(np.float32))
    """

    __slots__ = ("_mark",)

    def __enter__(self) -> Scratch:
        self._mark = (len(_stack.chunks), _stack.used)
        _stack.depth += 1
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        _stack.depth -= 1
        count, used = self._mark
        if _stack.depth:
            # Chunks stay where they are: nothing taken outside lies behind the mark.
            if len(_stack.chunks) == count:
                _stack.used = used
            return
        if len(_stack.chunks) > 1:  # one piece next time
            total = sum(c.size for c in _stack.chunks)
            _stack.chunks = [_aligned(total)] if total <= _KEPT else []
        elif _stack.chunks and _stack.chunks[0].size > _KEPT:
            _stack.chunks = []
        _stack.used = 0

    def __call__(self, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        """An uninitialised array that is valid until the innermost scope ends."""
        bytes_needed = math.prod(shape) * dtype.itemsize
        chunks, start = _stack.chunks, _stack.used
        if not chunks or start + bytes_needed > chunks[-1].size:
            chunks.append(_aligned(max(bytes_needed + _LINE, 2 * chunks[-1].size if chunks else 0)))
            start = 0
        chunk = chunks[-1]
        _stack.used = start + (bytes_needed + _LINE - 1) // _LINE * _LINE
        return np.ndarray(shape, dtype, chunk, start)


def scratch(like: Any) -> Any:
    """A scope for a forward pass of an array: a Scratch, or on a GPU CuPy's pool, which keeps memory itself."""
    if isinstance(like, np.ndarray):
        return Scratch()
    return contextlib.nullcontext(_arrays.Beside("regard.nn", like).empty)


def _aligned(size: int) -> np.ndarray:
    memory = np.empty(size + _LINE, np.uint8)
    start = -memory.ctypes.data % _LINE
    return memory[start : start + size]
