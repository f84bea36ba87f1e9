"""Transformer stacks of regard.nn one step at a time, with what earlier steps computed kept."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from regard import _arrays, dense
from regard._checks import describe
from regard.cache import KVCache
from regard.dot_product import attention
from regard.nn.attention import MultiheadAttention, lengths_of
from regard.nn.transformer import TransformerDecoder, TransformerEncoder


class CachedDecoder:
    """A TransformerDecoder, or a causal TransformerEncoder, as a Decoder of regard.nn.generate.

    It runs, and keeps what it keeps, where the arrays that `embed` gives are: NumPy's, or CuPy's on a GPU.
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
        is computed in; tokens and positions are NumPy's. Where rows have unequal lengths, what stands
        beyond a row's end is not used, and its positions go up to max_len - 1.
    project : callable
        (rows, d_model), after the stack's norm -> logits (rows, vocabulary).
    max_len : int
        Room for that many tokens in each row, prompt and generated together; no more than max_positions
        where layers have a RotaryEmbedding.
    rows : int, optional
        How many sequences there are at first; default the memory's batch.
    cache_dtype : str or dtype, optional
        What keys and values of self-attention are kept in, as in KVCache; default the embeddings' dtype.

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
        cache_dtype: Any = None,
    ) -> None:
        if not isinstance(stack, (TransformerDecoder, TransformerEncoder)):
            raise TypeError(f"stack: expected a TransformerDecoder or TransformerEncoder, got {describe(stack)}")
        if isinstance(stack, TransformerDecoder) != (memory is not None):
            needs = "a memory" if memory is None else "no memory"
            raise TypeError(f"memory: expected {needs} with {type(stack).__name__}")
        self._layers, self._norm = list(stack.layers), stack.norm
        self._embed, self._project, self.max_len, self._cache_dtype = embed, project, max_len, cache_dtype
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
            memory = _own(memory)
            if memory.ndim == 3 and not self._layers[0].self_attn.batch_first:
                memory = memory.swapaxes(0, 1)
            with _arrays.current_device("CachedDecoder", memory):
                self._memory = _Memory(self._layers, memory, memory_key_padding_mask)
        elif rows is None:
            raise TypeError("rows: expected how many sequences there are, which no memory says")
        self._lengths = np.zeros(len(memory) if rows is None else rows, np.int64)
        if self._memory is not None and len(self._lengths) != len(memory):
            raise ValueError(f"rows: expected the memory's batch, {len(memory)}, got {rows}")
        self._caches: list[KVCache] = []  # of the dtype that the first step's embeddings have

    @property
    def lengths(self) -> np.ndarray:
        """How many tokens each row has taken, int64 (rows,)."""
        return self._lengths.copy()

    def step(self, tokens: np.ndarray, lengths: np.ndarray | None = None) -> Any:
        """Take tokens (rows, len), of which lengths (rows,) count (default all): logits (rows, vocabulary)."""
        return self._step(tokens, lengths, each=False)

    def step_each(self, tokens: np.ndarray, lengths: np.ndarray | None = None) -> Any:
        """The same, with the logits that follow each token, (rows, len, vocabulary): to score or to check a draft.

        What stands beyond a row's end has no meaning.
        """
        return self._step(tokens, lengths, each=True)

    def _step(self, tokens: np.ndarray, lengths: np.ndarray | None, each: bool) -> Any:
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
        span = _Span(added, length, positions)
        x = self._embed(tokens, positions)
        with _arrays.current_device("CachedDecoder", x):
            if not self._caches:
                if self._memory is not None:
                    self._memory.check_beside(x)
                self._caches = [self._cache_for(layer.self_attn, rows, x) for layer in self._layers]
            x = self._through_layers(x, span)
            self._lengths = before + added
            if each:
                x = x.reshape(rows * length, x.shape[-1])
            elif length == 1:
                x = x[:, 0]
            else:
                x = x[_arrays.beside(x, np.arange(rows)), _arrays.beside(x, added - 1)]
            logits = self._project(x if self._norm is None else self._norm.forward(x))
            return logits.reshape(rows, length, logits.shape[-1]) if each else logits

    def _through_layers(self, x: Any, span: _Span) -> Any:
        for i, (layer, cache) in enumerate(zip(self._layers, self._caches, strict=True)):
            x = self._self_attention(layer, x, cache, span)
            if self._memory is not None:
                x = self._cross_attention(layer, x, self._memory, i)
                x = layer._joined(x, layer.norm3, layer._feed_forward)
            else:
                x = layer._joined(x, layer.norm2, layer._feed_forward)
        return x

    def truncate(self, lengths: Any) -> None:
        """Forget what rows took from `lengths` on: an int, or integers (rows,), from 0 to each row's own length."""
        for cache in self._caches:
            cache.truncate(lengths)
        if self._caches:
            self._lengths = self._caches[0].lengths
        elif np.any(np.asarray(lengths) != 0):
            raise ValueError(f"lengths: expected 0, because no token was taken yet, got {lengths}")

    def select(self, rows: np.ndarray) -> None:
        """Go on with these rows in this order, each left out, kept or repeated."""
        if len(rows) == len(self._lengths) and np.array_equal(rows, np.arange(len(rows))):
            return
        for cache in self._caches:
            cache.reorder(rows)
        self._lengths = self._lengths[rows]
        if self._memory is not None:
            self._memory.select(rows)

    def _cache_for(self, module: MultiheadAttention, rows: int, x: Any) -> KVCache:
        interleaved = module.rotary is not None and module.rotary.interleaved
        return KVCache(
            rows, module.num_heads_kv, self.max_len, module.head_dim, dtype=self._cache_dtype, like=x,
            interleaved=interleaved,
        )  # fmt: skip

    @staticmethod
    def _self_attention(layer: Any, x: Any, cache: KVCache, span: _Span) -> Any:
        def attend(y: Any) -> Any:
            q, k, v = layer.self_attn._project(y, y, y)  # (rows, len, heads, dim)
            cos = sin = None
            if layer.self_attn.rotary is not None:  # keys are turned on their way into the cache
                q = layer.self_attn._turned("query", q, span.positions)
                cos, sin = layer.self_attn.rotary.tables(k)
            cache.append(k, v, span.lengths, cos=cos, sin=sin, layout="bshd")
            attended = cache.attend(q, layout="bshd", **span.options, **layer.self_attn._scoring)
            return layer.self_attn.out_proj.forward(attended.reshape(y.shape))

        return layer._joined(x, layer.norm1, attend)

    @staticmethod
    def _cross_attention(layer: Any, x: Any, memory: _Memory, i: int) -> Any:
        def attend(y: Any) -> Any:
            return layer.multihead_attn.out_proj.forward(memory.attend(i, layer.multihead_attn, y))

        return layer._joined(x, layer.norm2, attend)


class _Span:
    """A step's tokens, at `positions`, of whose `length` each row takes `added`; lengths is None where all are."""

    def __init__(self, added: np.ndarray, length: int, positions: np.ndarray) -> None:
        self.positions = positions
        self.lengths = None if (added == length).all() else added
        self.options: dict[str, Any] = {}
        if self.lengths is not None:
            self.options["query_lengths"] = self.lengths
        if length > 1:
            self.options["causal"] = True


def _own(x: Any) -> Any:
    """An array of CuPy as it is, any other as NumPy's."""
    return x if _arrays.is_array(x) else _arrays.numpy_view("CachedDecoder", x)


class _Memory:
    """The memory's keys and values of each layer, projected once: (sources, len, heads, dim).

    Rows that stem from one source, such as beam search's, stand side by side and are attended as the
    queries of one sequence, so that its keys are read once for all of them.
    """

    def __init__(self, layers: list[Any], memory: Any, padding: Any) -> None:
        width = layers[0].self_attn.embed_dim
        if memory.ndim != 3 or memory.shape[-1] != width:
            raise ValueError(f"memory: expected shape (batch, len, {width}), got {describe(memory)}")
        batch, length, _ = memory.shape
        self._options = _seen(padding, batch, length, memory)
        self._kv = [_projected(layer.multihead_attn, memory) for layer in layers]
        self._sources = np.arange(batch)  # of each row, an index into self._kv
        self._each = 1

    def check_beside(self, x: Any) -> None:
        if _arrays.device_of(x) != _arrays.device_of(self._kv[0][0]):
            raise TypeError("embed: expected it to give arrays on the device of memory")

    def attend(self, layer: int, module: MultiheadAttention, x: Any) -> Any:
        """x (rows, len, d_model) -> the same shape, heads joined and not projected."""
        k, v = self._kv[layer]
        packed = module._packed_projection(module._weights_for("query", x), "q")
        q = dense.linear(x, packed).reshape(len(k), self._each * x.shape[1], module.num_heads, module.head_dim)
        return attention(q, k, v, layout="bshd", **self._options).reshape(x.shape)

    def select(self, rows: np.ndarray) -> None:
        sources = self._sources[rows]
        starts = np.flatnonzero(np.diff(sources, prepend=-1))
        each = len(sources) // len(starts) if len(starts) else 1
        if np.array_equal(starts, np.arange(len(starts)) * each) and len(starts) * each == len(sources):
            chosen, self._each = sources[starts], each
        else:
            chosen, self._each = sources, 1
        kept = self._kv[0][0]
        if not np.array_equal(chosen, np.arange(len(kept))):
            with _arrays.current_device("CachedDecoder", kept):
                there = _arrays.beside(kept, chosen)
                self._kv = [(_by_heads(k[there]), _by_heads(v[there])) for k, v in self._kv]
                # Lengths stay on the host.
                self._options = {n: x[_arrays.beside(x, chosen)] for n, x in self._options.items()}
        self._sources = np.repeat(np.arange(len(chosen)), self._each)


def _projected(module: MultiheadAttention, memory: Any) -> tuple[Any, Any]:
    """Keys and values (batch, len, heads, dim)."""
    packed = module._packed_projection(module._weights_for("memory", memory), "kv")
    kv = dense.linear(memory, packed).reshape(*memory.shape[:2], 2 * module.num_heads_kv, module.head_dim)
    return _by_heads(kv[:, :, : module.num_heads_kv]), _by_heads(kv[:, :, module.num_heads_kv :])


def _by_heads(x: Any) -> Any:
    """x (batch, len, heads, dim) with a head's rows in one stretch.

    They are read once a token: rows apart take 2 to 4 times as long.
    """
    return _arrays.namespace(x).ascontiguousarray(x.swapaxes(1, 2)).swapaxes(1, 2)


def _seen(padding: Any, batch: int, length: int, memory: Any) -> dict[str, Any]:
    """A padding mask as an option of regard.attention; one that only hides ends is read as lengths."""
    if padding is None:
        return {}
    padding = _own(padding)
    if padding.dtype != np.bool_ or padding.shape != (batch, length):
        expected = f"a bool array (True = ignore) of shape ({batch}, {length})"
        error = ValueError if padding.dtype == np.bool_ else TypeError
        raise error(f"memory_key_padding_mask: expected {expected}, got {describe(padding)}")
    lengths = lengths_of(padding)
    if lengths is not None:
        return {"key_lengths": lengths}
    return {"mask": _arrays.beside(memory, ~padding[:, None, None])}
