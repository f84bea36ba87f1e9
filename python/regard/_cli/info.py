"""`info`: what this installation is, and what it uses on this machine."""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import os
import platform
import sys
from pathlib import Path

import numpy as np

import regard
from regard import _backend, _cpu_features
from regard._cli import table

#: Optional packages and what they are for.
_PACKAGES = {
    "ml_dtypes": "bfloat16 in NumPy arrays",
    "cupy": "arrays on NVIDIA GPUs",
    "torch": "its tensors as arguments",
    "jax": "its arrays as arguments",
    "rich": "pretty tables and progress bars",
    "matplotlib": "regard.plot and benchmark plots",
    "onnx": "regard.onnx in ONNX's reference evaluator",
}
#: Distributions that carry a package under another name, by prefix.
_CUPY = ("cupy", "cupy-cuda12x", "cupy-cuda13x", "cupy-cuda11x")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    pass


def run(options: argparse.Namespace) -> int:
    show(plain=options.plain)
    return 0


def show(plain: bool = False) -> None:
    table.show("", ("", ""), rows(), left=2, plain=plain)


def rows() -> list[tuple[str, str]]:
    """(what, value), an empty `what` where a value goes on."""
    found = [
        ("regard", f"{regard.__version__} at {Path(regard.__file__).parent}"),
        ("python", f"{platform.python_version()}{_free_threaded()}, NumPy {np.__version__}"),
        ("system", f"{platform.system()} {platform.machine()}"),
        ("processor", processor()),
        ("compiler", str(_cpu_features.compiler)),
        ("instruction set", f"{_backend.isa}: {_why_picked()}"),
    ]
    found += [("", f"{name}: {_state(name)}") for name in reversed(_backend.INSTRUCTION_SETS) if name != _backend.isa]
    found.append(("threads", _threads()))
    found.append(("CUDA", _cuda()))
    found += [
        ("packages" if i == 0 else "", f"{name} {_version(name) or 'not installed'} ({use})")
        for i, (name, use) in enumerate(_PACKAGES.items())
    ]
    return found


def processor() -> str:
    """The processor's model name."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.lower().startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def cores() -> int:
    """How many processors this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _free_threaded() -> str:
    enabled = getattr(sys, "_is_gil_enabled", lambda: True)()
    return "" if enabled else " (free-threaded)"


def _why_picked() -> str:
    named = os.environ.get("REGARD_ISA")
    if named == _backend.isa:
        return "named by REGARD_ISA"
    if _backend.isa == _backend.possible()[-1]:
        return "the best that was built and that this machine runs"
    return "selected by the program"


def _state(name: str) -> str:
    reason = _backend.INSTRUCTION_SETS[name]
    if name not in _backend.built():
        return "not built" if reason is None else f"not built, and {reason}"
    return f"possible (REGARD_ISA={name})" if reason is None else f"built, but {reason}"


def _threads() -> str:
    date = int(_backend.cpu.openmp)
    limits = "".join(f", {name}={os.environ[name]}" for name in ("OMP_NUM_THREADS",) if name in os.environ)
    return f"{regard.get_num_threads()} of {cores()} cores (OpenMP {date // 100}-{date % 100:02d}{limits})"


def _cuda() -> str:
    if importlib.util.find_spec("regard._cuda") is None:
        driver = (
            "a driver is present" if Path("/proc/driver/nvidia/version").exists() else "no driver is present either"
        )
        return f"no: this build has no CUDA kernels; {driver}"
    try:
        state = importlib.import_module("regard._cuda").why_not()
    except ImportError as failure:
        return f"no: the CUDA module does not load: {failure}"
    return "yes" if state is None else f"no: {state}"


def _version(name: str) -> str | None:
    """The installed version, without importing the package."""
    for distribution in _CUPY if name == "cupy" else (name,):
        try:
            return importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None
