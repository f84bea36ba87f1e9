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


def numpy_attention_varlen(
    query: Any, key: Any, value: Any, cu_seqlens_q: Any, cu_seqlens_kv: Any, causal: bool = False
) -> Any:
    out = np.zeros((*query.shape[:2], value.shape[2]), query.dtype)
    for b in range(len(cu_seqlens_q) - 1):
        rows, keys = slice(*cu_seqlens_q[b : b + 2]), slice(*cu_seqlens_kv[b : b + 2])
        q, k, v = (x.swapaxes(0, 1)[None] for x in (query[rows], key[keys], value[keys]))
        if q.size and k.size:
            out[rows] = numpy_attention(q, k, v, causal)[0].swapaxes(0, 1)
    return out


def numpy_attention_paged(query: Any, key_pages: Any, value_pages: Any, page_table: Any, key_lengths: Any) -> Any:
    outs = []
    for b, length in enumerate(key_lengths):
        gathered = (p[page_table[b]].reshape(-1, *p.shape[2:])[:length] for p in (key_pages, value_pages))
        k, v = (x.swapaxes(0, 1)[None] for x in gathered)
        outs.append(numpy_attention(query[b : b + 1], k, v))
    return np.concatenate(outs)


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


def _numpy_mlp(pooled: Any, w_reduce: Any, b_reduce: Any, w_expand: Any, b_expand: Any) -> Any:
    hidden = np.maximum(pooled @ _computed(w_reduce).T + _computed(b_reduce), 0)
    return hidden @ _computed(w_expand).T + _computed(b_expand)


def _numpy_sigmoid(x: Any) -> Any:
    return 1 / (1 + np.exp(-x))


def numpy_squeeze_excitation(x: Any, **mlp: Any) -> Any:
    y = _computed(x)
    gate = _numpy_sigmoid(_numpy_mlp(y.mean(axis=(2, 3)), **mlp))
    return (y * gate[:, :, None, None]).astype(x.dtype, copy=False)


def numpy_gru(x: Any, w_input: Any, w_hidden: Any, b_input: Any, b_hidden: Any) -> Any:
    given = _computed(x) @ _computed(w_input).T + _computed(b_input)
    w, b = _computed(w_hidden).T, _computed(b_hidden)
    h = np.zeros((x.shape[0], w.shape[0]), w.dtype)
    out = np.empty((*x.shape[:2], w.shape[0]), w.dtype)
    for t in range(x.shape[1]):
        (x_r, x_z, x_n), (h_r, h_z, h_n) = (np.split(a, 3, axis=1) for a in (given[:, t], h @ w + b))
        z = _numpy_sigmoid(x_z + h_z)
        n = np.tanh(x_n + _numpy_sigmoid(x_r + h_r) * h_n)
        h = out[:, t] = n + z * (h - n)
    return out.astype(x.dtype, copy=False), h.astype(x.dtype, copy=False)


def numpy_lstm(x: Any, w_input: Any, w_hidden: Any, b_input: Any, b_hidden: Any) -> Any:
    given = _computed(x) @ _computed(w_input).T + (_computed(b_input) + _computed(b_hidden))
    w = _computed(w_hidden).T
    h = c = np.zeros((x.shape[0], w.shape[0]), w.dtype)
    out = np.empty((*x.shape[:2], w.shape[0]), w.dtype)
    for t in range(x.shape[1]):
        i, f, g, o = np.split(given[:, t] + h @ w, 4, axis=1)
        c = _numpy_sigmoid(f) * c + _numpy_sigmoid(i) * np.tanh(g)
        h = out[:, t] = _numpy_sigmoid(o) * np.tanh(c)
    return tuple(a.astype(x.dtype, copy=False) for a in (out, h, c))


def _numpy_channel_attention(y: Any, **mlp: Any) -> Any:
    scores = _numpy_mlp(y.mean(axis=(2, 3)), **mlp) + _numpy_mlp(y.max(axis=(2, 3)), **mlp)
    return y * _numpy_sigmoid(scores)[:, :, None, None]


def _numpy_spatial_attention(y: Any, w_spatial: Any) -> Any:
    kernel = _computed(w_spatial)[0]
    height, width = y.shape[2:]
    above, left = (kernel.shape[1] - 1) // 2, (kernel.shape[2] - 1) // 2
    below, right = kernel.shape[1] - 1 - above, kernel.shape[2] - 1 - left
    planes = np.pad(np.stack([y.mean(axis=1), y.max(axis=1)], 1), ((0, 0), (0, 0), (above, below), (left, right)))
    scores = np.zeros((len(y), height, width), y.dtype)
    for i in range(kernel.shape[1]):
        for j in range(kernel.shape[2]):
            for plane in range(2):
                scores += planes[:, plane, i : i + height, j : j + width] * kernel[plane, i, j]
    return y * _numpy_sigmoid(scores)[:, None]


def numpy_channel_attention(x: Any, **mlp: Any) -> Any:
    return _numpy_channel_attention(_computed(x), **mlp).astype(x.dtype, copy=False)


def numpy_spatial_attention(x: Any, w_spatial: Any) -> Any:
    return _numpy_spatial_attention(_computed(x), w_spatial).astype(x.dtype, copy=False)


def numpy_cbam(x: Any, w_spatial: Any, **mlp: Any) -> Any:
    y = _numpy_channel_attention(_computed(x), **mlp)
    return _numpy_spatial_attention(y, w_spatial).astype(x.dtype, copy=False)


def numpy_efficient_channel_attention(x: Any, w: Any) -> Any:
    y, taps = _computed(x), _computed(w)
    reach = len(taps) // 2
    means = np.pad(y.mean(axis=(2, 3)), ((0, 0), (reach, reach)))
    scores = np.stack([np.correlate(row, taps) for row in means])
    return (y * _numpy_sigmoid(scores)[:, :, None, None]).astype(x.dtype, copy=False)


def _numpy_attend(scores: Any, value: Any, dtype: Any) -> Any:
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    return (weights @ _computed(value)).astype(dtype, copy=False), weights.astype(dtype, copy=False)


def _numpy_tanh_scores(
    query: Any, key: Any, v: Any, w_query: Any = None, w_key: Any = None, bias: Any = None, more: Any = None
) -> Any:
    q, k = _computed(query), _computed(key)
    q = q if w_query is None else q @ _computed(w_query).T
    k = k if w_key is None else k @ _computed(w_key).T
    q = q if bias is None else q + _computed(bias)
    pairs = q[:, :, None] + k[:, None]
    if more is not None:
        pairs += more
    return np.tanh(pairs, out=pairs) @ _computed(v)


def numpy_additive_attention(query: Any, key: Any, value: Any, **parameters: Any) -> Any:
    return _numpy_attend(_numpy_tanh_scores(query, key, **parameters), value, query.dtype)[0]


def numpy_multiplicative_attention(query: Any, key: Any, value: Any, w: Any) -> Any:
    scores = (_computed(query) @ _computed(w)) @ _computed(key).swapaxes(1, 2)
    return _numpy_attend(scores, value, query.dtype)[0]


def numpy_location_sensitive_attention(
    query: Any,
    key: Any,
    value: Any,
    previous_weights: Any,
    w_location: Any,
    location_kernel: Any,
    **parameters: Any,
) -> Any:
    kernel, previous = _computed(location_kernel), _computed(previous_weights)
    width = kernel.shape[2]
    padded = np.pad(previous, ((0, 0), (0, 0), ((width - 1) // 2, width // 2)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, width, axis=2)
    features = np.tensordot(windows, kernel, axes=((1, 3), (1, 2)))
    located = features @ _computed(w_location).T
    return _numpy_attend(_numpy_tanh_scores(query, key, more=located[:, None], **parameters), value, query.dtype)


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


def torch_attention_varlen(
    query: Any, key: Any, value: Any, cu_seqlens_q: Any, cu_seqlens_kv: Any, causal: bool = False
) -> Any:
    import torch

    out = torch.zeros((*query.shape[:2], value.shape[2]), dtype=query.dtype)
    starts_q, starts_kv = cu_seqlens_q.tolist(), cu_seqlens_kv.tolist()
    for b in range(len(starts_q) - 1):
        rows, keys = slice(*starts_q[b : b + 2]), slice(*starts_kv[b : b + 2])
        q, k, v = (x.transpose(0, 1)[None] for x in (query[rows], key[keys], value[keys]))
        out[rows] = torch_attention(q, k, v, causal)[0].transpose(0, 1)
    return out


def torch_attention_paged(query: Any, key_pages: Any, value_pages: Any, page_table: Any, key_lengths: Any) -> Any:
    import torch

    outs = []
    for b, length in enumerate(key_lengths.tolist()):
        gathered = (p[page_table[b]].flatten(0, 1)[:length] for p in (key_pages, value_pages))
        k, v = (x.transpose(0, 1)[None] for x in gathered)
        outs.append(torch_attention(query[b : b + 1], k, v))
    return torch.cat(outs)


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


def torch_global_max_pool(x: Any) -> Any:
    import torch

    return torch.nn.functional.adaptive_max_pool2d(x, 1).flatten(1)


def _torch_mlp(pooled: Any, w_reduce: Any, b_reduce: Any, w_expand: Any, b_expand: Any) -> Any:
    import torch

    linear = torch.nn.functional.linear
    return linear(torch.relu(linear(pooled, w_reduce, b_reduce)), w_expand, b_expand)


def torch_squeeze_excitation(x: Any, **mlp: Any) -> Any:
    return x * _torch_mlp(torch_global_average_pool(x), **mlp).sigmoid()[:, :, None, None]


def torch_channel_attention(x: Any, **mlp: Any) -> Any:
    scores = _torch_mlp(torch_global_average_pool(x), **mlp) + _torch_mlp(torch_global_max_pool(x), **mlp)
    return x * scores.sigmoid()[:, :, None, None]


def torch_spatial_attention(x: Any, w_spatial: Any) -> Any:
    import torch

    planes = torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], 1)
    return x * torch.nn.functional.conv2d(planes, w_spatial, padding=w_spatial.shape[-1] // 2).sigmoid()


def torch_cbam(x: Any, w_spatial: Any, **mlp: Any) -> Any:
    return torch_spatial_attention(torch_channel_attention(x, **mlp), w_spatial)


def torch_efficient_channel_attention(x: Any, w: Any) -> Any:
    import torch

    means = torch_global_average_pool(x)[:, None]
    scores = torch.nn.functional.conv1d(means, w[None, None], padding=w.shape[0] // 2)
    return x * scores.sigmoid()[:, 0, :, None, None]


def _torch_tanh_scores(
    query: Any, key: Any, v: Any, w_query: Any = None, w_key: Any = None, bias: Any = None, more: Any = None
) -> Any:
    import torch

    q = query if w_query is None else torch.nn.functional.linear(query, w_query)
    k = key if w_key is None else torch.nn.functional.linear(key, w_key)
    pairs = (q if bias is None else q + bias)[:, :, None] + k[:, None]
    return torch.tanh(pairs if more is None else pairs + more) @ v


def torch_additive_attention(query: Any, key: Any, value: Any, **parameters: Any) -> Any:
    return _torch_tanh_scores(query, key, **parameters).softmax(-1) @ value


def torch_multiplicative_attention(query: Any, key: Any, value: Any, w: Any) -> Any:
    return ((query @ w) @ key.transpose(1, 2)).softmax(-1) @ value


def torch_location_sensitive_attention(
    query: Any,
    key: Any,
    value: Any,
    previous_weights: Any,
    w_location: Any,
    location_kernel: Any,
    **parameters: Any,
) -> Any:
    import torch

    features = torch.nn.functional.conv1d(previous_weights, location_kernel, padding=location_kernel.shape[-1] // 2)
    located = torch.nn.functional.linear(features.transpose(1, 2), w_location)
    weights = _torch_tanh_scores(query, key, more=located[:, None], **parameters).softmax(-1)
    return weights @ value, weights


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
