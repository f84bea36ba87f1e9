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


def numpy_squeeze_excitation(x: Any, w_reduce: Any, b_reduce: Any, w_expand: Any, b_expand: Any) -> Any:
    y = _computed(x)
    hidden = np.maximum(y.mean(axis=(2, 3)) @ _computed(w_reduce).T + _computed(b_reduce), 0)
    gate = 1 / (1 + np.exp(-(hidden @ _computed(w_expand).T + _computed(b_expand))))
    return (y * gate[:, :, None, None]).astype(x.dtype, copy=False)


def _sigmoid(x: Any) -> Any:
    return 1 / (1 + np.exp(-x))


def numpy_gru(x: Any, w_input: Any, w_hidden: Any, b_input: Any, b_hidden: Any) -> Any:
    given = _computed(x) @ _computed(w_input).T + _computed(b_input)
    w, b = _computed(w_hidden).T, _computed(b_hidden)
    h = np.zeros((x.shape[0], w.shape[0]), w.dtype)
    out = np.empty((*x.shape[:2], w.shape[0]), w.dtype)
    for t in range(x.shape[1]):
        (x_r, x_z, x_n), (h_r, h_z, h_n) = (np.split(a, 3, axis=1) for a in (given[:, t], h @ w + b))
        z = _sigmoid(x_z + h_z)
        n = np.tanh(x_n + _sigmoid(x_r + h_r) * h_n)
        h = out[:, t] = n + z * (h - n)
    return out.astype(x.dtype, copy=False), h.astype(x.dtype, copy=False)


def numpy_lstm(x: Any, w_input: Any, w_hidden: Any, b_input: Any, b_hidden: Any) -> Any:
    given = _computed(x) @ _computed(w_input).T + (_computed(b_input) + _computed(b_hidden))
    w = _computed(w_hidden).T
    h = c = np.zeros((x.shape[0], w.shape[0]), w.dtype)
    out = np.empty((*x.shape[:2], w.shape[0]), w.dtype)
    for t in range(x.shape[1]):
        i, f, g, o = np.split(given[:, t] + h @ w, 4, axis=1)
        c = _sigmoid(f) * c + _sigmoid(i) * np.tanh(g)
        h = out[:, t] = _sigmoid(o) * np.tanh(c)
    return tuple(a.astype(x.dtype, copy=False) for a in (out, h, c))


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


def torch_gru(x: Any, **named: Any) -> Any:
    import torch

    weights = tuple(named.values())
    h0 = x.new_zeros(1, x.shape[0], weights[1].shape[1])
    out, h_n = torch.gru(x, h0, weights, True, 1, 0.0, False, False, True)
    return out, h_n[0]


def torch_lstm(x: Any, **named: Any) -> Any:
    import torch

    weights = tuple(named.values())
    zeros = x.new_zeros(1, x.shape[0], weights[1].shape[1])
    out, h_n, c_n = torch.lstm(x, (zeros, zeros), weights, True, 1, 0.0, False, False, True)
    return out, h_n[0], c_n[0]
