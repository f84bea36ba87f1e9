"""Every target of speed on a CPU: regard against its peers, and against the ceilings of the machine.

    python bench/compare_peers.py [--threads 2] [--seconds 4] [--rows PATTERN] [--all] [--quick] [--dry]

Prints one table, in less than 8 minutes on two quiet cores, and writes bench/results/cpu.md and cpu-roofline.png. Peers
are PyTorch, ONNX Runtime and OpenVINO, whichever are installed. Rows that this machine cannot decide are skipped with
the reason; a row that fails says so, the others go on, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import importlib
import re
import sys
import time
from collections.abc import Sequence

import contests
import harness
import regard
import targets
from regard import _backend
from regard._ceilings import LARGEST_READ, Ceilings
from regard._cli.info import cores
from targets import Line, Measured, Run

HEADER = (
    "work",
    "regard",
    *targets.COLUMNS,
    "vs best peer",
    "rate",
    "of ceiling",
    "target",
    "reached",
    "verdict",
)

ABOUT = """\
Each line is a target: what `regard` and its peers need for one call, and whether the target is reached. All contenders
of a row are timed in turns within one run, on the same number of threads; times are those of the fastest round, and
`vs best peer` is the fastest peer's over regard's. `-`: no such peer here, or it has no kernel for the case. Shapes of
attention are batch x heads(/heads_kv) x len(_q/_kv) x dim; a rate counts 2 len_q len_kv (dim_qk + dim_v) operations a
head (half if causal), or the bytes of inputs and outputs where reading is the ceiling. `of ceiling` is that rate over
what was measured for the instruction set and the bytes in question. `short` names a target that is not reached. Written
by `python bench/compare_peers.py`."""


class Machine:
    """The ceilings of each instruction set in use, measured once."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._found: dict[str, Ceilings] = {}

    def on(self, isa: str) -> Ceilings:
        if isa not in self._found:
            with _backend.using(isa):
                self._found[isa] = Ceilings(self._seconds)
        return self._found[isa]

    def holding(self, line: Line) -> tuple[float | None, str]:
        """What holds a line on the instruction set in use, and its name."""
        ceilings = self.on(_backend.isa)
        if line.ceiling == "read":
            return ceilings.gbytes(int(line.bytes)), "read"
        if line.ceiling == "tiles" and ceilings.gtiles() is not None:
            return ceilings.gtiles(), "tiles"
        return (ceilings.gflops, "FMA") if line.ceiling else (None, "")

    def computing(self) -> dict[str, float]:
        """{name: GFLOP/s}."""
        found = {}
        for isa in _backend.possible():
            ceilings = self.on(isa)
            found[f"{isa} FMA"] = ceilings.gflops
            if (tiles := ceilings.gtiles()) is not None:
                found[f"{isa} tiles, bf16"] = tiles
        return found

    def reading(self) -> dict[str, float]:
        """{where from: GB/s}, of bytes that lie well inside each cache, on the best instruction set."""
        ceilings, sizes = self.on(_backend.isa), harness.cache_sizes()
        private = regard.get_num_threads() * sizes.get(2, 0)
        held = {"L2": private // 2, "L3": sizes.get(3, 0) // 2}
        if held["L3"] <= private:
            held.pop("L3")  # no level of its own beyond the private ones
        return {**{k: ceilings.gbytes(n) for k, n in held.items() if n}, "memory": ceilings.gbytes(LARGEST_READ)}


def main() -> int:
    parser = harness.parser(__doc__, threads=min(2, cores()), seconds=4.0)
    parser.add_argument("--rows", default="", metavar="PATTERN", help="a regular expression; writes nothing")
    parser.add_argument("--all", action="store_true", help="measure what this machine cannot decide too")
    parser.add_argument(
        "--quick", action="store_true", help="two rounds of each row, to see that all runs; writes nothing"
    )
    options = parser.parse_args()
    pattern = re.compile(options.rows)
    start = time.perf_counter()
    if harness.installed("torch"):
        importlib.import_module("torch")  # so that its threads are set too
    harness.set_threads(options.threads)
    machine = Machine(0.02 if options.quick else 0.2)

    table = Table(machine, options)
    for run in contests.runs():
        chosen = tuple(line for line in run.lines if pattern.search(line.label))
        if chosen:
            table.add(dataclasses.replace(run, lines=chosen))
    ceilings = [*machine.computing().items()], [*machine.reading().items()]
    minutes = (time.perf_counter() - start) / 60
    notes = [*table.failures, *(f"{which} in: {'; '.join(where)}." for which, where in table.formulations.items())]
    notes.append(f"It took {minutes:.1f} minutes.")
    print(_ceilings_text(*ceilings), harness.markdown_table(HEADER, table.rows), *notes, sep="\n\n")
    if not (options.dry or options.quick or options.rows):
        title = "Attention on a CPU: peers and ceilings"
        plot = harness.roofline_plot("cpu-roofline", title, dict(ceilings[0]), dict(ceilings[1]), table.points)
        sections = ["## Ceilings", _ceilings_text(*ceilings), "## Targets"]
        about, threads = "\n\n".join([ABOUT, *notes]), options.threads
        path = harness.write_results(
            "cpu", title, about, HEADER, table.rows, threads=threads, plot=plot, sections=sections
        )
        print(f"wrote {path}")
    return 1 if table.failures else 0


class Table:
    """Rows as they are measured, what is to be said about them, and points for the plot."""

    def __init__(self, machine: Machine, options: argparse.Namespace) -> None:
        self._machine, self._options = machine, options
        self.rows: list[list[str]] = []
        self.failures: list[str] = []
        self.formulations: dict[str, list[str]] = {}
        self.points: dict[str, tuple[float, float, float | None]] = {}

    def add(self, run: Run) -> None:
        """Measure a run, or say why not."""
        undecided = _undecided(run)
        if undecided and not (self._options.all and _possible(run)):
            self._say(run, f"skipped: {undecided}")
            return
        try:
            with _backend.using(run.isa or _backend.isa):
                self._measure(run, undecided)
        except Exception as failure:  # whatever it is, the other rows are wanted
            self._say(run, "error")
            self.failures.append(f"{run.lines[0].label}: {type(failure).__name__}: {failure}")
        finally:
            gc.collect()  # arrays of one run are not to stand beside those of the next

    def _measure(self, run: Run, undecided: str) -> None:
        contest = run.prepare(self._options.threads)
        harness.set_threads(self._options.threads)
        seconds, rounds = (0.0, 2) if self._options.quick else (self._options.seconds, None)
        times = harness.compare(contest.calls, seconds=seconds, rounds=rounds, least_rounds=run.least_rounds)
        fastest = {name: timing.minimum for name, timing in times.items()}
        for line in run.lines:
            ceiling, name = self._machine.holding(line)
            measured = Measured(line, fastest, contest.errors, ceiling)
            self._add_row(_row(measured, name, undecided))
            if line.flops and line.bytes:
                peer = measured.best_peer()
                speed = line.flops / measured.best / 1e9
                self.points[line.label] = (line.flops / line.bytes, speed, speed / peer if peer else None)
        for peer, formulation in contest.notes.items():
            self.formulations.setdefault(f"{peer} runs {formulation}", []).append(run.lines[0].label)

    def _say(self, run: Run, verdict: str) -> None:
        for line in run.lines:
            wanted = "; ".join(target.text for target in line.targets)
            self._add_row([line.label, *["-"] * (len(HEADER) - 4), wanted, "-", verdict])

    def _add_row(self, row: list[str]) -> None:
        self.rows.append(row)
        print(" | ".join(row), file=sys.stderr, flush=True)


def _undecided(run: Run) -> str:
    """Why this machine cannot decide a run's targets, or nothing."""
    if run.isa and run.isa not in _backend.possible():
        return f"needs {run.isa}: {_backend.INSTRUCTION_SETS.get(run.isa) or 'not built'}"
    for need in run.needs:
        if need == "AMX" and _backend.isa != "amx":
            return "needs AMX"
        if need == "2 cores" and cores() < 2:
            return "needs 2 cores"
        if need == "torch" and not harness.installed("torch"):
            return "needs torch"
    return ""


def _possible(run: Run) -> bool:
    """Whether it runs here all the same."""
    return not run.isa and ("torch" not in run.needs or bool(harness.installed("torch")))


def _row(m: Measured, ceiling: str, undecided: str) -> list[str]:
    line, peers = m.line, m.of_peers()
    cells = [_time(peers[column]) if column in peers else "-" for column in targets.COLUMNS]
    ratio, share = m.best_peer(), m.share()
    unit = "GB/s" if line.ceiling == "read" else "GFLOP/s"
    figures = [
        f"{ratio:.2f}x" if ratio else "-",
        f"{m.rate:.3g} {unit}" if line.flops else "-",
        f"{share:.0%} {ceiling}" if share else "-",
    ]
    reached, short = [], []
    for target in line.targets:
        value = target.value(m)
        reached.append("-" if value is None else target.form.format(value))
        if value is not None and not target.kept_by(value):
            short.append(target.text)
    if undecided:
        verdict = f"not judged: {undecided}"
    elif all(value == "-" for value in reached):
        verdict = "skipped: no peer here"
    else:
        verdict = f"short: {', '.join(short)}" if short else "pass"
    wanted = "; ".join(target.text for target in line.targets)
    return [line.label, _time(m.best), *cells, *figures, wanted, "; ".join(reached), verdict]


def _time(seconds: float) -> str:
    scale, unit = (1.0, "s") if seconds >= 1 else (1e3, "ms") if seconds >= 1e-4 else (1e6, "us")
    return f"{seconds * scale:.3g} {unit}"


def _ceilings_text(computing: Sequence[tuple[str, float]], reading: Sequence[tuple[str, float]]) -> str:
    rows = [(name, f"{rate:.0f} GFLOP/s") for name, rate in computing]
    rows += [(f"read from {name}", f"{rate:.0f} GB/s") for name, rate in reading]
    return harness.markdown_table(("ceiling", "measured"), rows)


if __name__ == "__main__":
    sys.exit(main())
