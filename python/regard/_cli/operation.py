"""What a row of the table of operations is: what to call, with what, and what it must equal."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

import regard
from regard import reference
from regard._costs import COSTS, size

_MATRICES = ("w_reduce", "w_expand", "w_query", "w_key", "w_location", "w_input", "w_hidden")

Arguments = dict[str, Any]
Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Case:
    """One call: shapes of the array arguments by name, the other arguments as they are."""

    label: str
    shapes: Mapping[str, Shape]
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def arguments(self, dtype: Any, seed: int = 0) -> Arguments:
        """Random arguments of `dtype`, the same for the same seed."""
        rng = np.random.default_rng(seed)
        arrays = {name: _fill(rng, name, shape, dtype) for name, shape in self.shapes.items()}
        return {**arrays, **self.options}


@dataclasses.dataclass(frozen=True)
class Operation:
    """What to call, what it must equal, and what it costs.

    Attributes
    ----------
    name : str
        Of the public function, and of its reference.
    terms : callable
        The length of the longest chain of sums, from the arguments: it sets the tolerance.
    check, bench : tuples of Case
        Small calls that reach every branch; calls of real models.
    numpy, torch : callables, optional
        The same the plain way, with the same arguments.
    call, reference : callables
        By default what is called `name` in regard and in regard.reference.
    """

    name: str
    terms: Callable[[Arguments], int]
    check: tuple[Case, ...]
    bench: tuple[Case, ...]
    numpy: Callable[..., Any] | None = None
    torch: Callable[..., Any] | None = None
    call: Callable[..., Any] | None = None
    reference: Callable[..., Any] | None = None

    def flops(self, arguments: Arguments) -> float:
        """Floating-point operations of a call."""
        return COSTS[self.name](arguments).flops

    def run(self, arguments: Arguments) -> Any:
        return (self.call or getattr(regard, self.name))(**arguments)

    def expected(self, arguments: Arguments) -> Any:
        """The reference in float64, on the values that the arguments have after rounding."""
        wide = {name: _widened(x) for name, x in arguments.items()}
        return (self.reference or getattr(reference, self.name))(**wide)


def moved_bytes(arguments: Arguments, result: Any) -> int:
    """What must move at least: each input read once, each output written once."""
    return size([*arguments.values(), result])


def dtypes() -> list[np.dtype]:
    """The dtypes that NumPy has here: bfloat16 comes with ml_dtypes."""
    found = [np.dtype(t) for t in (np.float32, np.float64, np.float16)]
    try:
        import ml_dtypes
    except ImportError:
        return found
    return [*found, np.dtype(ml_dtypes.bfloat16)]


def _fill(rng: np.random.Generator, name: str, shape: Shape, dtype: Any) -> Any:
    """Values as they come in practice, by the argument's name."""
    if name in ("mask", "attn_mask"):
        return rng.random(shape) < 0.7
    if name == "alibi_slopes":
        return (2.0 ** -rng.uniform(1, 8, shape)).astype(np.float32)
    if name in ("sinks", "cos", "sin", "lses"):
        return rng.standard_normal(shape).astype(np.float32)
    if name == "positions" or name.endswith("lengths"):
        return rng.integers(0, 40, shape)
    if name == "previous_weights":
        values = rng.random(shape, np.float32)
        return (values / values.sum(axis=-1, keepdims=True)).astype(dtype)
    values = rng.standard_normal(shape, np.float32)
    if name == "v" or (name in ("w", "weight", *_MATRICES) and len(shape) == 2):
        values /= math.sqrt(shape[-1])  # so that outputs are about 1, whatever the width
    return values.astype(dtype)


def _widened(x: Any) -> Any:
    return x.astype(np.float64) if isinstance(x, np.ndarray) and x.dtype.kind in "fV" else x
