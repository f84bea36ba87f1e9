"""bench/compare_peers.py runs, says what it skips, and goes on where a row fails. No times are asserted."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import regard
from regard import _backend

BENCH = Path(__file__).resolve().parent.parent / "bench"

pytestmark = pytest.mark.skipif(not BENCH.is_dir(), reason="needs the repository")


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    pytest.importorskip("ml_dtypes", reason="the benchmarks' bfloat16")
    monkeypatch.syspath_prepend(str(BENCH))
    import compare_peers

    return compare_peers


@pytest.fixture
def table(bench: Any) -> Any:
    options = argparse.Namespace(threads=1, seconds=0.0, quick=True, all=False)
    return bench.Table(bench.Machine(0.001), options)


def test_two_rows_run_beside_torch() -> None:
    pytest.importorskip("torch", reason="the peer")
    pytest.importorskip("ml_dtypes", reason="the benchmarks' bfloat16")
    done = subprocess.run(
        [sys.executable, str(BENCH / "compare_peers.py"), "--quick", "--rows", "f32 1x1x8x64|SE 8x256x7x7"],
        env={**os.environ, "PYTHONPATH": str(Path(regard.__file__).parent.parent)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    rows = [line.split("|") for line in done.stdout.splitlines() if line.startswith("| f32 ")]
    assert [row[1].strip() for row in rows] == ["f32 1x1x8x64", "f32 SE 8x256x7x7 nchw"]
    for row in rows:
        regards, torchs = row[2].split(), row[3].split()
        assert float(regards[0]) > 0 and float(torchs[0]) > 0


def test_a_row_that_fails_does_not_end_the_others(bench: Any, table: Any) -> None:
    import targets

    def fails(threads: int) -> Any:
        raise RuntimeError("no such kernel")

    def works(threads: int) -> Any:
        x = np.ones((1, 1, 8, 16), np.float32)
        return targets.Contest({"regard": lambda: regard.attention(x, x, x), "torch": lambda: None})

    for label, prepare in (("first", fails), ("second", works)):
        line = targets.Line(label, (targets.best_peer(0.0),), flops=1.0, bytes=1.0, ceiling="fma")
        table.add(targets.Run((line,), prepare))
    (first, second) = table.rows
    assert (first[0], first[-1]) == ("first", "error")
    assert (second[0], second[-1]) == ("second", "pass")
    assert table.failures == ["first: RuntimeError: no such kernel"]


def test_rows_without_what_they_need_are_skipped_by_name(bench: Any, table: Any) -> None:
    import contests

    # The plain instruction set has no tiles.
    with _backend.using("baseline"):
        for run in contests.runs():
            if "AMX" in run.needs:
                table.add(run)
    assert table.rows and all(row[-1] == "skipped: needs AMX" for row in table.rows)


def test_every_row_says_what_is_wanted(bench: Any) -> None:
    import contests

    lines = [line for run in contests.runs() for line in run.lines]
    labels = [line.label for line in lines]
    assert len(set(labels)) == len(labels)
    assert all(line.targets for line in lines)


def test_roofline_is_drawn(bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib", reason="the plot")
    import harness

    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    points = {"attention": (100.0, 50.0, 40.0), "decode": (1.0, 8.0, None)}
    name = harness.roofline_plot("roof", "Roofline", {"avx2 FMA": 100.0}, {"memory": 10.0}, points)
    assert name == "roof.png"
    assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
