"""Linear layers and the norms around them (Vaswani et al., 2017; Ba et al., 2016; Zhang & Sennrich, 2019)."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from regard import _arrays, _backend, _checks

#: As in core/linear_problem.h.
_ACTIVATIONS = {None: 0, "relu": 1, "gelu": 2, "silu": 3, "gelu_tanh": 4}
_HELD = {"float32": 0, "bfloat16": 1, "int8": 2}
_FLOATS = ("float32", "float64", "float16", "bfloat16")


class PackedLinear:
    """The weight and bias of a linear layer in the order in which the kernels read them; see pack_linear.

    Attributes
    ----------
    packed : array
        Opaque; float32, or float64 where the weight was float64. Serves every instruction set. On a GPU it is the
        weight itself, or its rows as int8.
    dtype : dtype
        Of the weight it was made from.
    held : str
        What it was packed as: "float32" (float64 where the weight was), "bfloat16" or "int8".
    in_features, out_features : int
    """

    __slots__ = ("bias", "dtype", "held", "in_features", "out_features", "packed", "scale")

    def __init__(
        self,
        packed: Any,
        out_features: int,
        in_features: int,
        dtype: Any,
        held: str = "float32",
        bias: Any = None,
        scale: Any = None,
    ) -> None:
        self.held = held
        # On a GPU; elsewhere they are packed with the weight.
        self.bias = bias
        self.scale = scale
        self.packed = packed
        self.out_features = out_features
        self.in_features = in_features
        self.dtype = dtype

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features), as the weight has them."""
        return self.out_features, self.in_features

    def __repr__(self) -> str:
        return f"PackedLinear({self.in_features} -> {self.out_features}, {self.dtype})"


def pack_linear(weight: Any, bias: Any = None, held: str = "float32") -> PackedLinear:
    """Pack a linear layer once, so that calls of regard.linear with it save that work.

    Parameters
    ----------
    weight : array, (out_features, in_features)
        float32, float64, float16 or bfloat16; any strides. It is copied, but on a GPU where `held` leaves it as it is.
    bias : array, (out_features,), optional
        Of the weight's dtype. On a GPU it is held as it is.
    held : {"float32", "bfloat16", "int8"}
        "float32" (float64 for a float64 weight): as the kernels compute; the same bits come out as
        without packing, except where bfloat16 runs on matrix tiles. "bfloat16": rounded to that dtype;
        products with bfloat16 inputs run in it where the machine has tiles or a fast instruction, and on
        tiles the same bits come out as of a bfloat16 weight without packing. "int8": whole multiples of
        max |weight| / 127 of each output channel, in products with inputs that are quantised likewise, by
        rows; up to 65536 in_features. Neither is for float64. On a GPU "float32" is the weight in its own
        dtype, without a copy, and "bfloat16" one rounded to that, for products that are the framework's;
        "int8" has the CPU's numbers.

    Returns
    -------
    PackedLinear
        To be given to regard.linear in place of weight and bias.

    Raises
    ------
    TypeError, ValueError
        Naming the argument, what was expected and what came.
    """
    code = _HELD.get(held) if isinstance(held, str) else None
    if code is None:
        raise ValueError(f"held: expected {', '.join(map(repr, _HELD))}, got {held!r}")
    if not hasattr(weight, "shape") and hasattr(weight, "__dlpack__"):  # the caller's own kind, which only gives
        weight = _arrays.numpy_view("pack_linear", weight)
    if _arrays.on_gpu(weight):
        return _held_on_gpu(weight, bias, held)
    result = _backend.cpu.pack_linear(_arrays.native("pack_linear", weight), _arrays.native("pack_linear", bias), code)
    if type(result) is tuple:
        raise _checks.error("pack_linear", result, {"weight": weight, "bias": bias, "held": held})
    out_features, in_features = weight.shape
    return PackedLinear(result[0], int(out_features), int(in_features), weight.dtype, held)


def _held_on_gpu(weight: Any, bias: Any, held: str) -> PackedLinear:
    named = {"weight": weight, "bias": bias, "held": held}

    def require(holds: bool, rule: str, argument: str) -> None:
        if not holds:
            raise _checks.error("pack_linear", (rule, argument, 0), named)

    if held == "int8":
        result = _arrays.call_on_gpu("pack_linear", "pack_bytes", (weight, bias), ())
        if type(result) is tuple:
            raise _checks.error("pack_linear", result, named)
        out_features, in_features = weight.shape
        return PackedLinear(result[0], int(out_features), int(in_features), weight.dtype, held, bias, result[1])
    dtype = _arrays.name_of_dtype(weight.dtype)
    require(dtype in _FLOATS, "dtype", "weight")
    require(weight.ndim == 2, "shape", "weight")
    require(held == "float32" or dtype != "float64", "held", "weight")
    if bias is not None:
        require(_arrays.on_gpu(bias), "device", "bias")
        require(bias.dtype == weight.dtype, "same_dtype", "bias")
        require(tuple(bias.shape) == tuple(weight.shape[:1]), "shape", "bias")
    out_features, in_features = weight.shape
    packed = _arrays.Beside("pack_linear", weight).converted(weight, "bfloat16") if held == "bfloat16" else weight
    return PackedLinear(packed, int(out_features), int(in_features), weight.dtype, held, bias)


def _packed_on_gpu(x: Any, given: PackedLinear, bias: Any) -> tuple[Any, Any]:
    """Weight and bias: in x's dtype, or as they are where they are held as int8."""
    if not _arrays.on_gpu(given.packed):
        raise TypeError("weight: expected a PackedLinear on the device of x, got one on the CPU")
    dtype = _arrays.name_of_dtype(x.dtype)
    rule = "packed" if bias is not None else "same_dtype"
    if bias is not None or (dtype == "float64") != (_arrays.name_of_dtype(given.packed.dtype) == "float64"):
        argument = "bias" if bias is not None else "weight"
        raise _checks.error("linear", (rule, argument, 0), {"x": x, "weight": given, "bias": bias})
    if dtype not in _FLOATS:
        raise _checks.error("linear", ("dtype", "x", 0), {"x": x})
    if given.held == "int8":
        return given.packed, given.bias
    memory = _arrays.Beside("linear", given.packed)
    return memory.converted(given.packed, dtype), None if given.bias is None else memory.converted(given.bias, dtype)


def linear(
    x: Any,
    weight: Any,
    bias: Any = None,
    activation: str | None = None,
    out: Any = None,
    residual: Any = None,
) -> Any:
    """A linear layer and what follows it in one pass: ``activation(x weight^T + bias) + residual``.

    Sums run in float32 (float64 for float64) and are rounded once, at the end. The bits of a row of the
    result depend on that row of x alone, not on how many rows there are. On a GPU the product is CuPy's or
    PyTorch's own, of the dtypes that it takes, rounded to x's dtype, and what follows it is one pass; weights held
    as int8 have kernels there.

    Parameters
    ----------
    x : array, (..., in_features)
        float32, float64, float16 or bfloat16; one axis or more, any strides.
    weight : array, (out_features, in_features), or PackedLinear
        Of x's dtype. A PackedLinear holds its bias and may have any dtype computed as x's is: float64 for
        float64, the others for the others; on a GPU such a weight is converted to x's dtype by each call.
    bias : array, (out_features,), optional
        Of x's dtype.
    activation : None, "relu", "gelu" (the erf form), "gelu_tanh" (its approximation by tanh) or "silu"
    out : array, (..., out_features), optional
        Written and returned; may overlap any input.
    residual : array, (..., out_features), optional
        Of x's dtype and leading axes; added before the one rounding.

    Returns
    -------
    array, (..., out_features)
        Of x's kind and dtype. NaN and infinities go as IEEE arithmetic takes them: 0 x inf is NaN.

    Raises
    ------
    TypeError, ValueError
        Naming the argument, what was expected and what came.
    """
    code = _checks.choice("activation", activation, _ACTIVATIONS)
    packed_out = -1
    held = 0
    given = weight
    if type(weight) is PackedLinear:
        shape = _checks.shape_of(x)
        if shape and shape[-1] != weight.in_features:  # padded, a packed weight does not tell
            named = {"x": x, "weight": weight, "bias": bias, "residual": residual, "out": out}
            raise _checks.error("linear", ("shape", "weight", 0), named)
        weight, packed_out, held = weight.packed, weight.out_features, _HELD[weight.held]
    on_gpu = type(x) is not np.ndarray and _arrays.on_gpu(x)
    if on_gpu and packed_out >= 0:
        weight, bias = _packed_on_gpu(x, given, bias)
    arrays = (x, weight, bias, residual)
    if out is not None:
        arrays = _arrays.apart_from(out, arrays)
    if on_gpu:
        if held == _HELD["int8"]:
            bytes_with_scale = (*arrays[:2], given.scale, *arrays[2:], out)
            result = _arrays.call_on_gpu("linear", "linear_bytes", bytes_with_scale, (code,))
        else:
            multiply = functools.partial(_arrays.product_on_gpu, x, weight)
            result = _arrays.call_on_gpu("linear", "linear", (*arrays, out), (code, multiply))
    elif packed_out >= 0 and type(weight) is not np.ndarray:
        raise TypeError("weight: expected a PackedLinear on the CPU, where x is, got one on a GPU")
    else:
        result = _arrays.call("linear", _backend.cpu.linear, (*arrays, out), (packed_out, code, held))
    if type(result) is tuple:
        raise _checks.error("linear", result, {"x": x, "weight": given, "bias": bias, "residual": residual, "out": out})
    return result[0]


def layer_norm(x: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5, out: Any = None) -> Any:
    """Layer normalisation over the last axis: ``(x - mean) / sqrt(variance + eps) * weight + bias``.

    The variance is the biased one, computed in two passes in float32 (float64 for float64).

    Parameters
    ----------
    x : array, (..., features)
        float32, float64, float16 or bfloat16; one axis or more, any strides.
    weight, bias : array, (features,), optional
        Of x's dtype.
    eps : float
        Finite, >= 0.
    out : array, (..., features), optional
        Written and returned; may overlap any input.

    Returns
    -------
    array, (..., features)
        Of x's kind and dtype.

    Raises
    ------
    TypeError, ValueError
        Naming the argument, what was expected and what came.

    References
    ----------
    Ba, Kiros & Hinton, "Layer normalization", 2016.
    """
    return _norm("layer_norm", x, None, weight, bias, eps, out)


def rms_norm(x: Any, weight: Any = None, eps: float = 1e-6, out: Any = None) -> Any:
    """Root mean square normalisation over the last axis: ``x / sqrt(mean(x^2) + eps) * weight``.

    Parameters
    ----------
    x : array, (..., features)
        float32, float64, float16 or bfloat16; one axis or more, any strides.
    weight : array, (features,), optional
        Of x's dtype.
    eps : float
        Finite, >= 0.
    out : array, (..., features), optional
        Written and returned; may overlap any input.

    Returns
    -------
    array, (..., features)
        Of x's kind and dtype.

    Raises
    ------
    TypeError, ValueError
        Naming the argument, what was expected and what came.

    References
    ----------
    Zhang & Sennrich, "Root mean square layer normalization", 2019.
    """
    return _norm("rms_norm", x, None, weight, None, eps, out)


def add_layer_norm(
    x: Any, residual: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5, out: Any = None
) -> Any:
    """``layer_norm(x + residual)`` in one pass; the sum is not rounded to x's dtype between.

    Parameters and errors are layer_norm's; residual has the shape and dtype of x.
    """
    return _norm("layer_norm", x, residual, weight, bias, eps, out)


def add_rms_norm(x: Any, residual: Any, weight: Any = None, eps: float = 1e-6, out: Any = None) -> Any:
    """``rms_norm(x + residual)`` in one pass, as add_layer_norm."""
    return _norm("rms_norm", x, residual, weight, None, eps, out)


def _norm(operation: str, x: Any, residual: Any, weight: Any, bias: Any, eps: float, out: Any) -> Any:
    arrays = (x, residual, weight, bias)
    if out is not None:
        arrays = _arrays.apart_from(out, arrays)
    try:
        result = _arrays.call(operation, _backend.cpu.norm, (*arrays, out), (eps, operation == "rms_norm"))
    except TypeError:
        _checks.number("eps", eps)
        raise
    if type(result) is tuple:
        names = ("x", "residual", "weight", "bias", "out")
        raise _checks.error(operation, result, dict(zip(names, (*arrays, out), strict=True)) | {"eps": eps})
    return result[0]
