"""Fair timing of several callables side by side.

A machine's clock, neighbours and memory drift by tens of per cent within minutes, so callables are never
timed one after the other: every round times each of them once, in an order that turns from round to round,
and two of them are compared by the median of the ratios of times taken in the same round.
"""

from __future__ import annotations

import dataclasses
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

#: A sample shorter than this is repeated within one reading of the clock.
_SHORTEST_SAMPLE = 1e-3
#: Thread pools of other libraries spin for about this long after a call, on cores that the next one needs.
_SPIN = 2e-3
#: Shorter calls run once untimed before each sample; of longer ones a cold start is a small part.
_LONG = 20e-3
#: How long a callable is warmed up.
_WARM_UP = 0.1


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds a call of one callable, a sample a round."""

    name: str
    samples: tuple[float, ...]

    @property
    def minimum(self) -> float:
        return min(self.samples)

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    def speedup_over(self, other: Timing) -> float:
        """How many times faster than `other`: the median over rounds of the ratio within a round."""
        return statistics.median(b / a for a, b in zip(self.samples, other.samples, strict=True))


def compare(
    calls: Mapping[str, Callable[[], Any]],
    *,
    seconds: float = 2.0,
    rounds: int | None = None,
    least_rounds: int = 5,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Timing]:
    """Time callables interleaved.

    Parameters
    ----------
    calls : {name: callable}
        Without arguments; results are dropped. All should do the same work.
    seconds : float
        About how long to measure in all, warm-up apart; at least `least_rounds` rounds are run.
    rounds : int, optional
        Run exactly so many rounds instead.
    clock : callable
        time.thread_time counts what the calling thread computes, and not what other programs do meanwhile: for
        callables that use one thread.

    Returns
    -------
    {name: Timing}, in the order given.
    """
    repeats = {name: _warm_up(call) for name, call in calls.items()}
    samples: dict[str, list[float]] = {name: [] for name in calls}
    order = list(calls)
    end = time.perf_counter() + seconds
    done = 0
    while done < (rounds or least_rounds) or (rounds is None and time.perf_counter() < end):
        for name in order if done % 2 == 0 else reversed(order):
            samples[name].append(_sample(calls[name], repeats[name], clock))
        if done % 2:
            order.append(order.pop(0))  # so that nobody always follows the same neighbour
        done += 1
    return {name: Timing(name, tuple(s)) for name, s in samples.items()}


def _warm_up(call: Callable[[], Any]) -> int:
    """Call until caches, pages and pools are warm; answers how many calls make a sample."""
    fastest = float("inf")
    end = time.perf_counter() + _WARM_UP
    for calls in range(1000):
        start = time.perf_counter()
        call()
        fastest = min(fastest, time.perf_counter() - start)
        if calls >= 1 and time.perf_counter() > end:
            break
    return max(1, round(_SHORTEST_SAMPLE / max(fastest, 1e-7)))


def _sample(call: Callable[[], Any], repeats: int, clock: Callable[[], float]) -> float:
    time.sleep(_SPIN)
    start = clock()
    call()
    once = clock() - start
    if once > _LONG:
        return once
    start = clock()
    for _ in range(repeats):
        call()
    return (clock() - start) / repeats


def set_threads(threads: int) -> None:
    """Set regard's threads, and torch's if it is imported already."""
    import regard

    regard.set_num_threads(threads)
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.set_num_threads(threads)
