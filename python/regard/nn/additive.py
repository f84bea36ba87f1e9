"""Additive attention with its weights (Bahdanau et al., 2014)."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from regard import _arrays, additive, dense
from regard._checks import describe
from regard.nn.module import Memory, Module, check_floats, constant, fan_in_uniform


class ProjectedKeys:
    """The keys of some sequences as AdditiveAttention.precompute projected them, for many steps of a decoder."""

    __slots__ = ("_values", "dtype", "keys", "projected")

    def __init__(self, projected: Any, keys: Any) -> None:
        self.projected = projected  # (batch, len_kv, dim): float64 for float64 keys, otherwise float32
        self.keys = keys  # (batch, len_kv, dim_key), as they were given
        self.dtype = keys.dtype
        self._values: Any = None

    @property
    def values(self) -> Any:
        """The keys in the projection's dtype: the values of the usual call, whose values are its keys."""
        if self._values is None:
            self._values = self.keys.astype(self.projected.dtype, copy=False)
        return self._values


class _Packed(NamedTuple):
    """One dtype's weights: as the function takes them, and packed for `linear`."""

    arrays: dict[str, Any]
    query: dense.PackedLinear
    key: dense.PackedLinear


class AdditiveAttention(Module):
    """``out_i = sum_j softmax_j(v . tanh(w_query query_i + w_key key_j + bias)) value_j``.

    Parameters
    ----------
    dim_query, dim_key : int
        Widths of queries (a decoder's states) and keys (an encoder's annotations).
    dim : int
        The width of the space in which they are added: w_query (dim, dim_query), w_key (dim, dim_key), v (dim,).
    bias : bool
        Whether there is a bias, (dim,), inside the tanh.

    Notes
    -----
    A decoder asks the same keys at every step: ``projected = module.precompute(keys)`` once, then
    ``module(query, projected)`` a step. Two-byte dtypes are computed in float32 throughout.
    """

    def __init__(
        self, dim_query: int, dim_key: int, dim: int, bias: bool = True, device: Any = None, dtype: Any = None
    ) -> None:
        super().__init__(device, dtype)
        self.dim_query, self.dim_key, self.dim = dim_query, dim_key, dim
        self.add_parameter("w_query", (dim, dim_query), fan_in_uniform(dim_query, dim, dim_query))
        self.add_parameter("w_key", (dim, dim_key), fan_in_uniform(dim_key, dim, dim_key))
        self.add_parameter("v", (dim,), fan_in_uniform(dim, dim))
        if bias:
            self.add_parameter("bias", (dim,), constant(0.0, dim))
        else:
            self.bias = None

    def _pack(self, dtype: Any, memory: Memory) -> Any:
        arrays = super()._pack(dtype, memory)
        return _Packed(
            arrays,
            dense.pack_linear(arrays["w_query"], arrays.get("bias")),
            dense.pack_linear(arrays["w_key"]),
        )

    def _check(self, argument: str, x: Any, width: int) -> None:
        if x.ndim != 3 or x.shape[2] != width:
            lengths = {"query": "len_q", "key": "len_kv"}[argument]
            raise ValueError(
                f"{argument}: expected shape (batch, {lengths}, dim_{argument} = {width}), got {describe(x)}"
            )

    def precompute(self, keys: Any) -> ProjectedKeys:
        """Project the keys of some sequences, (batch, len_kv, dim_key), once for many calls."""
        projected: ProjectedKeys = _arrays.through_modules(type(self).__name__, self._projected, (keys,), {})
        return projected

    def _projected(self, keys: Any) -> ProjectedKeys:
        check_floats("key", keys)
        self._check("key", keys, self.dim_key)
        wide = keys.astype(np.float32, copy=False) if keys.dtype.itemsize == 2 else keys
        return ProjectedKeys(dense.linear(wide, self._weights_for("key", wide).key), keys)

    def forward(
        self,
        query: Any,
        key: Any,
        value: Any = None,
        mask: Any = None,
        key_lengths: Any = None,
        return_weights: bool = False,
    ) -> Any:
        """Attend.

        Parameters
        ----------
        query : array, (batch, len_q, dim_query)
        key : array, (batch, len_kv, dim_key), or ProjectedKeys
            Of the query's dtype.
        value : array, (batch, len_kv, dim_v), optional
            The keys themselves where left out.
        mask : bool array, optional
            True = attend. Broadcasts to (batch, len_q, len_kv).
        key_lengths : int32 or int64 array, (batch,), optional
            Valid prefixes of keys and values.
        return_weights : bool
            Also return the weights, (batch, len_q, len_kv).

        Returns
        -------
        out : array, (batch, len_q, dim_v), or with return_weights (out, weights)
        """
        weights = self._weights_for("query", query)
        self._check("query", query, self.dim_query)
        seen = {"mask": mask, "key_lengths": key_lengths, "return_weights": return_weights}
        if not isinstance(key, ProjectedKeys):
            return additive.additive_attention(query, key, key if value is None else value, **weights.arrays, **seen)
        if key.dtype != query.dtype:
            raise TypeError(f"key: expected the dtype of query, {query.dtype}, got keys projected from {key.dtype}")
        if value is not None:
            check_floats("value", value)
            if value.dtype != query.dtype:
                raise TypeError(f"value: expected the dtype of query, {query.dtype}, got {describe(value)}")
        compute = key.projected.dtype
        value = key.values if value is None else value.astype(compute, copy=False)
        wide = query
        if compute != query.dtype:
            wide = query.astype(compute)
            weights = self._weights_for("query", wide)
        wide = dense.linear(wide, weights.query)
        result = additive.additive_attention(wide, key.projected, value, v=weights.arrays["v"], **seen)
        if compute == query.dtype:
            return result
        if return_weights:
            return tuple(x.astype(query.dtype) for x in result)
        return result.astype(query.dtype)
