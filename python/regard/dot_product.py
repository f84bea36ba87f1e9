"""Dot-product attention (Vaswani et al., 2017, "Attention Is All You Need")."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from regard import _arrays, _backend, _checks, _options

# The inputs that are arrays, in the binding's order.
_INPUTS = (
    "query",
    "key",
    "value",
    "mask",
    "bias",
    "alibi_slopes",
    "sinks",
    "query_lengths",
    "key_lengths",
)
_STAGES = {"scaled": 0, "capped": 1, "masked": 2, "weights": 3}


def attention(
    query: Any,
    key: Any,
    value: Any,
    *,
    mask: Any = None,
    bias: Any = None,
    causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    alignment: str | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    alibi_slopes: Any = None,
    sinks: Any = None,
    query_lengths: Any = None,
    key_lengths: Any = None,
    dropout_p: float = 0.0,
    seed: int | None = None,
    layout: str = "bhsd",
    precision: str = "highest",
    return_lse: bool = False,
    return_weights: bool = False,
    out: Any = None,
) -> Any:
    """Scaled dot-product attention, without the len_q x len_kv matrix.

    For each query i: ``out_i = sum_j softmax_j(score_ij) value_j`` with
    ``score = scale * query . key``, then softcap, bias and ALiBi, then masks.

    Parameters
    ----------
    query : array, (batch, heads, len_q, dim_qk)
        float32, float64, float16 or bfloat16; any strides.
    key : array, (batch, heads_kv, len_kv, dim_qk)
        Of the query's dtype. Each key head serves heads / heads_kv query heads (GQA, MQA).
    value : array, (batch, heads_kv, len_kv, dim_v)
        Of the query's dtype.
    mask : bool array or regard.BlockMask, optional
        True = attend. Broadcasts to (batch, heads, len_q, len_kv).
    bias : array of float32 or the query's dtype, optional
        Added to the scaled scores. Broadcasts like mask. A bias of -inf masks.
    causal : bool
        Query i sees the keys up to the diagonal: a window with no right side.
    window : (left, right), optional
        How many keys either side of the diagonal a query sees; None = unlimited.
    alignment : "upper_left" or "lower_right", optional
        Where the diagonal lies. Needed by causal, window and ALiBi when len_q != len_kv.
    scale : float, optional
        Default 1 / sqrt(dim_qk).
    softcap : float, optional
        softcap * tanh(score / softcap), after scale, before bias and mask.
    alibi_slopes : float32 array, (heads,) or (batch, heads), optional
        Adds -slope * distance to the diagonal.
    sinks : float32 array, (heads,), optional
        One more logit in each row's softmax denominator.
    query_lengths, key_lengths : int32 or int64 array, (batch,), optional
        Valid prefixes; rows beyond a query length are 0. "lower_right" aligns each sequence's ends.
    dropout_p : float
        The probability that a weight is dropped; what stays is scaled by 1 / (1 - dropout_p).
    seed : int, optional
        0 to 2^64 - 1. What is dropped is a function of (seed, batch, head, query, key) alone
        (Philox4x32-10; Salmon et al., 2011). Default: a new one from the system.
    layout : "bhsd" or "bshd"
        The order of the four axes of query, key, value and out.
    precision : "highest", "high" or "medium"
        How float32 products may be computed: as float32 are, from 16 bits of each operand, or from 8. Only a
        matrix unit (instruction set amx) gains by it; elsewhere all are "highest".
    return_lse : bool
        Also return the natural log of each row's softmax denominator.
    return_weights : bool
        Also return the weights that out is the sum of values with, after dropout. The one option
        that costs len_q x len_kv memory.
    out : array, (batch, heads, len_q, dim_v), optional
        Written and returned; may overlap any input.

    Returns
    -------
    out : array, (batch, heads, len_q, dim_v)
        Of the query's kind and dtype. A query that sees no key gives 0.
    lse : float32 array, (batch, heads, len_q)
        Only with return_lse. Where a query sees no key: its sink, or -inf without one.
    weights : array, (batch, heads, len_q, len_kv)
        Only with return_weights; of the query's kind and dtype.

    Raises
    ------
    TypeError, ValueError
        Naming the argument, what was expected and what came.
    """
    short = type(query) is np.ndarray and mask is None and bias is None and window is None and scale is None
    short = short and softcap is None and alibi_slopes is None and sinks is None
    short = short and query_lengths is None and key_lengths is None and seed is None and dropout_p == 0.0
    sequence_first = _checks.choice("layout", layout, _checks.LAYOUTS)
    if short and precision == "highest" and not (return_lse or return_weights):
        # A short call without options spent half its time on options. What is refused is worded below.
        diagonal = 0 if alignment is None else _checks.choice("alignment", alignment, _options.ALIGNMENTS)
        result = _backend.cpu.attention_without_options(query, key, value, out, bool(causal), diagonal, sequence_first)
        if result is not None:
            return result
    dense, options = _options.parsed(query, mask, causal, window, alignment, scale, softcap, dropout_p, seed, precision)
    inputs = (query, key, value, dense, bias, alibi_slopes, sinks, query_lengths, key_lengths)
    numbers = (*options, sequence_first, return_lse, return_weights)
    return _options.attend("attention", _INPUTS, inputs, out, numbers, (mask, scale, softcap), layout)


def scores(
    query: Any,
    key: Any,
    *,
    stage: str = "masked",
    mask: Any = None,
    bias: Any = None,
    causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    alignment: str | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    alibi_slopes: Any = None,
    sinks: Any = None,
    query_lengths: Any = None,
    key_lengths: Any = None,
    mean_of_heads: bool = False,
) -> Any:
    """The (batch, heads, len_q, len_kv) scores of attention after a stage, for the ONNX operator and regard.nn.

    stage is "scaled" (scale * query . key), "capped" (after softcap), "masked" (after bias, ALiBi and masks: -inf is
    hidden) or "weights" (after the softmax). Options are those of :func:`attention`, with arrays in layout "bhsd".
    mean_of_heads, for NumPy's arrays alone, gives their mean over heads, (batch, len_q, len_kv), in so much memory.
    """
    last = _checks.choice("stage", stage, _STAGES)
    dense, options = _options.parsed(query, mask, causal, window, alignment, scale, softcap, 0.0, None, "highest")
    arrays = (query, key, dense, bias, alibi_slopes, sinks, query_lengths, key_lengths)
    result = _arrays.call("scores", _backend.cpu.attention_scores, arrays, (*options[1:6], last, mean_of_heads))
    if type(result) is tuple:
        names = ("query", "key", *_INPUTS[3:])
        raise _checks.error("attention", result, dict(zip(names, arrays, strict=True)) | {"mask": mask, "scale": scale})
    return result[0]


#: Errors of attention's arguments that stand for attn_mask.
_OF_ATTN_MASK = _checks.Renamed(mask="attn_mask", bias="attn_mask")


def scaled_dot_product_attention(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """``torch.nn.functional.scaled_dot_product_attention``: its signature and semantics, on any array.

    Parameters
    ----------
    query : array, (..., heads, len_q, dim_qk)
        At least (len_q, dim_qk); leading axes broadcast between query, key and value.
    key : array, (..., heads, len_kv, dim_qk)
    value : array, (..., heads, len_kv, dim_v)
    attn_mask : bool array (True = attend) or float array (added to the scores), optional
        Broadcasts to (..., heads, len_q, len_kv).
    dropout_p : float
        As in :func:`attention`, with a new seed at each call.
    is_causal : bool
        Query i sees keys 0 to i (the upper left diagonal), whatever the lengths. Excludes attn_mask, as in
        PyTorch's documentation.
    scale : float, optional
        Default 1 / sqrt(dim_qk).
    enable_gqa : bool
        Allow heads that are a multiple of the heads of key and value.

    Returns
    -------
    out : array, (..., heads, len_q, dim_v)

    Raises
    ------
    TypeError, ValueError
        Naming the argument, what was expected and what came.
    """
    if attn_mask is not None and is_causal:
        raise ValueError("attn_mask: expected None together with is_causal=True, got an array as well")
    for name, x in (("query", query), ("key", key), ("value", value)):
        rank = getattr(x, "ndim", None)
        if not isinstance(rank, int):  # a class of arrays has something else
            raise TypeError(f"{name}: expected an array, got {_checks.describe(x)}")
        if rank < 2:
            raise ValueError(f"{name}: expected shape (..., len, dim), got {_checks.describe(x)}")
    lead = tuple(query.shape[:-2])
    if not lead == tuple(key.shape[:-2]) == tuple(value.shape[:-2]):
        if not (enable_gqa and len(lead) > 0 and _same_but_heads(query, key, value)):
            query, key, value = _broadcast_leading(query, key, value)
            lead = tuple(query.shape[:-2])
    mask = bias = None
    if attn_mask is not None:
        dtype = getattr(attn_mask, "dtype", None)
        if len(lead) != 2:
            attn_mask = _arrays.broadcast_to(attn_mask, (*lead, query.shape[-2], key.shape[-2]), "attn_mask")
            attn_mask = _four_axes(attn_mask)
        if dtype is not None and str(dtype).endswith("bool"):
            mask = attn_mask
        else:
            bias = attn_mask
    with _OF_ATTN_MASK:
        out = attention(
            _four_axes(query),
            _four_axes(key),
            _four_axes(value),
            mask=mask,
            bias=bias,
            causal=is_causal,
            alignment="upper_left",
            scale=scale,
            dropout_p=dropout_p,
        )
    return out if len(lead) == 2 else out.reshape(*lead, *out.shape[-2:])


def _four_axes(x: Any) -> Any:
    """(batch, heads, len, dim) from any number of leading axes."""
    if x.ndim == 4:
        return x
    heads = x.shape[-3] if x.ndim > 2 else 1
    batch = math.prod(x.shape[:-3]) if x.ndim > 3 else 1
    return x.reshape(batch, heads, *x.shape[-2:])


def _same_but_heads(query: Any, key: Any, value: Any) -> bool:
    return (
        tuple(query.shape[:-3]) == tuple(key.shape[:-3]) == tuple(value.shape[:-3]) and key.shape[-3] == value.shape[-3]
    )


def _broadcast_leading(*arrays: Any) -> tuple[Any, ...]:
    try:
        lead = np.broadcast_shapes(*(tuple(x.shape[:-2]) for x in arrays))
    except ValueError:
        shapes = ", ".join(str(tuple(x.shape)) for x in arrays)
        raise ValueError(
            f"key: expected leading axes that broadcast between query, key and value, got shapes {shapes}"
            " (enable_gqa=True allows fewer heads in key and value)"
        ) from None
    return tuple(_arrays.broadcast_to(x, (*lead, *x.shape[-2:]), "key") for x in arrays)
