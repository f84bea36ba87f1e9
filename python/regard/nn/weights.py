"""Weights in files: safetensors, mapped into memory and read where a module asks for them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from regard import _arrays
from regard.nn.module import Module, Renamed

M = TypeVar("M", bound=Module)

#: The format's names of dtypes, little-endian all.
_DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}
#: The format's own limit of its header.
_MOST_HEADER_BYTES = 100_000_000


class Safetensors(Mapping[str, np.ndarray]):
    """The arrays of a safetensors file by name, read-only views of the mapped file.

    Nothing but the header is read until an array's elements are; what was read can be dropped by the
    system again. The file must stay as it is while arrays are in use.

    Parameters
    ----------
    path : path
        A file of the format that https://github.com/huggingface/safetensors describes.

    Raises
    ------
    ValueError
        The file is no such file, or is cut off; the message says what is wrong.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        size = self.path.stat().st_size
        if size < 8:
            raise self._error(f"expected at least 8 bytes, got {size}")
        self._bytes = np.memmap(self.path, np.uint8, mode="r")
        length = int(self._bytes[:8].view("<u8")[0])
        if length > min(size - 8, _MOST_HEADER_BYTES):
            raise self._error(f"its header should have {length} bytes, the file has {size}")
        self._data = self._bytes[8 + length :]
        try:
            header = json.loads(self._bytes[8 : 8 + length].tobytes())
            self.metadata: dict[str, str] = header.pop("__metadata__", {})
            self._entries = {name: self._entry(name, entry) for name, entry in header.items()}
        except (UnicodeDecodeError, json.JSONDecodeError, AttributeError, KeyError, TypeError) as error:
            raise self._error(f"its header cannot be read ({error!r})") from None

    def _error(self, what: str) -> ValueError:
        return ValueError(f"{self.path}: not a safetensors file: {what}")

    def _entry(self, name: str, entry: Mapping[str, Any]) -> tuple[str, tuple[int, ...], int, int]:
        dtype, shape = entry["dtype"], tuple(int(n) for n in entry["shape"])
        begin, end = (int(n) for n in entry["data_offsets"])
        count = 1
        for n in shape:
            count *= n
        if not 0 <= begin <= end <= self._data.size or min(shape, default=0) < 0:
            raise self._error(f"{name} lies at bytes {begin} to {end} of {self._data.size}")
        if dtype in _DTYPES:
            expected = count * (2 if dtype == "BF16" else np.dtype(_DTYPES[dtype]).itemsize)
            if end - begin != expected:
                raise self._error(f"{name}, {dtype} of shape {shape}, has {end - begin} bytes in place of {expected}")
        return dtype, shape, begin, end

    def __getitem__(self, name: str) -> np.ndarray:
        dtype, shape, begin, end = self._entries[name]
        if dtype not in _DTYPES:
            raise TypeError(f"{self.path}: {name}: expected dtype {', '.join(_DTYPES)}, got {dtype}")
        kind = _arrays.numpy_dtype(_DTYPES[dtype])
        return (
            np.asarray(self._data[begin:end])
            .view(kind.newbyteorder("<") if kind.kind in "fiu" else kind)
            .reshape(shape)
        )

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)


def _joined(
    paths: Sequence[str | os.PathLike[str]], rename: Mapping[str, str] | Callable[[str], str | None] | None
) -> Renamed:
    """Several files as one, under the names that the module has."""
    places: dict[str, tuple[Safetensors, str]] = {}
    for path in paths:
        file = Safetensors(path)
        for name in file:
            new: str | None = name
            if callable(rename):
                new = rename(name)
            elif rename is not None:
                new = rename.get(name, name)
            if new is None:
                continue
            if new in places:
                other, given = places[new]
                raise ValueError(f"path: {name} of {file.path} and {given} of {other.path} are both {new}")
            places[new] = file, name
    return Renamed(places)


def load(
    module: M,
    path: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    rename: Mapping[str, str] | Callable[[str], str | None] | None = None,
    strict: bool = True,
) -> M:
    """Load a module's weights from a safetensors file, or from several that share them.

    The file is mapped, not read: weights pass through memory once, when they are packed for the
    kernels, and `module.state_dict()` gives back views of the file. The file must stay as it is.

    Parameters
    ----------
    module : Module
        What to load; one with ``module.to(weights=...)`` packs them as that says.
    path : path or sequence of paths
    rename : mapping or callable, optional
        From names in the file to names in the module. A mapping leaves names that it lacks as they
        are; a callable may answer None: that array is left out.
    strict : bool
        As in :meth:`Module.load_state_dict`.

    Returns
    -------
    Module
        The module given.

    Raises
    ------
    ValueError
        A file is no safetensors file, two arrays have one name, or arrays do not fit the module.
    TypeError
        Arrays are no floats.
    """
    paths = [path] if isinstance(path, (str, os.PathLike)) else list(path)
    module.load_state_dict(_joined(paths, rename), strict)
    return module
