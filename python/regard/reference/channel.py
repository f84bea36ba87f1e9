"""Channel and spatial attention.

Papers: Hu et al., "Squeeze-and-excitation networks" (2018); Woo et al., "CBAM" (2018); Wang et al., "ECA-Net" (2020).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from regard.reference._functions import ACTIVATIONS, affine, chosen, dtypes_of, gate_function, mean, unwarned

Array = Any


@unwarned
def global_average_pool(x: Array, layout: str = "nchw") -> Array:
    """Mean over the image: (batch, channels) from (batch, channels, height, width) or nhwc."""
    dtype, compute = dtypes_of(x)
    return mean(np.asarray(x).astype(compute), image_axes(x, layout)).astype(dtype)


@unwarned
def global_max_pool(x: Array, layout: str = "nchw") -> Array:
    """Maximum over the image: (batch, channels); NaN where there is one, -inf of nothing."""
    return np.asarray(x).max(axis=image_axes(x, layout), initial=-np.inf)


@unwarned
def squeeze_excitation(
    x: Array,
    w_reduce: Array,
    b_reduce: Array | None,
    w_expand: Array,
    b_expand: Array | None,
    *,
    activation: str = "relu",
    gate: str | tuple[str, float, float] = "sigmoid",
    layout: str = "nchw",
    out: Array | None = None,
) -> Array:
    """x * gate(w_expand activation(w_reduce mean(x) + b_reduce) + b_expand)  [1]_.

    w_reduce (reduced, channels) and w_expand (channels, reduced) are laid out as `linear` has
    them, which includes 1 x 1 convolutions without their last two axes.

    .. [1] Hu et al., Squeeze-and-excitation networks, 2018
    """
    dtype, compute = dtypes_of(x)
    axes = image_axes(x, layout)
    x = np.asarray(x).astype(compute)
    gates = gate_function(gate)(_mlp(mean(x, axes), w_reduce, b_reduce, w_expand, b_expand, activation))
    return _into(out, (x * np.expand_dims(gates, axes)).astype(dtype))


@unwarned
def channel_attention(
    x: Array,
    w_reduce: Array,
    b_reduce: Array | None,
    w_expand: Array,
    b_expand: Array | None,
    *,
    activation: str = "relu",
    gate: Any = "sigmoid",
    layout: str = "nchw",
    out: Array | None = None,
) -> Array:
    """x * gate(mlp(mean) + mlp(max)), mlp(m) = w_expand activation(w_reduce m + b_reduce) + b_expand."""
    dtype, compute = dtypes_of(x)
    axes = image_axes(x, layout)
    x = np.asarray(x).astype(compute)
    pools = (mean(x, axes), x.max(axis=axes, initial=-np.inf))
    of_mean, of_max = (_mlp(pool, w_reduce, b_reduce, w_expand, b_expand, activation) for pool in pools)
    weights = gate_function(gate)(of_mean + of_max)
    return _into(out, (x * np.expand_dims(weights, axes)).astype(dtype))


@unwarned
def spatial_attention(
    x: Array,
    w_spatial: Array,
    b_spatial: Array | None = None,
    *,
    gate: Any = "sigmoid",
    layout: str = "nchw",
    out: Array | None = None,
) -> Array:
    """x * gate(conv(mean over channels, max over channels) + b_spatial), position by position."""
    dtype, compute = dtypes_of(x)
    axis = 1 if layout == "nchw" else 3
    image_axes(x, layout)
    x = np.asarray(x).astype(compute)
    planes = np.stack([mean(x, axis), x.max(axis=axis, initial=-np.inf)], axis=1)
    weights = gate_function(gate)(_convolved(planes, w_spatial, b_spatial))
    return _into(out, (x * np.expand_dims(weights, axis)).astype(dtype))


@unwarned
def cbam(
    x: Array,
    *,
    w_reduce: Array,
    b_reduce: Array | None,
    w_expand: Array,
    b_expand: Array | None,
    w_spatial: Array,
    b_spatial: Array | None = None,
    activation: str = "relu",
    gate: Any = "sigmoid",
    layout: str = "nchw",
    out: Array | None = None,
) -> Array:
    """spatial_attention(channel_attention(x)), rounded to x's dtype at the end only."""
    dtype, compute = dtypes_of(x)
    y = np.asarray(x).astype(compute)
    y = channel_attention(y, w_reduce, b_reduce, w_expand, b_expand, activation=activation, gate=gate, layout=layout)
    y = spatial_attention(y, w_spatial, b_spatial, gate=gate, layout=layout)
    return _into(out, y.astype(dtype))


@unwarned
def efficient_channel_attention(
    x: Array, w: Array, *, gate: Any = "sigmoid", layout: str = "nchw", out: Array | None = None
) -> Array:
    """x * gate(the channels' means, convolved with w over the channels)."""
    dtype, compute = dtypes_of(x)
    axes = image_axes(x, layout)
    x = np.asarray(x).astype(compute)
    taps = np.asarray(w).astype(compute)
    reach = len(taps) // 2
    means = np.pad(mean(x, axes), ((0, 0), (reach, reach)))
    channels = means.shape[1] - 2 * reach
    scores = sum(taps[k] * means[:, k : k + channels] for k in range(len(taps)))
    return _into(out, (x * np.expand_dims(gate_function(gate)(scores), axes)).astype(dtype))


def image_axes(x: Array, layout: str) -> tuple[int, int]:
    if layout not in ("nchw", "nhwc"):
        raise ValueError(f'layout must be "nchw" or "nhwc", got {layout!r}')
    if np.ndim(x) != 4:
        raise ValueError(f"x must have 4 axes, got shape {np.shape(x)}")
    return (2, 3) if layout == "nchw" else (1, 2)


def _mlp(
    pooled: Array, w_reduce: Array, b_reduce: Array | None, w_expand: Array, b_expand: Array | None, activation: str
) -> Array:
    """w_expand activation(w_reduce pooled + b_reduce) + b_expand: (batch, channels) from (batch, channels)."""
    return affine(chosen(ACTIVATIONS, activation)(affine(pooled, w_reduce, b_reduce)), w_expand, b_expand)


def _convolved(planes: Array, w: Array, bias: Array | None) -> Array:
    """(batch, height, width) from (batch, 2, height, width): zero padding, cross-correlation."""
    w = np.asarray(w).astype(planes.dtype)
    kernel = w.shape[2]
    height, width = planes.shape[2:]
    margin = (kernel // 2, kernel // 2)
    padded = np.pad(planes, ((0, 0), (0, 0), margin, margin))
    y = np.zeros_like(planes[:, 0])
    for i in range(kernel):
        for j in range(kernel):
            for plane in range(2):
                y += w[0, plane, i, j] * padded[:, plane, i : i + height, j : j + width]
    return y if bias is None else y + np.asarray(bias).astype(y.dtype)


def _into(out: Array | None, result: Array) -> Array:
    if out is None:
        return result
    out[...] = result
    return out
