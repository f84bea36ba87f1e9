"""The ONNX operators Attention and RotaryEmbedding as functions: their inputs in order, their attributes by name.

The onnx package is not needed: `regard.onnx.attention(q, k, v, None, past_key, past_value, is_causal=1)` computes what
a node of that operator with these inputs and attributes means. Scores, softmax and sums are float32, or float64, never
less, whatever softmax_precision says.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from regard import _arrays, _checks, dot_product, rotary

__all__ = ["attention", "rotary_embedding"]

Array = Any

#: The opset that brought each operator's input or attribute.
_ATTENTION_INPUTS = {
    "Q": 23,
    "K": 23,
    "V": 23,
    "attn_mask": 23,
    "past_key": 23,
    "past_value": 23,
    "nonpad_kv_seqlen": 24,
}
_ATTENTION_ATTRIBUTES = {
    "is_causal": 23,
    "kv_num_heads": 23,
    "q_num_heads": 23,
    "qk_matmul_output_mode": 23,
    "scale": 23,
    "softcap": 23,
    "softmax_precision": 23,
    "left_window_size": 25,
    "right_window_size": 25,
}
_ROTARY_INPUTS = {"X": 23, "cos_cache": 23, "sin_cache": 23, "position_ids": 23}
_ROTARY_ATTRIBUTES = {"interleaved": 23, "num_heads": 23, "rotary_embedding_dim": 23}

#: TensorProto's numbers of the types that softmax_precision may name.
_PRECISIONS = {1: "float32", 10: "float16", 11: "float64", 16: "bfloat16"}
_DOUBLE = 11

#: What qk_matmul_output_mode shows.
_STAGES = ("scaled", "capped", "masked", "weights")
_WEIGHTS = _STAGES.index("weights")

_HOST = _arrays.Beside("onnx", np.empty(0))

#: What regard calls the inputs, for its messages.
_NAMES = {
    "query": "Q",
    "key": "K",
    "value": "V",
    "mask": "attn_mask",
    "bias": "attn_mask",
    "key_lengths": "nonpad_kv_seqlen",
}
_ROTARY_NAMES = {"x": "X", "cos": "cos_cache", "sin": "sin_cache", "positions": "position_ids"}


def attention(*inputs: Any, opset: int = 25, **attributes: Any) -> tuple[Any, ...]:
    """The ONNX operator Attention, opsets 23 to 25  [1]_.

    ``Y = softmax(softcap(scale Q K^T) + attn_mask) V``, with the keys of past_key before those of K.

    Parameters
    ----------
    *inputs : Q, K, V, attn_mask, past_key, past_value, nonpad_kv_seqlen
        In this order, None where absent; those at the end may be left out.

        Q : (batch, q_num_heads, len_q, dim_qk), or (batch, len_q, q_num_heads * dim_qk)
            float32, float64, float16 or bfloat16; K and V have as many axes as Q.
        K : (batch, kv_num_heads, len_kv, dim_qk), or (batch, len_kv, kv_num_heads * dim_qk)
        V : (batch, kv_num_heads, len_kv, dim_v), or (batch, len_kv, kv_num_heads * dim_v)
        attn_mask : bool (True = attend), or numbers that are added to the scores
            Broadcasts to (batch, q_num_heads, len_q, total), total = past + len_kv. From opset 24 on, a last axis
            shorter than total hides the keys beyond it.
        past_key, past_value : (batch, kv_num_heads, past, dim_qk) and (batch, kv_num_heads, past, dim_v)
            Both or neither.
        nonpad_kv_seqlen : int64, (batch,)
            Opset 24: only so many keys of each sequence are seen. Not together with past_key.
    opset : int
        Of the model: 23, 24 and 25 differ in what they allow. Later ones are as 25.
    is_causal : int
        1: query i sees the keys up to i + offset, where offset is past, or nonpad_kv_seqlen - len_q, or 0.
    left_window_size, right_window_size : int
        Opset 25: how many keys either side of i + offset are seen; -1 = all.
    q_num_heads, kv_num_heads : int
        Needed with 3 axes.
    scale : float
        Default 1 / sqrt(dim_qk).
    softcap : float
        softcap * tanh(score / softcap), before attn_mask; 0 = none.
    softmax_precision : 1, 10, 11 or 16 (float32, float16, float64, bfloat16)
        The least precision of the softmax. It is float32 anyway: only 11 has an effect, and computes all in float64.
    qk_matmul_output_mode : 0, 1, 2 or 3
        Asks for the fourth output: scores, scores after softcap, after softcap and all masks, or weights.

    Returns
    -------
    Y : array of Q's kind, dtype and number of axes
        0 where a query sees no key.
    present_key, present_value : arrays, (batch, kv_num_heads, total, dim)
        Past and new keys and values; None without past_key.
    qk_matmul_output : array of Q's dtype, (batch, q_num_heads, len_q, total)
        None without qk_matmul_output_mode. The one output that costs len_q x total memory.

    Raises
    ------
    TypeError, ValueError
        Naming the input or attribute, what was expected and what came.

    .. [1] https://onnx.ai/onnx/operators/onnx__Attention.html
    """
    _known("Attention", opset, inputs, _ATTENTION_INPUTS, attributes, _ATTENTION_ATTRIBUTES)
    return _called("onnx.attention", _attention, inputs, attributes)


def _called(operation: str, function: Callable[..., Any], inputs: tuple[Any, ...], attributes: dict[str, Any]) -> Any:
    """function(memory of the first input, *inputs, **attributes): a GPU's arrays as they are, others as NumPy's."""
    first = inputs[0]
    if _arrays.on_gpu(first):
        given = [x.detach() if hasattr(x, "detach") else x for x in inputs]
        memory = _arrays.Beside(operation, first)
        with memory.current():
            return function(memory, *given, **attributes)
    on_host = functools.partial(function, _HOST)
    return _arrays.through_numpy(operation, on_host, inputs, attributes)


def _attention(memory: _arrays.Beside, *inputs: Any, _opset: int, **attributes: Any) -> tuple[Any, ...]:
    inputs += (None,) * (7 - len(inputs))
    q, k, v, mask, past_key, past_value, valid = inputs
    for name, x in (("Q", q), ("K", k), ("V", v)):
        _array(memory, name, x, (3, 4) if name == "Q" else (q.ndim,))
    causal = bool(_whole(attributes, "is_causal", 0, (0, 1)))
    left, right = (_whole(attributes, f"{side}_window_size", -1) for side in ("left", "right"))
    mode = None
    if "qk_matmul_output_mode" in attributes:
        mode = _whole(attributes, "qk_matmul_output_mode", 0, (0, 1, 2, 3))
    double = _whole(attributes, "softmax_precision", 1, tuple(_PRECISIONS)) == _DOUBLE
    heads, heads_kv = (attributes.get(name) for name in ("q_num_heads", "kv_num_heads"))
    flat = q.ndim == 3
    q4 = _by_heads("Q", q, "q_num_heads", heads)
    k4, v4 = (_by_heads(name, x, "kv_num_heads", heads_kv) for name, x in (("K", k), ("V", v)))

    present_key = present_value = None
    if (past_key is None) != (past_value is None):
        given, missing = ("past_key", "past_value") if past_value is None else ("past_value", "past_key")
        raise ValueError(f"{missing}: expected an array together with {given}, got None")
    past = 0
    if past_key is not None:
        if valid is not None:
            raise ValueError("nonpad_kv_seqlen: expected None together with past_key, got an array as well")
        present_key = _extended(memory, "past_key", past_key, k4)
        present_value = _extended(memory, "past_value", past_value, v4)
        if present_key.shape[2] != present_value.shape[2]:
            raise ValueError(
                f"past_value: expected as many keys as past_key has, {past_key.shape[2]}, got {past_value.shape[2]}"
            )
        past, k4, v4 = past_key.shape[2], present_key, present_value

    compute = _computed_in(memory, {q.dtype, k.dtype, v.dtype}, double)
    total, len_q = k4.shape[2], q4.shape[2]
    options: dict[str, Any] = {"scale": attributes.get("scale"), "softcap": attributes.get("softcap") or None}
    options |= _mask(memory, mask, total, compute, padded=_opset >= 24)
    right = 0 if causal and right != 0 else right
    if left >= 0 or right >= 0:
        bounds = (left if left >= 0 else None, right if right >= 0 else None)
        if valid is not None:
            options |= {"window": bounds, "alignment": "lower_right"}
        else:
            options |= _window(memory, *bounds, past, len_q, total, options.get("mask"))
    if valid is not None:
        options["key_lengths"] = valid

    shape = (q4.shape[0], len_q, q4.shape[1], v4.shape[3])  # heads inside: 3 axes come out without a transposition
    y = memory.empty(shape if flat else (shape[0], shape[2], shape[1], shape[3]), compute)
    q4, k4, v4 = (memory.converted(x, compute) for x in (q4, k4, v4))
    out, stage, weights = y.swapaxes(1, 2) if flat else y, None, mode == _WEIGHTS
    with _renamed(_NAMES):
        found = dot_product.attention(q4, k4, v4, out=out, return_weights=weights, **options)
    if flat:
        y = y.reshape(*shape[:2], shape[2] * shape[3])
    if mode is not None:
        stage = found[1] if weights else dot_product.scores(q4, k4, stage=_STAGES[mode], **options)
        stage = memory.converted(stage, q.dtype)
    return memory.converted(y, q.dtype), present_key, present_value, stage


def rotary_embedding(*inputs: Any, opset: int = 25, **attributes: Any) -> Array:
    """The ONNX operator RotaryEmbedding, opset 23  [1]_.

    Parameters
    ----------
    *inputs : X, cos_cache, sin_cache, position_ids
        In this order; position_ids may be left out or None.

        X : (batch, num_heads, length, head_size), or (batch, length, num_heads * head_size)
            float32, float64, float16 or bfloat16.
        cos_cache, sin_cache : (positions, dim / 2) with position_ids, else (batch, length, dim / 2)
            dim is rotary_embedding_dim, or head_size where that is 0.
        position_ids : int64, (batch, length)
            Rows of the caches.
    opset : int
        Of the model; 23 and later mean the same.
    interleaved : int
        1 rotates neighbours (x0, x1), (x2, x3), ...; 0 rotates the first half against the second.
    rotary_embedding_dim : int
        Only so many first entries are rotated; 0 = all.
    num_heads : int
        Needed with 3 axes.

    Returns
    -------
    Y : array of X's kind, dtype and shape

    Raises
    ------
    TypeError, ValueError
        Naming the input or attribute, what was expected and what came.

    .. [1] https://onnx.ai/onnx/operators/onnx__RotaryEmbedding.html
    """
    _known("RotaryEmbedding", opset, inputs, _ROTARY_INPUTS, attributes, _ROTARY_ATTRIBUTES)
    return _called("onnx.rotary_embedding", _rotary_embedding, inputs, attributes)


def _rotary_embedding(
    memory: _arrays.Beside,
    x: Array,
    cos: Array,
    sin: Array,
    positions: Array = None,
    *,
    _opset: int,
    **attributes: Any,
) -> Array:
    _array(memory, "X", x, (3, 4))
    interleaved = bool(_whole(attributes, "interleaved", 0, (0, 1)))
    dim = _whole(attributes, "rotary_embedding_dim", 0)
    flat = x.ndim == 3
    by_heads = _by_heads("X", x, "num_heads", attributes.get("num_heads") or None)
    head_size = by_heads.shape[3]
    if dim > head_size or dim % 2 or dim < 0:
        raise ValueError(f"rotary_embedding_dim: expected an even number up to head_size = {head_size}, got {dim}")
    if not dim and head_size % 2:
        raise ValueError(f"X: expected an even head_size, or a rotary_embedding_dim, got {_checks.describe(x)}")
    for name, cache in (("cos_cache", cos), ("sin_cache", sin)):
        _array(memory, name, cache, (3,) if positions is None else (2,), "X")
        if cache.shape[-1] != (dim or head_size) // 2:
            raise ValueError(
                f"{name}: expected a last axis of half of what is rotated, {(dim or head_size) // 2},"
                f" got {_checks.describe(cache)}"
            )
    with _renamed(_ROTARY_NAMES):
        y = rotary.rotary_embedding(by_heads, cos, sin, positions, interleaved)
    return y.swapaxes(1, 2).reshape(x.shape) if flat else y


def _known(
    operator: str,
    opset: int,
    inputs: tuple[Any, ...],
    names: Mapping[str, int],
    attributes: dict[str, Any],
    known: Mapping[str, int],
) -> None:
    """Refuse what the operator does not have at this opset; leave the opset among the attributes."""
    if not isinstance(opset, (int, np.integer)) or isinstance(opset, bool):
        raise TypeError(f"opset: expected an integer, got {_checks.describe(opset)}")
    if opset < 23:
        raise ValueError(f"opset: expected 23 or later, which have {operator}, got {opset}")
    for name in attributes:
        if name not in known:
            raise TypeError(f"{name}: expected an attribute of {operator} ({', '.join(known)})")
        if opset < known[name]:
            raise ValueError(f"{name}: expected opset {known[name]} or later, which have this attribute, got {opset}")
    if len(inputs) > len(names):
        raise TypeError(f"inputs: expected at most {len(names)} ({', '.join(names)}), got {len(inputs)}")
    optional = ("attn_mask", "past_key", "past_value", "nonpad_kv_seqlen", "position_ids")
    for i, (name, since) in enumerate(names.items()):
        absent = i >= len(inputs) or inputs[i] is None
        if absent and name not in optional:
            raise TypeError(f"{name}: expected an array, got None")
        if not absent and opset < since:
            raise ValueError(f"{name}: expected None before opset {since}, got an array at opset {opset}")
    attributes["_opset"] = int(opset)


def _whole(attributes: Mapping[str, Any], name: str, default: int, choices: tuple[int, ...] = ()) -> int:
    """An integer attribute: one of `choices`, or a count or -1."""
    value = attributes.get(name, default)
    expected = f"one of {', '.join(map(str, choices))}" if choices else "-1 or a count"
    if not isinstance(value, (int, np.integer)):
        raise TypeError(f"{name}: expected {expected}, got {_checks.describe(value)}")
    if value not in choices if choices else value < -1:
        raise ValueError(f"{name}: expected {expected}, got {value}")
    return int(value)


def _array(memory: _arrays.Beside, name: str, x: Array, ranks: tuple[int, ...], first: str = "Q") -> None:
    axes = " or ".join(map(str, ranks))
    if not memory.holds(x):
        if hasattr(x, "__dlpack__"):
            raise TypeError(f"{name}: expected an array of {first}'s kind, on its device, got {_checks.describe(x)}")
        raise TypeError(f"{name}: expected an array of {axes} axes, got {_checks.describe(x)}")
    if x.ndim not in ranks:
        raise ValueError(f"{name}: expected {axes} axes, got {_checks.describe(x)}")


def _by_heads(name: str, x: Array, attribute: str, heads: Any) -> Array:
    """(batch, heads, len, dim) from either form, 3 axes split without a copy where their strides allow it."""
    if x.ndim == 4:
        if heads is not None and heads != x.shape[1]:
            raise ValueError(f"{attribute}: expected the heads of {name}, {x.shape[1]}, got {heads}")
        return x
    if not isinstance(heads, (int, np.integer)):
        raise TypeError(
            f"{attribute}: expected a number of heads, because {name} has 3 axes, got {_checks.describe(heads)}"
        )
    if heads < 1 or x.shape[2] % heads:
        raise ValueError(f"{attribute}: expected a divisor of the last axis of {name}, {x.shape[2]}, got {heads}")
    return x.reshape(*x.shape[:2], heads, x.shape[2] // heads).swapaxes(1, 2)


def _extended(memory: _arrays.Beside, name: str, past: Array, new: Array) -> Array:
    """Past and new keys, or values, in one array."""
    _array(memory, name, past, (4,))
    want = (*new.shape[:2], "past", new.shape[3])
    if (*past.shape[:2], "past", past.shape[3]) != want:
        raise ValueError(f"{name}: expected shape ({', '.join(map(str, want))}), got {_checks.describe(past)}")
    if past.dtype != new.dtype:
        raise TypeError(f"{name}: expected the dtype of the new ones, {new.dtype}, got {_checks.describe(past)}")
    return memory.joined((past, new), 2)


def _computed_in(memory: _arrays.Beside, dtypes: set[Any], double: bool) -> Any:
    """The dtype that all inputs fit in, of those that the kernels take."""
    if len(dtypes) == 1 and not double:  # NumPy's names cost a quarter of a small call
        (only,) = dtypes
        if getattr(only, "isnative", True):
            return only
    names = {_arrays.name_of_dtype(x) for x in dtypes}
    wide = double or "float64" in names
    return memory.dtype("float64" if wide else names.pop() if len(names) == 1 else "float32")


def _mask(memory: _arrays.Beside, mask: Any, total: int, compute: Any, *, padded: bool) -> dict[str, Array]:
    """attn_mask as regard.attention's mask or bias."""
    if mask is None:
        return {}
    _array(memory, "attn_mask", mask, (0, 1, 2, 3, 4))
    added = mask.dtype != memory.dtype("bool")
    if added and mask.dtype not in (memory.dtype("float32"), compute):
        # Integers and other floats are added too: exact in float64, and rounded once to what the scores are.
        wide = memory.dtype("float64")
        mask = memory.converted(mask, wide if compute == wide else "float32")
    if padded and mask.ndim and mask.shape[-1] < total:
        whole = memory.full((*mask.shape[:-1], total), -np.inf if added else False, mask.dtype)
        whole[..., : mask.shape[-1]] = mask
        mask = whole
    return {"bias" if added else "mask": mask}


def _window(
    memory: _arrays.Beside, left: int | None, right: int | None, offset: int, len_q: int, total: int, mask: Any
) -> dict[str, Any]:
    """The keys from `left` before to `right` after i + offset, as a window on one of regard's two diagonals."""
    for alignment, diagonal in (("upper_left", 0), ("lower_right", total - len_q)):
        shift = offset - diagonal
        bounds = (None if left is None else left - shift, None if right is None else right + shift)
        if all(bound is None or bound >= 0 for bound in bounds):
            return {"window": bounds, "alignment": alignment}
    # Neither diagonal has the band on both its sides (past keys, and new ones that are not as many as queries).
    distance = np.arange(total) - np.arange(len_q)[:, None] - offset
    band = np.ones(distance.shape, np.bool_)
    if left is not None:
        band &= distance >= -left
    if right is not None:
        band &= distance <= right
    band = memory.array(band)
    return {"mask": band if mask is None else mask & band}


@contextlib.contextmanager
def _renamed(names: Mapping[str, str]) -> Iterator[None]:
    """Within it, regard's refusals name the operator's inputs."""
    try:
        yield
    except (TypeError, ValueError) as error:
        name, colon, rest = str(error).partition(":")
        if colon and name in names:
            raise type(error)(f"{names[name]}:{rest}") from None
        raise
