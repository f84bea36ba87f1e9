"""Fair timing of several callables side by side, and the Markdown table and PNG plot that come of it.

A machine's clock, neighbours and memory drift by tens of per cent within minutes, so callables are never
timed one after the other: every round times each of them once, in an order that turns from round to round,
and two of them are compared by the median of the ratios of times taken in the same round.
"""

from __future__ import annotations

import dataclasses
import datetime
import importlib.metadata
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"

#: A sample shorter than this is repeated within one reading of the clock.
_SHORTEST_SAMPLE = 1e-3
#: Thread pools of other libraries spin for about this long after a call, on cores that the next one needs.
_SPIN = 2e-3
#: Shorter calls run once untimed before each sample; of longer ones a cold start is a small part.
_LONG = 20e-3


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
    calls: Mapping[str, Callable[[], Any]], *, seconds: float = 2.0, rounds: int | None = None
) -> dict[str, Timing]:
    """Time callables interleaved.

    Parameters
    ----------
    calls : {name: callable}
        Without arguments; results are dropped. All should do the same work.
    seconds : float
        About how long to measure in all, warm-up apart; at least 5 rounds are run.
    rounds : int, optional
        Run exactly so many rounds instead.

    Returns
    -------
    {name: Timing}, in the order given.
    """
    repeats = {name: _warm_up(call) for name, call in calls.items()}
    samples: dict[str, list[float]] = {name: [] for name in calls}
    order = list(calls)
    end = time.perf_counter() + seconds
    done = 0
    while done < (rounds or 5) or (rounds is None and time.perf_counter() < end):
        for name in order if done % 2 == 0 else reversed(order):
            samples[name].append(_sample(calls[name], repeats[name]))
        if done % 2:
            order.append(order.pop(0))  # so that nobody always follows the same neighbour
        done += 1
    return {name: Timing(name, tuple(s)) for name, s in samples.items()}


def _warm_up(call: Callable[[], Any]) -> int:
    """Call until caches, pages and pools are warm; answers how many calls make a sample."""
    fastest = float("inf")
    end = time.perf_counter() + 0.1
    for calls in range(1000):
        start = time.perf_counter()
        call()
        fastest = min(fastest, time.perf_counter() - start)
        if calls >= 1 and time.perf_counter() > end:
            break
    return max(1, round(_SHORTEST_SAMPLE / max(fastest, 1e-7)))


def _sample(call: Callable[[], Any], repeats: int) -> float:
    time.sleep(_SPIN)
    start = time.perf_counter()
    call()
    once = time.perf_counter() - start
    if once > _LONG:
        return once
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats


# Threads and versions of the peers.


def set_threads(threads: int) -> None:
    """Set regard's threads, and torch's if it is imported already."""
    import regard

    regard.set_num_threads(threads)
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.set_num_threads(threads)


def onnxruntime_session(model: bytes, threads: int) -> Any:
    """An ONNX Runtime session on `threads` threads that do not spin between calls."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def openvino_compile(model: Any, threads: int, precision: str) -> Any:
    """An OpenVINO request on `threads` threads; `precision` is "f32", "bf16" or "f16"."""
    import openvino

    settings = {
        "INFERENCE_NUM_THREADS": threads,
        "INFERENCE_PRECISION_HINT": precision,
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": 1,
    }
    return openvino.Core().compile_model(model, "CPU", settings).create_infer_request()


def installed(*names: str) -> dict[str, str]:
    """Versions of those of the distributions that are installed."""
    found = {}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


# What it ran on.


def processor() -> str:
    """The processor's model name."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("model name", "Model Name")):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def hardware() -> dict[str, str]:
    """What a reader needs to judge a figure: hardware, system, versions; no names of hosts or users."""
    import numpy as np

    from regard import _backend

    found = {"date": datetime.date.today().isoformat(), "processor": processor()}
    found["cores available"] = str(
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    )
    caches = _caches()
    if caches:
        found["caches"] = caches
    found["system"] = f"{platform.system()} {platform.machine()}, Python {platform.python_version()}"
    found["instruction set"] = f"{_backend.isa} (of {', '.join(_backend.possible())})"
    found["numpy"] = np.__version__
    found.update(installed("torch", "onnxruntime", "openvino"))
    return found


def _caches() -> str:
    parts = []
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        try:
            level, kind, size = ((index / n).read_text().strip() for n in ("level", "type", "size"))
        except OSError:
            continue
        if kind != "Instruction":
            parts.append(f"L{level} {size.replace('K', ' KiB').replace('M', ' MiB')}")
    return ", ".join(parts)


# Tables and plots.


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """An aligned Markdown table: the first column to the left, numbers to the right."""
    lines = [list(header), *[list(r) for r in rows]]
    widths = [max(3, *(len(line[c]) for line in lines)) for c in range(len(header))]

    def row(cells: Sequence[str]) -> str:
        return (
            "| "
            + " | ".join(
                x.ljust(w) if c == 0 else x.rjust(w)
                for c, (x, w) in enumerate(zip(cells, widths, strict=True))
            )
            + " |"
        )

    rule = (
        "|" + "|".join("-" * (w + 2) if c == 0 else "-" * (w + 1) + ":" for c, w in enumerate(widths)) + "|"
    )
    return "\n".join([row(lines[0]), rule, *map(row, lines[1:])])


def write_results(
    name: str,
    title: str,
    about: str,
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    threads: int,
    plot: str | None = None,
) -> Path:
    """Write bench/results/<name>.md: what it is, what it ran on, the table, and the plot if drawn."""
    RESULTS.mkdir(exist_ok=True)
    ran_on = "\n".join(f"- {key}: {value}" for key, value in {**hardware(), "threads": str(threads)}.items())
    parts = [f"# {title}", about, ran_on, markdown_table(header, rows)]
    if plot is not None:
        parts.append(f"![{title}]({plot})")
    path = RESULTS / f"{name}.md"
    path.write_text("\n\n".join(parts) + "\n")
    return path


def bar_plot(name: str, title: str, unit: str, groups: Mapping[str, Mapping[str, float]]) -> str | None:
    """Draw bench/results/<name>.png: bars of `groups` {case: {contender: value}}. None without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        return None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    contenders = list(dict.fromkeys(c for bars in groups.values() for c in bars))
    height = 0.8 / len(contenders)
    figure, axes = pyplot.subplots(
        figsize=(9, 1.2 + 0.22 * len(groups) * (len(contenders) + 1)), layout="constrained"
    )
    for k, contender in enumerate(contenders):
        bars = [(i, bars[contender]) for i, bars in enumerate(groups.values()) if contender in bars]
        drawn = axes.barh(
            [i + k * height for i, _ in bars],
            [v for _, v in bars],
            height * 0.92,
            label=contender,
            color=f"C{k}",
        )
        axes.bar_label(drawn, fmt="%.3g", padding=2, fontsize=7)
    axes.set_yticks([i + 0.4 - height / 2 for i in range(len(groups))], list(groups), fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel(unit)
    axes.set_title(title, fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, loc="lower right")
    RESULTS.mkdir(exist_ok=True)
    figure.savefig(RESULTS / f"{name}.png", dpi=120)
    pyplot.close(figure)
    return f"{name}.png"
