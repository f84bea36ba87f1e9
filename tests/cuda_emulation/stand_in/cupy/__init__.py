"""As much of CuPy as regard uses, over the emulator: arrays whose memory only kernels and asnumpy() may touch."""

from __future__ import annotations

from typing import Any

import numpy as np

from . import cuda
from ._emulator import emulator

float32, float64, float16, uint8, int8, int64 = np.float32, np.float64, np.float16, np.uint8, np.int8, np.int64


class _Pointer:
    def __init__(self, ptr: int) -> None:
        self.ptr = ptr


class ndarray:
    """A device array. NumPy cannot read it; what it knows about itself is CuPy's."""

    __array_ufunc__ = None

    def __init__(self, host: np.ndarray) -> None:
        self._host = host

    shape = property(lambda self: self._host.shape)
    strides = property(lambda self: self._host.strides)
    dtype = property(lambda self: self._host.dtype)
    ndim = property(lambda self: self._host.ndim)
    size = property(lambda self: self._host.size)
    nbytes = property(lambda self: self._host.nbytes)
    data = property(lambda self: _Pointer(self._host.__array_interface__["data"][0]))
    device = property(lambda self: cuda.Device(0))

    def __len__(self) -> int:
        return len(self._host)

    def __array__(self, *_: Any, **__: Any) -> np.ndarray:
        raise TypeError("Implicit conversion to a NumPy array is not allowed.")

    def __bool__(self) -> bool:
        raise TypeError("regard waits for the device nowhere: it asks for no element")

    def __dlpack_device__(self) -> tuple[int, int]:
        raise RuntimeError("CuPy's would ask the driver about the pointer: device.id knows")

    def __dlpack__(self, **_: Any) -> Any:
        raise BufferError("arrays of this stand-in are read by their attributes")

    def reshape(self, *shape: int) -> ndarray:
        return ndarray(self._host.reshape(*shape))

    def swapaxes(self, a: int, b: int) -> ndarray:
        return ndarray(self._host.swapaxes(a, b))

    def transpose(self, *axes: int) -> ndarray:
        return ndarray(self._host.transpose(*axes))

    def astype(self, dtype: Any, copy: bool = True) -> ndarray:
        return self if not copy and self.dtype == dtype else _made(self._host.astype(dtype))

    def view(self, dtype: Any) -> ndarray:
        return ndarray(self._host.view(dtype))

    def copy(self) -> ndarray:
        return _made(self._host)

    def take(self, indices: ndarray, axis: int) -> ndarray:
        return _made(self._host.take(indices._host, axis, mode="wrap"))

    def clip(self, low: Any, high: Any) -> ndarray:
        return _made(self._host.clip(low, high))

    def max(self, axis: int, keepdims: bool = False) -> ndarray:
        return _made(self._host.max(axis, keepdims=keepdims))

    def sum(self, axis: int, keepdims: bool = False) -> ndarray:
        return _made(self._host.sum(axis, keepdims=keepdims))

    def argmax(self, axis: int) -> ndarray:
        return _made(self._host.argmax(axis))

    def mean(self, axis: int) -> ndarray:
        return _made(self._host.mean(axis))

    def __matmul__(self, other: ndarray) -> ndarray:
        wide = np.promote_types(self.dtype, np.float32)  # as cuBLAS sums 16-bit products
        return _made((self._host.astype(wide) @ other._host.astype(wide)).astype(self.dtype))

    def __getitem__(self, key: Any) -> ndarray:
        return _like(self._host, self._host[_on_host(key)])

    def __setitem__(self, key: Any, x: ndarray) -> None:
        self._host[_on_host(key)] = x._host

    def __invert__(self) -> ndarray:
        return _made(~self._host)

    def __add__(self, other: ndarray) -> ndarray:
        return _made(self._host + other._host)

    def __sub__(self, other: ndarray) -> ndarray:
        return _made(self._host - other._host)

    def __neg__(self) -> ndarray:
        return _made(-self._host)

    def __and__(self, other: ndarray) -> ndarray:
        return _made(self._host & other._host)

    def __iadd__(self, other: ndarray) -> ndarray:
        self._host += other._host
        return self

    def __isub__(self, other: ndarray) -> ndarray:
        self._host -= other._host
        return self

    def __imul__(self, other: ndarray) -> ndarray:
        self._host *= other._host
        return self


def _on_host(key: Any) -> Any:
    if type(key) is tuple:
        return tuple(map(_on_host, key))
    assert not isinstance(key, np.ndarray), "an index is copied to the device by whoever has it"
    return key._host if type(key) is ndarray else key


def _made(x: Any) -> ndarray:
    """What the device has computed, in memory of its own, with the strides of `x`: gaps stay poisoned."""
    x = np.asarray(x)
    low = sum(min(0, (n - 1) * s) for n, s in zip(x.shape, x.strides, strict=True)) if x.size else 0
    high = sum(max(0, (n - 1) * s) for n, s in zip(x.shape, x.strides, strict=True)) if x.size else 0
    memory = emulator().device_memory(high - low + x.itemsize if x.size else 0)
    if x.size == 0:
        return ndarray(np.empty(x.shape, x.dtype))
    host = np.ndarray(x.shape, x.dtype, memory, -low, x.strides)
    host[...] = x
    return ndarray(host)


def _like(whole: np.ndarray, part: np.ndarray) -> ndarray:
    """A part of an array: a view where it is one."""
    return ndarray(part) if np.may_share_memory(whole, part) else _made(part)


def zeros(shape: Any, dtype: Any = float) -> ndarray:
    made = empty(shape, dtype)
    made._host.view(np.uint8)[...] = 0
    return made


def full(shape: Any, value: Any, dtype: Any) -> ndarray:
    made = empty(shape, dtype)
    made._host[...] = value
    return made


def empty(shape: Any, dtype: Any = float) -> ndarray:
    """Memory of exactly the array's size, filled with NaN patterns."""
    dtype = np.dtype(dtype)
    size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    cuda.allocated.append(cuda.get_current_stream().ptr)
    return ndarray(emulator().device_memory(size).view(dtype).reshape(shape))


def asarray(x: Any, dtype: Any = None) -> ndarray:
    """A copy on the device of what is not there, each element where `x` has it."""
    if not isinstance(x, ndarray):
        x = np.asarray(x, dtype)
        cuda.copied.append(("to the device", x.nbytes))
        return _made(x)
    return x if dtype is None else x.astype(dtype, copy=False)


def ascontiguousarray(x: ndarray, dtype: Any = None) -> ndarray:
    host = np.ascontiguousarray(x._host, dtype)
    return x if host is x._host else _made(host)


def concatenate(arrays: Any, axis: int = 0) -> ndarray:
    return _made(np.concatenate([x._host for x in arrays], axis))


def repeat(x: ndarray, repeats: int, axis: int) -> ndarray:
    return _made(np.repeat(x._host, repeats, axis))


def pad(x: ndarray, pad_width: Any) -> ndarray:
    return _made(np.pad(x._host, pad_width))


def stack(arrays: Any) -> ndarray:
    return _made(np.stack([x._host for x in arrays]))


def argpartition(x: ndarray, kth: int, axis: int) -> ndarray:
    return _made(np.argpartition(x._host, kth, axis))


def take_along_axis(x: ndarray, indices: ndarray, axis: int) -> ndarray:
    return _made(np.take_along_axis(x._host, indices._host, axis))


def tanh(x: ndarray) -> ndarray:
    return _made(np.tanh(x._host))


def exp(x: ndarray) -> ndarray:
    return _made(np.exp(x._host))


def log(x: ndarray) -> ndarray:
    return _made(np.log(x._host))


def from_dlpack(x: Any) -> ndarray:
    """Of this folder's stand-in for a framework, whose capsules are its arrays."""
    return ndarray(x.__dlpack__(stream=cuda.get_current_stream().ptr)._host)


def broadcast_to(x: ndarray, shape: Any) -> ndarray:
    return ndarray(np.broadcast_to(x._host, shape))


def asnumpy(x: ndarray) -> np.ndarray:
    cuda.copied.append(("to the host", x.nbytes))
    return np.array(x._host)
