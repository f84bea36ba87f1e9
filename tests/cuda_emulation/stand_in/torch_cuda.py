"""PyTorch's CUDA tensors over the emulator: PyTorch itself, whose tensors say that they are on a GPU.

Their memory is the CPU's, and what PyTorch does with them is its own. Only what regard asks of a device is played:
where a tensor is, functions that make one there, the current stream; what would wait for the device is refused.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import torch
from torch.overrides import TorchFunctionMode

#: The stream that was current at each allocation, for tests to look at.
allocated: list[int] = []
_STREAM = 7
_INDEXING = (torch.Tensor.__getitem__, torch.Tensor.__setitem__)  # which take indices from the CPU


class CudaTensor(torch.Tensor):
    """A tensor on cuda:0."""

    __module__ = "torch"

    device = property(lambda self: torch.device("cuda", 0))

    def __dlpack_device__(self) -> tuple[int, int]:
        return (2, 0)

    def __dlpack__(self, **_: Any) -> Any:
        raise BufferError("tensors of this stand-in are read by their attributes")

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        flat = [y for x in args for y in (x if isinstance(x, (list, tuple)) else (x,))]
        tensors = [x for x in flat if isinstance(x, torch.Tensor)]
        if func not in _INDEXING and any(type(x) is torch.Tensor for x in tensors):
            raise RuntimeError("Expected all tensors to be on the same device, but found at least two devices")
        return super().__torch_function__(func, types, args, kwargs or {})

    def __array__(self, *_: Any, **__: Any) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first.")

    def _waits(self, *_: Any, **__: Any) -> Any:
        raise AssertionError("this would wait for the device")

    numpy, item, tolist, __bool__, __float__, __int__, cpu = 7 * (_waits,)


class _Made(TorchFunctionMode):
    """Functions that make tensors, where they are asked for device="cuda"."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if kwargs.get("device") is None or torch.device(kwargs["device"]).type != "cuda":
            return func(*args, **kwargs)
        allocated.append(_STREAM)
        made = func(*args, **{**kwargs, "device": "cpu"}).clone()  # as_tensor must not share a NumPy array's memory
        if func is torch.empty:
            made.reshape(-1).view(torch.uint8).fill_(0xFF)  # NaN patterns
        return made.as_subclass(CudaTensor)


@contextlib.contextmanager
def emulated() -> Iterator[None]:
    """Within it, this process's PyTorch has a GPU."""
    before = torch.cuda.current_stream
    torch.cuda.current_stream = lambda device=None: SimpleNamespace(cuda_stream=_STREAM)
    try:
        with _Made():
            yield
    finally:
        torch.cuda.current_stream = before


def asarray(x: np.ndarray) -> torch.Tensor:
    """A copy on the device."""
    words = {"bfloat16": np.int16, "float8_e4m3fn": np.uint8}.get(x.dtype.name)
    made = torch.from_numpy(np.array(x if words is None else x.view(words)))
    return (made if words is None else made.view(getattr(torch, x.dtype.name))).as_subclass(CudaTensor)


def asnumpy(x: torch.Tensor) -> np.ndarray:
    name = str(x.dtype).rpartition(".")[2]
    plain = x.detach().as_subclass(torch.Tensor)
    if name not in ("bfloat16", "float8_e4m3fn"):
        return plain.numpy().copy()
    words = plain.view(torch.int16 if name == "bfloat16" else torch.uint8)
    return words.numpy().view(getattr(ml_dtypes, name)).copy()
