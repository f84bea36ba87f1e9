"""Picks the compiled module: the best instruction set this machine runs, or the one REGARD_ISA names."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import sys
from collections.abc import Iterator
from types import ModuleType

from regard import _cpu_features

#: {instruction set: None, or why this machine cannot run it}, worst first.
INSTRUCTION_SETS: dict[str, str | None] = _cpu_features.instruction_sets()
if "REGARD_AMX_MODEL" in os.environ:  # a folder with a build of the tile kernels over a software model, for tests
    sys.modules[__package__].__path__.append(os.environ["REGARD_AMX_MODEL"])
    INSTRUCTION_SETS = {"amx_model": INSTRUCTION_SETS.get("avx2", "it is not x86-64"), **INSTRUCTION_SETS}

#: The module in use. Callers read it at every call, so that using() can switch it.
cpu: ModuleType
isa: str


def _load(name: str) -> ModuleType:
    return importlib.import_module(f"regard._cpu_{name}")


def built() -> list[str]:
    """Instruction sets that this installation was built with."""
    return [n for n in INSTRUCTION_SETS if importlib.util.find_spec(f"regard._cpu_{n}")]


def possible() -> list[str]:
    """Instruction sets that were built and that this machine runs, worst first."""
    return [n for n in built() if INSTRUCTION_SETS[n] is None]


def select(name: str) -> None:
    """Use one instruction set from here on.

    Raises
    ------
    ValueError
        The instruction set is unknown, was not built, or cannot run here.
    """
    global cpu, isa
    names = possible()
    if name not in names:
        reason = INSTRUCTION_SETS.get(name, "no such instruction set") or "not built"
        raise ValueError(f"REGARD_ISA: expected one of {', '.join(names)}, got {name!r} ({reason})")
    threads = cpu.get_num_threads() if "cpu" in globals() else None
    cpu, isa = _load(name), name
    if threads is not None:
        cpu.set_num_threads(threads)


def cuda(operation: str) -> ModuleType:
    """The module of CUDA kernels.

    Raises
    ------
    NotImplementedError
        It was not built, or cannot run here: the message names `operation` and says why.
    """
    try:
        module = importlib.import_module("regard._cuda")
    except ImportError as failure:
        reason = str(failure) if importlib.util.find_spec("regard._cuda") else "this build has no CUDA kernels"
        raise NotImplementedError(f"{operation}: an array on a GPU, but {reason}") from None
    reason = module.why_not()
    if reason is not None:
        raise NotImplementedError(f"{operation}: an array on a GPU, but CUDA cannot be used: {reason}")
    return module


@contextlib.contextmanager
def using(name: str) -> Iterator[ModuleType]:
    """Use one instruction set within a block (for tests and comparisons)."""
    before = isa
    select(name)
    try:
        yield cpu
    finally:
        select(before)


select(os.environ.get("REGARD_ISA") or possible()[-1])
