"""bench/bench_cuda.py, as far as that needs no GPU: what it times, and that a call which fails takes no other along."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

BENCH = Path(__file__).resolve().parent.parent / "bench"
pytestmark = pytest.mark.skipif(not BENCH.is_dir(), reason="needs the repository")


@pytest.fixture
def bench_cuda(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(BENCH)
    return importlib.import_module("bench_cuda")


def test_events_enclose_the_call_alone(bench_cuda: Any, capsys: pytest.CaptureFixture[str]) -> None:
    done: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.at = len(done)
            done.append("event")

        def synchronize(self) -> None:
            done.append("wait")

        def elapsed_time(self, end: Event) -> float:
            return float(end.at - self.at)

    def broken() -> None:
        raise RuntimeError("no such kernel")

    fill = SimpleNamespace(zero_=lambda: done.append("fill"))
    torch = SimpleNamespace(cuda=SimpleNamespace(Event=Event), empty=lambda *_, **__: fill, uint8=None)
    times = bench_cuda.milliseconds(torch, {"a": lambda: done.append("a"), "broken": broken})
    assert times == {"a": 2.0}  # what else it does lies outside
    assert done[:5] == ["fill", "event", "a", "event", "wait"]
    assert done.count("a") == bench_cuda.ROUNDS + 3
    assert capsys.readouterr().err == "broken failed: no such kernel\n"
