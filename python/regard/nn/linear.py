"""Linear layers and embeddings."""

from __future__ import annotations

from typing import Any

import numpy as np

from regard import _arrays, dense
from regard._checks import describe, renamed
from regard.nn.module import INPUT, Memory, Module, fan_in_uniform, normal


class Linear(Module):
    """``y = x weight^T + bias`` over the last axis, with an activation in the same pass where asked.

    Parameters
    ----------
    in_features, out_features : int
        weight is (out_features, in_features).
    bias : bool
        Whether there is a bias, (out_features,).
    """

    _float32_serves_16_bit = ("cpu",)
    _holds = True

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, device: Any = None, dtype: Any = None
    ) -> None:
        super().__init__(device, dtype)
        self.in_features, self.out_features = in_features, out_features
        self.add_parameter(
            "weight", (out_features, in_features), fan_in_uniform(in_features, out_features, in_features)
        )
        if bias:
            self.add_parameter("bias", (out_features,), fan_in_uniform(in_features, out_features))
        else:
            self.bias = None

    def _pack(self, dtype: Any, memory: Memory) -> Any:
        return dense.pack_linear(**super()._pack(dtype, memory), held=self._holding("weight", dtype))

    def forward(self, input: Any, activation: str | None = None, residual: Any = None, out: Any = None) -> Any:
        """input (..., in_features) -> (..., out_features); activation as in :func:`regard.linear`.

        residual (..., out_features) is added after the activation, in the same pass; out is written and
        returned where given.
        """
        try:
            return dense.linear(input, self._weights_for("x", input), None, activation, out, residual)
        except (TypeError, ValueError) as error:
            if str(error).startswith("weight: expected shape"):  # the module's own: it is the input that does not fit
                expected = f"(..., in_features = {self.in_features})"
                raise ValueError(f"input: expected shape {expected}, got {describe(input)}") from None
            raise renamed(error, INPUT) from None


class Embedding(Module):
    """A table of vectors, looked up by number.

    Parameters
    ----------
    num_embeddings, embedding_dim : int
        weight is (num_embeddings, embedding_dim).
    padding_idx : int, optional
        The row that starts as zeros. It is looked up like any other.
    max_norm, norm_type : float, optional
        Vectors whose norm of that type (2 is the Euclidean one) exceeds max_norm are scaled down to it
        when looked up; the weight stays as it is. (PyTorch changes the weight in place.)
    scale_grad_by_freq, sparse : bool
        PyTorch's words; without effect.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(device, dtype)
        if padding_idx is not None and not -num_embeddings <= padding_idx < num_embeddings:
            raise ValueError(
                f"padding_idx: expected None or a row of num_embeddings = {num_embeddings}, got {padding_idx}"
            )
        self.num_embeddings, self.embedding_dim, self.padding_idx = num_embeddings, embedding_dim, padding_idx
        self.max_norm, self.norm_type = max_norm, norm_type
        shape = (num_embeddings, embedding_dim)
        self.add_parameter("weight", shape, normal(1.0, *shape, zero_row=padding_idx))

    def _pack(self, dtype: Any, memory: Memory) -> Any:
        parameter = self._parameters["weight"]
        if self.max_norm is None:
            return parameter.put(memory, dtype)
        table = parameter.put(_arrays.HOST, dtype)
        compute = np.float64 if dtype == np.float64 else np.float32
        norms = np.linalg.norm(table.astype(compute), ord=self.norm_type, axis=1)[:, None]
        held = np.where(norms > self.max_norm, table * (self.max_norm / (norms + 1e-7)), table)
        return memory.put(type(self).__name__, held, dtype)

    def forward(self, input: Any) -> Any:
        """input (...), integers from 0 to num_embeddings - 1
        -> (..., embedding_dim) of the module's dtype.

        Those on a GPU are held to that range, without a look at them on the host.
        """
        if not _arrays.is_array(input) or input.dtype.kind not in "iu":
            raise TypeError(f"input: expected an array of integers, got {describe(input)}")
        if not isinstance(input, np.ndarray):
            table = self._weights(self.dtype, _arrays.memory_of(type(self).__name__, input))
            return table.take(input.astype(np.int64, copy=False).clip(0, self.num_embeddings - 1), axis=0)
        table = self._weights(self.dtype)
        self._check(input)
        return np.take(table, input, axis=0)

    def _check(self, input: np.ndarray) -> None:
        """Refuse numbers that are not in the table."""
        last = self.num_embeddings - 1
        if input.size and (input.min() < 0 or input.max() > last):
            outside = input[(input < 0) | (input > last)].flat[0]
            raise ValueError(f"input: expected numbers from 0 to num_embeddings - 1 = {last}, got {outside}")
