"""Attention in convolutional networks: pooling a map, weighing its channels and its positions.

Papers: Hu et al., "Squeeze-and-Excitation Networks" (2018); Woo et al., "CBAM" (2018); Wang et al., "ECA-Net" (2020).
"""

from __future__ import annotations

from typing import Any

from regard import _arrays, _backend, _checks

_LAYOUTS = {"nchw": False, "nhwc": True}
_ACTIVATIONS = {"relu": 0, "silu": 1, "gelu": 2, "hard_swish": 3, "gelu_tanh": 4}
#: Kind, slope and offset; these are PyTorch's for hard_sigmoid.
_GATES: dict[Any, tuple[int, float, float]] = {
    "sigmoid": (0, 0.0, 0.0),
    "tanh": (1, 0.0, 0.0),
    "hard_sigmoid": (2, 1.0 / 6.0, 0.5),
}

_KERNELS = {"global_average_pool": "global_pool", "global_max_pool": "global_pool"}
_MLP = ("w_reduce", "b_reduce", "w_expand", "b_expand")
_SPATIAL = ("w_spatial", "b_spatial")


def _gate(gate: Any) -> tuple[int, float, float]:
    try:
        if isinstance(gate, (tuple, list)) and len(gate) == 3 and gate[0] == "hard_sigmoid":
            return 2, float(gate[1]), float(gate[2])
        return _GATES[gate]
    except (KeyError, TypeError, ValueError):
        raise ValueError(f"gate: expected {_checks.VALUES['gate']}, got {gate!r}") from None


def _call(
    operation: str,
    names: tuple[str, ...],
    arrays: tuple[Any, ...],
    options: tuple[Any, ...],
    layout: str,
    gate: Any = None,
) -> Any:
    """Run a kernel on arrays in the order of names, and word its refusal. The last array is out where names has it."""
    if names[-1] == "out" and arrays[-1] is not None:
        # Elements are read before they are written: x itself may be out. Other overlaps are copied first.
        x, *rest, out = arrays
        apart = _arrays.apart_from(out, tuple(rest) if out is x else (x, *rest))
        arrays = (x, *apart, out) if out is x else (*apart, out)
    kernel = getattr(_backend.cpu, _KERNELS.get(operation, operation))
    result = _arrays.call(operation, kernel, arrays, options)
    if type(result) is tuple:
        raise _checks.error(operation, result, dict(zip(names, arrays, strict=True)) | {"gate": gate}, layout)
    return result[0]


def global_average_pool(x: Any, layout: str = "nchw") -> Any:
    """Mean of each channel over its positions.

    Parameters
    ----------
    x : array, (batch, channels, height, width), or (batch, height, width, channels) with layout="nhwc"
        float32, float64, float16 or bfloat16; any strides. 16-bit values are summed in float32.
    layout : "nchw" or "nhwc"
        The order of x's axes.

    Returns
    -------
    array, (batch, channels)
        Of x's kind and dtype; NaN where there are no positions.

    Raises
    ------
    TypeError, ValueError
        Naming the argument, what was expected and what came.
    """
    return _call("global_average_pool", ("x",), (x,), (_checks.choice("layout", layout, _LAYOUTS), False), layout)


def global_max_pool(x: Any, layout: str = "nchw") -> Any:
    """Maximum of each channel over its positions.

    Parameters
    ----------
    x : array, (batch, channels, height, width), or (batch, height, width, channels) with layout="nhwc"
        float32, float64, float16 or bfloat16; any strides.
    layout : "nchw" or "nhwc"
        The order of x's axes.

    Returns
    -------
    array, (batch, channels)
        Of x's kind and dtype; NaN where a channel has one, -inf where there are no positions.

    Raises
    ------
    TypeError, ValueError
        Naming the argument, what was expected and what came.
    """
    return _call("global_max_pool", ("x",), (x,), (_checks.choice("layout", layout, _LAYOUTS), True), layout)


def squeeze_excitation(
    x: Any,
    w_reduce: Any,
    b_reduce: Any,
    w_expand: Any,
    b_expand: Any,
    *,
    activation: str = "relu",
    gate: Any = "sigmoid",
    layout: str = "nchw",
    out: Any = None,
) -> Any:
    """Squeeze-and-excitation: rescale each channel by a weight computed from all channels' means.

    ``out = x * gate(w_expand activation(w_reduce mean(x) + b_reduce) + b_expand)``, channel by channel.

    Parameters
    ----------
    x : array, (batch, channels, height, width), or (batch, height, width, channels) with layout="nhwc"
        float32, float64, float16 or bfloat16; any strides.
    w_reduce : array, (reduced, channels)
        Of x's dtype, like all parameters.
    b_reduce : array, (reduced,), or None
    w_expand : array, (channels, reduced)
    b_expand : array, (channels,), or None
    activation : "relu", "silu", "gelu", "gelu_tanh" or "hard_swish"
        Of the hidden units; gelu is the exact one, with erf; gelu_tanh its approximation.
    gate : "sigmoid", "tanh", "hard_sigmoid" or ("hard_sigmoid", alpha, beta)
        hard_sigmoid is clamp(alpha x + beta, 0, 1), with PyTorch's alpha = 1/6 and beta = 1/2 where not given.
    layout : "nchw" or "nhwc"
        The order of the axes of x and out.
    out : array of x's shape and dtype, optional
        Written and returned; may be x itself (no copy is made then) or overlap any input.

    Returns
    -------
    array of x's shape
        Of x's kind and dtype.

    Raises
    ------
    TypeError, ValueError
        Naming the argument, what was expected and what came.

    References
    ----------
    Hu, Shen & Sun, "Squeeze-and-Excitation Networks", CVPR 2018.
    """
    options = (
        _checks.choice("activation", activation, _ACTIVATIONS),
        *_gate(gate),
        _checks.choice("layout", layout, _LAYOUTS),
    )
    arrays = (x, w_reduce, b_reduce, w_expand, b_expand, out)
    return _call("squeeze_excitation", ("x", *_MLP, "out"), arrays, options, layout, gate)


def channel_attention(
    x: Any,
    w_reduce: Any,
    b_reduce: Any,
    w_expand: Any,
    b_expand: Any,
    *,
    activation: str = "relu",
    gate: Any = "sigmoid",
    layout: str = "nchw",
    out: Any = None,
) -> Any:
    """CBAM's channel attention: rescale each channel by a weight computed from all channels' means and maxima.

    ``out = x * gate(mlp(mean(x)) + mlp(max(x)))``, channel by channel, with
    ``mlp(m) = w_expand activation(w_reduce m + b_reduce) + b_expand``.

    Parameters
    ----------
    x : array, (batch, channels, height, width), or (batch, height, width, channels) with layout="nhwc"
        float32, float64, float16 or bfloat16; any strides.
    w_reduce : array, (reduced, channels)
        Of x's dtype, like all parameters.
    b_reduce : array, (reduced,), or None
    w_expand : array, (channels, reduced)
    b_expand : array, (channels,), or None
    activation : "relu", "silu", "gelu", "gelu_tanh" or "hard_swish"
        Of the hidden units; gelu is the exact one, with erf; gelu_tanh its approximation.
    gate : "sigmoid", "tanh", "hard_sigmoid" or ("hard_sigmoid", alpha, beta)
        hard_sigmoid is clamp(alpha x + beta, 0, 1), with PyTorch's alpha = 1/6 and beta = 1/2 where not given.
    layout : "nchw" or "nhwc"
        The order of the axes of x and out.
    out : array of x's shape and dtype, optional
        Written and returned; may be x itself (no copy is made then) or overlap any input.

    Returns
    -------
    array of x's shape
        Of x's kind and dtype.

    Raises
    ------
    TypeError, ValueError
        Naming the argument, what was expected and what came.

    References
    ----------
    Woo, Park, Lee & Kweon, "CBAM: Convolutional Block Attention Module", ECCV 2018.
    """
    options = (
        _checks.choice("activation", activation, _ACTIVATIONS),
        *_gate(gate),
        _checks.choice("layout", layout, _LAYOUTS),
    )
    arrays = (x, w_reduce, b_reduce, w_expand, b_expand, out)
    return _call("channel_attention", ("x", *_MLP, "out"), arrays, options, layout, gate)


def spatial_attention(
    x: Any,
    w_spatial: Any,
    b_spatial: Any = None,
    *,
    gate: Any = "sigmoid",
    layout: str = "nchw",
    out: Any = None,
) -> Any:
    """CBAM's spatial attention: rescale each position by a weight from the channels' mean and maximum around it.

    ``out = x * gate(conv(mean_c(x), max_c(x)) + b_spatial)``, position by position; conv is a
    cross-correlation (as PyTorch's convolutions are) of two planes into one, padded with zeros.

    Parameters
    ----------
    x : array, (batch, channels, height, width), or (batch, height, width, channels) with layout="nhwc"
        float32, float64, float16 or bfloat16; any strides.
    w_spatial : array, (1, 2, kernel, kernel)
        kernel is odd; plane 0 is for the mean, plane 1 for the maximum. Of x's dtype.
    b_spatial : array, (1,), optional
    gate : "sigmoid", "tanh", "hard_sigmoid" or ("hard_sigmoid", alpha, beta)
        hard_sigmoid is clamp(alpha x + beta, 0, 1), with PyTorch's alpha = 1/6 and beta = 1/2 where not given.
    layout : "nchw" or "nhwc"
        The order of the axes of x and out.
    out : array of x's shape and dtype, optional
        Written and returned; may be x itself (no copy is made then) or overlap any input.

    Returns
    -------
    array of x's shape
        Of x's kind and dtype.

    Raises
    ------
    TypeError, ValueError
        Naming the argument, what was expected and what came.

    References
    ----------
    Woo, Park, Lee & Kweon, "CBAM: Convolutional Block Attention Module", ECCV 2018.
    """
    options = (*_gate(gate), _checks.choice("layout", layout, _LAYOUTS))
    arrays = (x, w_spatial, b_spatial, out)
    return _call("spatial_attention", ("x", *_SPATIAL, "out"), arrays, options, layout, gate)


def cbam(
    x: Any,
    *,
    w_reduce: Any,
    b_reduce: Any,
    w_expand: Any,
    b_expand: Any,
    w_spatial: Any,
    b_spatial: Any = None,
    activation: str = "relu",
    gate: Any = "sigmoid",
    layout: str = "nchw",
    out: Any = None,
) -> Any:
    """The Convolutional Block Attention Module: channel_attention, then spatial_attention of its result.

    ``y = x * gate(mlp(mean(x)) + mlp(max(x)))``, then ``out = y * gate(conv(mean_c(y), max_c(y)) + b_spatial)``.
    y is never stored: x is read three times, and no array of its size is made but out.

    Parameters
    ----------
    x : array, (batch, channels, height, width), or (batch, height, width, channels) with layout="nhwc"
        float32, float64, float16 or bfloat16; any strides.
    w_reduce : array, (reduced, channels)
        Of x's dtype, like all parameters.
    b_reduce : array, (reduced,), or None
    w_expand : array, (channels, reduced)
    b_expand : array, (channels,), or None
    w_spatial : array, (1, 2, kernel, kernel)
        kernel is odd; plane 0 is for the mean, plane 1 for the maximum.
    b_spatial : array, (1,), optional
    activation : "relu", "silu", "gelu", "gelu_tanh" or "hard_swish"
        Of the hidden units; gelu is the exact one, with erf; gelu_tanh its approximation.
    gate : "sigmoid", "tanh", "hard_sigmoid" or ("hard_sigmoid", alpha, beta)
        hard_sigmoid is clamp(alpha x + beta, 0, 1), with PyTorch's alpha = 1/6 and beta = 1/2 where not given.
    layout : "nchw" or "nhwc"
        The order of the axes of x and out.
    out : array of x's shape and dtype, optional
        Written and returned; may be x itself (no copy is made then) or overlap any input.

    Returns
    -------
    array of x's shape
        Of x's kind and dtype.

    Raises
    ------
    TypeError, ValueError
        Naming the argument, what was expected and what came.

    References
    ----------
    Woo, Park, Lee & Kweon, "CBAM: Convolutional Block Attention Module", ECCV 2018.
    """
    options = (
        _checks.choice("activation", activation, _ACTIVATIONS),
        *_gate(gate),
        _checks.choice("layout", layout, _LAYOUTS),
    )
    arrays = (x, w_reduce, b_reduce, w_expand, b_expand, w_spatial, b_spatial, out)
    return _call("cbam", ("x", *_MLP, *_SPATIAL, "out"), arrays, options, layout, gate)


def efficient_channel_attention(
    x: Any,
    w: Any,
    *,
    gate: Any = "sigmoid",
    layout: str = "nchw",
    out: Any = None,
) -> Any:
    """ECA-Net's attention: rescale each channel by a weight computed from the means of its neighbours.

    ``out = x * gate(conv(mean(x)))``, channel by channel; conv runs over the channels, padded with
    zeros, and is a cross-correlation (as PyTorch's convolutions are).

    Parameters
    ----------
    x : array, (batch, channels, height, width), or (batch, height, width, channels) with layout="nhwc"
        float32, float64, float16 or bfloat16; any strides.
    w : array, (kernel,)
        kernel is odd. Of x's dtype.
    gate : "sigmoid", "tanh", "hard_sigmoid" or ("hard_sigmoid", alpha, beta)
        hard_sigmoid is clamp(alpha x + beta, 0, 1), with PyTorch's alpha = 1/6 and beta = 1/2 where not given.
    layout : "nchw" or "nhwc"
        The order of the axes of x and out.
    out : array of x's shape and dtype, optional
        Written and returned; may be x itself (no copy is made then) or overlap any input.

    Returns
    -------
    array of x's shape
        Of x's kind and dtype.

    Raises
    ------
    TypeError, ValueError
        Naming the argument, what was expected and what came.

    References
    ----------
    Wang et al., "ECA-Net: Efficient Channel Attention for Deep Convolutional Neural Networks", CVPR 2020.
    """
    options = (*_gate(gate), _checks.choice("layout", layout, _LAYOUTS))
    return _call("efficient_channel_attention", ("x", "w", "out"), (x, w, out), options, layout, gate)
