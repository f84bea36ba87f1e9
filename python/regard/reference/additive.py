"""Additive, multiplicative and location-sensitive attention in plain NumPy: what the kernels must compute.

Names: query (batch, len_q, dim_q), key (batch, len_kv, dim_k), value (batch, len_kv, dim_v); ``dim`` is the width
of the space in which additive attention adds. Weights have the layout of PyTorch's linear, (out, in).
Everything is computed in float64 and returned in the query's dtype.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from regard.reference._functions import affine, unwarned
from regard.reference.dot_product import bool_mask, in_prefix, softmax_weights, weighted_values


def _float64(x: Any) -> Any:
    return None if x is None else np.asarray(x).astype(np.float64)


def _tanh_scores(
    query: Any, key: Any, v: np.ndarray, w_query: Any, w_key: Any, bias: Any, located: np.ndarray | float = 0.0
) -> np.ndarray:
    """v . tanh(w_query query_i + w_key key_j + located_ij + bias) of every pair: (batch, len_q, len_kv)."""
    q = query if w_query is None else affine(query, w_query, None)
    k = key if w_key is None else affine(key, w_key, None)
    if bias is not None:
        q = q + bias
    return np.tanh(q[:, :, None, :] + k[:, None, :, :] + located) @ v


def _attend(
    scores: np.ndarray, mask: Any, key_lengths: Any, value: np.ndarray, dtype: Any
) -> tuple[np.ndarray, np.ndarray]:
    """Softmax over the keys seen, and the weighted sum of their values. A query that sees no key gives 0."""
    seen = np.broadcast_to(in_prefix(key_lengths, scores.shape[2])[:, None, :], scores.shape)
    if mask is not None:
        seen = seen & np.broadcast_to(bool_mask(mask), scores.shape)
    weights, _ = softmax_weights(np.where(seen, scores, -np.inf), None)
    # A key of weight exactly 0 is left out as a masked one is: its value may be NaN or inf, and 0 times that is NaN.
    return weighted_values(weights, value, weights != 0).astype(dtype), weights.astype(dtype)


@unwarned
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
    out, weights = _attend(_tanh_scores(s, h, v, w_a, u_a, bias), mask, key_lengths, value, dtype)
    return (out, weights) if return_weights else out


@unwarned
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
    h_t = h_t if w_a is None else h_t @ w_a
    out, weights = _attend(h_t @ h_s.transpose(0, 2, 1), mask, key_lengths, value, dtype)
    return (out, weights) if return_weights else out


@unwarned
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
    return _attend(_tanh_scores(s, h, w, w_s, v_h, b, f @ u.T), mask, None, value, dtype)
