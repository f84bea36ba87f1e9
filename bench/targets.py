"""What compare_peers.py judges: a target is a figure of one line of its table, and the bound it has to keep."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

#: Columns of the table; a line's best peer is the fastest of those in PEERS.
PEERS = ("torch", "onnxruntime", "openvino")
COLUMNS = (*PEERS, "NumPy")

Call = Callable[[], Any]


@dataclasses.dataclass(frozen=True)
class Contest:
    """Contenders of one interleaved run, ready to be called.

    Attributes
    ----------
    calls : {contender: callable}
    notes : {contender: which of its formulations runs}
    errors : {contender: (error, what it may be)}
    """

    calls: Mapping[str, Call]
    notes: Mapping[str, str] = dataclasses.field(default_factory=dict)
    errors: Mapping[str, tuple[float, float]] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Measured:
    """What a line's targets are figured from."""

    line: Line
    seconds: Mapping[str, float]
    errors: Mapping[str, tuple[float, float]]
    ceiling: float | None

    @property
    def best(self) -> float:
        """Seconds of the line's own contender."""
        return self.seconds[self.line.contender]

    def over(self, contender: str) -> float | None:
        """Its time over the line's own."""
        return self.seconds[contender] / self.best if contender in self.seconds else None

    def of_peers(self) -> dict[str, float]:
        """{column: seconds} of the peers that ran."""
        return {column: self.seconds[name] for column, name in self.line.peers.items() if name in self.seconds}

    def best_peer(self) -> float | None:
        """The fastest peer's time over the line's own."""
        times = [seconds for column, seconds in self.of_peers().items() if column in PEERS]
        return min(times) / self.best if times else None

    def share(self) -> float | None:
        """Of the ceiling that holds the line."""
        return self.rate / self.ceiling if self.ceiling else None

    @property
    def rate(self) -> float:
        """GFLOP/s, or GB/s where reading is the ceiling."""
        return (self.line.bytes if self.line.ceiling == "read" else self.line.flops) / self.best / 1e9


@dataclasses.dataclass(frozen=True)
class Target:
    """`value` of what was measured is to be `bound` at least, or at most; None where it cannot be figured here."""

    bound: float
    what: str
    value: Callable[[Measured], float | None]
    at_most: bool = False
    form: str = "{:.2f}x"

    @property
    def text(self) -> str:
        return f"{'<=' if self.at_most else '>='} {self.form.format(self.bound)} {self.what}"

    def kept_by(self, value: float) -> bool:
        return value <= self.bound if self.at_most else value >= self.bound


def best_peer(bound: float) -> Target:
    return Target(bound, "best peer", Measured.best_peer)


def faster_than(contender: str, bound: float, what: str = "") -> Target:
    return Target(bound, what or contender, lambda m: m.over(contender))


def cost_over(contender: str, bound: float, what: str) -> Target:
    """The line's time over another contender's."""

    def value(m: Measured) -> float | None:
        return m.best / m.seconds[contender] if contender in m.seconds else None

    return Target(bound, what, value, at_most=True)


def share(bound: float, of: str) -> Target:
    return Target(bound, f"of {of}", Measured.share, form="{:.0%}")


def microseconds(bound: float) -> Target:
    return Target(bound, "us", lambda m: m.best * 1e6, at_most=True, form="{:.1f}")


def accuracy(what: str) -> Target:
    """The error over what it may be, at most 1."""

    def value(m: Measured) -> float | None:
        if m.line.contender not in m.errors:
            return None
        error, allowed = m.errors[m.line.contender]
        return error / allowed

    return Target(1.0, what, value, at_most=True)


@dataclasses.dataclass(frozen=True)
class Line:
    """A line of the table.

    Attributes
    ----------
    label : str
    targets : tuple of Target
    contender : str
        Whose line it is, among the run's.
    peers : {column: contender}
    flops, bytes : float
        Of a call: what it computes, and what it moves at least.
    ceiling : "tiles", "fma", "read" or ""
        The machine's limit that holds the call; "tiles" is "fma" for an instruction set without.
    """

    label: str
    targets: tuple[Target, ...]
    contender: str = "regard"
    peers: Mapping[str, str] = dataclasses.field(default_factory=lambda: {name: name for name in COLUMNS})
    flops: float = 0.0
    bytes: float = 0.0
    ceiling: str = ""


@dataclasses.dataclass(frozen=True)
class Run:
    """One interleaved run: its lines and how its contenders are made, given the number of threads.

    `isa` runs it on another instruction set than the best; `needs` names what its targets take for granted: "AMX",
    "torch", "2 cores". `least_rounds`, of calls that take seconds.
    """

    lines: tuple[Line, ...]
    prepare: Callable[[int], Contest]
    isa: str = ""
    needs: tuple[str, ...] = ()
    least_rounds: int = 5
