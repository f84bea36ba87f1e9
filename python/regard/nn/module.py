"""What every module with weights is built on: parameters, state dicts, calls with any kind of array."""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from regard import _arrays, _checks

if TYPE_CHECKING:
    from typing_extensions import Self

#: The n-th parameter made in a process starts from seed n: the same program has the same initial weights.
_seeds = itertools.count()

#: Where a module's weights are packed for: the CPU, or a GPU.
Memory = _arrays.HostMemory | _arrays.CupyMemory

FLOATS = ("float32", "float64", "float16", "bfloat16")

#: PyTorch's word, in some modules' calls, for what functions call x.
INPUT = {"x": "input"}

#: How the weights of linear layers may be held.
_HELD = ("float32", "bfloat16", "int8")


def check_floats(argument: str, x: Any) -> None:
    """Refuse what is no array of floats that modules compute with."""
    if not _arrays.is_array(x) or x.dtype.name not in FLOATS or not x.dtype.isnative:
        raise TypeError(f"{argument}: expected an array of dtype {', '.join(FLOATS)}, got {_checks.describe(x)}")


class IncompatibleKeys(NamedTuple):
    """What load_state_dict(strict=False) found amiss."""

    missing_keys: list[str]
    unexpected_keys: list[str]


class Renamed(Mapping[str, Any]):
    """A state dict's arrays under other names, read where they are when asked for: {name: (mapping, name in it)}."""

    def __init__(self, places: Mapping[str, tuple[Mapping[str, Any], str]]) -> None:
        self._places = places

    def __getitem__(self, name: str) -> Any:
        mapping, given = self._places[name]
        return mapping[given]

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


class Parameter:
    """One weight: what was loaded, as it came, or else initial values drawn when first asked for."""

    def __init__(self, shape: tuple[int, ...], initial: Callable[[np.random.Generator], np.ndarray], dtype: Any = None):
        self.shape = shape
        self.value: Any = None  # what was loaded
        self.owners: list[Module] = []  # more than one where modules share it
        self._initial = initial
        self._dtype = dtype
        self._seed = next(_seeds)

    def get(self) -> Any:
        """The value as it was loaded: the same object."""
        if self.value is None:
            self.value = self._initial(np.random.default_rng(self._seed)).astype(self._dtype or np.float32)
        return self.value

    def take(self, value: Any) -> None:
        """Another value, and what its owners packed of the last one is gone."""
        self.value = value
        for module in self.owners:
            module._packed = {}

    def checked(self, name: str, value: Any) -> Any:
        """`value`, if it can be this parameter's.

        Raises
        ------
        TypeError, ValueError
            It is no array of a floating dtype, or has another shape.
        """
        shape = getattr(value, "shape", None)
        if shape is None or not (hasattr(value, "__array__") or hasattr(value, "__dlpack__")):
            raise TypeError(f"{name}: expected an array of shape {self.shape}, got {_checks.describe(value)}")
        # Frameworks write their dtypes as "torch.float32" or "dtype('float32')".
        if str(value.dtype).rpartition(".")[2] not in FLOATS:
            raise TypeError(f"{name}: expected dtype {', '.join(FLOATS)}, got {_checks.describe(value)}")
        if tuple(shape) != self.shape:
            raise ValueError(f"{name}: expected shape {self.shape}, got {_checks.describe(value)}")
        return value

    def put(self, memory: Memory, dtype: Any) -> Any:
        """The value as a contiguous array of `dtype` in `memory`; a view where that needs no copy."""
        return memory.put(type(self).__name__, self.get(), dtype)


class Module:
    """A function of arrays with weights, under PyTorch's names; always in evaluation mode.

    Arrays given and returned are NumPy's, those of any framework with DLPack on the CPU, or CuPy's and
    PyTorch's on a GPU (the latter with CuPy installed): a call runs where its first array is, and results
    are of its kind. float32, float64, float16 and bfloat16 inputs are computed with weights of the same
    dtype; 16-bit ones in float32, rounded after each step.

    Weights stay as they were loaded (:meth:`state_dict` returns the same arrays) and are rearranged
    for the kernels once: for the module's own dtype by :meth:`load_state_dict`, for another input
    dtype or another device at the first call with it. Arrays changed in place afterwards must be loaded
    again. Weights loaded from a GPU's memory are used there as they are, where dtypes agree.

    A module without loaded weights has initial ones, distributed as PyTorch's are.

    Parameters
    ----------
    device : None or "cpu"
        PyTorch's word: a module runs where the arrays are that it is called with.
    dtype : dtype or its name, optional
        Of the initial weights, and of the inputs that weights are packed for when they are loaded: float32.

    Raises
    ------
    NotImplementedError
        For another device, and by calls for what there is no kernel for.
    """

    #: Where 16-bit inputs take the weights as packed for float32: "cpu", because it computes in float32; or "gpu" too.
    _float32_serves_16_bit: tuple[str, ...] = ()
    #: Whether weights are held as to() says; int8 is made of float32, whatever the inputs' dtype.
    _holds = False

    def __init__(self, device: Any = None, dtype: Any = None) -> None:
        if str(device) not in ("None", "cpu"):
            raise NotImplementedError(
                f"{type(self).__name__}: no device {device}: a module runs where the arrays are that it is called with"
            )
        name = "float32" if dtype is None else getattr(dtype, "__name__", str(dtype).rpartition(".")[2])
        if name not in FLOATS:
            raise TypeError(f"dtype: expected {', '.join(FLOATS)}, got {dtype!r}")
        self.dtype = _arrays.numpy_dtype(name)
        self._parameters: dict[str, Parameter] = {}
        self._children: dict[str, Module] = {}
        self._packed: dict[Any, Any] = {}
        self._held: str | None = None

    # ---- Parameters and children: attributes, as in PyTorch ----

    def add_parameter(self, name: str, shape: tuple[int, ...], initial: Callable[..., np.ndarray]) -> None:
        """A parameter, an attribute from here on; `initial` makes its first values from a Generator."""
        self._parameters[name] = Parameter(shape, initial, self.dtype)
        self._parameters[name].owners.append(self)

    def tie(self, name: str, other: Module, other_name: str | None = None) -> None:
        """Share a parameter with another module, as ``self.weight = other.weight`` does in PyTorch.

        From here on both have the one of `other`, whichever is loaded or set. A state dict has it under both names;
        one that is loaded needs only one of them.

        Parameters
        ----------
        name : str
            This module's parameter, which is given up.
        other : Module
            Whose parameter it becomes.
        other_name : str, optional
            Its name there; default `name`.

        Raises
        ------
        TypeError, ValueError
            There is no such parameter, or it has another shape.
        """
        other_name = name if other_name is None else other_name
        for argument, module, wanted in (("name", self, name), ("other_name", other, other_name)):
            if not isinstance(module, Module):
                raise TypeError(f"other: expected a Module, got {_checks.describe(module)}")
            if wanted not in module._parameters:
                kind, known = type(module).__name__, ", ".join(map(repr, module._parameters)) or "none"
                raise ValueError(f"{argument}: expected a parameter of {kind} ({known}), got {wanted!r}")
        shared, given_up = other._parameters[other_name], self._parameters[name]
        if shared.shape != given_up.shape:
            raise ValueError(f"other: expected {other_name} of shape {given_up.shape}, got {shared.shape}")
        if shared is not given_up:
            given_up.owners.remove(self)
            shared.owners.append(self)
            self._parameters[name], self._packed = shared, {}

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, Module):
            self._children[name] = value
        elif value is None and name in self.__dict__.get("_children", ()):
            del self._children[name]
        elif name in self.__dict__.get("_parameters", ()):
            parameter = self._parameters[name]
            parameter.take(parameter.checked(name, value))
            return
        object.__setattr__(self, name, value)

    def __getattr__(self, name: str) -> Any:
        parameters = self.__dict__.get("_parameters", {})
        if name in parameters:
            return parameters[name].get()
        if name in ("_parameters", "_children"):
            raise AttributeError(f"{type(self).__name__}: expected super().__init__() before modules and parameters")
        raise AttributeError(f"{type(self).__name__!r} has no attribute {name!r}")

    def named_modules(self, prefix: str = "") -> Iterator[tuple[str, Module]]:
        """This module and all within it, with their dotted names."""
        yield prefix, self
        for name, child in self._children.items():
            yield from child.named_modules(f"{prefix}.{name}" if prefix else name)

    def _named(self) -> dict[str, tuple[Module, Parameter]]:
        return {
            f"{path}.{name}" if path else name: (module, parameter)
            for path, module in self.named_modules()
            for name, parameter in module._parameters.items()
        }

    def state_dict(self) -> dict[str, Any]:
        """The weights by PyTorch's names: the very arrays that were loaded."""
        return {name: parameter.get() for name, (_, parameter) in self._named().items()}

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True) -> IncompatibleKeys:
        """Take the weights of a PyTorch module's state dict, or of a file that was saved from one.

        Parameters
        ----------
        state_dict : mapping of names to arrays
            NumPy arrays, or anything with ``__array__`` or DLPack, such as PyTorch's tensors; kept
            without a copy. Any of the four dtypes.
        strict : bool
            The names must be exactly the module's; of those that modules share (:meth:`tie`), one will do.

        Returns
        -------
        (missing_keys, unexpected_keys)
            Both empty where strict.

        Raises
        ------
        TypeError, ValueError
            Names are missing or unexpected (only where strict), or arrays have another shape or are
            no floats. All are listed in one message, and the module is as it was.
        """
        named, given = self._named(), list(state_dict.keys())
        loaded = {id(named[name][1]) for name in given if name in named}
        missing = [name for name, (_, parameter) in named.items() if id(parameter) not in loaded]
        unexpected = [name for name in given if name not in named]
        wrong: list[str] = []
        error: type[Exception] = ValueError
        if strict and missing:
            wrong.append(f"missing: {', '.join(missing)}")
        if strict and unexpected:
            wrong.append(f"unexpected: {', '.join(unexpected)}")
        values = {}
        for name in given:
            if name in named:
                try:
                    values[name] = named[name][1].checked(name, state_dict[name])
                except (TypeError, ValueError) as refused:
                    wrong.append(str(refused))
                    if not isinstance(refused, ValueError) and len(wrong) == 1:
                        error = TypeError
        if wrong:
            lines = "".join(f"\n  {line}" for line in wrong)
            raise error(f"state_dict: does not fit {type(self).__name__}:{lines}")
        with self._as_it_was_on_error():
            for name, value in values.items():
                named[name][1].take(value)
            self.pack()
        return IncompatibleKeys(missing, unexpected)

    @contextlib.contextmanager
    def _as_it_was_on_error(self) -> Iterator[None]:
        """Weights, how they are held and what is packed go back to what they were, if something is raised."""
        modules = [(module, module._held, module._packed) for _, module in self.named_modules()]
        values = [(parameter, parameter.value) for _, parameter in self._named().values()]
        try:
            yield
        except BaseException:
            for module, held, packed in modules:
                module._held, module._packed = held, packed
            for parameter, value in values:
                parameter.value = value
            raise

    # ---- Weights in the kernels' order ----

    def to(self, *, weights: str | None) -> Self:
        """Hold the weights of all linear layers within, those of attention's projections too, in so many bits.

        Only the packed copy that kernels read changes; :meth:`state_dict` gives back what was loaded. It
        may be called before weights are loaded.

        Parameters
        ----------
        weights : {"float32", "bfloat16", "int8"} or None
            - "float32": as the kernels compute (float64 for float64 inputs). On a GPU, in the inputs' dtype.
            - "bfloat16": rounded to bfloat16, half the memory. bfloat16 inputs are multiplied in that
              dtype where the machine can, others in float32.
            - "int8": whole numbers from -127 to 127 with a scale for each output channel, a quarter of
              the memory. Inputs are quantised on the way, each row with a scale of its own, and
              products are summed exactly: every instruction set has the same sums. Errors are about
              1 % of a layer's output, and rows with outliers fare worse.
            - None: "bfloat16" for weights that were loaded as bfloat16, which loses nothing; else
              "float32".

        Returns
        -------
        Module
            This module.

        Raises
        ------
        ValueError
            `weights` is none of these.

        Notes
        -----
        float64 inputs need weights held as "float32" or None: others are refused at the call.
        """
        if weights is not None and weights not in _HELD:
            raise ValueError(f"weights: expected {', '.join(map(repr, _HELD))} or None, got {weights!r}")
        with self._as_it_was_on_error():
            for _, module in self.named_modules():
                module._held, module._packed = weights, {}
            if any(parameter.value is not None for _, parameter in self._named().values()):
                self.pack()
        return self

    def _holding(self, name: str, dtype: Any) -> str:
        """How the linear weight `name` is held for inputs computed as `dtype`."""
        if self._held is None:
            value = self._parameters[name].value
            loaded = str(getattr(value, "dtype", "")).rpartition(".")[2]
            return "bfloat16" if loaded == "bfloat16" and dtype != np.float64 else "float32"
        if dtype == np.float64 and self._held != "float32":
            raise TypeError(
                f"x: expected dtype float32, float16 or bfloat16, because weights are held as {self._held}, got float64"
            )
        return self._held

    def pack(self, dtype: Any = None, like: Any = None) -> None:
        """Rearrange all weights for the kernels now, for inputs of `dtype` (default: the module's own).

        Those inputs will be where the array `like` is; by default on the CPU, or on the GPU from whose memory weights
        were loaded.
        """
        like = self._loaded_on_gpu() if like is None else like
        memory = _arrays.memory_of(type(self).__name__, like)
        for _, module in self.named_modules():
            # A module of float64 may hold its weights in fewer bits, for calls with other inputs.
            if dtype is not None or self.dtype != np.float64 or module._held in (None, "float32"):
                module._weights(self.dtype if dtype is None else np.dtype(dtype), memory)

    def _loaded_on_gpu(self) -> Any:
        """A weight that was loaded from a GPU's memory, or None."""
        loaded = (parameter.value for _, parameter in self._named().values())
        return next((x for x in loaded if x is not None and _arrays.on_gpu(x)), None)

    def _weights(self, dtype: Any, memory: Memory = _arrays.HOST) -> Any:
        """What _pack made for this dtype. Threads that meet here at first both pack, with the same result."""
        key = dtype if memory.device is None else (dtype, memory.device)
        made = self._packed  # weights loaded meanwhile come with a new one: what is packed here is not theirs
        packed = made.get(key)
        if packed is None:
            float32_serves = memory.kind in self._float32_serves_16_bit or (self._holds and self._held == "int8")
            if dtype.itemsize == 2 and float32_serves:
                packed = self._weights(np.dtype(np.float32), memory)
            else:
                packed = self._pack(dtype, memory)
                memory.wait()
            made[key] = packed
        return packed

    def _weights_for(self, argument: str, x: Any) -> Any:
        """The weights in the dtype of an input, which must be an array of floats, and where it is."""
        dtype: Any = getattr(x, "dtype", None)
        if type(x) is np.ndarray:
            packed = self._packed.get(dtype)
            if packed is not None:
                return packed
        check_floats(argument, x)
        try:
            return self._weights(dtype, _arrays.memory_of(type(self).__name__, x))
        except TypeError as error:
            raise _checks.renamed(error, {"x": argument}) from None

    def _pack(self, dtype: Any, memory: Memory) -> Any:
        """The module's own parameters (not its children's) in the kernels' order; subclasses override it."""
        return {name: parameter.put(memory, dtype) for name, parameter in self._parameters.items()}

    # ---- Calls ----

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The function itself, on arrays of NumPy, or on CuPy's of the current device."""
        raise NotImplementedError(f"{type(self).__name__} has no forward")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """forward() on arrays of any kind; results are of the first one's."""
        return _arrays.through_modules(type(self).__name__, self.forward, args, kwargs)

    def eval(self) -> Module:
        """This module: it is always in evaluation mode, and without dropout."""
        return self


class ModuleList(Module):
    """Modules in a row, named by their numbers."""

    def __init__(self, modules: Any = ()) -> None:
        super().__init__()
        for module in modules:
            self.append(module)

    def append(self, module: Module) -> Self:
        """One more at the end; returns this list."""
        if not isinstance(module, Module):
            raise TypeError(f"module: expected a Module, got {_checks.describe(module)}")
        self._children[str(len(self._children))] = module
        return self

    def __iter__(self) -> Iterator[Any]:
        return iter(self._children.values())

    def __len__(self) -> int:
        return len(self._children)

    def __getitem__(self, index: int | slice) -> Any:
        found = list(self._children.values())[index]
        return ModuleList(found) if isinstance(index, slice) else found


# ---- Initial values, as PyTorch draws them ----


# Partials of functions of this module rather than closures: those can be pickled, and so modules can.


def _uniform(bound: float, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    return rng.uniform(-bound, bound, shape)


def _normal(deviation: float, shape: tuple[int, ...], zero_row: int | None, rng: np.random.Generator) -> np.ndarray:
    values = rng.normal(0.0, deviation, shape)
    if zero_row is not None:
        values[zero_row] = 0.0
    return values


def _constant(value: float, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    return np.full(shape, value)


def uniform(bound: float, *shape: int) -> Callable[[np.random.Generator], np.ndarray]:
    """Uniform over (-bound, bound)."""
    return functools.partial(_uniform, bound, shape)


def fan_in_uniform(fan_in: int, *shape: int) -> Callable[[np.random.Generator], np.ndarray]:
    """What PyTorch's Linear and convolutions start from: uniform within 1 / sqrt(fan_in)."""
    return uniform(1.0 / math.sqrt(max(fan_in, 1)), *shape)


def xavier_uniform(*shape: int) -> Callable[[np.random.Generator], np.ndarray]:
    """Glorot and Bengio, 2010; for weights of shape (out, in)."""
    return uniform(math.sqrt(6.0 / max(shape[0] + shape[1], 1)), *shape)


def normal(deviation: float, *shape: int, zero_row: int | None = None) -> Callable[[np.random.Generator], np.ndarray]:
    """Normal around 0, but for a row of zeros."""
    return functools.partial(_normal, deviation, shape, zero_row)


def constant(value: float, *shape: int) -> Callable[[np.random.Generator], np.ndarray]:
    """The same number everywhere."""
    return functools.partial(_constant, value, shape)
