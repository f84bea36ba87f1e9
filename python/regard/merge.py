"""Merging attention over disjoint sets of keys (Milakov & Gimelshein, 2018; Rabe & Staats, 2021)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from regard import _arrays, _backend, _checks


def merge_attention(outs: Any, lses: Any, layout: str = "bhsd") -> tuple[Any, Any]:
    """Attention over all keys from the results over disjoint parts of them.

    ``lse = log sum_i exp(lse_i)`` and ``out = sum_i exp(lse_i - lse) out_i``, in the parts' order.

    Parameters
    ----------
    outs : sequence of arrays (..., dim_v), or one array (parts, ..., dim_v)
        The parts' results: float32, float64, float16 or bfloat16, all of one dtype and shape, any
        strides. One part or more.
    lses : sequence of arrays (...), or one array (parts, ...)
        Their lse, as regard.attention returns it with return_lse=True: float32, or float64 where
        outs are. A sink's logit must be in one part only.
    layout : "bhsd" or "bshd"
        "bshd": arrays with four axes are (batch, len, heads, dim_v), and their lse, as attention
        returns it with that layout, is (batch, heads, len).

    Returns
    -------
    out : array, (..., dim_v)
        Of the kind and dtype of outs.
    lse : array, (...)
        Of the kind and dtype of lses.

    Notes
    -----
    A part whose lse is -inf saw no key: it weighs nothing, whatever its out holds. Where all are
    -inf, out is 0 and lse -inf. One part alone, or beside such parts, keeps its bits. NaN or +inf
    in an lse makes out and lse NaN there.

    Raises
    ------
    TypeError, ValueError
        Naming the argument, what was expected and what came.
    """
    sequence_first = _checks.choice("layout", layout, _checks.LAYOUTS)
    outs, lses = parts_of("outs", outs), parts_of("lses", lses)
    if not outs or len(lses) != len(outs):
        argument, wanted = ("outs", "one part or more") if not outs else ("lses", f"{len(outs)} parts, as outs has")
        raise ValueError(f"{argument}: expected {wanted}, got {len(outs if not outs else lses)}")
    backend, count = _backend.cpu, len(outs)

    def kernel(*arrays: Any) -> Any:
        return backend.merge_attention(list(arrays[:count]), list(arrays[count:]), sequence_first)

    if _arrays.on_gpu(outs[0]):
        result = _arrays.call_on_gpu("merge_attention", "merge_attention", (*outs, *lses), (sequence_first,))
    else:
        result = _arrays.call("merge_attention", kernel, (*outs, *lses), ())
    if type(result) is tuple:
        raise _error(result, outs, lses, layout)
    return tuple(result)


def parts_of(argument: str, x: Any) -> list[Any]:
    """The parts of a sequence of arrays, or of one array by its first axis."""
    if hasattr(x, "shape") and not isinstance(x, type):
        if len(x.shape) == 0:
            raise ValueError(f"{argument}: expected (parts, ...), got {_checks.describe(x)}")
        return [x[i, ...] for i in range(x.shape[0])]  # NumPy's lse of one row stays an array
    if not isinstance(x, Sequence) or isinstance(x, (str, bytes)):
        raise TypeError(f"{argument}: expected a sequence of arrays, or one array, got {_checks.describe(x)}")
    return list(x)


def _error(refusal: tuple[str, str, int], outs: list[Any], lses: list[Any], layout: str) -> Exception:
    """The exception, about the first part that differs from the first."""
    rule, argument, entry = refusal
    del entry
    given = outs if argument == "outs" else lses
    first = outs[0]
    shape = tuple(_checks.shape_of(first))
    if argument == "lses":
        shape = (shape[0], shape[2], shape[1]) if layout == "bshd" and len(shape) == 4 else shape[:-1]
    got = "; ".join(_checks.describe(x) for x in given)
    if rule in ("type", "device"):
        where = "the device of the first" if rule == "device" else "the CPU"
        return TypeError(f"{argument}: expected arrays on {where}, got {got}")
    if rule == "dtype" and argument == "lses":
        return TypeError(f"lses: expected dtype float32 (or float64 where outs are float64), all the same, got {got}")
    if rule == "dtype":
        return TypeError(f"outs: expected dtype {_checks.FLOATS} in native byte order, got {got}")
    if rule == "same_dtype":
        return TypeError(f"outs: expected the same dtype for all parts, got {got}")
    return ValueError(f"{argument}: expected each part to have the shape {shape}, of 1 to 7 axes, got {got}")
