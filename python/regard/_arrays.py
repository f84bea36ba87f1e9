"""The only file that knows NumPy, CuPy, PyTorch and DLPack: what came in goes back as the same kind of array."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import itertools
import math
import sys
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from regard import _backend

#: DLPack device types. Managed memory, which the driver moves, is read as a device's.
_CPU, _CUDA = 1, (2, 13)


class _Capsule:
    """A DLPack capsule as the object that from_dlpack functions ask for."""

    def __init__(self, capsule: Any) -> None:
        self._capsule = capsule

    def __dlpack__(self, **_: Any) -> Any:
        return self._capsule

    def __dlpack_device__(self) -> tuple[int, int]:
        return (_CPU, 0)


def _device(x: Any) -> tuple[int, int]:
    """The device of an array as DLPack numbers it."""
    if type(x).__module__.partition(".")[0] == "cupy":  # asks the driver about the pointer; empty arrays have none
        return _CUDA[0], int(x.device.id)
    kind, number = x.__dlpack_device__()
    return int(kind), int(number)


def native(operation: str, x: Any) -> Any:
    """`x` as the binding reads it: NumPy arrays as they are, others through DLPack without a copy or gradients.

    Objects that are no arrays pass through: the problem's own check names the argument.
    """
    if isinstance(x, (np.ndarray, type)) or not hasattr(x, "__dlpack_device__"):
        return x
    device = _device(x)[0]
    if device != _CPU:
        raise NotImplementedError(
            f"{operation}: no kernel for arrays of {type(x).__module__} on DLPack device {device}"
        )
    if hasattr(x, "is_neg") and x.is_neg():  # PyTorch's view of negated numbers, which DLPack does not tell
        raise TypeError(f"{operation}: expected arrays of their own numbers, got a negated view; give x.resolve_neg()")
    x = x.detach() if getattr(x, "requires_grad", False) else x
    try:
        return np.from_dlpack(x)
    except (BufferError, RuntimeError, TypeError):
        return x.__dlpack__()  # bfloat16: NumPy refuses it, the binding does not


def same_kind(like: Any) -> Callable[[np.ndarray], Any]:
    """The function that turns a NumPy result into the kind of array that `like` is, without a copy."""
    if isinstance(like, np.ndarray):
        return lambda x: x
    for base in type(like).__mro__:
        name = base.__module__.partition(".")[0]
        framework: Any = sys.modules["jax"].numpy if name in ("jaxlib", "jax") else sys.modules.get(name)
        if hasattr(framework, "from_dlpack"):
            break
    else:  # the caller's own kind, which only gives: NumPy's
        return lambda x: x.view(numpy_dtype("bfloat16")) if x.dtype == np.uint16 else x
    return lambda x: framework.from_dlpack(_Capsule(_backend.cpu.bfloat16_capsule(x)) if x.dtype == np.uint16 else x)


def name_of_dtype(dtype: Any) -> str:
    """The name of a dtype of NumPy, ml_dtypes or another framework, of a scalar type, or the name itself."""
    if isinstance(dtype, str):
        return dtype
    if isinstance(dtype, type):
        return dtype.__name__
    return str(getattr(dtype, "name", dtype)).rpartition(".")[2]


# ---- GPUs ------------------------------------------------------------------------------------------------------------


def _framework(x: Any) -> Any:
    return sys.modules[type(x).__module__.partition(".")[0]]


def on_gpu(x: Any) -> bool:
    """Whether `x` is an array on a CUDA device."""
    return not isinstance(x, (np.ndarray, type)) and hasattr(x, "__dlpack_device__") and _device(x)[0] in _CUDA


def _seen(x: Any) -> Any:
    """`x` as the CUDA binding reads it: device arrays without a copy and without waiting, others as they are.

    CuPy's own attributes know bfloat16, its capsules do not; nor do PyTorch's always know float8. A stream of -1 asks
    a framework not to synchronise: kernels run on the stream that it works on.
    """
    if x is None or not on_gpu(x):
        return x
    name = _framework(x).__name__
    if name == "cupy":
        return (x.device.id, x.data.ptr, x.shape, x.strides, x.dtype.name)
    if name == "torch":
        item = x.element_size()
        strides = tuple(item * stride for stride in x.stride())
        return (x.device.index, x.data_ptr(), tuple(x.shape), strides, name_of_dtype(x.dtype))
    return x.__dlpack__(stream=-1)


class _Gpu:
    """The stream and the memory of the framework and device that an array belongs to."""

    def __init__(self, operation: str, like: Any) -> None:
        self._like = like
        self._framework = _framework(like)
        name = self._framework.__name__
        if name not in ("cupy", "torch"):
            raise NotImplementedError(
                f"{operation}: no kernel for {name} arrays on a GPU; CuPy's and PyTorch's have one"
            )
        self._cupy = name == "cupy"
        self.device = _device(like)[1]

    def stream(self) -> int:
        """The stream that the framework works on, as a number."""
        if not self._cupy:
            return int(self._framework.cuda.current_stream(self.device).cuda_stream)
        with self._framework.cuda.Device(self.device):
            return int(self._framework.cuda.get_current_stream().ptr)

    def allocate(self, shape: Sequence[int], dtype: str) -> tuple[Any, Any]:
        """A new array, of the first array's dtype if `dtype` is empty, and as the binding sees it."""
        kind = getattr(self._framework, dtype) if dtype else self._like.dtype
        if self._cupy:
            with self._framework.cuda.Device(self.device):
                made = self._framework.empty(tuple(shape), kind)
        else:
            made = self._framework.empty(tuple(shape), dtype=kind, device=self._like.device)
        return made, _seen(made)


def call_on_gpu(
    operation: str, kernel: str, arrays: tuple[Any, ...], options: tuple[Any, ...], like: Any = None
) -> Any:
    """As call(), for a first array (or `like`) on a GPU: outputs are its framework's, work goes to its stream."""
    module = _backend.cuda(operation)
    function = getattr(module, kernel, None)
    if function is None:
        raise NotImplementedError(f"{operation}: not available on CUDA yet")
    gpu = _Gpu(operation, arrays[0] if like is None else like)
    seen = [_seen(x) for x in arrays]
    try:
        result = function(*seen, *options, gpu.stream(), gpu.allocate)
    except NotImplementedError as missing:
        raise NotImplementedError(f"{operation}: {missing}") from None
    if isinstance(result, tuple):
        return result
    given = {id(s): x for s, x in zip(seen, arrays, strict=True) if x is not None}
    return [given.get(id(x), x) for x in result]


def product_on_gpu(x: Any, weight: Any) -> tuple[Any, Any]:
    """x weight^T as x's framework computes it, and as the binding sees it."""
    if _framework(x).__name__ == "cupy":
        with x.device:  # as one matrix: more axes would be products of a batch
            made = x.reshape(math.prod(x.shape[:-1]), x.shape[-1]) @ weight.swapaxes(0, 1)
            made = made.reshape(*x.shape[:-1], weight.shape[0])
    else:
        # The product is finished in place, of which its gradient would know nothing.
        made = x.detach() @ weight.detach().swapaxes(0, 1)
    return made, _seen(made)


class Beside:
    """What the framework of `like` (NumPy, CuPy or PyTorch) makes where `like` is. dtypes are its own, or names."""

    def __init__(self, operation: str, like: Any) -> None:
        self._framework = np if isinstance(like, np.ndarray) else _framework(like)
        name = self._framework.__name__
        if name not in ("numpy", "cupy", "torch"):
            raise NotImplementedError(
                f"{operation}: not available for {name} arrays on a GPU, only CuPy's and PyTorch's"
            )
        self._torch, self._gpu = name == "torch", on_gpu(like)
        self._device = _device(like)[1]

    def holds(self, x: Any) -> bool:
        """Whether `x` is this framework's, in the same place."""
        if not self._gpu:
            return isinstance(x, np.ndarray)
        return on_gpu(x) and _framework(x) is self._framework and _device(x)[1] == self._device

    def current(self) -> contextlib.AbstractContextManager[Any]:
        """Within it CuPy works on this device; PyTorch works where its tensors are."""
        if self._torch or not self._gpu:
            return contextlib.nullcontext()
        return self._framework.cuda.Device(self._device)

    def _made(self, function: str, *arguments: Any, **dtype: Any) -> Any:
        make = getattr(self._framework, function)
        if self._torch:
            return make(*arguments, **dtype, device=f"cuda:{self._device}")
        with self.current():
            return make(*arguments, **dtype)

    def dtype(self, dtype: Any) -> Any:
        """The framework's dtype of that name; any other as it is."""
        if not isinstance(dtype, str):
            return dtype
        return getattr(self._framework, dtype) if self._torch else numpy_dtype(dtype)

    def empty(self, shape: tuple[int, ...], dtype: Any) -> Any:
        return self._made("empty", shape, dtype=self.dtype(dtype))

    def zeros(self, shape: tuple[int, ...], dtype: Any) -> Any:
        return self._made("zeros", shape, dtype=self.dtype(dtype))

    def full(self, shape: tuple[int, ...], value: Any, dtype: Any) -> Any:
        return self._made("full", shape, value, dtype=self.dtype(dtype))

    def array(self, x: np.ndarray) -> Any:
        """A host's array, brought here."""
        return self._made("as_tensor" if self._torch else "asarray", x)

    def converted(self, x: Any, dtype: Any) -> Any:
        """`x` in another dtype; itself where it has it."""
        dtype = self.dtype(dtype)
        if self._torch:
            return x.detach().to(dtype)
        if x.dtype == dtype:
            return x
        with self.current():
            return x.astype(dtype, copy=False)

    def joined(self, arrays: tuple[Any, ...], axis: int) -> Any:
        """Arrays one after another along an axis."""
        if self._torch:
            return self._framework.cat(arrays, axis)
        return self._made("concatenate", arrays, axis)


# ---- Where modules keep their weights --------------------------------------------------------------------------------


class HostMemory:
    """NumPy's memory, as modules use it."""

    kind = "cpu"
    device: int | None = None

    def put(self, operation: str, x: Any, dtype: Any) -> np.ndarray:
        """`x`, an array of any framework, as a contiguous one of `dtype` here; a view where that needs no copy."""
        return np.ascontiguousarray(on_host(operation, x), dtype)

    def wait(self) -> None:
        """What was put here is here."""


HOST = HostMemory()


class CupyMemory:
    """CuPy's memory on one GPU."""

    kind = "gpu"

    def __init__(self, cupy: Any, device: int) -> None:
        self._cupy = cupy
        self.device: int | None = device

    def __deepcopy__(self, memo: Any) -> CupyMemory:
        return self

    def put(self, operation: str, x: Any, dtype: Any) -> Any:
        """As HostMemory.put, in the order of the current stream."""
        with self._cupy.cuda.Device(self.device):
            if not on_gpu(x):
                return self._cupy.asarray(np.ascontiguousarray(numpy_view(operation, x), dtype))
            x = _as_cupy(self._cupy, x)
            return self._cupy.ascontiguousarray(x if x.device.id == self.device else x.copy(), dtype)

    def wait(self) -> None:
        """Wait until what was put here is here, so that calls on any stream may read it."""
        with self._cupy.cuda.Device(self.device):
            self._cupy.cuda.get_current_stream().synchronize()


def memory_of(operation: str, like: Any) -> HostMemory | CupyMemory:
    """Where a module's weights must be for calls with arrays like this one."""
    if like is None or not on_gpu(like):
        return HOST
    return CupyMemory(_cupy_for(operation, like), _device(like)[1])


def _cupy_for(operation: str, like: Any) -> Any:
    """CuPy, which modules compute with on a GPU."""
    framework = _framework(like)
    if framework.__name__ == "cupy":
        return framework
    if framework.__name__ != "torch":
        raise NotImplementedError(
            f"{operation}: not available for {framework.__name__} arrays on a GPU; for CuPy's and PyTorch's it is"
        )
    try:
        return importlib.import_module("cupy")
    except ImportError:
        raise NotImplementedError(
            f"{operation}: PyTorch's tensors on a GPU need the cupy package, which cannot be imported here"
        ) from None


def _as_cupy(cupy: Any, x: Any) -> Any:
    """An array on a GPU as CuPy's, without a copy, in the order of the current stream; bfloat16 goes as its bits."""
    if _framework(x) is cupy:
        return x
    x = x.detach()
    if str(x.dtype) == "torch.bfloat16":
        return cupy.from_dlpack(x.view(_framework(x).int16)).view(numpy_dtype("bfloat16"))
    return cupy.from_dlpack(x)


def _as_torch(torch: Any, x: Any) -> Any:
    """A CuPy array as PyTorch's, the same way back."""
    if x.dtype.name == "bfloat16":
        return torch.from_dlpack(x.view(np.int16)).view(torch.bfloat16)
    return torch.from_dlpack(x)


# ---- What modules ask of NumPy and CuPy alike ------------------------------------------------------------------------


def is_array(x: Any) -> bool:
    """Whether `x` is what a module's forward computes with: an array of NumPy or CuPy."""
    return isinstance(x, np.ndarray) or type(x).__module__.partition(".")[0] == "cupy"


def namespace(x: Any) -> Any:
    """The functions of x's framework under NumPy's names: NumPy's, or CuPy's."""
    return np if isinstance(x, np.ndarray) else _framework(x)


def device_of(x: Any) -> int | None:
    """The GPU on which an array is; None is the CPU."""
    return _device(x)[1] if on_gpu(x) else None


def beside(like: Any, x: Any) -> Any:
    """A NumPy array `x` where `like` is; anything else as it is."""
    if isinstance(like, np.ndarray) or not isinstance(x, np.ndarray):
        return x
    return Beside("regard.nn", like).array(x)


def current_device(operation: str, x: Any) -> contextlib.AbstractContextManager[Any]:
    """A block in which new arrays of CuPy are made where `x`, an array of NumPy or CuPy, is."""
    if isinstance(x, np.ndarray) or not on_gpu(x):
        return _NOWHERE
    framework = _framework(x).__name__
    if framework != "cupy":
        raise NotImplementedError(f"{operation}: not available for {framework} arrays on a GPU, only CuPy's")
    return Beside(operation, x).current()


_NOWHERE = contextlib.nullcontext()


def as_float8(x: Any) -> tuple[Any, ...]:
    """A GPU's bytes as the CUDA binding reads float8, which not every framework has."""
    return (*_seen(x)[:4], "float8_e4m3fn")


def _apart_on_gpu(out: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    extent = _backend.cuda("out").extent
    first, last = extent(_seen(out))

    def apart(x: Any) -> Any:
        if x is None or not on_gpu(x):
            return x
        begin, end = extent(_seen(x))
        if begin >= last or end <= first:
            return x
        return x.copy() if _framework(x).__name__ == "cupy" else x.clone()

    return tuple(map(apart, inputs))


def call(
    operation: str,
    kernel: Callable[..., Any],
    arrays: tuple[Any, ...],
    options: tuple[Any, ...],
) -> Any:
    """kernel(*arrays, *options) for arrays of any framework; outputs are of the first array's kind."""
    if type(arrays[0]) is np.ndarray:
        result = kernel(*arrays, *options)
        if type(result) is not tuple:  # else it refuses, and may only not have known an array of another framework
            return result
    if on_gpu(arrays[0]):
        return call_on_gpu(operation, kernel.__name__, arrays, options)
    natives = [native(operation, x) for x in arrays]
    result = kernel(*natives, *options)
    if isinstance(result, tuple):
        return result
    convert = same_kind(arrays[0])
    given = {id(n): x for n, x in zip(natives, arrays, strict=True) if x is not None}
    return [given[id(x)] if id(x) in given else convert(x) for x in result]


def broadcast_to(x: Any, shape: tuple[int, ...], argument: str) -> Any:
    """A view of `x` repeated to `shape` without a copy, for arrays of any framework."""
    if on_gpu(x) and not hasattr(x, "expand"):
        return _framework(x).broadcast_to(x, shape)
    repeat = x.expand if hasattr(x, "expand") else lambda s: np.broadcast_to(native(argument, x), s)
    try:
        return repeat(shape)
    except (RuntimeError, ValueError):
        raise ValueError(
            f"{argument}: expected a shape that broadcasts to {shape}, got shape {tuple(x.shape)}"
        ) from None


def apart_from(out: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """The inputs, those that may share memory with `out` copied, so that `out` may overlap any of them."""
    if on_gpu(out):
        return _apart_on_gpu(out, inputs)
    if not isinstance(out, np.ndarray):
        # Another framework's array: its memory is compared through NumPy where NumPy reads it.
        out = native("out", out)

    def apart(x: Any) -> Any:
        if type(x) is type(out) is np.ndarray:
            return x.copy() if np.may_share_memory(out, x) else x
        if x is None or on_gpu(x):  # whether it may be there is the call's to say
            return x
        y = native("out", x)
        both = isinstance(out, np.ndarray) and isinstance(y, np.ndarray)
        shared = np.may_share_memory(out, y) if both else type(y) is type(out)
        if not shared:
            return x
        return y.copy() if isinstance(y, np.ndarray) else x.clone()

    return tuple(map(apart, inputs))


def numpy_dtype(name: str) -> np.dtype[Any]:
    """The NumPy dtype of that name; bfloat16 and float8_e4m3fn are ml_dtypes', an optional package."""
    if name not in ("bfloat16", "float8_e4m3fn"):
        return np.dtype(name)
    try:
        import ml_dtypes
    except ImportError:
        raise TypeError(f"dtype: {name} weights, caches and inputs of modules need the ml_dtypes package") from None
    return np.dtype(getattr(ml_dtypes, name))


def numpy_view(operation: str, x: Any) -> np.ndarray:
    """`x`, an array of any framework on the CPU, as NumPy's, without a copy; bfloat16 too."""
    if type(x) is np.ndarray:
        return x
    x = native(operation, x)
    if type(x).__name__ == "PyCapsule":
        return _backend.cpu.bfloat16_words(x).view(numpy_dtype("bfloat16"))
    return np.asarray(x)


def on_host(operation: str, x: Any) -> np.ndarray:
    """As numpy_view; what lies on a GPU is copied, when the device has computed it."""
    if not on_gpu(x):
        return numpy_view(operation, x)
    framework = _framework(x)
    if framework.__name__ == "cupy":
        return np.asarray(framework.asnumpy(x))
    if framework.__name__ == "torch":
        return numpy_view(operation, x.detach().cpu())
    raise NotImplementedError(f"{operation}: no way to read {framework.__name__} arrays on a GPU")


def _framework_of(like: Any) -> Callable[[np.ndarray], Any]:
    convert = same_kind(like)
    return lambda x: convert(x.view(np.uint16) if x.dtype.name == "bfloat16" else x)


def _foreign(x: Any) -> bool:
    """Whether `x` is, or a tuple or list `x` has, an array of another framework than NumPy."""
    if type(x) in (tuple, list):
        return any(map(_foreign, x))
    return type(x) is not np.ndarray and hasattr(x, "__dlpack__") and not isinstance(x, type)


def _arrays_in(x: Any) -> Iterator[Any]:
    if isinstance(x, (tuple, list)):  # an LSTM's states
        for y in x:
            yield from _arrays_in(y)
    elif hasattr(x, "__dlpack__") and not isinstance(x, type):
        yield x


def through_numpy(operation: str, function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """function(*args, **kwargs) with all arrays as NumPy's; results are of the first array's kind."""
    if not any(map(_foreign, itertools.chain(args, kwargs.values()))):
        return function(*args, **kwargs)
    like = next(_arrays_in([*args, *kwargs.values()]))
    result = _mapped(function, args, kwargs, lambda x: numpy_view(operation, x))
    return result if isinstance(like, np.ndarray) else _converted(result, np.ndarray, _framework_of(like))


def through_modules(
    operation: str, function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Any:
    """As through_numpy, but with all arrays as CuPy's where the first one is on a GPU; NumPy's stay as they are."""
    if not any(map(_foreign, itertools.chain(args, kwargs.values()))):
        return function(*args, **kwargs)
    given = list(_arrays_in([*args, *kwargs.values()]))
    like = given[0]
    if not on_gpu(like):
        if any(map(on_gpu, given)):
            first = next(iter(inspect.signature(function).parameters))
            if not args and on_gpu(kwargs.get(first)):  # a mask on the host was named before it
                return through_modules(
                    operation, function, (kwargs[first],), {n: x for n, x in kwargs.items() if n != first}
                )
            raise TypeError(_misplaced(function, args, kwargs, like))
        return through_numpy(operation, function, args, kwargs)
    cupy = _cupy_for(operation, like)

    def view(x: Any) -> Any:
        return _as_cupy(cupy, x) if on_gpu(x) else numpy_view(operation, x)

    with working_beside(operation, like):
        result = _mapped(function, args, kwargs, view)
        framework = _framework(like)
        return result if framework is cupy else _converted(result, cupy.ndarray, lambda x: _as_torch(framework, x))


def _misplaced(function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], like: Any) -> str:
    """Which argument is on a GPU, though `like` is not."""
    named = {**inspect.signature(function).bind(*args, **kwargs).arguments, **kwargs}
    held = {name: list(_arrays_in(x)) for name, x in named.items()}
    first = next(name for name, found in held.items() if any(x is like for x in found))
    wrong = next(name for name, found in held.items() if any(map(on_gpu, found)))
    return f"{wrong}: expected an array on the CPU, where {first} is, got one on a GPU"


@contextlib.contextmanager
def working_beside(operation: str, like: Any) -> Iterator[None]:
    """Within it CuPy works on the GPU of `like`, on its framework's stream. Without a GPU it is nothing."""
    if like is None or not on_gpu(like):
        yield
        return
    cupy, framework, device = _cupy_for(operation, like), _framework(like), _device(like)[1]
    with cupy.cuda.Device(device):
        if framework is cupy:
            yield
        else:
            with _as_stream(cupy, framework.cuda.current_stream(device).cuda_stream, device):
                yield


def _as_stream(cupy: Any, number: int, device: int) -> Any:
    """Another framework's stream as CuPy's."""
    if hasattr(cupy.cuda.Stream, "from_external"):  # from 14 on, where ExternalStream warns that it will go
        return cupy.cuda.Stream.from_external(types.SimpleNamespace(__cuda_stream__=lambda: (0, number)))
    return cupy.cuda.ExternalStream(number, device)


def _mapped(
    function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], view: Callable[[Any], Any]
) -> Any:
    """function(*args, **kwargs) with view(x) in the place of every array x."""
    views: dict[int, Any] = {}  # the same array given twice is seen to be the same

    def seen(x: Any) -> Any:
        if isinstance(x, tuple):  # an LSTM's states
            return tuple(map(seen, x))
        if isinstance(x, list):
            return list(map(seen, x))
        if not hasattr(x, "__dlpack__") or isinstance(x, type):
            return x
        if id(x) not in views:
            views[id(x)] = view(x)
        return views[id(x)]

    return function(*map(seen, args), **{name: seen(x) for name, x in kwargs.items()})


def _converted(result: Any, kind: type, convert: Callable[[Any], Any]) -> Any:
    if isinstance(result, tuple):
        return tuple(_converted(x, kind, convert) for x in result)
    return convert(result) if isinstance(result, kind) else result
