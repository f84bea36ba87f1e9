"""Dot-product attention (Vaswani et al., 2017)."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from regard.reference._functions import dtypes_of, unwarned

Array = Any


@unwarned
def attention(
    query: Array,
    key: Array,
    value: Array,
    *,
    mask: Array | None = None,
    bias: Array | None = None,
    causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    alignment: str | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    alibi_slopes: Array | None = None,
    sinks: Array | None = None,
    query_lengths: Array | None = None,
    key_lengths: Array | None = None,
    dropout_p: float = 0.0,
    seed: int | None = None,
    layout: str = "bhsd",
    precision: str = "highest",
    return_lse: bool = False,
    return_weights: bool = False,
    out: Array | None = None,
) -> Any:
    """softmax(mask(softcap(scale * query key^T) + bias + ALiBi)) value  [1]_.

    Parameters
    ----------
    query, key, value : arrays
        (batch, heads, len_q, dim_qk), (batch, heads_kv, len_kv, dim_qk) and
        (batch, heads_kv, len_kv, dim_v), or with layout="bshd" heads and lengths exchanged.
        Query head h uses key head h // (heads / heads_kv).
    mask : bool array, True where a query may attend; broadcasts to (batch, heads, len_q, len_kv).
        Or a BlockMask
    bias : float array, added to the scaled scores; broadcasts likewise
    causal : bool
        No key right of the diagonal: a window with nothing on its right side.
    window : (left, right)
        How many keys on either side of the diagonal are seen; None is unlimited.
    alignment : "upper_left" or "lower_right"
        Where the diagonal of causal, window and ALiBi lies: j = i, or j = i + len_kv - len_q (with
        lengths, each sequence's own). Needed where one of the three is used and len_q != len_kv.
    scale : float, 1 / sqrt(dim_qk) where left out
    softcap : float; scores become softcap * tanh(score / softcap)
    alibi_slopes : (heads,) or (batch, heads); -slope * distance to the diagonal is added [2]_
    sinks : (heads,); one more logit in the denominator of each row, with no value
    query_lengths, key_lengths : (batch,) ints; what lies beyond these prefixes is masked
    dropout_p, seed
        Weight (b, h, i, j) is dropped when a random word, a function of seed and these four, is below
        dropout_p 2^32; the others are scaled by 1 / (1 - dropout_p). See `random_words`.
    precision
        Without effect on the reference.

    Returns
    -------
    out, or a tuple (out[, lse][, weights])
        out has the query's dtype and layout; lse, the natural log of each row's denominator, is
        (batch, heads, len_q) in the precision of the computation; weights are
        (batch, heads, len_q, len_kv) in the query's dtype. A row that sees no key is 0; without a
        sink its lse is -inf.

    .. [1] Vaswani et al., Attention is all you need, 2017
    .. [2] Press et al., Train short, test long, 2021
    """
    dtype, compute = dtypes_of(query, key, value)
    q, k, v = (heads_first(x, layout).astype(compute) for x in (query, key, value))
    if q.shape[0] != k.shape[0] or k.shape[:3] != v.shape[:3] or q.shape[3] != k.shape[3]:
        raise ValueError(f"shapes do not fit: query {q.shape}, key {k.shape}, value {v.shape}")
    heads, len_q, len_kv = q.shape[1], q.shape[2], k.shape[2]

    distance = distance_to_diagonal(
        len_q,
        len_kv,
        checked_alignment(alignment, causal or window is not None or alibi_slopes is not None, len_q, len_kv),
        query_lengths,
        key_lengths,
    )
    visible = (
        in_window(distance, *(window or (None, None)), causal=causal)
        & in_prefix(query_lengths, len_q)[:, None, :, None]
        & in_prefix(key_lengths, len_kv)[:, None, None, :]
    )
    if mask is not None:
        visible = visible & bool_mask(mask.to_dense() if hasattr(mask, "to_dense") else mask)
    added = compute(0) if bias is None else np.asarray(bias, compute)
    if alibi_slopes is not None:
        slopes = np.asarray(alibi_slopes, compute)[..., None, None]  # (batch?, heads, 1, 1)
        added = added - slopes * np.abs(distance).astype(compute)
    sink = None if sinks is None else np.asarray(sinks, compute)[:, None, None]

    kept = (
        compute(1)
        if dropout_p == 0
        else kept_weights(dropout_p, seed or 0, (q.shape[0], heads, len_q, len_kv), compute)
    )

    o, lse, weights = attend(
        q, repeat_heads(k, heads), repeat_heads(v, heads), scale, softcap, added, visible, sink, kept
    )
    o = heads_first(o, layout).astype(dtype)  # exchanging the axes twice restores them
    if out is not None:
        out[...] = o
        o = out
    extras = [lse[..., 0]] * return_lse + [weights.astype(dtype)] * return_weights
    return (o, *extras) if extras else o


def attention_varlen(
    query: Array,
    key: Array,
    value: Array,
    cu_seqlens_q: Array,
    cu_seqlens_kv: Array,
    *,
    return_lse: bool = False,
    return_weights: bool = False,
    out: Array | None = None,
    **options: Any,
) -> Any:
    """attention of each sequence by itself; query (total_q, heads, dim_qk), key (total_kv, heads_kv, dim_qk), ...

    Sequence b has rows cu_seqlens[b] to cu_seqlens[b + 1]. lse is (heads, total_q); weights are padded to the longest.
    """
    batch = len(cu_seqlens_q) - 1
    padded_q, lengths_q = padded(query, cu_seqlens_q)
    padded_k, lengths_k = padded(key, cu_seqlens_kv)
    padded_v, _ = padded(value, cu_seqlens_kv)
    for name, lengths in (("query_lengths", lengths_q), ("key_lengths", lengths_k)):
        if options.get(name) is None:
            options[name] = lengths
    if options.get("alignment") is None and (options["query_lengths"] == options["key_lengths"]).all():
        options["alignment"] = "upper_left"
    o, lse, weights = attention(
        padded_q, padded_k, padded_v, layout="bshd", return_lse=True, return_weights=True, **options
    )
    packed = np.zeros((*query.shape[:2], value.shape[2]), o.dtype) if out is None else out
    packed[...] = 0
    packed_lse = np.full((query.shape[1], query.shape[0]), -np.inf, lse.dtype)
    for b in range(batch):
        rows = slice(cu_seqlens_q[b], cu_seqlens_q[b + 1])
        packed[rows] = o[b, : lengths_q[b]]
        packed_lse[:, rows] = lse[b, :, : lengths_q[b]]
    extras = [packed_lse] * return_lse + [weights] * return_weights
    return (packed, *extras) if extras else packed


def attention_paged(
    query: Array,
    key_pages: Array,
    value_pages: Array,
    page_table: Array,
    key_lengths: Array,
    *,
    key_scales: Array | None = None,
    value_scales: Array | None = None,
    layout: str = "bhsd",
    **options: Any,
) -> Any:
    """attention over the keys that page_table (batch, pages) names; pages are (pages, page_size, heads_kv, dim)."""
    key = gathered(key_pages, key_scales, page_table, key_lengths, query.dtype)
    value = gathered(value_pages, value_scales, page_table, key_lengths, query.dtype)
    lengths = np.asarray(key_lengths)
    queries = options.get("query_lengths")
    if queries is None:
        queries = np.full(len(lengths), query.shape[2 if layout == "bhsd" else 1])
    if options.get("alignment") is None and (queries == lengths).all():
        options["alignment"] = "upper_left"
    q = heads_first(query, layout)
    result = attention(q, heads_first(key, "bshd"), heads_first(value, "bshd"), key_lengths=lengths, **options)
    if layout == "bhsd":
        return result
    return (heads_first(result[0], layout), *result[1:]) if isinstance(result, tuple) else heads_first(result, layout)


@unwarned
def scaled_dot_product_attention(
    query: Array,
    key: Array,
    value: Array,
    attn_mask: Array | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Array:
    """torch.nn.functional.scaled_dot_product_attention, in NumPy.

    query (..., len_q, dim_qk), key (..., len_kv, dim_qk), value (..., len_kv, dim_v); attn_mask is
    bool (True = attend) or float (added) and broadcasts to (..., len_q, len_kv); is_causal aligns
    upper left. With enable_gqa, axis -3 of key and value may divide the query's.
    """
    if dropout_p != 0.0:
        raise NotImplementedError("reference.scaled_dot_product_attention has no dropout_p")
    if attn_mask is not None and is_causal:
        raise ValueError("attn_mask and is_causal exclude each other: put both into attn_mask")
    dtype, compute = dtypes_of(query, key, value)
    q, k, v = (np.asarray(x).astype(compute) for x in (query, key, value))
    if enable_gqa:
        k, v = (repeat_heads(x, q.shape[-3]) for x in (k, v))
    added: Array = compute(0)
    visible: Array = np.True_
    if is_causal:
        distance = distance_to_diagonal(q.shape[-2], k.shape[-2], "upper_left")[0, 0]
        visible = in_window(distance, None, None, causal=True)
    elif attn_mask is not None and np.asarray(attn_mask).dtype == bool:
        visible = np.asarray(attn_mask)
    elif attn_mask is not None:
        dtypes_of(attn_mask)
        added = np.asarray(attn_mask).astype(compute)
    o, _, _ = attend(q, k, v, scale, None, added, visible, None)
    return o.astype(dtype)


# The steps of attention, in order. Arrays here are (..., len, dim) with heads before lengths.


def attend(
    q: Array,
    k: Array,
    v: Array,
    scale: float | None,
    softcap: float | None,
    added: Array,
    visible: Array,
    sink: Array | None,
    kept: Array = 1,
) -> tuple[Array, Array, Array]:
    """(out, lse, weights) of the computation proper; lse keeps a last axis of 1."""
    s = scores(q, k, scale, softcap, added, visible)
    weights, lse = softmax_weights(s, sink)
    weights = np.where(s == -np.inf, weights, weights * kept)
    return weighted_values(weights, v, s != -np.inf), lse, weights


def scores(q: Array, k: Array, scale: float | None, softcap: float | None, added: Array, visible: Array) -> Array:
    """Scale, then softcap, then bias and ALiBi, then the mask, which is a true -inf."""
    if scale is None:
        scale = 1.0 / math.sqrt(q.shape[-1])
    s = (q @ k.swapaxes(-1, -2)) * q.dtype.type(scale)
    if softcap is not None:
        cap = q.dtype.type(softcap)
        s = cap * np.tanh(s / cap)
    return np.where(visible, s + added, q.dtype.type(-np.inf))


def softmax_weights(s: Array, sink: Array | None) -> tuple[Array, Array]:
    """Weights of each row, and the log of its denominator. A row of -inf weighs 0 everywhere."""
    m = s.max(axis=-1, keepdims=True, initial=-np.inf)
    if sink is not None:
        m = np.maximum(m, sink)
    m = np.where(m == -np.inf, s.dtype.type(0), m)  # -inf - -inf would be NaN
    p = np.exp(s - m)
    total = p.sum(axis=-1, keepdims=True)
    if sink is not None:
        total = total + np.exp(sink - m)
    weights = np.divide(p, total, out=np.zeros_like(p), where=total != 0)
    return weights, m + np.log(total)


def weighted_values(weights: Array, v: Array, seen: Array) -> Array:
    """weights @ v, in which a key that is not seen contributes nothing, not even 0 * NaN."""
    finite = np.isfinite(v)
    out = np.asarray(weights @ np.where(finite, v, v.dtype.type(0)))
    axes = (*range(v.ndim - 2), v.ndim - 1)
    for j in np.flatnonzero(~finite.all(axis=axes)):
        one = slice(j, j + 1)
        special = np.where(finite[..., one, :], v.dtype.type(0), v[..., one, :])
        out += np.where(seen[..., one], weights[..., one] * special, v.dtype.type(0))
    return out


def padded(x: Array, starts: Array) -> tuple[Array, Array]:
    """(batch, longest, heads, dim) and the lengths, from sequences packed one after another."""
    lengths = np.diff(np.asarray(starts))
    rows = np.zeros((len(lengths), int(lengths.max(initial=0)), *x.shape[1:]), x.dtype)
    for b, n in enumerate(lengths):
        rows[b, :n] = x[starts[b] : starts[b] + n]
    return rows, lengths


def gathered(pages: Array, scales: Array | None, page_table: Array, lengths: Array, dtype: Any) -> Array:
    """(batch, longest, heads_kv, dim) of the query's dtype, from pages."""
    size = pages.shape[1]
    rows = np.zeros((len(lengths), int(np.max(lengths, initial=0)), *pages.shape[2:]), dtype)
    for b, n in enumerate(lengths):
        for j in range(n):
            row = pages[page_table[b, j // size], j % size]
            if scales is not None:
                row = row.astype(np.float64) * scales[page_table[b, j // size], j % size][:, None]
            rows[b, j] = row.astype(dtype)
    return rows


def kept_weights(p: float, seed: int, shape: tuple[int, int, int, int], compute: Any) -> Array:
    """What dropout multiplies weight (b, h, i, j) by: 0, or 1 / (1 - p)."""
    b, h, i, j = np.meshgrid(*(np.arange(n, dtype=np.uint64) for n in shape), indexing="ij", sparse=True)
    words = random_words(seed, np.stack(np.broadcast_arrays(j // 4, i, h, b)))
    word = np.choose(np.broadcast_to(j % 4, shape).astype(np.intp), words)
    return np.where(word >= int(p * 2**32 + 0.5), compute(1 / (1 - p) if p < 1 else 0), compute(0))


def random_words(seed: int, counter: Array) -> Array:
    """Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011): 4 words from 4 words."""
    low = np.uint64(0xFFFFFFFF)
    x0, x1, x2, x3 = (c.astype(np.uint64) & low for c in counter)
    k0, k1 = seed & 0xFFFFFFFF, seed >> 32
    for _ in range(10):
        a, b = np.uint64(0xD2511F53) * x0, np.uint64(0xCD9E8D57) * x2
        x0, x1, x2, x3 = (
            (b >> np.uint64(32)) ^ x1 ^ np.uint64(k0),
            b & low,
            (a >> np.uint64(32)) ^ x3 ^ np.uint64(k1),
            a & low,
        )
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return np.stack([x0, x1, x2, x3])


def distance_to_diagonal(
    len_q: int,
    len_kv: int,
    alignment: str,
    query_lengths: Array | None = None,
    key_lengths: Array | None = None,
) -> Array:
    """How far key j lies right of row i's diagonal: (batch or 1, 1, len_q, len_kv)."""
    right = np.arange(len_kv)[None, :] - np.arange(len_q)[:, None]
    if alignment == "upper_left":
        return right[None, None]
    shift = np.asarray(len_kv if key_lengths is None else key_lengths, np.int64) - np.asarray(
        len_q if query_lengths is None else query_lengths, np.int64
    )
    return right - shift.reshape(-1, 1, 1, 1)


def in_window(distance: Array, left: int | None, right: int | None, *, causal: bool) -> Array:
    """True from `left` keys before the diagonal to `right` keys after it; causal: none after."""
    if (left is not None and left < 0) or (right is not None and right < 0):
        raise ValueError(f"window must not be negative, got ({left}, {right})")
    visible = np.ones(distance.shape, bool)
    if left is not None:
        visible &= distance >= -left
    if right is not None:
        visible &= distance <= right
    if causal:
        visible &= distance <= 0
    return visible


def in_prefix(lengths: Array | None, length: int) -> Array:
    """True in each sequence's valid prefix: (batch or 1, length)."""
    if lengths is None:
        return np.ones((1, length), bool)
    given = np.asarray(lengths)
    if ((given < 0) | (given > length)).any():
        raise ValueError(f"lengths must lie between 0 and {length}, got {given}")
    return np.arange(length) < given[:, None]


def checked_alignment(alignment: str | None, used: bool, len_q: int, len_kv: int) -> str:
    if alignment not in (None, "upper_left", "lower_right"):
        raise ValueError(f'alignment must be "upper_left" or "lower_right", got {alignment!r}')
    if alignment is None and used and len_q != len_kv:
        raise ValueError(
            f"alignment is needed for causal, window and ALiBi where len_q ({len_q}) differs from "
            f'len_kv ({len_kv}): "upper_left" puts the diagonal at key i for query i, '
            '"lower_right" puts the last query at the last key'
        )
    return alignment or "upper_left"


def repeat_heads(x: Array, heads: int) -> Array:
    """Each key or value head once for every query head of its group (GQA; MQA has one group)."""
    heads_kv = x.shape[-3]
    if heads == heads_kv:
        return x
    if heads_kv == 0 or heads % heads_kv:
        raise ValueError(f"heads ({heads}) must be a multiple of heads_kv ({heads_kv})")
    return np.repeat(x, heads // heads_kv, axis=-3)


def heads_first(x: Array, layout: str) -> Array:
    """(batch, heads, len, dim) from either layout; its own inverse."""
    if layout not in ("bhsd", "bshd"):
        raise ValueError(f'layout must be "bhsd" or "bshd", got {layout!r}')
    if np.ndim(x) != 4:
        raise ValueError(f"query, key and value must have 4 axes, got shape {np.shape(x)}")
    return np.asarray(x) if layout == "bhsd" else np.swapaxes(x, 1, 2)


def bool_mask(mask: Array) -> Array:
    if np.asarray(mask).dtype != bool:
        raise TypeError(f"mask must be bool, got {np.asarray(mask).dtype}")
    return np.asarray(mask)
