"""What both caches are made of: memory for keys and values, and the call that writes into it."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from regard import _arrays, _backend, _checks

#: Those of one byte come with a float32 scale for each token and head.
DTYPES = ("float32", "float64", "float16", "bfloat16", "int8", "float8_e4m3fn")
QUANTISED = ("int8", "float8_e4m3fn")


def indices(argument: str, x: Any, name: str, n: int, most: Any, limit: str) -> np.ndarray:
    """A copy of (n,) integers of any kind of array or sequence, each from 0 to `most`: copied once, then checked.

    `name` is what n is called, `limit` what the largest entry is called.
    """
    if _arrays.on_gpu(x):
        raise TypeError(
            f"{argument}: expected an array on the CPU, where caches keep their lengths, since reading "
            f"a GPU's would wait for it; got {_checks.describe(x)} on a GPU"
        )
    copy = np.array(_arrays.numpy_view(argument, x) if hasattr(x, "__dlpack__") else x)
    if copy.size == 0 and copy.dtype == np.float64 and not hasattr(x, "dtype"):
        copy = copy.astype(np.int64)  # an empty list
    if copy.dtype not in (np.int32, np.int64):
        raise TypeError(f"{argument}: expected dtype int32 or int64, got {_checks.describe(x)}")
    if copy.shape != (n,):
        raise ValueError(f"{argument}: expected shape ({name} = {n},), got {_checks.describe(x)}")
    copy = copy.astype(np.int64)
    wrong = (copy < 0) | (copy > most)
    if wrong.any():
        entry = int(wrong.argmax())
        largest = int(np.broadcast_to(most, copy.shape)[entry])
        raise ValueError(
            f"{argument}: expected entries from 0 to {limit} = {largest}, got {copy[entry]} at index {entry}"
        )
    return copy


def _zeros(shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray:
    """Zeros from a cache line's start on, so that no vector of a row lies across two lines."""
    size = math.prod(shape) * dtype.itemsize
    try:
        memory = np.zeros(size + 64, np.uint8)
    except MemoryError:
        raise MemoryError(f"no memory for an array of {dtype}, shape {shape}, {size} bytes") from None
    start = -memory.ctypes.data % 64
    return memory[start : start + size].view(dtype).reshape(shape)


def _table(argument: str, x: Any, dim_qk: int, memory: _arrays.Beside | None) -> Any:
    """A copy in float32."""
    if x is None:
        return None
    if isinstance(x, type) or not hasattr(x, "shape"):
        raise TypeError(f"{argument}: expected an array (max_positions, pairs), got {_checks.describe(x)}")
    if len(x.shape) != 2 or 2 * x.shape[1] > dim_qk:
        raise ValueError(
            f"{argument}: expected shape (max_positions, pairs) where pairs is at most half of dim_qk = {dim_qk}, "
            f"got {_checks.describe(x)}"
        )
    if memory is None or not _arrays.on_gpu(x):
        table = np.array(_arrays.numpy_view(argument, x), np.float32)
        return table if memory is None else memory.array(table)
    if not memory.holds(x):
        raise TypeError(f"{argument}: expected an array of like's kind, on its device, got {_checks.describe(x)}")
    return memory.joined((memory.converted(x, "float32"),), 0)


class Cache:
    """What both caches say of their store."""

    _store: Store

    @property
    def dtype(self) -> str:
        """The name of the dtype that is stored."""
        return self._store.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of memory, scales included."""
        return self._store.nbytes

    @property
    def key_scales(self) -> Any:
        return read_only(self._store.key_scales)

    @property
    def value_scales(self) -> Any:
        return read_only(self._store.value_scales)


class Store:
    """Keys and values of one dtype, their scales, and the rotary tables that turn keys on their way in.

    `leading` are the names and lengths of the axes before the last one, the dimension. Beside a GPU's array all of it
    is that framework's, on that device; float8, which CuPy does not have, is held as bytes there.
    """

    def __init__(
        self,
        cache: str,
        leading: dict[str, int],
        dim_qk: int,
        dim_v: int,
        dtype: Any,
        like: Any,
        cos: Any,
        sin: Any,
        interleaved: bool,
    ) -> None:
        axes = tuple(leading.values())
        if math.prod(max(n, 1) for n in axes) * max(dim_qk, dim_v) >= 2**59:  # numbers of up to 8 bytes
            sizes = {**leading, "dim_qk": dim_qk, "dim_v": dim_v}
            got = ", ".join(f"{name} = {n}" for name, n in sizes.items())
            raise ValueError(f"{cache}: expected sizes whose memory can be addressed, got {got}")
        if like is not None:
            if isinstance(like, type) or not hasattr(like, "dtype"):
                raise TypeError(f"like: expected an array, got {_checks.describe(like)}")
            if not _arrays.on_gpu(like):
                _arrays.native(cache, like)  # names the device that has no kernel
        self._memory = _arrays.Beside(cache, like) if like is not None and _arrays.on_gpu(like) else None
        self.dtype = _arrays.name_of_dtype(
            dtype if dtype is not None else like.dtype if like is not None else "float32"
        )
        if self.dtype not in DTYPES:
            given = dtype if dtype is not None else like
            raise TypeError(f"dtype: expected one of {', '.join(DTYPES)}, got {_checks.describe(given)}")
        self.interleaved = bool(interleaved)
        self.quantised = self.dtype in QUANTISED
        if (cos is None) != (sin is None):
            raise TypeError(f"{'cos' if cos is None else 'sin'}: expected an array, because the other is given")
        self.cos, self.sin = (_table(name, x, dim_qk, self._memory) for name, x in (("cos", cos), ("sin", sin)))
        if self.cos is not None and self.sin is not None and self.cos.shape != self.sin.shape:
            raise ValueError(f"sin: expected the shape of cos, {self.cos.shape}, got {_checks.describe(sin)}")
        self._float8_as_bytes = self._memory is not None and self.dtype == "float8_e4m3fn"
        storage = "uint8" if self._float8_as_bytes else self.dtype
        self.key, self.value = self.zeros((*axes, dim_qk), storage), self.zeros((*axes, dim_v), storage)
        scales = (axes, "float32")
        self.key_scales = self.zeros(*scales) if self.quantised else None
        self.value_scales = self.zeros(*scales) if self.quantised else None

    def zeros(self, shape: tuple[int, ...], dtype: Any) -> Any:
        if self._memory is not None:
            return self._memory.zeros(shape, dtype)
        return _zeros(shape, _arrays.numpy_dtype(dtype) if isinstance(dtype, str) else dtype)

    def index(self, x: np.ndarray) -> Any:
        """`x` as arrays of this store take it for an index."""
        return x if self._memory is None else self._memory.array(x)

    def numbers(self, x: Any) -> Any:
        """Stored keys or values as the binding reads them."""
        return _arrays.as_float8(x) if self._float8_as_bytes else x

    def arrays(self) -> list[Any]:
        """All that a token has a place in."""
        return [x for x in (self.key, self.value, self.key_scales, self.value_scales) if x is not None]

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in self.arrays())

    def copy(self, source: np.ndarray, to: np.ndarray, length: int) -> None:
        """The first `length` tokens of sequences `source`, in the places of sequences `to`."""
        arrays, old, new = self.arrays(), self.index(source), self.index(to)
        rows = [x[old, :, :length] for x in arrays]  # copies: all are taken before any is written
        for x, taken in zip(arrays, rows, strict=True):
            x[new, :, :length] = taken

    def take(self, source: np.ndarray, length: int) -> None:
        """Sequences `source`, as far as `length`, in memory of their own in place of all that there are."""

        index = self.index(source)

        def taken(x: Any) -> Any:
            rows = self.zeros((len(source), *x.shape[1:]), x.dtype)
            rows[:, :, :length] = x[index, :, :length]
            return rows

        self.key, self.value = taken(self.key), taken(self.value)
        if self.key_scales is not None and self.value_scales is not None:
            self.key_scales, self.value_scales = taken(self.key_scales), taken(self.value_scales)

    def write(
        self,
        views: tuple[Any, Any, Any, Any],
        key: Any,
        value: Any,
        slots: np.ndarray,
        places: np.ndarray,
        angles: tuple[Any, Any, Any],
        paged: bool,
        layout: str,
    ) -> None:
        """Put key and value, (batch, heads_kv, len, dim), into `slots` of views, (batch or 1, heads_kv, slots, dim).

        places : (batch, len), each token's place in its sequence; angles : cos, sin and positions given to the call
        """
        cos, sin, positions = self._angles(*angles, places)
        given = (key, value, cos, sin, positions)
        options = (self.interleaved, paged, layout == "bshd")
        if self._memory is not None:
            arrays = (key, value, *map(self.numbers, views[:2]), *views[2:], slots, cos, sin, positions)
            refusal = _arrays.call_on_gpu("append", "cache_append", arrays, options, like=self.key)
        else:
            natives = [x if x is None or type(x) is np.ndarray else _arrays.native("append", x) for x in given]
            refusal = _backend.cpu.cache_append(natives[0], natives[1], *views, slots, *natives[2:], *options)
        if type(refusal) is tuple:
            if refusal[:2] == ("entry", "positions") and angles[2] is None:
                raise ValueError(
                    f"cos: expected a table of at least {int(places.max()) + 1} positions, as many tokens as the "
                    f"longest sequence then has, got {_checks.describe(cos)}"
                )
            named = dict(zip(("key", "value", "cos", "sin", "positions"), given, strict=True))
            # As the message shows shapes: all sequences, and the axes in the order of the layout.
            whole = [_arrays.broadcast_to(x, (len(slots), *x.shape[1:]), "append") for x in views[:2]]
            if layout == "bshd":
                whole = [x.swapaxes(1, 2) for x in whole]
            known = {"key_cache": whole[0], "value_cache": whole[1]}
            raise _checks.error("append", refusal, known | named, layout)

    def _angles(self, cos: Any, sin: Any, positions: Any, places: np.ndarray) -> tuple[Any, Any, Any]:
        if (cos is None) != (sin is None):
            raise TypeError(f"{'cos' if cos is None else 'sin'}: expected an array, because the other is given")
        if cos is None:
            cos, sin = self.cos, self.sin
        if cos is None and positions is not None:
            raise ValueError("positions: expected None, because neither the cache nor this call has cos and sin")
        if positions is None and cos is not None and len(getattr(cos, "shape", ())) == 2:
            positions = places
        return cos, sin, positions


def length_of(key: Any, layout: str) -> int:
    """len of an array (batch, heads_kv, len, dim); 0 where it is none, for the check to say so."""
    shape = _checks.shape_of(key)
    return int(shape[1 if layout == "bshd" else 2]) if len(shape) == 4 else 0


def attend_options(options: dict[str, Any], reserved: tuple[str, ...]) -> str:
    """Takes from the options of an attend call what a cache decides itself, where it is None; returns the layout."""
    for name in reserved:
        given = options.pop(name, None)
        if given is not None:
            raise TypeError(f"{name}: expected None, because the cache has it, got {_checks.describe(given)}")
    alignment = options.get("alignment")
    if alignment not in (None, "lower_right"):
        raise ValueError(
            f"alignment: expected None or 'lower_right', the only one a cache has: the last query lines up with "
            f"the last key of its sequence; got {alignment!r}"
        )
    layout = options.get("layout", "bhsd")
    _checks.choice("layout", layout, _checks.LAYOUTS)
    return str(layout)


def check_query(query: Any, batch: str, rows: int, heads_kv: int, dim_qk: int, layout: str) -> None:
    """Refuse a query that does not fit a cache, in the cache's own terms; `batch` is what its `rows` are called."""
    if isinstance(query, type) or not hasattr(query, "shape"):
        return
    shape = tuple(query.shape)
    first, last = f"{batch} = {rows}", f"dim_qk = {dim_qk}"
    expected = f"({first}, heads, len_q, {last})" if layout == "bhsd" else f"({first}, len_q, heads, {last})"
    heads = 1 if layout == "bhsd" else 2
    if len(shape) != 4 or shape[0] != rows or shape[3] != dim_qk or (heads_kv and shape[heads] % heads_kv):
        raise ValueError(
            f"query: expected shape {expected} where heads is a multiple of heads_kv = {heads_kv}, "
            f"got {_checks.describe(query)}"
        ) from None


def read_only(x: Any) -> Any:
    """A view that cannot be written through; a GPU's framework, which has none, gives its array."""
    if x is None:
        return None
    if not isinstance(x, np.ndarray):
        return x
    view = x.view()
    view.flags.writeable = False
    return view


def one_number(argument: str, x: Any) -> int | None:
    """`x` where it stands for one number, as an array without axes does; None of a sequence and of what a GPU holds."""
    if isinstance(x, (list, tuple)) or _checks.shape_of(x) or _arrays.on_gpu(x):
        return None
    return min(_checks.count(argument, x), 2**63 - 1)  # what is larger is refused just as well


def numbers(argument: str, x: Any) -> list[int]:
    """A list of ints from an int, a sequence of them, or a (n,) array: a copy."""
    if _checks.shape_of(x):
        x = indices(argument, x, "n", int(x.shape[0]), np.iinfo(np.int64).max, "2^63 - 1").tolist()
    elif not isinstance(x, (list, tuple, range)):
        x = [x]
    return [_checks.count(argument, number) for number in x]
