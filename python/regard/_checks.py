"""Words the errors. Runs only when a problem's own check() has refused, so a good call pays nothing."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from types import TracebackType
from typing import Any

import numpy as np

from regard import _arrays

_MAP = {"x": "batch channels height width"}
_MAP_OUT = {"out": "batch channels height width"}
_MLP = {
    "w_reduce": "reduced channels",
    "b_reduce": "reduced",
    "w_expand": "channels reduced",
    "b_expand": "channels",
}
_ANGLES = {"cos": "max_positions pairs", "sin": "max_positions pairs", "positions": "batch len"}
_SPATIAL = {"w_spatial": "1 2 kernel kernel", "b_spatial": "1"}


def _recurrent(gates: int) -> dict[str, str]:
    rows = f"{gates}*hidden"
    weights = {"w_hidden": f"{rows} hidden", "w_input": f"{rows} in_features", "b_input": rows, "b_hidden": rows}
    return {"x": "batch len in_features", **weights, "h0": "batch hidden", "lengths": "batch"}


#: Expected shapes, by operation and argument, in the names of docs and docstrings.
SHAPES: dict[str, dict[str, str]] = {
    "attention": {
        "query": "batch heads len_q dim_qk",
        "key": "batch heads_kv len_kv dim_qk",
        "value": "batch heads_kv len_kv dim_v",
        "mask": "batch heads len_q len_kv",
        "bias": "batch heads len_q len_kv",
        "alibi_slopes": "batch heads",
        "sinks": "heads",
        "query_lengths": "batch",
        "key_lengths": "batch",
        "out": "batch heads len_q dim_v",
    },
    "attention_varlen": {
        "query": "total_q heads dim_qk",
        "key": "total_kv heads_kv dim_qk",
        "value": "total_kv heads_kv dim_v",
        "cu_seqlens_q": "batch+1",
        "cu_seqlens_kv": "batch+1",
        "mask": "batch heads len_q len_kv",
        "bias": "batch heads len_q len_kv",
        "alibi_slopes": "batch heads",
        "sinks": "heads",
        "query_lengths": "batch",
        "key_lengths": "batch",
        "out": "total_q heads dim_v",
    },
    "attention_paged": {
        "query": "batch heads len_q dim_qk",
        "key_pages": "pages page_size heads_kv dim_qk",
        "value_pages": "pages page_size heads_kv dim_v",
        "page_table": "batch pages_per_sequence",
        "key_scales": "pages page_size heads_kv",
        "value_scales": "pages page_size heads_kv",
        "mask": "batch heads len_q len_kv",
        "bias": "batch heads len_q len_kv",
        "alibi_slopes": "batch heads",
        "sinks": "heads",
        "query_lengths": "batch",
        "key_lengths": "batch",
        "out": "batch heads len_q dim_v",
    },
    "rotary_embedding": {"x": "batch heads len dim", "out": "batch heads len dim"} | _ANGLES,
    "append": {
        "key_cache": "batch heads_kv capacity dim_qk",
        "value_cache": "batch heads_kv capacity dim_v",
        "key": "batch heads_kv len dim_qk",
        "value": "batch heads_kv len dim_v",
    }
    | _ANGLES,
    "linear": {
        "x": "... in_features",
        "weight": "out_features in_features",
        "bias": "out_features",
        "residual": "... out_features",
        "out": "... out_features",
    },
    "pack_linear": {"weight": "out_features in_features", "bias": "out_features"},
    "layer_norm": {
        "x": "... features",
        "residual": "... features",
        "weight": "features",
        "bias": "features",
        "out": "... features",
    },
    "rms_norm": {
        "x": "... features",
        "residual": "... features",
        "weight": "features",
        "out": "... features",
    },
    "global_average_pool": _MAP,
    "global_max_pool": _MAP,
    "squeeze_excitation": _MAP | _MLP | _MAP_OUT,
    "channel_attention": _MAP | _MLP | _MAP_OUT,
    "spatial_attention": _MAP | _SPATIAL | _MAP_OUT,
    "cbam": _MAP | _MLP | _SPATIAL | _MAP_OUT,
    "efficient_channel_attention": _MAP | {"w": "kernel"} | _MAP_OUT,
    "additive_attention": {
        "query": "batch len_q dim_q",
        "key": "batch len_kv dim_k",
        "value": "batch len_kv dim_v",
        "v": "dim",
        "w_query": "dim dim_q",
        "w_key": "dim dim_k",
        "bias": "dim",
        "mask": "batch len_q len_kv",
        "key_lengths": "batch",
    },
    "multiplicative_attention": {
        "query": "batch len_q dim_q",
        "key": "batch len_kv dim_k",
        "value": "batch len_kv dim_v",
        "w": "dim_q dim_k",
        "mask": "batch len_q len_kv",
        "key_lengths": "batch",
    },
    "gru": _recurrent(3),
    "lstm": _recurrent(4) | {"c0": "batch hidden"},
    # Of a module, which has checked its weights.
    "recurrent": {
        "x": "batch len in_features",
        "h0": "directions batch hidden",
        "c0": "directions batch hidden",
        "lengths": "batch",
    },
    "location_sensitive_attention": {
        "query": "batch len_q dim_q",
        "key": "batch len_kv dim_k",
        "value": "batch len_kv dim_v",
        "v": "dim",
        "w_query": "dim dim_q",
        "w_key": "dim dim_k",
        "location_kernel": "filters channels width",
        "w_location": "dim filters",
        "location_bias": "filters",
        "previous_weights": "batch len_q channels len_kv",
        "bias": "dim",
        "mask": "batch len_q len_kv",
    },
}

#: What else must hold, said after the expected shape.
HINTS: dict[tuple[str, str], str] = {
    ("attention", "key"): "heads = {heads} must be a multiple of heads_kv",
    ("attention", "query"): "dim_qk must be at least 1",
    ("attention_varlen", "key"): "heads = {heads} must be a multiple of heads_kv",
    ("attention_varlen", "query"): "dim_qk must be at least 1",
    ("attention_varlen", "cu_seqlens_q"): "batch is the number of sequences",
    ("attention_varlen", "cu_seqlens_kv"): "there is one sequence of keys for each of queries",
    ("attention_paged", "key_pages"): "heads = {heads} must be a multiple of heads_kv, and page_size at least 1",
    ("attention_paged", "query"): "dim_qk must be at least 1",
    **{
        (operation, name): "pairs is at most half of the last axis; without positions max_positions is at least "
        "len = {len}, or the shape (batch, len, pairs); cos and sin have one shape"
        for operation in ("rotary_embedding", "append")
        for name in ("cos", "sin")
    },
    ("linear", "x"): "there are 1 to 8 axes",
    ("linear", "residual"): "the leading axes are those of x",
    ("linear", "out"): "the leading axes are those of x",
    ("layer_norm", "x"): "there are 1 to 8 axes",
    ("layer_norm", "out"): "the leading axes are those of x",
    ("layer_norm", "residual"): "the leading axes are those of x",
    ("rms_norm", "x"): "there are 1 to 8 axes",
    ("rms_norm", "out"): "the leading axes are those of x",
    ("rms_norm", "residual"): "the leading axes are those of x",
    ("efficient_channel_attention", "w"): "kernel must be odd",
    ("spatial_attention", "w_spatial"): "kernel must be odd",
    ("cbam", "w_spatial"): "kernel must be odd",
    ("additive_attention", "query"): "dim_q must be dim = {dim}, the length of v, unless w_query is given",
    ("additive_attention", "key"): "dim_k must be dim = {dim}, the length of v, unless w_key is given",
    ("additive_attention", "v"): "dim must be at least 1",
    ("multiplicative_attention", "query"): "dim_q must be at least 1",
    ("multiplicative_attention", "key"): "dim_k must be dim_q unless w is given, and at least 1",
    ("location_sensitive_attention", "query"): "dim_q must be dim = {dim}, the length of v, unless w_query is given",
    ("location_sensitive_attention", "key"): "dim_k must be dim = {dim}, the length of v, unless w_key is given",
    ("location_sensitive_attention", "v"): "dim must be at least 1",
    ("location_sensitive_attention", "location_kernel"): "channels may be left out if it is 1",
    ("location_sensitive_attention", "previous_weights"): "len_q, and channels if it is 1, may be left out",
}

#: Arguments that may have other dtypes than the floats.
DTYPES: dict[str, str] = {
    "mask": "bool (True = attend; for added scores use bias=)",
    "bias": "float32 or the dtype of the first argument",
    "alibi_slopes": "float32",
    "sinks": "float32",
    "query_lengths": "int32 or int64",
    "key_lengths": "int32 or int64",
    "cu_seqlens_q": "int32 or int64",
    "cu_seqlens_kv": "int32 or int64",
    "page_table": "int32 or int64",
    "key_pages": "float32, float64, float16, bfloat16, int8 or float8_e4m3fn",
    "value_pages": "that of key_pages",
    "key_scales": "float32",
    "value_scales": "float32",
    "positions": "int32 or int64",
    "cos": "float32 or the dtype of the first array",
    "sin": "that of cos, float32 or the dtype of the first array",
    "lengths": "int32 or int64",
}

#: Ranges of numbers.
VALUES: dict[str, str] = {
    "window": "(left, right), each None or a count >= 0",
    "scale": "a finite number",
    "softcap": "None or a finite number > 0",
    "dropout_p": "a number from 0 to 1",
    "eps": "a finite number >= 0",
    "gate": "'sigmoid', 'tanh', 'hard_sigmoid' or ('hard_sigmoid', alpha, beta) with finite numbers",
}

#: Which entries an index array may have, in dimension names.
ENTRIES: dict[tuple[str, str], str] = {
    ("attention_varlen", "cu_seqlens_q"): "entries from 0 to total_q = {total_q} that begin with 0 and never fall",
    ("attention_varlen", "cu_seqlens_kv"): "entries from 0 to total_kv = {total_kv} that begin with 0 and never fall",
    ("attention_varlen", "query_lengths"): "entries from 0 to the length of each sequence",
    ("attention_varlen", "key_lengths"): "entries from 0 to the length of each sequence",
    ("attention_paged", "page_table"): "entries from 0 to pages - 1, pages = {pages}, where a sequence has keys",
    ("attention_paged", "key_lengths"): "entries from 0 to pages_per_sequence * page_size"
    " = {pages_per_sequence} * {page_size}, and 0 without pages",
    ("rotary_embedding", "positions"): "entries from 0 to max_positions - 1, max_positions = {max_positions}",
    ("append", "positions"): "entries from 0 to max_positions - 1, max_positions = {max_positions}",
}
_LENGTHS = {
    "query_lengths": "entries from 0 to len_q = {len_q}",
    "key_lengths": "entries from 0 to len_kv = {len_kv}",
    "lengths": "entries from 0 to len = {len}",
}

FLOATS = "float32, float64, float16 or bfloat16"

ALIGNMENT = (
    "alignment: expected 'upper_left' (query i lines up with key i) or 'lower_right' (the last query "
    "lines up with the last key), because causal, window and alibi_slopes need a diagonal and "
    "len_q = {len_q} differs from len_kv = {len_kv}; got None"
)


ALIGNMENT_OF_EACH = (
    "alignment: expected 'upper_left' (query i lines up with key i) or 'lower_right' (the last query "
    "lines up with the last key), because causal, window and alibi_slopes need a diagonal and a "
    "sequence has not as many queries as keys; got None"
)


class _Names(dict[str, Any]):
    """Dimension names for format_map: an unknown one stands for itself."""

    def __missing__(self, name: str) -> str:
        return "?"


#: Layouts of arrays with heads, and whether the sequence comes before them.
LAYOUTS = {"bhsd": False, "bshd": True}


def choice(argument: str, value: Any, choices: Mapping[Any, Any]) -> Any:
    """What `value` stands for, or the error that lists the choices."""
    try:
        return choices[value]
    except (KeyError, TypeError):
        expected = ", ".join(repr(c) for c in choices)
        raise ValueError(f"{argument}: expected one of {expected}, got {value!r}") from None


def count(argument: str, value: Any, least: int = 0) -> int:
    """`value` as an int, or the error that says what it should have been."""
    try:
        n = operator.index(value)
    except TypeError:
        raise TypeError(f"{argument}: expected an integer >= {least}, got {describe(value)}") from None
    if n < least:
        raise ValueError(f"{argument}: expected an integer >= {least}, got {n}")
    return n


def number(argument: str, value: Any) -> None:
    """Raise TypeError unless `value` is a real number: said here, since bindings only say "incompatible"."""
    try:
        value.__float__()  # float() would take words too
    except (AttributeError, TypeError):
        raise TypeError(f"{argument}: expected {VALUES[argument]}, got {describe(value)}") from None
    except OverflowError:
        raise ValueError(f"{argument}: expected {VALUES[argument]}, got {describe(value)}") from None


def renamed(error: BaseException, names: Mapping[str, str]) -> BaseException:
    """The error, if it is about an argument of `names`, about the one that it stands for there."""
    name, colon, rest = str(error).partition(":")
    return type(error)(f"{names[name]}:{rest}") if colon and name in names else error


class Renamed:
    """A scope whose errors about some arguments are about those that the caller gave: {inner name: the caller's}."""

    __slots__ = ("_names",)

    def __init__(self, **names: str) -> None:
        self._names = names

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if isinstance(error, (TypeError, ValueError)):
            raise renamed(error, self._names) from None


def describe(x: Any) -> str:
    """What an argument is, in a few words."""
    if x is None:
        return "None"
    if hasattr(x, "dtype") and hasattr(x, "shape") and not isinstance(x, type):
        kind = "PackedLinear" if type(x).__name__ == "PackedLinear" else "array"
        return f"{x.dtype} {kind} of shape {tuple(x.shape)}"
    return f"{type(x).__name__} {x!r}"[:80]


def shape_of(x: Any) -> tuple[int, ...]:
    """The shape of an array; () of what is none, such as a class of arrays, whose `shape` is something else."""
    return () if isinstance(x, type) else getattr(x, "shape", ())


def dimensions(shapes: Mapping[str, str], arguments: Mapping[str, Any], refused: str = "") -> dict[str, int]:
    """Lengths of the named dimensions, each as the first argument that has it says; the refused one is asked last."""
    found: dict[str, int] = {}
    for argument, names in sorted(shapes.items(), key=lambda item: item[0] == refused):
        shape = shape_of(arguments.get(argument))
        parts = names.split()
        if parts[0] == "...":  # any leading axes
            parts = parts[1:]
            shape = shape[-len(parts) :]
        if len(shape) == len(parts):
            for name, length in zip(parts, shape, strict=True):
                if name == "batch+1":
                    found.setdefault("batch", length - 1)
                if "*" not in name:
                    found.setdefault(name, length)
    # The longest sequences, where offsets or pages say it.
    for name, offsets in (("len_q", "cu_seqlens_q"), ("len_kv", "cu_seqlens_kv")):
        ends = arguments.get(offsets)
        if isinstance(ends, np.ndarray) and ends.ndim == 1 and ends.size > 1 and ends.dtype.kind in "iu":
            found.setdefault(name, int(np.diff(ends).max()))
    if {"pages_per_sequence", "page_size"} <= found.keys():
        found.setdefault("len_kv", found["pages_per_sequence"] * found["page_size"])
    return found


def _in_layout(names: str, layout: str) -> str:
    parts = names.split()
    if layout == "bshd" and len(parts) == 4 and parts[1].startswith("heads") and "dim" in parts[3]:
        parts[1], parts[2] = parts[2], parts[1]
    if layout == "nhwc" and parts[:2] == ["batch", "channels"] and len(parts) == 4:
        parts = [parts[0], parts[2], parts[3], parts[1]]
    if layout == "time_major" and parts[:2] == ["batch", "len"]:
        parts[:2] = ["len", "batch"]
    return " ".join(parts)


def error(operation: str, refusal: tuple[str, str, int], arguments: Mapping[str, Any], layout: str = "") -> Exception:
    """The exception for a refusal (rule, argument, entry) of an operation called with `arguments`."""
    rule, argument, entry = refusal
    shapes = {a: _in_layout(s, layout) for a, s in SHAPES[operation].items()}
    known = dimensions(shapes, arguments, argument if rule in ("rank", "shape", "broadcast") else "")
    value: Any = arguments.get(argument)
    got = describe(value)
    first = next(iter(shapes))

    def filled(names: str) -> str:
        for name in names.split():
            times, _, of = name.rpartition("*")  # "3*hidden"
            if of in known:
                known[name] = int(times or 1) * known[of]
        return ", ".join(f"{n} = {known[n]}" if n in known and not n.isdigit() else n for n in names.split())

    shape = f"({filled(shapes.get(argument, ''))})"
    if argument == "positions":
        shape += f" or ({filled('len')},)"
    hint = HINTS.get((operation, argument))
    hint = " where " + hint.format_map(_Names(known)) if hint else ""
    if rule == "type":
        if _arrays.on_gpu(arguments.get(first)):
            return TypeError(f"{argument}: expected an array of shape {shape} on the device of {first}, got {got}")
        return TypeError(f"{argument}: expected an array on the CPU of shape {shape}, got {got}")
    if rule == "device":
        return TypeError(f"{argument}: expected an array on the device of {first}, got {got}")
    if rule == "aligned":
        return ValueError(f"{argument}: expected elements at multiples of their size in a GPU's memory, got {got}")
    if rule == "dtype":
        expected = DTYPES.get(argument, FLOATS)
        return TypeError(f"{argument}: expected dtype {expected} in native byte order, got {got}")
    if rule == "same_dtype":
        dtype = getattr(arguments.get(first), "dtype", "?")
        return TypeError(f"{argument}: expected the dtype of {first}, {dtype}, got {got}")
    if rule == "shape" and argument == "cos" and arguments.get("positions") is None:
        table, length = shape_of(value), known.get("len", 0)
        if len(table) == 2 and table[0] < length:
            return ValueError(
                f"cos: expected a table of at least len = {length} positions, because no positions are given, got {got}"
            )
    if rule in ("rank", "shape"):
        return ValueError(f"{argument}: expected shape {shape}{hint}, got {got}")
    if rule == "packed":
        return ValueError(f"{argument}: expected None, because the packed weight holds its own, got {got}")
    if rule == "held":
        most = "at most 65536 in_features and " if arguments["held"] == "int8" else ""
        return ValueError(f"{argument}: expected {most}no float64 where held = {arguments['held']!r}, got {got}")
    if rule == "broadcast":
        return ValueError(f"{argument}: expected a shape that broadcasts to {shape}, got {got}")
    if rule == "writable":
        return ValueError(f"{argument}: expected a writable array without repeated elements, got {got}")
    if rule == "value":
        return ValueError(f"{argument}: expected {VALUES[argument]}, got {value!r}")
    if rule == "alignment":
        if "len_kv" not in known:
            return ValueError(ALIGNMENT_OF_EACH)
        return ValueError(ALIGNMENT.format(**known))
    if rule == "unused":
        return ValueError(
            f"{argument}: expected None, because only int8 and float8_e4m3fn pages have scales, got {got}"
        )
    if rule == "entry":
        expected = (ENTRIES.get((operation, argument)) or _LENGTHS[argument]).format_map(_Names(known))
        place = tuple(int(i) for i in np.unravel_index(entry, value.shape))
        where = place[0] if len(place) == 1 else place
        return ValueError(f"{argument}: expected {expected}, got {int(value[place])} at index {where}")
    if rule == "too_large":
        return ValueError(f"{argument}: expected a size in bytes below 2^63, got shape {shape}")
    raise AssertionError(f"unknown rule {rule!r}")
