"""Layer and RMS normalisation over the last axes."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

from regard import dense
from regard._checks import describe, renamed
from regard.nn.module import INPUT, Memory, Module, constant

#: What PyTorch 2.13 takes for eps=None: the epsilon of the dtype that is computed in, float32 for 16-bit inputs.
_EPSILON = {"float64": 2.0**-52, "float32": 2.0**-23, "float16": 2.0**-23, "bfloat16": 2.0**-23}


class _Norm(Module):
    """What both share: the last axes, seen as one."""

    normalized_shape: tuple[int, ...]
    _words: ClassVar[Mapping[str, str]] = {}  # PyTorch's for arguments of functions

    def __init__(
        self, normalized_shape: int | Sequence[int], elementwise_affine: bool, device: Any, dtype: Any
    ) -> None:
        super().__init__(device, dtype)
        if not isinstance(normalized_shape, Sequence):
            normalized_shape = (operator.index(normalized_shape),)
        self.normalized_shape = tuple(map(operator.index, normalized_shape))
        self.elementwise_affine = elementwise_affine
        if elementwise_affine:
            self.add_parameter("weight", self.normalized_shape, constant(1.0, *self.normalized_shape))
        else:
            self.weight = None

    def _pack(self, dtype: Any, memory: Memory) -> Any:
        flat = {name: x.reshape(-1) for name, x in super()._pack(dtype, memory).items()}
        return flat.get("weight"), flat.get("bias")

    def _rows(self, x: Any) -> Any:
        """x as (..., normalised elements)."""
        count = len(self.normalized_shape)
        if x.shape[x.ndim - count :] != self.normalized_shape:
            expected = ", ".join(("...", *map(str, self.normalized_shape)))
            raise ValueError(f"x: expected shape ({expected}), got {describe(x)}")
        return x.reshape(*x.shape[: x.ndim - count], math.prod(self.normalized_shape))

    def _over_rows(self, norm: Callable[..., Any], inputs: tuple[Any, ...], more: tuple[Any, ...], out: Any) -> Any:
        """norm(*inputs, *more, out) of the inputs as rows; out is written and returned where given."""
        try:
            if len(self.normalized_shape) == 1 and {x.shape[-1:] for x in inputs} == {self.normalized_shape}:
                return norm(*inputs, *more, out)
            rows = [self._rows(x) for x in inputs]
        except (TypeError, ValueError) as error:
            raise renamed(error, self._words) from None
        shape = inputs[0].shape
        if out is None:
            return norm(*rows, *more, None).reshape(shape)
        if getattr(out, "shape", None) != shape or out.dtype != inputs[0].dtype:
            raise ValueError(f"out: expected {inputs[0].dtype} array of shape {shape}, got {describe(out)}")
        if out.flags.c_contiguous:
            norm(*rows, *more, self._rows(out))
        else:
            out[...] = norm(*rows, *more, None).reshape(shape)
        return out


class LayerNorm(_Norm):
    """Layer normalisation (Ba et al., 2016): the last axes to mean 0 and variance 1, then weight and bias.

    Parameters
    ----------
    normalized_shape : int or sequence of int
        The lengths of the axes that are normalised together; weight and bias have that shape.
    eps : float
        Added to the variance.
    elementwise_affine, bias : bool
        Whether there are weight and bias, and whether there is a bias.
    """

    _words = INPUT

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(normalized_shape, elementwise_affine, device, dtype)
        self.eps = eps
        if elementwise_affine and bias:
            self.add_parameter("bias", self.normalized_shape, constant(0.0, *self.normalized_shape))
        else:
            self.bias = None

    def forward(self, input: Any, out: Any = None) -> Any:
        """input (..., *normalized_shape) -> the same shape and dtype; out is written and returned where given."""
        weight, bias = self._weights_for("input", input)
        return self._over_rows(dense.layer_norm, (input,), (weight, bias, self.eps), out)

    def of_sum(self, x: Any, residual: Any, out: Any = None) -> Any:
        """The norm of x + residual in one pass over memory."""
        weight, bias = self._weights_for("x", x)
        return self._over_rows(dense.add_layer_norm, (x, residual), (weight, bias, self.eps), out)


class RMSNorm(_Norm):
    """Root-mean-square normalisation (Zhang and Sennrich, 2019).

    Parameters
    ----------
    normalized_shape : int or sequence of int
        The lengths of the axes that are normalised together; weight has that shape.
    eps : float, optional
        Added to the mean square; None is the epsilon of float32, for float64 inputs of float64, as in PyTorch.
    elementwise_affine : bool
        Whether there is a weight.
    """

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float | None = None,
        elementwise_affine: bool = True,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(normalized_shape, elementwise_affine, device, dtype)
        self.eps = eps

    def forward(self, x: Any, out: Any = None) -> Any:
        """x (..., *normalized_shape) -> the same shape and dtype; out is written and returned where given."""
        weight, _ = self._weights_for("x", x)
        return self._over_rows(dense.rms_norm, (x,), (weight, self._eps(x)), out)

    def of_sum(self, x: Any, residual: Any, out: Any = None) -> Any:
        """The norm of x + residual in one pass over memory."""
        weight, _ = self._weights_for("x", x)
        return self._over_rows(dense.add_rms_norm, (x, residual), (weight, self._eps(x)), out)

    def _eps(self, x: Any) -> float:
        return _EPSILON[x.dtype.name] if self.eps is None else self.eps
