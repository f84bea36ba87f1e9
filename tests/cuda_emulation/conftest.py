"""These tests run where REGARD_CUDA_EMULATION names the folder of a build of the emulator:

cmake -S . -B build/emulation -G Ninja -DREGARD_CUDA_EMULATION=ON -DREGARD_PYTHON=ON -DREGARD_CUDA=OFF
cmake --build build/emulation --target regard_cuda_emulated
REGARD_CUDA_EMULATION=build/emulation/tests/cuda_emulation python -m pytest tests/cuda_emulation
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from regard import _backend


@pytest.fixture(scope="session")
def _stand_in() -> Iterator[Any]:
    if "REGARD_CUDA_EMULATION" not in os.environ:
        pytest.skip("needs REGARD_CUDA_EMULATION, the folder of a build of the CUDA emulator")
    os.environ["REGARD_CUDA_EMULATION"] = str(Path(os.environ["REGARD_CUDA_EMULATION"]).resolve())
    known = {name: m for name, m in sys.modules.items() if name.partition(".")[0] == "cupy"}
    for name in known:
        del sys.modules[name]
    folder = str(Path(__file__).parent / "stand_in")
    sys.path.insert(0, folder)
    import cupy

    yield cupy
    sys.path.remove(folder)
    for name in [n for n in sys.modules if n.partition(".")[0] == "cupy"]:
        del sys.modules[name]
    sys.modules.update(known)


@pytest.fixture
def emulator(_stand_in: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The emulated module in the place of regard._cuda, as an H100 that runs lanes in order."""
    module = _stand_in._emulator.emulator()
    monkeypatch.setattr(_backend, "cuda", lambda operation: module)
    module.set_device(90, 232448)
    module.set_order(False, 0)
    module.set_clocks(0, 0)
    yield module
    module.set_order(False, 0)
    module.set_clocks(0, 0)


@pytest.fixture
def cupy(_stand_in: Any, emulator: Any) -> Any:
    return _stand_in


@pytest.fixture
def torch_cuda(emulator: Any) -> Iterator[Any]:
    """PyTorch's tensors that say they are on a GPU; asarray() and asnumpy() as CuPy has them."""
    pytest.importorskip("torch", reason="plays PyTorch's tensors on a GPU with PyTorch's own on the CPU")
    import torch_cuda

    with torch_cuda.emulated():
        yield torch_cuda


@pytest.fixture(params=["cupy", "torch_cuda"])
def gpu(request: pytest.FixtureRequest) -> Any:
    """Either framework."""
    return request.getfixturevalue(request.param)


#: Compute capability and shared memory of a GPU whose warps multiply, and of one whose warpgroups do.
TENSOR_CORES = {"sm_80": (80, 166912), "sm_90": (90, 232448)}


@pytest.fixture(params=TENSOR_CORES)
def tensor_cores(emulator: Any, request: pytest.FixtureRequest) -> None:
    emulator.set_device(*TENSOR_CORES[request.param])


@pytest.fixture(params=[("float32", "sm_90"), ("bfloat16", "sm_80"), ("bfloat16", "sm_90")], ids="-".join)
def dtype(emulator: Any, request: pytest.FixtureRequest) -> str:
    """A dtype of each kernel for many queries, on a GPU that has the kernel."""
    name, device = request.param
    emulator.set_device(*TENSOR_CORES[device])
    return name
