"""Attention blocks in ONNX graphs: squeeze-and-excitation, and self-attention with one projection for all of q, k, v.

A block is found by the shape of its graph, walked backwards from the one node that only it has, and comes with its
weights in regard's layout. Nodes of Identity, which exporters leave everywhere, are looked through.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import regard

Array = np.ndarray


@dataclasses.dataclass(frozen=True)
class SqueezeExcitation:
    """y = x * clamp(alpha s + beta, 0, 1), s = w_expand relu(w_reduce mean(x) + b_reduce) + b_expand."""

    source: str  # names of tensors: x and y
    result: str
    w_reduce: Array  # (reduced, channels)
    b_reduce: Array
    w_expand: Array  # (channels, reduced)
    b_expand: Array
    gate: tuple[str, float, float]

    def __call__(self, x: Array) -> Array:
        mlp = (self.w_reduce, self.b_reduce, self.w_expand, self.b_expand)
        return regard.squeeze_excitation(x, *mlp, gate=self.gate)

    def channel_weights(self, x: Array) -> Array:
        """What the channels are multiplied by: (batch, channels)."""
        hidden = regard.linear(regard.global_average_pool(x), self.w_reduce, self.b_reduce, activation="relu")
        _, alpha, beta = self.gate
        return np.clip(alpha * regard.linear(hidden, self.w_expand, self.b_expand) + beta, 0, 1)


@dataclasses.dataclass(frozen=True)
class SelfAttention:
    """y = w_out heads(softmax(scale q k^T) v) + b_out, with q, k, v = w_in x + b_in."""

    source: str
    result: str
    w_in: Array  # (3 heads dim, features)
    b_in: Array
    w_out: Array  # (features, heads dim)
    b_out: Array
    heads: int
    scale: float

    def __call__(self, x: Array) -> Array:
        batch, length, _ = x.shape
        qkv = regard.linear(x, self.w_in, self.b_in).reshape(batch, length, 3, self.heads, -1)
        out = regard.attention(*np.moveaxis(qkv, 2, 0), scale=self.scale, layout="bshd")
        return regard.linear(out.reshape(batch, length, -1), self.w_out, self.b_out)


class _Mismatch(Exception):
    """This is some other block."""


class Graph:
    """An ONNX graph to walk through, from results to sources."""

    def __init__(self, path: Path) -> None:
        self.model = onnx.load(path)
        nodes = self.model.graph.node
        self._producers = {output: node for node in nodes for output in node.output}
        self._constants = {t.name: onnx.numpy_helper.to_array(t) for t in self.model.graph.initializer}
        for node in nodes:
            if node.op_type == "Constant":
                self._constants[node.output[0]] = onnx.numpy_helper.to_array(attribute(node, "value"))
        self._users: dict[str, list[Any]] = {}
        for node in nodes:
            for name in {self.origin(i) for i in node.input}:
                if node.op_type != "Identity":
                    self._users.setdefault(name, []).append(node)

    def nodes(self, op_type: str) -> Iterator[Any]:
        return (n for n in self.model.graph.node if n.op_type == op_type)

    def origin(self, name: str) -> str:
        """The tensor that `name` is, before any Identity."""
        while name in self._producers and self._producers[name].op_type == "Identity":
            name = self._producers[name].input[0]
        return name

    def producer(self, name: str, *op_types: str) -> Any:
        node = self._producers.get(self.origin(name))
        if node is None or node.op_type not in op_types:
            raise _Mismatch
        return node

    def user(self, name: str, op_type: str) -> Any:
        found = [n for n in self._users.get(self.origin(name), []) if n.op_type == op_type]
        if len(found) != 1:
            raise _Mismatch
        return found[0]

    def constant(self, name: str) -> Array:
        """A stored tensor, or one that is reshaped on its way."""
        name = self.origin(name)
        if name in self._constants:
            return self._constants[name]
        node = self.producer(name, "Reshape")
        return self.constant(node.input[0]).reshape(self.constant(node.input[1]))

    def affine(self, name: str, op_type: str) -> tuple[str, Array, Array]:
        """(source, weight, bias) of op_type(source, weight) + bias."""
        added = self.producer(name, "Add")
        product = self.producer(added.input[0], op_type)
        return product.input[0], self.constant(product.input[1]), self.constant(added.input[1]).ravel()

    def squeeze_excitations(self) -> list[SqueezeExcitation]:
        """In the order of the graph."""
        return [b for n in self.nodes("HardSigmoid") if (b := self._tried(self._squeeze_excitation, n)) is not None]

    def self_attentions(self) -> list[SelfAttention]:
        return [b for n in self.nodes("Softmax") if (b := self._tried(self._self_attention, n)) is not None]

    @staticmethod
    def _tried(finder: Any, node: Any) -> Any:
        try:
            return finder(node)
        except _Mismatch:
            return None

    def _squeeze_excitation(self, gate: Any) -> SqueezeExcitation:
        hidden, w_expand, b_expand = self.affine(gate.input[0], "Conv")
        pooled, w_reduce, b_reduce = self.affine(self.producer(hidden, "Relu").input[0], "Conv")
        pool = self.producer(pooled, "GlobalAveragePool", "ReduceMean")
        pointwise = w_reduce.shape[2:] == w_expand.shape[2:] == (1, 1)
        if not pointwise or (pool.op_type == "ReduceMean" and list(attribute(pool, "axes")) != [2, 3]):
            raise _Mismatch
        product = self.user(gate.output[0], "Mul")
        source = self.origin(pool.input[0])
        if source not in {self.origin(i) for i in product.input}:
            raise _Mismatch
        slopes = ("hard_sigmoid", float(attribute(gate, "alpha", 0.2)), float(attribute(gate, "beta", 0.5)))
        matrices = (w_reduce[:, :, 0, 0], b_reduce, w_expand[:, :, 0, 0], b_expand)
        return SqueezeExcitation(source, product.output[0], *matrices, slopes)

    def _self_attention(self, softmax: Any) -> SelfAttention:
        # q comes multiplied by the scale, with an addition of 0 that exporters write beside it.
        scores = self.producer(softmax.input[0], "MatMul")
        zero = self.producer(scores.input[0], "Add")
        scaled = self.producer(zero.input[0], "Mul")
        if self.constant(zero.input[1]).any():
            raise _Mismatch
        sliced = self.producer(self.producer(scaled.input[0], "Squeeze").input[0], "Slice")
        turned = self.producer(sliced.input[0], "Transpose")
        split = self.producer(turned.input[0], "Reshape")
        _, _, three, heads, _ = self.constant(split.input[1]).tolist()
        if three != 3 or list(attribute(turned, "perm")) != [2, 0, 3, 1, 4]:
            raise _Mismatch
        source, w_in, b_in = self.affine(split.input[0], "MatMul")
        joined = self.user(self.user(softmax.output[0], "MatMul").output[0], "Transpose")
        product = self.user(self.user(joined.output[0], "Reshape").output[0], "MatMul")
        result = self.user(product.output[0], "Add").output[0]
        _, w_out, b_out = self.affine(result, "MatMul")
        # MatMul has weights as (in, out); linear as (out, in).
        matrices = [np.ascontiguousarray(w_in.T), b_in, np.ascontiguousarray(w_out.T), b_out]
        return SelfAttention(
            self.origin(source), result, *matrices, heads, float(self.constant(scaled.input[1]).item())
        )


def attribute(node: Any, name: str, default: Any = None) -> Any:
    for a in node.attribute:
        if a.name == name:
            return onnx.helper.get_attribute_value(a)
    return default
