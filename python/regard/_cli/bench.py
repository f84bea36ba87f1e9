"""`bench`: every operation against NumPy, and PyTorch where installed, interleaved in one run."""

from __future__ import annotations

import argparse
import importlib.util
import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np

import regard
from regard import _backend
from regard._ceilings import LARGEST_READ, Ceilings
from regard._cli import models, operations, table
from regard._cli.check import add_operation, chosen_operations
from regard._cli.info import processor
from regard._cli.operations import Arguments, Case, Operation
from regard._cli.peers import to_torch
from regard._cli.timing import Timing, compare, set_threads


def add_arguments(parser: argparse.ArgumentParser) -> None:
    about = "single operations (default), or whole models on regard.nn against PyTorch's"
    parser.add_argument("what", nargs="?", choices=("operations", "models"), default="operations", help=about)
    add_operation(parser)
    parser.add_argument("--dtype", default="float32", choices=[d.name for d in operations.dtypes()])
    parser.add_argument("--threads", type=_threads, metavar="N", help="default: what regard uses")
    parser.add_argument("--seconds", type=_seconds, default=2.0, help="for each row; default 2")
    parser.add_argument("--quick", action="store_true", help="a few rounds of each operation's smallest call")
    parser.add_argument("--no-torch", action="store_true", help="leave PyTorch out even where installed")


def _threads(text: str) -> int:
    n = int(text) if text.strip().isdecimal() else 0
    if not 1 <= n <= 4096:
        raise argparse.ArgumentTypeError(f"invalid value: {text!r} (expected an integer from 1 to 4096)")
    return n


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise argparse.ArgumentTypeError(f"invalid value: {text!r} (expected a finite number > 0)")
    return seconds


def run(options: argparse.Namespace) -> int:
    torch = not options.no_torch and importlib.util.find_spec("torch") is not None
    if torch:
        importlib.import_module("torch")
    before = regard.get_num_threads()
    set_threads(before if options.threads is None else options.threads)
    try:
        if options.what == "models":
            models.run(options, torch)
        else:
            _run(options, torch)
    finally:
        regard.set_num_threads(before)
    return 0


def _run(options: argparse.Namespace, torch: bool) -> None:
    dtype = {d.name: d for d in operations.dtypes()}[options.dtype]
    seconds, rounds = (0.0, 3) if options.quick else (options.seconds, None)
    cases = [
        (operation, case)
        for operation in chosen_operations(options.operation)
        for case in (_smallest(operation) if options.quick else operation.bench)
    ]
    ceilings = Ceilings(0.02 if options.quick else 0.1)
    rows = []
    with table.progress(len(cases), options.plain) as step:
        for operation, case in cases:
            step(f"{operation.name} {case.label}")
            rows.append(measured(operation, case, dtype, ceilings, torch=torch, seconds=seconds, rounds=rounds))
    header = ["operation", "case", "ms", "GFLOP/s", "GB/s", "of ceiling", "NumPy ms", "faster"]
    header += ["torch ms", "faster"] if torch else []
    memory = ceilings.gbytes(LARGEST_READ)
    title = (
        f"{processor()}, {_backend.isa}, {regard.get_num_threads()} threads, {dtype.name}\n"
        f"ceilings: {ceilings.gflops:.0f} GFLOP/s float32 multiply-add, {memory:.0f} GB/s read from memory"
    )
    table.show(title, header, rows, left=2, plain=options.plain)
    print(
        "\nms: fastest round. faster: median over interleaved rounds of the peer's time over regard's."
        "\nof ceiling: the least time that multiply-adds (F), or reading all inputs and outputs from the"
        "\ncache or memory that holds them (B), would take, over the fastest round."
    )


def _smallest(operation: Operation) -> tuple[Case, ...]:
    return (min(operation.bench, key=lambda c: sum(math.prod(s) for s in c.shapes.values())),)


def measured(
    operation: Operation,
    case: Case,
    dtype: Any,
    ceilings: Ceilings,
    *,
    torch: bool,
    seconds: float,
    rounds: int | None,
) -> Sequence[str]:
    """One row of the table."""
    arguments = case.arguments(dtype)
    calls: dict[str, Any] = {"regard": partial(operation.run, arguments)}
    if operation.numpy is not None:
        calls["numpy"] = partial(operation.numpy, **_for_peers(arguments))
    if torch and operation.torch is not None:
        calls["torch"] = _torch_call(operation, arguments)
    times = compare(calls, seconds=seconds, rounds=rounds)
    best = times["regard"].minimum
    flops = operation.flops(arguments)
    moved = operations.moved_bytes(arguments, operation.run(arguments))
    peak = ceilings.gflops / 2 if np.dtype(dtype) == np.float64 else ceilings.gflops
    computing, moving = flops / peak / 1e9, moved / ceilings.gbytes(moved) / 1e9
    share = f"{max(computing, moving) / best:.0%} {'F' if computing > moving else 'B'}"
    rates = (f"{flops / best / 1e9:.1f}", f"{moved / best / 1e9:.1f}")
    peers = [text for name in ("numpy", "torch") if name == "numpy" or torch for text in _against(times, name)]
    return [operation.name, case.label, _ms(best), *rates, share, *peers]


def _against(times: dict[str, Timing], name: str) -> tuple[str, str]:
    if name not in times:
        return "-", "-"
    return _ms(times[name].minimum), f"{times['regard'].speedup_over(times[name]):.2f}x"


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.4g}"


def _for_peers(arguments: Arguments) -> Arguments:
    renamed = {"is_causal": "causal"}
    return {renamed.get(name, name): x for name, x in arguments.items()}


def _torch_call(operation: Operation, arguments: Arguments) -> Any:
    import torch

    tensors = {name: to_torch(x) for name, x in _for_peers(arguments).items()}
    inference = torch.inference_mode()

    def call() -> Any:
        with inference:
            return operation.torch(**tensors)  # type: ignore[misc]

    return call
