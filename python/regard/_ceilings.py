"""What this machine reaches at most, measured on the instruction set and threads in use."""

from __future__ import annotations

from regard import _backend

#: Above this size, memory is read and no longer a cache.
LARGEST_READ = 256 << 20


class Ceilings:
    """Rates of one backend at one number of threads; each is measured when first asked for.

    The best of three measurements of `seconds` each: a neighbour's load lowers a ceiling, nothing raises it.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._backend = _backend.cpu
        self._read: dict[int, float] = {}
        self._exponentials = 0.0
        self._tiles: float | None = None
        self.gflops = max(self._backend.measure_fma(seconds) for _ in range(3))

    def gexp(self) -> float:
        """Exponentials of float32, 1e9 a second."""
        if not self._exponentials:
            self._exponentials = max(self._backend.measure_exp(self._seconds) for _ in range(3))
        return self._exponentials

    def gtiles(self) -> float | None:
        """GFLOP/s of bfloat16 products on matrix tiles; None for an instruction set without."""
        if self._tiles is None and getattr(self._backend, "tiles", False):
            self._tiles = max(self._backend.measure_tiles(self._seconds) for _ in range(3))
        return self._tiles

    def gbytes(self, working_set: int) -> float:
        """Read bandwidth of whichever cache, or memory, holds so many bytes."""
        # Up to an eighth more: a whole power of two may lie in the next cache, and few sizes are to be measured.
        step = max(1 << 12, 1 << max(0, working_set.bit_length() - 4))
        size = min(-(-max(working_set, 1) // step) * step, LARGEST_READ)
        if size not in self._read:
            self._read[size] = max(self._backend.measure_read(size, self._seconds) for _ in range(3))
        return self._read[size]
