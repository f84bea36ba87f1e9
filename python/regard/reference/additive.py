"""Additive, multiplicative and location-sensitive attention in plain NumPy: what the kernels must compute.

Names: query (batch, len_q, dim_q), key (batch, len_kv, dim_k), value (batch, len_kv, dim_v); ``dim`` is the width
of the space in which additive attention adds. Weights have the layout of PyTorch's linear, (out, in).
Everything is computed in float64 and returned in the query's dtype.
"""

from __future__ import annotations

from typing import Any

import numpy as np


def _float64(x: Any) -> Any:
    return None if x is None else np.asarray(x).astype(np.float64)


def _visible(mask: Any, key_lengths: Any, batch: int, len_q: int, len_kv: int) -> np.ndarray:
    """Which keys each query may see: (batch, len_q, len_kv) of bool."""
    seen = np.ones((batch, len_q, len_kv), bool)
    if mask is not None:
        seen = seen & np.broadcast_to(mask, seen.shape)
    if key_lengths is not None:
        seen = seen & (np.arange(len_kv) < np.asarray(key_lengths)[:, None])[:, None, :]
    return seen


def _attend(scores: np.ndarray, seen: np.ndarray, value: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Softmax over the keys seen, and the weighted sum of their values. A query that sees no key gives 0."""
    scores = np.where(seen, scores, -np.inf)
    largest = np.max(scores, axis=-1, keepdims=True, initial=-np.inf)
    with np.errstate(invalid="ignore"):
        weights = np.where(seen, np.exp(scores - np.where(largest == -np.inf, 0, largest)), 0)
        total = weights.sum(axis=-1, keepdims=True)
        weights = np.divide(weights, total, out=np.zeros_like(weights), where=total != 0)
    # A masked value may be NaN or inf, and 0 times that is NaN: rows and keys of weight exactly 0 are left out.
    out = np.zeros((*scores.shape[:2], value.shape[-1]))
    for b in range(scores.shape[0]):
        for i in range(scores.shape[1]):
            keys = weights[b, i] != 0
            out[b, i] = weights[b, i, keys] @ value[b, keys]
    return out, weights


def additive_attention(
    query: Any,
    key: Any,
    value: Any,
    *,
    v: Any,
    w_query: Any = None,
    w_key: Any = None,
    bias: Any = None,
    mask: Any = None,
    key_lengths: Any = None,
    return_weights: bool = False,
) -> Any:
    """Bahdanau, Cho, Bengio, "Neural Machine Translation by Jointly Learning to Align and Translate" (2014), A.1.2.

    e_ij = v^T tanh(W_a s_i + U_a h_j), alpha = softmax_j(e), c_i = sum_j alpha_ij h_j, with s the queries, h the keys.
    """
    dtype = np.asarray(query).dtype
    s, h, value, v, w_a, u_a, bias = map(_float64, (query, key, value, v, w_query, w_key, bias))
    with np.errstate(invalid="ignore", over="ignore"):
        s = s if w_a is None else s @ w_a.T
        h = h if u_a is None else h @ u_a.T
        if bias is not None:
            s = s + bias
        e = np.tanh(s[:, :, None, :] + h[:, None, :, :]) @ v
    out, weights = _attend(e, _visible(mask, key_lengths, *e.shape), value)
    return (out.astype(dtype), weights.astype(dtype)) if return_weights else out.astype(dtype)


def multiplicative_attention(
    query: Any,
    key: Any,
    value: Any,
    *,
    w: Any = None,
    mask: Any = None,
    key_lengths: Any = None,
    return_weights: bool = False,
) -> Any:
    """Luong, Pham, Manning, "Effective Approaches to Attention-based Neural Machine Translation" (2015), eq. 8.

    score(h_t, h_s) = h_t^T h_s ("dot") or h_t^T W_a h_s ("general"), with h_t the queries, h_s the keys.
    """
    dtype = np.asarray(query).dtype
    h_t, h_s, value, w_a = map(_float64, (query, key, value, w))
    with np.errstate(invalid="ignore", over="ignore"):
        h_t = h_t if w_a is None else h_t @ w_a
        scores = h_t @ h_s.transpose(0, 2, 1)
    out, weights = _attend(scores, _visible(mask, key_lengths, *scores.shape), value)
    return (out.astype(dtype), weights.astype(dtype)) if return_weights else out.astype(dtype)


def location_sensitive_attention(
    query: Any,
    key: Any,
    value: Any,
    previous_weights: Any,
    *,
    v: Any,
    w_query: Any = None,
    w_key: Any = None,
    w_location: Any,
    location_kernel: Any,
    location_bias: Any = None,
    bias: Any = None,
    mask: Any = None,
) -> tuple[Any, Any]:
    """Chorowski et al., "Attention-Based Models for Speech Recognition" (2015), eq. 8 and 9.

    f_i = F * alpha_{i-1}, e_ij = w^T tanh(W s_i + V h_j + U f_ij + b): F is location_kernel (filters, channels, width),
    U is w_location (dim, filters), alpha_{i-1} is previous_weights, * correlates along the keys with zeros around them.
    """
    dtype = np.asarray(query).dtype
    s, h, value, w, w_s, v_h, u, b = map(_float64, (query, key, value, v, w_query, w_key, w_location, bias))
    kernel, alpha = _float64(location_kernel), _float64(previous_weights)
    if kernel.ndim == 2:
        kernel = kernel[:, None, :]
    filters, channels, width = kernel.shape
    batch, len_q, len_kv = s.shape[0], s.shape[1], h.shape[1]
    if alpha.ndim == 2:  # (batch, len_kv)
        alpha = alpha[:, None, None, :]
    elif alpha.ndim == 3:  # (batch, len_q, len_kv), or with several channels (batch, channels, len_kv)
        alpha = alpha[:, :, None, :] if channels == 1 else alpha[:, None, :, :]
    alpha = np.broadcast_to(alpha, (batch, len_q, channels, len_kv))
    left = (width - 1) // 2
    padded = np.pad(alpha, ((0, 0), (0, 0), (0, 0), (left, width - 1 - left)))
    f = np.zeros((batch, len_q, len_kv, filters))
    for t in range(width):
        f += np.einsum("fc,bicj->bijf", kernel[:, :, t], padded[:, :, :, t : t + len_kv])
    if location_bias is not None:
        f += _float64(location_bias)
    with np.errstate(invalid="ignore", over="ignore"):
        s = s if w_s is None else s @ w_s.T
        h = h if v_h is None else h @ v_h.T
        if b is not None:
            s = s + b
        e = np.tanh(s[:, :, None, :] + h[:, None, :, :] + f @ u.T) @ w
    out, weights = _attend(e, _visible(mask, None, *e.shape), value)
    return out.astype(dtype), weights.astype(dtype)
