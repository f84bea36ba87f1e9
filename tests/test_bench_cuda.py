"""bench/bench_cuda.py, as far as that needs no GPU: what it times, and that a call which fails takes no other along."""

from __future__ import annotations

import importlib
from collections.abc import Callable
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


class OnCpu:
    """PyTorch, whose device "cuda" is the CPU."""

    def __init__(self, torch: Any) -> None:
        self._torch = torch

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._torch, name)
        return (lambda *x, device, **rest: found(*x, **rest)) if name in ("randn", "zeros", "empty") else found


def test_tables_have_a_row_for_each_shape(bench_cuda: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    torch = OnCpu(pytest.importorskip("torch"))

    def once(_: Any, calls: dict[str, Callable[[], Any]]) -> dict[str, float]:
        return {name: 2.0 for name, call in calls.items() if call() is not None}

    monkeypatch.setattr(bench_cuda, "milliseconds", once)
    monkeypatch.setattr(bench_cuda, "DECODING", [("GQA", 2, 4, 2, 16, 32)])
    monkeypatch.setattr(bench_cuda, "MAPS", [(2, 8, 3, 5, 4)])
    monkeypatch.setattr(bench_cuda, "LAYERS", [(3, 16, 8)])
    # bytes of keys and values in 2 ms, as GB/s, of a copy's 1e-3
    assert "| GQA" in (steps := bench_cuda.decoding(torch, 1e-3))
    assert f"{2 * 2 * 2 * 16 * 32 * 2 / 2 / 1e6:.0f} ({100 * 2 * 2 * 2 * 16 * 32 * 2 / 2 / 1e6 / 1e-3:.0f} %)" in steps
    assert steps.count("2000.0") >= 2
    both = bench_cuda.maps(torch, 1e-3)
    assert "2x8x3x5 float32" in both and "2x8x3x5 float16" in both and both.count("2000.0") == 6
    assert f"{2 / (2 * 2 * 8 * 3 * 5 * 4 / 1e-3 / 1e6):.2f}x" in both
    assert "3 x 16 x 8" in bench_cuda.layers(torch)
