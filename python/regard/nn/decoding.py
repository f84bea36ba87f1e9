"""Transformer stacks of regard.nn one step at a time, with what earlier steps computed kept."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from regard import _arrays, dense
from regard._checks import describe
from regard.dot_product import attention
from regard.nn.attention import MultiheadAttention, lengths_of
from regard.nn.transformer import TransformerDecoder, TransformerEncoder


class CachedDecoder:
    """A TransformerDecoder, or a causal TransformerEncoder, as a Decoder of regard.nn.generate.

    Keys and values of self-attention are kept from step to step; those of the memory are projected
    once, and all sequences that stem from one row of the memory read them together.

    Parameters
    ----------
    stack : TransformerDecoder or TransformerEncoder
        An encoder makes a model without a memory: each layer's self-attention is causal.
    memory : array, (batch, len, d_model), optional
        What a TransformerDecoder attends to. (len, batch, d_model) where the stack is not batch_first.
    memory_key_padding_mask : bool array, (batch, len), optional
        True = this position of the memory is padding, as in TransformerDecoder.forward.
    embed : callable
        (tokens int64 (rows, len), positions int64 (rows, len)) -> (rows, len, d_model), whose dtype
        is computed in. Where rows have unequal lengths, what stands behind a row's end is not used, and
        its positions go up to max_len - 1.
    project : callable
        (rows, d_model), behind the stack's norm -> logits (rows, vocabulary).
    max_len : int
        Room for that many tokens in each row, prompt and generated together; no more than max_positions
        where layers have a RotaryEmbedding.
    rows : int, optional
        How many sequences there are at first; default the memory's batch.

    Raises
    ------
    TypeError, ValueError
        Naming the argument, what was expected and what came.
    """

    def __init__(
        self,
        stack: TransformerDecoder | TransformerEncoder,
        memory: Any = None,
        memory_key_padding_mask: Any = None,
        *,
        embed: Callable[[np.ndarray, np.ndarray], Any],
        project: Callable[[np.ndarray], Any],
        max_len: int,
        rows: int | None = None,
    ) -> None:
        if not isinstance(stack, (TransformerDecoder, TransformerEncoder)):
            raise TypeError(f"stack: expected a TransformerDecoder or TransformerEncoder, got {describe(stack)}")
        if isinstance(stack, TransformerDecoder) != (memory is not None):
            needs = "a memory" if memory is None else "no memory"
            raise TypeError(f"memory: expected {needs} with {type(stack).__name__}")
        self._layers, self._norm = list(stack.layers), stack.norm
        self._embed, self._project, self.max_len = embed, project, max_len
        for layer in self._layers:
            rotary = layer.self_attn.rotary
            if rotary is not None and max_len > rotary.max_positions:
                raise ValueError(
                    f"max_len: expected at most rotary's max_positions = {rotary.max_positions}, got {max_len}"
                )
            if memory is not None and layer.multihead_attn.rotary is not None:
                raise NotImplementedError("stack: no cache of a memory whose keys are turned by rotary")
        self._memory = None
        if memory is not None:
            memory = _arrays.numpy_view("CachedDecoder", memory)
            if memory.ndim == 3 and not self._layers[0].self_attn.batch_first:
                memory = memory.swapaxes(0, 1)
            self._memory = _Memory(self._layers, memory, memory_key_padding_mask)
        elif rows is None:
            raise TypeError("rows: expected how many sequences there are, which no memory says")
        self._lengths = np.zeros(len(memory) if rows is None else rows, np.int64)
        if self._memory is not None and len(self._lengths) != len(memory):
            raise ValueError(f"rows: expected the memory's batch, {len(memory)}, got {rows}")
        self._caches = [_Cache(max_len) for _ in self._layers]

    @property
    def lengths(self) -> np.ndarray:
        """How many tokens each row has taken, int64 (rows,)."""
        return self._lengths.copy()

    def step(self, tokens: np.ndarray, lengths: np.ndarray | None = None) -> Any:
        """Take tokens (rows, len), of which lengths (rows,) count (default all): logits (rows, vocabulary)."""
        rows, length = tokens.shape
        if rows != len(self._lengths) or length < 1:
            raise ValueError(f"tokens: expected shape (rows = {len(self._lengths)}, len >= 1), got {describe(tokens)}")
        added = np.full(rows, length, np.int64) if lengths is None else np.asarray(lengths, np.int64)
        if added.shape != (rows,) or added.min(initial=1) < 1 or added.max(initial=1) > length:
            raise ValueError(f"lengths: expected shape ({rows},) from 1 to len = {length}, got {lengths}")
        before = self._lengths
        if int((before + added).max(initial=0)) > self.max_len:
            raise ValueError(
                f"tokens: expected no more than max_len = {self.max_len} in a row, got {int((before + added).max())}"
            )
        positions = np.minimum(before[:, None] + np.arange(length), self.max_len - 1)
        span = _Span(before, added, length, positions)
        x = self._embed(tokens, positions)
        for i, (layer, cache) in enumerate(zip(self._layers, self._caches, strict=True)):
            x = self._self_attention(layer, x, cache, span)
            if self._memory is not None:
                x = self._cross_attention(layer, x, self._memory, i)
                x = layer._joined(x, layer.norm3, layer._feed_forward)
            else:
                x = layer._joined(x, layer.norm2, layer._feed_forward)
        self._lengths = before + added
        x = x[:, 0] if length == 1 else x[np.arange(rows), added - 1]
        return self._project(x if self._norm is None else self._norm.forward(x))

    def select(self, rows: np.ndarray) -> None:
        """Go on with these rows in this order, each left out, kept or repeated."""
        if len(rows) == len(self._lengths) and np.array_equal(rows, np.arange(len(rows))):
            return
        for cache in self._caches:
            cache.select(rows, self._lengths)
        self._lengths = self._lengths[rows]
        if self._memory is not None:
            self._memory.select(rows)

    @staticmethod
    def _self_attention(layer: Any, x: Any, cache: _Cache, span: _Span) -> Any:
        def attend(y: Any) -> Any:
            q, k, v = layer.self_attn._project(y, y, y)  # (rows, len, heads, dim)
            if layer.self_attn.rotary is not None:  # keys are kept turned
                q = layer.self_attn._turned("query", q, span.positions)
                k = layer.self_attn._turned("key", k, span.positions)
            cache.append(k, v, span)
            return layer.self_attn.out_proj.forward(cache.attend(q, span).reshape(y.shape))

        return layer._joined(x, layer.norm1, attend)

    @staticmethod
    def _cross_attention(layer: Any, x: Any, memory: _Memory, i: int) -> Any:
        def attend(y: Any) -> Any:
            return layer.multihead_attn.out_proj.forward(memory.attend(i, layer.multihead_attn, y))

        return layer._joined(x, layer.norm2, attend)


class _Span:
    """Where a step's tokens lie: behind `before` (rows,) tokens, `added` (rows,) of the `length` given."""

    def __init__(self, before: np.ndarray, added: np.ndarray, length: int, positions: np.ndarray) -> None:
        self.before, self.added, self.length, self.positions = before, added, length, positions
        first = int(before[0]) if len(before) else 0
        self.together = bool((before == first).all() and (added == length).all())
        self.end = first + length if self.together else int((before + added).max(initial=0))
        self.options: dict[str, Any] = {}
        if not self.together:
            self.options = {"key_lengths": before + added, "query_lengths": added}
        if length > 1:
            self.options.update(causal=True, alignment="lower_right")


class _Cache:
    """Keys and values of one layer's self-attention, (rows, heads, capacity, dim)."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._kv: list[np.ndarray] = []

    def append(self, k: np.ndarray, v: np.ndarray, span: _Span) -> None:
        """k, v (rows, len, heads, dim), which go where `span` says."""
        if not self._kv:
            rows, _, heads, _ = k.shape
            self._kv = [np.empty((rows, heads, self._capacity, x.shape[-1]), x.dtype) for x in (k, v)]
        for kept, x in zip(self._kv, (k, v), strict=True):
            if span.together:
                kept[:, :, span.end - span.length : span.end] = x.swapaxes(1, 2)
            else:
                for row, (start, count) in enumerate(zip(span.before, span.added, strict=True)):
                    kept[row, :, start : start + count] = x[row, :count].swapaxes(0, 1)

    def attend(self, q: np.ndarray, span: _Span) -> np.ndarray:
        """q (rows, len, heads, dim) -> the same shape."""
        out = np.empty_like(q, order="C")
        k, v = (x[:, :, : span.end] for x in self._kv)
        attention(q.swapaxes(1, 2), k, v, out=out.swapaxes(1, 2), **span.options)
        return out

    def select(self, rows: np.ndarray, lengths: np.ndarray) -> None:
        end = int(lengths.max(initial=0))
        for i, kept in enumerate(self._kv):
            if len(rows) == len(kept):
                kept[:, :, :end] = kept[rows, :, :end]  # the right side is a copy
            else:
                self._kv[i] = np.empty((len(rows), *kept.shape[1:]), kept.dtype)
                self._kv[i][:, :, :end] = kept[rows, :, :end]


class _Memory:
    """The memory's keys and values of each layer, projected once: (sources, heads, len, dim).

    Rows that stem from one source, such as beam search's, stand side by side and are attended as the
    queries of one sequence, so that its keys are read once for all of them.
    """

    def __init__(self, layers: list[Any], memory: np.ndarray, padding: Any) -> None:
        width = layers[0].self_attn.embed_dim
        if memory.ndim != 3 or memory.shape[-1] != width:
            raise ValueError(f"memory: expected shape (batch, len, {width}), got {describe(memory)}")
        batch, length, _ = memory.shape
        self._options = _seen(padding, batch, length)
        self._kv = [_projected(layer.multihead_attn, memory) for layer in layers]
        self._sources = np.arange(batch)  # of each row, an index into self._kv
        self._each = 1

    def attend(self, layer: int, module: MultiheadAttention, x: np.ndarray) -> np.ndarray:
        """x (rows, len, d_model) -> the same shape, heads joined and not projected."""
        k, v = self._kv[layer]
        packed = module._packed_projection(module._weights_for("query", x), "q")
        q = dense.linear(x, packed).reshape(len(k), self._each * x.shape[1], module.num_heads, module.head_dim)
        out = np.empty_like(q)
        attention(q.swapaxes(1, 2), k, v, out=out.swapaxes(1, 2), **self._options)
        return out.reshape(x.shape)

    def select(self, rows: np.ndarray) -> None:
        sources = self._sources[rows]
        starts = np.flatnonzero(np.diff(sources, prepend=-1))
        each = len(sources) // len(starts) if len(starts) else 1
        if np.array_equal(starts, np.arange(len(starts)) * each) and len(starts) * each == len(sources):
            chosen, self._each = sources[starts], each
        else:
            chosen, self._each = sources, 1
        if not np.array_equal(chosen, np.arange(len(self._kv[0][0]))):
            self._kv = [(k[chosen], v[chosen]) for k, v in self._kv]
            self._options = {name: x[chosen] for name, x in self._options.items()}
        self._sources = np.repeat(np.arange(len(chosen)), self._each)


def _projected(module: MultiheadAttention, memory: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Keys and values (batch, heads, len, dim).

    Copied so that a head's are in one stretch: read once a token, rows apart take 2 to 4 times as long.
    """
    packed = module._packed_projection(module._weights_for("memory", memory), "kv")
    kv = dense.linear(memory, packed)
    k, v = np.split(kv.reshape(*memory.shape[:2], -1, module.head_dim), 2, axis=2)
    return np.ascontiguousarray(k.swapaxes(1, 2)), np.ascontiguousarray(v.swapaxes(1, 2))


def _seen(padding: Any, batch: int, length: int) -> dict[str, Any]:
    """A padding mask as an option of regard.attention; one that only hides ends is read as lengths."""
    if padding is None:
        return {}
    padding = _arrays.numpy_view("CachedDecoder", padding)
    if padding.dtype != np.bool_ or padding.shape != (batch, length):
        expected = f"a bool array (True = ignore) of shape ({batch}, {length})"
        error = ValueError if padding.dtype == np.bool_ else TypeError
        raise error(f"memory_key_padding_mask: expected {expected}, got {describe(padding)}")
    lengths = lengths_of(padding)
    return {"mask": ~padding[:, None, None]} if lengths is None else {"key_lengths": lengths}
