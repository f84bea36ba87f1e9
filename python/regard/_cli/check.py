"""`check`: every operation on every instruction set that this machine runs, against regard.reference."""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from regard import _backend
from regard._cli import operations, table
from regard._cli.operations import Case, Operation

_HEADER = ("operation", "dtype", "instruction set", "max error", "tolerance", "")


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The worst of an operation's cases. Errors are relative to the largest magnitude in the reference."""

    operation: str
    dtype: str
    isa: str
    error: float
    tolerance: float
    note: str = ""

    @property
    def ok(self) -> bool:
        return self.error <= self.tolerance

    @property
    def row(self) -> tuple[str, ...]:
        figures = ("-", "-") if math.isnan(self.error) else (f"{self.error:.1e}", f"{self.tolerance:.1e}")
        return (self.operation, self.dtype, self.isa, *figures, "ok" if self.ok else "WRONG")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_operation(parser)


def add_operation(parser: argparse.ArgumentParser) -> None:
    """The option that chosen_operations() takes."""
    names = [o.name for o in operations.OPERATIONS]
    about = "only this one; may be repeated"
    parser.add_argument("--operation", action="append", choices=names, metavar="NAME", help=about)


def run(options: argparse.Namespace) -> int:
    chosen = chosen_operations(options.operation)
    count = len(chosen) * len(operations.dtypes()) * len(_backend.possible())
    with table.progress(count, options.plain) as step:
        outcomes = list(check(chosen, step))
    title = "Largest error against regard.reference in float64, relative to the largest value"
    rows = [o.row for o in outcomes]
    table.show(title, _HEADER, rows, left=3, plain=options.plain, bad=lambda row: row[5] != "ok")
    wrong = [o for o in outcomes if not o.ok]
    print(f"\n{len(outcomes)} checks, " + (f"{len(wrong)} wrong:" if wrong else "all right"))
    for o in wrong:
        print(f"  {o.operation} {o.dtype} {o.isa}: {o.note}")
    return 1 if wrong else 0


def chosen_operations(names: Sequence[str] | None) -> tuple[Operation, ...]:
    known = {o.name: o for o in operations.OPERATIONS}
    return tuple(known[n] for n in names or known)


def check(chosen: Sequence[Operation], step: Any = lambda _: None) -> Iterator[Outcome]:
    """Run all cases of the operations, in every dtype, on every instruction set."""
    for operation in chosen:
        for dtype in operations.dtypes():
            cases = [(c, c.arguments(dtype)) for c in operation.check]
            expected = [operation.expected(arguments) for _, arguments in cases]
            for isa in _backend.possible():
                step(f"{operation.name} {dtype.name} {isa}")
                with _backend.using(isa):
                    yield _outcome(operation, dtype.name, isa, cases, expected)


def _outcome(
    operation: Operation, dtype: str, isa: str, cases: list[tuple[Case, dict[str, Any]]], expected: list[Any]
) -> Outcome:
    worst = Outcome(operation.name, dtype, isa, 0.0, 0.0)
    for (case, arguments), wanted in zip(cases, expected, strict=True):
        try:
            error, tolerance = compared(operation.run(arguments), wanted, operation.terms(arguments))
        except Exception as failure:
            note = f"{case.label}: {type(failure).__name__}: {failure}"
            return Outcome(operation.name, dtype, isa, math.nan, 0.0, note)
        if error > tolerance:
            return Outcome(operation.name, dtype, isa, error, tolerance, case.label)
        if worst.tolerance == 0 or error / tolerance > worst.error / worst.tolerance:
            worst = Outcome(operation.name, dtype, isa, error, tolerance)
    return worst


def compared(result: Any, expected: Any, terms: int) -> tuple[float, float]:
    """(error, tolerance) of the output, or of the worst of several."""
    results = result if isinstance(result, tuple) else (result,)
    wanted = expected if isinstance(expected, tuple) else (expected,)
    if len(results) != len(wanted):
        raise ValueError(f"expected {len(wanted)} outputs, got {len(results)}")
    pairs = [(_error(r, w), tolerance(r.dtype, terms)) for r, w in zip(results, wanted, strict=True)]
    return max(pairs, key=lambda pair: pair[0] / pair[1])


def tolerance(dtype: np.dtype, terms: int) -> float:
    """How far a right result may be from the reference, relative to the largest value.

    A sum of n rounded terms is off by about sqrt(n) epsilon at most; twice that leaves room for exponentials
    and quotients around it (right kernels stay below a quarter of it). 16-bit results are computed in float32
    and rounded once: half an epsilon, and as much again for what float32 lost.
    """
    if dtype.itemsize == 2:
        return epsilon(dtype)
    return 2 * math.sqrt(max(terms, 1)) * epsilon(dtype)


def epsilon(dtype: np.dtype) -> float:
    return 2.0**-7 if dtype.name == "bfloat16" else float(np.finfo(dtype).eps)


def _error(result: Any, expected: Any) -> float:
    if not isinstance(result, np.ndarray) or result.shape != expected.shape:
        raise ValueError(f"expected an array of shape {expected.shape}, got {getattr(result, 'shape', result)}")
    if result.size == 0:
        return 0.0
    have, want = result.astype(np.float64), np.asarray(expected, np.float64)
    finite = np.isfinite(want)
    # Infinities and NaN must be where the reference has them.
    if not np.array_equal(have[~finite], want[~finite], equal_nan=True) or not np.isfinite(have[finite]).all():
        return math.inf
    if not finite.any():
        return 0.0
    largest = float(np.abs(want[finite]).max())
    difference = float(np.abs(have[finite] - want[finite]).max())
    return difference / largest if largest > 0 else (0.0 if difference == 0 else math.inf)
