"""The command line runs with NumPy alone, says what is wrong, and answers the right exit status."""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import regard
from regard import _backend
from regard._cli import check, main, operations, table, timing

# Blocks packages as if they were not installed, then runs the command line.
ALONE = """
import sys
for name in ("rich", "torch", "ml_dtypes", "matplotlib"):
    sys.modules[name] = None
from regard._cli import main
sys.exit(main(sys.argv[1:]))
"""


def _run(*arguments: str, stdout: int = subprocess.PIPE, **environment: str) -> subprocess.CompletedProcess[str]:
    path = str(Path(regard.__file__).parent.parent)
    return subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, "PYTHONPATH": path, **environment},
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
        timeout=120,
    )


def _operation(name: str) -> operations.Operation:
    return next(o for o in operations.OPERATIONS if o.name == name)


def _only_first_case(operation: operations.Operation, **changes: Any) -> operations.Operation:
    return dataclasses.replace(operation, check=operation.check[:1], **changes)


def test_module_runs() -> None:
    done = _run("-m", "regard", "info")
    assert done.returncode == 0, done.stderr
    assert regard.__version__ in done.stdout
    assert _backend.possible()[-1] in done.stdout


def test_no_command_is_an_error() -> None:
    done = _run("-m", "regard")
    assert done.returncode == 2
    assert "info" in done.stderr
    assert "bench" in done.stderr


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match=r"^0$"):
        main(["--version"])
    assert capsys.readouterr().out == f"regard {regard.__version__}\n"


def test_info_says_what_was_forced() -> None:
    isa = _backend.possible()[0]
    done = _run("-m", "regard", "info", REGARD_ISA=isa)
    assert f"{isa}: named by REGARD_ISA" in done.stdout


def test_info_names_every_instruction_set_and_reason(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--plain"]) == 0
    text = capsys.readouterr().out
    for name, reason in _backend.INSTRUCTION_SETS.items():
        assert name in text
        assert reason is None or reason in text
    assert "CUDA" in text
    assert f"NumPy {np.__version__}" in text


def test_show_config_prints_info(capsys: pytest.CaptureFixture[str]) -> None:
    regard.show_config()
    assert regard.__version__ in capsys.readouterr().out


def test_every_command_runs_with_numpy_alone() -> None:
    bench = ["bench", "--quick", "--operation", "squeeze_excitation"]
    for arguments in (["info"], ["check", "--operation", "attention"], bench):
        done = _run("-c", ALONE, *arguments)
        assert done.returncode == 0, done.stderr
        assert "torch ms" not in done.stdout
        assert "bfloat16 " not in done.stdout or arguments == ["info"]


def test_check_passes_on_this_machine(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "--plain"]) == 0
    text = capsys.readouterr().out
    for operation in operations.OPERATIONS:
        assert operation.name in text
    for isa in _backend.possible():
        assert isa in text
    assert "all right" in text


def test_check_fails_on_a_wrong_operation(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(**arguments: Any) -> Any:
        return regard.scaled_dot_product_attention(**arguments) * arguments["query"].dtype.type(1.02)

    broken = _only_first_case(_operation("scaled_dot_product_attention"), call=wrong)
    monkeypatch.setattr(operations, "OPERATIONS", (broken,))
    assert main(["check", "--plain"]) == 1
    text = capsys.readouterr().out
    assert "WRONG" in text
    assert "plain" in text  # the case that was wrong


def test_check_fails_on_an_exception_and_goes_on(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(**_: Any) -> Any:
        raise NotImplementedError("layer_norm: no kernel")

    broken = _only_first_case(_operation("layer_norm"), call=missing)
    sound = _only_first_case(_operation("rms_norm"))
    monkeypatch.setattr(operations, "OPERATIONS", (broken, sound))
    assert main(["check", "--plain"]) == 1
    text = capsys.readouterr().out
    assert "NotImplementedError: layer_norm: no kernel" in text
    assert "rms_norm" in text


@pytest.mark.parametrize(
    "spoil",
    [
        lambda x: np.where(np.arange(x.size).reshape(x.shape) == 3, np.nan, x),
        lambda x: np.where(np.arange(x.size).reshape(x.shape) == 3, np.inf, x),
        lambda x: x[..., :-1],
        lambda x: (x, x),
    ],
    ids=["nan", "inf", "shape", "count"],
)
def test_compared_refuses(spoil: Any) -> None:
    right = np.linspace(-1, 1, 12, dtype=np.float32).reshape(3, 4)
    assert check.compared(right, right.astype(np.float64), 1)[0] == 0
    try:
        error, tolerance = check.compared(spoil(right), right.astype(np.float64), 1)
    except ValueError:
        return
    assert error > tolerance


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("check", "--operation", "atention"), r"argument --operation: invalid choice: 'atention' \(choose "),
        (("bench", "--operation", "atention"), r"argument --operation: invalid choice: 'atention'"),
        *((("bench", "--threads", n), rf"argument --threads: invalid value: '{n}' \(expected an integer from 1 to 4096")
          for n in ("-3", "0", "5000", "1.5", "two")),
        *((("bench", "--seconds", n), rf"argument --seconds: invalid value: '{n}' \(expected a finite number > 0\)")
          for n in ("-1", "0", "nan", "inf", "two")),
    ],
    ids=" ".join,
)  # fmt: skip
def test_usage_errors(arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match=r"^2$"):
        main(arguments)
    assert re.search(message, capsys.readouterr().err)


@pytest.mark.parametrize("arguments", [("info",), ("info", "--plain"), ("bench", "--help")], ids=" ".join)
def test_a_reader_that_has_gone_is_no_traceback(arguments: tuple[str, ...]) -> None:
    read, write = os.pipe()
    os.close(read)
    try:
        done = _run("-m", "regard", *arguments, stdout=write, PYTHONUNBUFFERED="")
    finally:
        os.close(write)
    assert (done.returncode, done.stderr) == (1, "")


def test_every_public_operation_has_a_row() -> None:
    public = {n for n in regard.__all__ if hasattr(regard.reference, n)}
    assert public == {o.name for o in operations.OPERATIONS}


def test_bench_prints_a_row_for_every_operation(capsys: pytest.CaptureFixture[str]) -> None:
    threads = regard.get_num_threads()
    assert main(["bench", "--quick", "--plain", "--no-torch", "--threads", "1"]) == 0
    assert regard.get_num_threads() == threads
    text = capsys.readouterr().out
    for column in ("ms", "GFLOP/s", "GB/s", "of ceiling", "NumPy ms"):
        assert column in text
    lines = [line.split()[0] for line in text.splitlines() if line.strip()]
    for operation in operations.OPERATIONS:
        assert operation.name in lines


def test_numpy_peers_do_the_same_work() -> None:
    for operation in operations.OPERATIONS:
        assert operation.numpy is not None
        for case in operation.bench:
            shapes = {n: tuple(min(s, 12) for s in shape) for n, shape in case.shapes.items()}
            if (
                len(shapes.get("query", ())) == 4
                and "key" in shapes
                and case.shapes["query"][1] != case.shapes["key"][1]
            ):
                shapes = {n: (s[0], 4 if n == "query" else 2, *s[2:]) for n, s in shapes.items()}
            if "cos" in shapes:  # half of x's last axis
                shapes = {n: (*s[:-1], 6) if n in ("cos", "sin") else s for n, s in shapes.items()}
            if "w_hidden" in shapes:  # 4 hidden units, and their gates one under the other
                rows = 4 * case.shapes["w_hidden"][0] // case.shapes["w_hidden"][1]
                shapes = {n: s if n == "x" else (rows, *s[1:]) for n, s in shapes.items()} | {"w_hidden": (rows, 4)}
            # Starts, pages and lengths of the smaller arrays.
            options = {n: np.minimum(x, 11) if isinstance(x, np.ndarray) else x for n, x in case.options.items()}
            arguments = dataclasses.replace(case, shapes=shapes, options=options).arguments(np.float32)
            error, tolerance = check.compared(
                operation.numpy(**arguments), operation.expected(arguments), operation.terms(arguments)
            )
            assert error <= tolerance, (operation.name, case.label)


def test_ceilings_are_plausible(backend: str) -> None:
    # Wide bounds: a figure outside them means wrong units, not a slow machine.
    assert 0.01 < _backend.cpu.measure_fma(0.02) < 1e6
    assert 0.01 < _backend.cpu.measure_read(1 << 20, 0.02) < 1e6
    assert _backend.cpu.measure_read(1, 0.001) > 0


@pytest.mark.parametrize("seconds", [0.0, -1.0, float("nan"), 1e9])
def test_ceilings_refuse_bad_times(seconds: float) -> None:
    with pytest.raises(ValueError, match="seconds"):
        _backend.cpu.measure_fma(seconds)


def test_ceilings_refuse_bad_sizes() -> None:
    with pytest.raises(ValueError, match="bytes"):
        _backend.cpu.measure_read(0, 0.01)
    with pytest.raises(MemoryError):
        _backend.cpu.measure_read(1 << 62, 0.01)


def test_compare_runs_everybody_in_every_round() -> None:
    calls: list[str] = []
    times = timing.compare({n: lambda n=n: calls.append(n) for n in "abc"}, rounds=4)
    assert list(times) == ["a", "b", "c"]
    assert {len(t.samples) for t in times.values()} == {4}
    assert set(calls) == {"a", "b", "c"}


def test_speedup_is_within_rounds() -> None:
    ours, theirs = timing.Timing("ours", (1.0, 10.0, 2.0)), timing.Timing("theirs", (2.0, 20.0, 4.0))
    assert ours.speedup_over(theirs) == 2.0
    assert (ours.minimum, ours.median) == (1.0, 2.0)


def test_text_table_is_aligned() -> None:
    assert table.text("T", ("name", "n"), [("a", "1"), ("bcdef", "22")]).splitlines() == [
        "T",
        "",
        "name    n",
        "-----  --",
        "a       1",
        "bcdef  22",
    ]
