"""The same operations in plain NumPy and in PyTorch: what `bench` measures regard against.

NumPy's versions are what one would write by hand, 16-bit inputs computed in float32; they take the arguments
of the bench cases only.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np


def _computed(x: Any) -> Any:
    return x if x.dtype in (np.float32, np.float64) else x.astype(np.float32)


def numpy_attention(query: Any, key: Any, value: Any, causal: bool = False) -> Any:
    q, k, v = (_computed(x) for x in (query, key, value))
    group = q.shape[1] // k.shape[1]
    if group > 1:
        k, v = np.repeat(k, group, axis=1), np.repeat(v, group, axis=1)
    s = (q * q.dtype.type(1 / math.sqrt(q.shape[3]))) @ k.swapaxes(2, 3)
    if causal:
        s[..., np.triu(np.ones(s.shape[2:], bool), 1)] = -np.inf
    s -= s.max(axis=-1, keepdims=True)
    np.exp(s, out=s)
    s /= s.sum(axis=-1, keepdims=True)
    return (s @ v).astype(query.dtype, copy=False)


def numpy_attention_varlen(query: Any, key: Any, value: Any, cu_seqlens_q: Any, cu_seqlens_kv: Any) -> Any:
    out = np.zeros((*query.shape[:2], value.shape[2]), query.dtype)
    for q0, q1, k0, k1 in zip(cu_seqlens_q, cu_seqlens_q[1:], cu_seqlens_kv, cu_seqlens_kv[1:], strict=False):
        one = (
            x[None, part].swapaxes(1, 2)
            for x, part in ((query, slice(q0, q1)), (key, slice(k0, k1)), (value, slice(k0, k1)))
        )
        out[q0:q1] = numpy_attention(*one)[0].swapaxes(0, 1)
    return out


def numpy_attention_paged(query: Any, key_pages: Any, value_pages: Any, page_table: Any, key_lengths: Any) -> Any:
    out = np.empty((*query.shape[:3], value_pages.shape[3]), query.dtype)
    for b, length in enumerate(key_lengths):
        rows = (x[page_table[b]].reshape(-1, *x.shape[2:])[:length] for x in (key_pages, value_pages))
        out[b] = numpy_attention(query[b : b + 1], *(x[None].swapaxes(1, 2) for x in rows))[0]
    return out


def _weighted(s: Any, value: Any, dtype: Any) -> tuple[Any, Any]:
    """The softmax of the scores, and the values it weighs."""
    s -= s.max(axis=-1, keepdims=True)
    np.exp(s, out=s)
    s /= s.sum(axis=-1, keepdims=True)
    return (s @ _computed(value)).astype(dtype, copy=False), s.astype(dtype, copy=False)


def numpy_additive_attention(query: Any, key: Any, value: Any, v: Any, w_query: Any, w_key: Any) -> Any:
    q, k = _computed(query) @ _computed(w_query).T, _computed(key) @ _computed(w_key).T
    return _weighted(np.tanh(q[:, :, None] + k[:, None]) @ _computed(v), value, query.dtype)[0]


def numpy_multiplicative_attention(query: Any, key: Any, value: Any, w: Any) -> Any:
    return _weighted(_computed(query) @ _computed(w) @ _computed(key).swapaxes(1, 2), value, query.dtype)[0]


def numpy_location_sensitive_attention(
    query: Any, key: Any, value: Any, previous_weights: Any, v: Any, w_location: Any, location_kernel: Any
) -> Any:
    kernel = _computed(location_kernel)
    width = kernel.shape[2]
    sides = ((width - 1) // 2, width // 2)
    padded = np.pad(_computed(previous_weights), ((0, 0), (0, 0), sides))
    near = np.lib.stride_tricks.sliding_window_view(padded, width, axis=2)  # batch, channels, len_kv, width
    features = np.tensordot(near, kernel, axes=((1, 3), (1, 2)))
    location = features @ _computed(w_location).T
    s = np.tanh(_computed(query)[:, :, None] + (_computed(key) + location)[:, None]) @ _computed(v)
    return _weighted(s, value, query.dtype)


def numpy_linear(x: Any, weight: Any, bias: Any) -> Any:
    y = _computed(x) @ _computed(weight).T
    y += _computed(bias)
    return y.astype(x.dtype, copy=False)


def numpy_layer_norm(x: Any, weight: Any, bias: Any) -> Any:
    y = _computed(x)
    y = y - y.mean(axis=-1, keepdims=True)
    y /= np.sqrt(np.square(y).mean(axis=-1, keepdims=True) + y.dtype.type(1e-5))
    y *= _computed(weight)
    y += _computed(bias)
    return y.astype(x.dtype, copy=False)


def numpy_rms_norm(x: Any, weight: Any) -> Any:
    y = _computed(x)
    y = y / np.sqrt(np.square(y).mean(axis=-1, keepdims=True) + y.dtype.type(1e-6))
    y *= _computed(weight)
    return y.astype(x.dtype, copy=False)


def numpy_rotary_embedding(x: Any, cos: Any, sin: Any) -> Any:
    y, half = _computed(x), x.shape[-1] // 2
    first, second = y[..., :half], y[..., half:]
    c, s = cos[:, None], sin[:, None]
    return np.concatenate([first * c - second * s, second * c + first * s], axis=-1).astype(x.dtype, copy=False)


def numpy_merge_attention(outs: Any, lses: Any) -> Any:
    weights = np.exp(lses - lses.max(axis=0))
    total = weights.sum(axis=0)
    out = np.einsum("p...,p...d->...d", weights / total, _computed(outs))
    return out.astype(outs.dtype, copy=False), lses.max(axis=0) + np.log(total)


def numpy_global_average_pool(x: Any) -> Any:
    return _computed(x).mean(axis=(2, 3)).astype(x.dtype, copy=False)


def numpy_global_max_pool(x: Any) -> Any:
    return x.max(axis=(2, 3))


def _sigmoid(x: Any) -> Any:
    return 1 / (1 + np.exp(-x))


def numpy_channel_attention(x: Any, w_reduce: Any, b_reduce: Any, w_expand: Any, b_expand: Any) -> Any:
    y = _computed(x)
    pooled = np.stack((y.mean(axis=(2, 3)), y.max(axis=(2, 3))))
    hidden = np.maximum(pooled @ _computed(w_reduce).T + _computed(b_reduce), 0)
    gate = _sigmoid((hidden @ _computed(w_expand).T + _computed(b_expand)).sum(axis=0))
    return (y * gate[:, :, None, None]).astype(x.dtype, copy=False)


def numpy_spatial_attention(x: Any, w_spatial: Any, b_spatial: Any) -> Any:
    y, w = _computed(x), _computed(w_spatial)[0]
    side = w.shape[1] // 2
    planes = np.pad(np.stack((y.mean(axis=1), y.max(axis=1)), axis=1), ((0, 0), (0, 0), (side, side), (side, side)))
    near = np.lib.stride_tricks.sliding_window_view(planes, w.shape[1:], axis=(2, 3))
    gate = _sigmoid(np.einsum("bchwij,cij->bhw", near, w) + _computed(b_spatial))
    return (y * gate[:, None]).astype(x.dtype, copy=False)


def numpy_cbam(
    x: Any, w_reduce: Any, b_reduce: Any, w_expand: Any, b_expand: Any, w_spatial: Any, b_spatial: Any
) -> Any:
    y = numpy_channel_attention(_computed(x), w_reduce, b_reduce, w_expand, b_expand)
    return numpy_spatial_attention(y, w_spatial, b_spatial).astype(x.dtype, copy=False)


def numpy_efficient_channel_attention(x: Any, w: Any) -> Any:
    y, taps = _computed(x), _computed(w)
    side = len(taps) // 2
    padded = np.pad(y.mean(axis=(2, 3)), ((0, 0), (side, side)))
    gate = _sigmoid(np.lib.stride_tricks.sliding_window_view(padded, len(taps), axis=1) @ taps)
    return (y * gate[:, :, None, None]).astype(x.dtype, copy=False)


def numpy_squeeze_excitation(x: Any, w_reduce: Any, b_reduce: Any, w_expand: Any, b_expand: Any) -> Any:
    y = _computed(x)
    hidden = np.maximum(y.mean(axis=(2, 3)) @ _computed(w_reduce).T + _computed(b_reduce), 0)
    gate = 1 / (1 + np.exp(-(hidden @ _computed(w_expand).T + _computed(b_expand))))
    return (y * gate[:, :, None, None]).astype(x.dtype, copy=False)


def to_torch(x: Any) -> Any:
    """The same memory as a tensor; other arguments pass through."""
    import torch

    if not isinstance(x, np.ndarray):
        return x
    if x.dtype.name == "bfloat16":
        return torch.from_numpy(x.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(x)


def torch_attention(query: Any, key: Any, value: Any, causal: bool = False) -> Any:
    import torch

    return torch.nn.functional.scaled_dot_product_attention(
        query, key, value, is_causal=causal, enable_gqa=query.shape[1] != key.shape[1]
    )


def torch_linear(x: Any, weight: Any, bias: Any) -> Any:
    import torch

    return torch.nn.functional.linear(x, weight, bias)


def torch_layer_norm(x: Any, weight: Any, bias: Any) -> Any:
    import torch

    return torch.nn.functional.layer_norm(x, x.shape[-1:], weight, bias)


def torch_rms_norm(x: Any, weight: Any) -> Any:
    import torch

    return torch.nn.functional.rms_norm(x, x.shape[-1:], weight, 1e-6)


def torch_rotary_embedding(x: Any, cos: Any, sin: Any) -> Any:
    import torch

    half = x.shape[-1] // 2
    c, s = (torch.cat([t, t], -1)[:, None].to(x.dtype) for t in (cos, sin))
    return x * c + torch.cat([-x[..., half:], x[..., :half]], -1) * s  # as transformers writes it


def torch_merge_attention(outs: Any, lses: Any) -> Any:
    import torch

    lse = torch.logsumexp(lses, 0)
    return (torch.exp(lses - lse)[..., None].to(outs.dtype) * outs).sum(0), lse


def torch_global_average_pool(x: Any) -> Any:
    import torch

    return torch.nn.functional.adaptive_avg_pool2d(x, 1).flatten(1)


def torch_squeeze_excitation(x: Any, w_reduce: Any, b_reduce: Any, w_expand: Any, b_expand: Any) -> Any:
    import torch

    linear = torch.nn.functional.linear
    hidden = torch.relu(linear(torch_global_average_pool(x), w_reduce, b_reduce))
    return x * torch.sigmoid(linear(hidden, w_expand, b_expand))[:, :, None, None]
