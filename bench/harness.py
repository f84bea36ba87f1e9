"""Fair timing of several callables side by side, and the Markdown table and PNG plot that come of it.

    harness.set_threads(2)
    times = harness.compare({"regard": ours, "torch": theirs}, seconds=2)
    times["regard"].minimum, times["regard"].speedup_over(times["torch"])

How it is timed: python/regard/_cli/timing.py.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import math
import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from regard import _arrays, _backend
from regard._cli.info import cores, processor
from regard._cli.timing import Timing, compare, set_threads

__all__ = [
    "Timing",
    "bar_plot",
    "cache_sizes",
    "compare",
    "hardware",
    "installed",
    "markdown_table",
    "normal",
    "onnxruntime_session",
    "openvino_compile",
    "parser",
    "roofline_plot",
    "set_threads",
    "write_results",
]

RESULTS = Path(__file__).parent / "results"


def parser(doc: str, *, threads: int | tuple[int, ...], seconds: float) -> argparse.ArgumentParser:
    """What every script here takes; `doc` is its docstring, `threads` has several where it measures several."""
    made = argparse.ArgumentParser(description=doc.splitlines()[0])
    several = {} if isinstance(threads, int) else {"nargs": "+"}
    made.add_argument("--threads", type=int, default=threads, metavar="N", **several)
    made.add_argument("--seconds", type=float, default=seconds, help="for each row, all contenders together")
    made.add_argument("--dry", action="store_true", help="print the table, write nothing")
    return made


def normal(shape: tuple[int, ...], dtype: Any, seed: int = 0) -> np.ndarray:
    """Normal values, of a dtype or its name."""
    kind = _arrays.numpy_dtype(dtype) if isinstance(dtype, str) else dtype
    return np.random.default_rng(seed).standard_normal(shape, np.float32).astype(kind)


# Threads and versions of the peers.


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


def hardware() -> dict[str, str]:
    """What a reader needs to judge a figure: hardware, system, versions; no names of hosts or users."""
    found = {"date": datetime.date.today().isoformat(), "processor": processor()}
    found["cores available"] = str(cores())
    if caches := cache_sizes():
        found["caches"] = ", ".join(f"L{level} {_size(size)}" for level, size in caches.items())
    load = os.getloadavg()[0]
    busy = ": other programs kept the cores busy, and times by the clock on the wall include waiting for them"
    found["load average at the end"] = f"{load:.1f}{busy if load > 2 * cores() else ''}"
    found["system"] = f"{platform.system()} {platform.machine()}, Python {platform.python_version()}"
    found["instruction set"] = f"{_backend.isa} (of {', '.join(_backend.possible())})"
    found["numpy"] = np.__version__
    found.update(installed("torch", "onnxruntime", "openvino"))
    return found


def cache_sizes() -> dict[int, int]:
    """{level: bytes} of one core's data caches, as far as the system tells."""
    found = {}
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        try:
            level, kind, size = ((index / n).read_text().strip() for n in ("level", "type", "size"))
        except OSError:
            continue
        if kind != "Instruction":
            found[int(level)] = int(size.rstrip("KM")) << {"K": 10, "M": 20}.get(size[-1], 0)
    return found


def _size(size: int) -> str:
    return f"{size >> 20} MiB" if size >= 1 << 20 and size % (1 << 20) == 0 else f"{size >> 10} KiB"


# Tables and plots.


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """An aligned Markdown table: the first column to the left, numbers to the right."""
    lines = [list(header), *[list(r) for r in rows]]
    widths = [max(3, *(len(line[c]) for line in lines)) for c in range(len(header))]

    def row(cells: Sequence[str]) -> str:
        return (
            "| "
            + " | ".join(
                x.ljust(w) if c == 0 else x.rjust(w) for c, (x, w) in enumerate(zip(cells, widths, strict=True))
            )
            + " |"
        )

    rule = "|" + "|".join("-" * (w + 2) if c == 0 else "-" * (w + 1) + ":" for c, w in enumerate(widths)) + "|"
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
    sections: Sequence[str] = (),
) -> Path:
    """Write bench/results/<name>.md: what it is, what it ran on, more sections, the table, and the plot if drawn."""
    RESULTS.mkdir(exist_ok=True)
    ran_on = "\n".join(f"- {key}: {value}" for key, value in {**hardware(), "threads": str(threads)}.items())
    parts = [f"# {title}", about, ran_on, *sections, markdown_table(header, rows)]
    if plot is not None:
        parts.append(f"![{title}]({plot})")
    path = RESULTS / f"{name}.md"
    path.write_text("\n\n".join(parts) + "\n")
    return path


def bar_plot(
    name: str,
    title: str,
    unit: str,
    panels: Mapping[str, Mapping[str, Mapping[str, float]]],
    mark: float | None = None,
) -> str | None:
    """Draw bench/results/<name>.png; answers the file's name, or None without matplotlib.

    `panels` is {heading: {case: {contender: value}}}: one panel of bars a heading, side by side.
    `mark` draws a line across at a value, such as the 1 of a ratio.
    """
    try:
        import matplotlib
    except ImportError:
        return None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    cases = list(dict.fromkeys(case for groups in panels.values() for case in groups))
    contenders = list(dict.fromkeys(c for groups in panels.values() for bars in groups.values() for c in bars))
    height = 0.8 / len(contenders)
    figure, all_axes = pyplot.subplots(
        1,
        len(panels),
        figsize=(2.5 + 3.5 * len(panels), 1.5 + 0.16 * len(cases) * (len(contenders) + 1)),
        layout="constrained",
        sharey=True,
        squeeze=False,
    )
    for axes, (heading, groups) in zip(all_axes[0], panels.items(), strict=True):
        for k, contender in enumerate(contenders):
            bars = [(i, groups[c][contender]) for i, c in enumerate(cases) if contender in groups.get(c, {})]
            places, values = [i + k * height for i, _ in bars], [v for _, v in bars]
            drawn = axes.barh(places, values, height * 0.92, label=contender, color=f"C{k}")
            axes.bar_label(drawn, fmt="%.3g", padding=2, fontsize=6)
        if mark is not None:
            axes.axvline(mark, color="0.4", linewidth=0.8)
        axes.set_title(heading, fontsize=10)
        axes.set_xlabel(unit)
        axes.margins(x=0.12)
        axes.spines[["top", "right"]].set_visible(False)
    first = all_axes[0][0]
    first.set_yticks([i + 0.4 - height / 2 for i in range(len(cases))], cases, fontsize=8)
    first.invert_yaxis()
    figure.suptitle(title, fontsize=11)
    figure.legend(*first.get_legend_handles_labels(), loc="outside lower center", ncols=len(contenders), fontsize=8)
    RESULTS.mkdir(exist_ok=True)
    figure.savefig(RESULTS / f"{name}.png", dpi=110)
    pyplot.close(figure)
    return f"{name}.png"


def roofline_plot(
    name: str,
    title: str,
    computing: Mapping[str, float],
    reading: Mapping[str, float],
    points: Mapping[str, tuple[float, float, float | None]],
) -> str | None:
    """Draw bench/results/<name>.png; answers the file's name, or None without matplotlib.

    `computing` and `reading` are {ceiling: GFLOP/s} and {ceiling: GB/s}; `points` {label: (operations a byte, GFLOP/s,
    the best peer's GFLOP/s or None)}. Points carry numbers, which the legend names.
    """
    try:
        import matplotlib
    except ImportError:
        return None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(12, max(6.0, 0.17 * len(points))), layout="constrained")
    intensities = [intensity for intensity, _, _ in points.values()] or [1.0]
    low, high = min(intensities) / 2, max(intensities) * 2
    top = max(computing.values())
    for i, (label, rate) in enumerate(reading.items()):
        axes.plot([low, top / rate], [low * rate, top], "--", color=f"C{i}", linewidth=1)
        slope = {"rotation": math.degrees(math.atan(rate)), "rotation_mode": "anchor", "transform_rotates_text": True}
        axes.text(1.2 * low, 1.3 * low * rate, f"{label} {rate:.0f} GB/s", fontsize=7, color=f"C{i}", **slope)
    for i, (label, rate) in enumerate(computing.items()):
        axes.axhline(rate, color="0.4", linewidth=1)
        # Each label further left than the one before: two ceilings may be nearly the same.
        axes.annotate(f"{label} {rate:.0f} GFLOP/s", (high / 8**i, rate), fontsize=7, ha="right", va="bottom")
    for number, (label, (intensity, ours, theirs)) in enumerate(points.items(), 1):
        if theirs:
            axes.plot([intensity, intensity], [theirs, ours], color="0.7", linewidth=0.8, zorder=1)
            axes.plot(intensity, theirs, "_", color="0.4", markersize=8, zorder=2)
        axes.plot(intensity, ours, "o", color="C3", markersize=4, zorder=3, label=f"{number}  {label}")
        axes.annotate(str(number), (intensity, ours), xytext=(4, 0), textcoords="offset points", fontsize=6)
    axes.set(xscale="log", yscale="log", xlim=(low, high), title=title)
    axes.set_xlabel("operations for each byte of inputs and outputs")
    axes.set_ylabel("GFLOP/s (circle: regard; dash: its best peer)")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right center", fontsize=7, handlelength=0, frameon=False)
    RESULTS.mkdir(exist_ok=True)
    figure.savefig(RESULTS / f"{name}.png", dpi=110)
    pyplot.close(figure)
    return f"{name}.png"
