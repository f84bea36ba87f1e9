"""Multi-head attention (Vaswani et al., 2017), under PyTorch's names and conventions."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from regard import _arrays, dense
from regard._checks import describe
from regard._options import checked_softcap, window_sides
from regard.dot_product import attention, scores
from regard.nn._workspace import scratch
from regard.nn.linear import Linear
from regard.nn.module import Memory, Module, constant, normal, xavier_uniform
from regard.nn.position import RotaryEmbedding


class MultiheadAttention(Module):
    """``concat(head_1 .. head_n) out_proj``, each head attending with its own projections.

    Parameters
    ----------
    embed_dim, num_heads : int
        Each head has embed_dim / num_heads dimensions.
    dropout : float
        PyTorch's word; without effect, because modules are always in evaluation mode.
    bias : bool
        Whether projections have biases.
    add_bias_kv : bool
        One more key and value, learned (bias_k, bias_v), after the others.
    add_zero_attn : bool
        One more key and value of zeros after those.
    kdim, vdim : int, optional
        Widths of key and value (default embed_dim). Where both are embed_dim, the projections are
        one weight, in_proj_weight (embed_dim + 2 heads_kv head_dim, embed_dim: without num_heads_kv,
        3 embed_dim rows); else q_proj_weight, k_proj_weight and v_proj_weight.
    batch_first : bool
        Inputs and outputs are (batch, len, embed_dim) instead of (len, batch, embed_dim).
    num_heads_kv : int, optional
        Grouped-query attention (Ainslie et al., 2023), which PyTorch's module lacks: so many heads of
        keys and values (default num_heads), each shared by num_heads / num_heads_kv heads of queries.
    rotary : RotaryEmbedding, optional
        Turns each head of the projected queries and keys by its token's position (Su et al., 2021); not
        the keys of add_bias_kv and add_zero_attn, which have none. Its dim is at most head_dim.
    window : (left, right), optional
        How many keys either side of its own place a query sees (Beltagy et al., 2020), None = unlimited; not together
        with add_bias_kv and add_zero_attn, whose keys have no place.
    softcap : float, optional
        Scores become softcap * tanh(score / softcap).

    Notes
    -----
    Where query, key and value are one array, a single packed product projects them, and heads are
    read in place. Which products there are depends on which inputs are the same: a layer says what its
    attention will see, and weights are packed when loaded; alone, they are packed at the first call.

    Where PyTorch gives NaN, for a query that may attend to no key, the attention here is 0 (and
    the output out_proj's bias), as are its weights.
    """

    _float32_serves_16_bit = ("cpu",)
    _holds = True

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: Any = None,
        dtype: Any = None,
        *,
        num_heads_kv: int | None = None,
        rotary: RotaryEmbedding | None = None,
        window: tuple[int | None, int | None] | None = None,
        softcap: float | None = None,
    ) -> None:
        super().__init__(device, dtype)
        if embed_dim <= 0 or num_heads <= 0 or embed_dim % num_heads:
            raise ValueError(f"embed_dim: expected a positive multiple of num_heads = {num_heads}, got {embed_dim}")
        self.embed_dim, self.num_heads, self.head_dim = embed_dim, num_heads, embed_dim // num_heads
        self.num_heads_kv = num_heads if num_heads_kv is None else num_heads_kv
        if self.num_heads_kv <= 0 or num_heads % self.num_heads_kv:
            raise ValueError(f"num_heads_kv: expected a divisor of num_heads = {num_heads}, got {num_heads_kv}")
        if rotary is not None and not isinstance(rotary, RotaryEmbedding):
            raise TypeError(f"rotary: expected None or regard.nn.RotaryEmbedding, got {describe(rotary)}")
        if rotary is not None and rotary.dim > self.head_dim:
            raise ValueError(f"rotary: expected dim <= embed_dim / num_heads = {self.head_dim}, got {rotary.dim}")
        self.rotary = rotary
        # Options of regard.attention that every call has.
        self._scoring: dict[str, Any] = {}
        if window is not None:
            window_sides(False, window)
            if add_bias_kv or add_zero_attn:
                raise ValueError(f"window: expected None with add_bias_kv or add_zero_attn, got {window!r}")
            self._scoring["window"] = tuple(window)
        if softcap is not None:
            self._scoring["softcap"] = checked_softcap(softcap)
        self.dropout, self.batch_first, self.add_zero_attn = dropout, batch_first, add_zero_attn
        self.kdim = embed_dim if kdim is None else kdim
        self.vdim = embed_dim if vdim is None else vdim
        self._same_dims = self.kdim == embed_dim == self.vdim
        #: The products that calls will need, as _packed_projection names them: packed together with the rest.
        self.expected: tuple[str, ...] = ()
        # Rows of the projections of query, key and value, and where each begins in in_proj_weight and in_proj_bias.
        kv_dim = self.num_heads_kv * self.head_dim
        self._rows = (0, embed_dim, embed_dim + kv_dim, embed_dim + 2 * kv_dim)
        for name, rows, width in (("q", embed_dim, embed_dim), ("k", kv_dim, self.kdim), ("v", kv_dim, self.vdim)):
            if self._same_dims:
                setattr(self, f"{name}_proj_weight", None)
            else:
                self.add_parameter(f"{name}_proj_weight", (rows, width), xavier_uniform(rows, width))
        all_rows = self._rows[3]
        if self._same_dims:
            self.add_parameter("in_proj_weight", (all_rows, embed_dim), xavier_uniform(all_rows, embed_dim))
        else:
            self.in_proj_weight = None
        if bias:
            self.add_parameter("in_proj_bias", (all_rows,), constant(0.0, all_rows))
        else:
            self.in_proj_bias = None
        for name in ("bias_k", "bias_v"):
            if add_bias_kv:
                self.add_parameter(name, (1, 1, kv_dim), normal(math.sqrt(2.0 / (kv_dim + 1)), 1, 1, kv_dim))
            else:
                setattr(self, name, None)
        self.out_proj = Linear(embed_dim, embed_dim, bias, device, dtype)

    def forward(
        self,
        query: Any,
        key: Any,
        value: Any,
        key_padding_mask: Any = None,
        need_weights: bool = True,
        attn_mask: Any = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
        *,
        key_mask: Any = None,
        residual: Any = None,
        out: Any = None,
        positions: Any = None,
        key_positions: Any = None,
    ) -> tuple[Any, Any]:
        """Attend from query to key and value.

        Parameters
        ----------
        query : array, (len_q, batch, embed_dim)
            With batch_first (batch, len_q, embed_dim); unbatched (len_q, embed_dim).
        key : array, (len_kv, batch, kdim) and so on
        value : array, (len_kv, batch, vdim) and so on
        key_padding_mask : array, (batch, len_kv) or unbatched (len_kv,), optional
            Bool: True = this key is padding, to be ignored. Floats are added to the scores.
        need_weights : bool
            Return the attention weights too. They take a matrix of len_q x len_kv, not averaged one for each head, and
            time in proportion, beside the attention itself, which never holds one; False is faster.
        attn_mask : array, (len_q, len_kv) or (batch * num_heads, len_q, len_kv), optional
            Bool: True = this query does not see this key. Floats are added to the scores.
        average_attn_weights : bool
            Weights are averaged over the heads.
        is_causal : bool
            Query i sees keys 0 to i. An attn_mask given beside it holds as well. (PyTorch asks for the mask that
            says the same; here it may be left out.)
        key_mask : bool array, (batch, len_kv) or unbatched (len_kv,), optional
            In place of key_padding_mask, with the meaning of regard.attention: True = attend to this key.
        residual : array, of query's shape, optional
            Added to the result, in the output projection's pass.
        out : array, of query's shape, optional
            Written and returned.
        positions : int32 or int64 array, (len_q,) or (batch, len_q), optional
            Of the queries, for rotary; default 0, 1, ...
        key_positions : int32 or int64 array, (len_kv,) or (batch, len_kv), optional
            Of the keys; default positions where key is query, else 0, 1, ...

        Returns
        -------
        out : array, of query's shape
        weights : None, or array (batch, len_q, len_kv), not averaged (batch, num_heads, len_q, len_kv)
            Unbatched, both lack the batch. Biases and zeros that were added count in len_kv.

        Raises
        ------
        TypeError, ValueError
            Naming the argument, what was expected and what came.
        """
        batched = self._check(query, key, value)
        if key_mask is not None:
            if key_padding_mask is not None:
                raise ValueError("key_mask: expected None where key_padding_mask is given: they say the same")
            if not _arrays.is_array(key_mask) or key_mask.dtype != np.bool_:
                raise TypeError(f"key_mask: expected a bool array (True = attend), got {describe(key_mask)}")
        if self.rotary is None and (positions is not None or key_positions is not None):
            name, given = ("positions", positions) if positions is not None else ("key_positions", key_positions)
            raise ValueError(f"{name}: expected None without rotary, got {describe(given)}")
        if key is query and key_positions is None:
            key_positions = positions
        with scratch(query) as take:
            q, k, v = self._project(query, key, value, take)
            if not batched:
                q, k, v = q[None], k[None], v[None]
            elif not self.batch_first:
                q, k, v = q.swapaxes(0, 1), k.swapaxes(0, 1), v.swapaxes(0, 1)
            if self.rotary is not None:
                q, k = self._turned("query", q, positions), self._turned("key", k, key_positions)
            given = k.shape[1]
            k, v = self._extended(k, v)
            options = self._masks(q, k, given, key_padding_mask, key_mask, attn_mask, is_causal, batched)
            options.update(self._scoring)
            if "window" in options:
                options["alignment"] = "upper_left"
            joined = take(query.shape, q.dtype)  # written where out_proj reads it
            heads = joined.reshape(*query.shape[:-1], self.num_heads, self.head_dim)
            if not batched:
                heads = heads[None]
            elif not self.batch_first:
                heads = heads.swapaxes(0, 1)
            weights = None
            if not need_weights:
                attention(q, k, v, layout="bshd", out=heads, **options)
            else:
                weights = _attend_with_weights(q, k, v, heads, average_attn_weights, options)
                weights = weights if batched else weights[0]
            return self.out_proj.forward(joined, None, residual, out), weights

    def _check(self, query: Any, key: Any, value: Any) -> bool:
        """Whether inputs are batched; refuses those that do not fit."""
        rank = getattr(query, "ndim", 0)
        order = ("batch", "len_{}") if self.batch_first else ("len_{}", "batch")
        for name, x, width in (
            ("query", query, self.embed_dim),
            ("key", key, self.kdim),
            ("value", value, self.vdim),
        ):
            if x is query and name != "query" and width == self.embed_dim:
                continue
            length = "len_q" if name == "query" else "len_kv"
            axes = [a.format("q" if name == "query" else "kv") for a in order]
            expected = f"({', '.join(axes)}, {width}){f' or ({length}, {width})' if name == 'query' else ''}"
            if not _arrays.is_array(x):
                raise TypeError(f"{name}: expected an array of shape {expected}, got {describe(x)}")
            if rank not in (2, 3) or x.ndim != rank or x.shape[-1] != width:
                raise ValueError(f"{name}: expected shape {expected}, got {describe(x)}")
            if x.dtype != query.dtype:
                raise TypeError(f"{name}: expected the dtype of query, {query.dtype}, got {describe(x)}")
            on_host = type(x) is np.ndarray and type(query) is np.ndarray
            if not on_host and _arrays.device_of(x) != _arrays.device_of(query):
                raise TypeError(f"{name}: expected an array on the device of query, got {describe(x)}")
        if rank == 3 and query.shape[not self.batch_first] != key.shape[not self.batch_first]:
            raise ValueError(
                f"key: expected the batch of query, {query.shape[not self.batch_first]}, got {describe(key)}"
            )
        if key.shape[:-1] != value.shape[:-1]:
            raise ValueError(f"value: expected the batch and length of key, {key.shape[:-1]}, got {describe(value)}")
        return rank == 3

    # ---- Projections ----

    def _pack(self, dtype: Any, memory: Memory) -> Any:
        # Filled by _packed_projection ("qkv", "q", "kv", "k", "v") and _row.
        packed = {"dtype": dtype, "memory": memory}
        for which in self.expected:
            self._packed_projection(packed, which)
        return packed

    def _packed_projection(self, packed: dict[str, Any], which: str) -> Any:
        if which not in packed:
            dtype, memory = packed["dtype"], packed["memory"]
            first = "qkv".index(which[0])
            rows = slice(self._rows[first], self._rows[first + len(which)])
            name = "in_proj_weight" if self._same_dims else f"{which}_proj_weight"
            held = self._holding(name, dtype)
            weight = packed.get(name)
            if weight is None:
                weight = self._parameters[name].put(memory, dtype)
            bias = None if self.in_proj_bias is None else self._parameters["in_proj_bias"].put(memory, dtype)[rows]
            product = dense.pack_linear(weight[rows] if self._same_dims else weight, bias, held=held)
            memory.wait()  # other threads, on streams of their own, find what is here already
            if memory.kind == "gpu" and held == "float32":
                packed[name] = weight  # products use parts of it where it is
            packed[which] = product
        return packed[which]

    def _row(self, packed: dict[str, Any], name: str, dtype: Any) -> Any:
        """The learned key or value, (1, 1, num_heads_kv, head_dim)."""
        key = f"{name} {dtype}"
        if key not in packed:
            row = self._parameters[name].put(packed["memory"], dtype).reshape(1, 1, self.num_heads_kv, self.head_dim)
            packed["memory"].wait()
            packed[key] = row
        return packed[key]

    def _project(self, query: Any, key: Any, value: Any, take: Callable[..., Any] | None = None) -> list[Any]:
        """Projections as views (.., num_heads, head_dim), in as few products as there are inputs.

        `take` answers the memory for them; without it, they are new.
        """
        packed = self._weights_for("query", query)
        groups: tuple[tuple[str, Any], ...]
        if self._same_dims and key is query and value is query:
            groups = (("qkv", query),)
        elif self._same_dims and value is key:
            groups = (("q", query), ("kv", key))
        else:
            groups = (("q", query), ("k", key), ("v", value))
        views: list[Any] = []
        for which, x in groups:
            product = self._packed_projection(packed, which)
            y = None if take is None else take((*x.shape[:-1], product.out_features), x.dtype)
            y = dense.linear(x, product, out=y)
            heads = y.reshape(*x.shape[:-1], y.shape[-1] // self.head_dim, self.head_dim)
            start = 0
            for name in which:
                end = start + (self.num_heads if name == "q" else self.num_heads_kv)
                views.append(heads[..., start:end, :])
                start = end
        return views

    def _turned(self, name: str, x: Any, positions: Any = None) -> Any:
        """x (batch, len, heads, head_dim), the projected `name`, turned by rotary in its place."""
        rotary: Any = self.rotary
        batch, length = x.shape[:2]
        argument = "positions" if name == "query" else "key_positions"
        if positions is None:
            if length > rotary.max_positions:
                raise ValueError(
                    f"{name}: expected at most rotary's max_positions = {rotary.max_positions} tokens, got {length}"
                )
        elif not _arrays.is_array(positions) or positions.dtype not in (np.int32, np.int64):
            raise TypeError(f"{argument}: expected an int32 or int64 array, got {describe(positions)}")
        elif positions.shape not in ((length,), (batch, length)):
            raise ValueError(f"{argument}: expected shape ({length},) or {batch, length}, got {describe(positions)}")
        elif not isinstance(positions, np.ndarray):
            pass  # kernels hold those on a GPU to their range
        elif positions.size and (positions.min() < 0 or positions.max() >= rotary.max_positions):
            raise ValueError(
                f"{argument}: expected 0 to rotary's max_positions - 1 = {rotary.max_positions - 1}, "
                f"got {positions.min()} to {positions.max()}"
            )
        return rotary.forward(x, positions, "bshd", out=x)

    def _extended(self, k: Any, v: Any) -> tuple[Any, Any]:
        """Keys and values (batch, len_kv, num_heads_kv, head_dim) with the learned one and zeros after them."""
        if self.bias_k is None and not self.add_zero_attn:
            return k, v
        extended = []
        xp, weights = _arrays.namespace(k), self._weights_for("key", k)
        for x, name in ((k, "bias_k"), (v, "bias_v")):
            parts = [x]
            if self.bias_k is not None:
                row = self._row(weights, name, x.dtype)
                parts.append(xp.broadcast_to(row, (x.shape[0], 1, *x.shape[2:])))
            if self.add_zero_attn:
                parts.append(xp.zeros((x.shape[0], 1, *x.shape[2:]), x.dtype))
            extended.append(xp.concatenate(parts, axis=1))
        return extended[0], extended[1]

    # ---- Masks ----

    def _masks(
        self,
        q: Any,
        k: Any,
        given: int,
        key_padding_mask: Any,
        key_mask: Any,
        attn_mask: Any,
        is_causal: bool,
        batched: bool,
    ) -> dict[str, Any]:
        """PyTorch's masks as options of regard.attention.

        q is (batch, len_q, heads, dim), k (batch, len_kv, heads_kv, dim), of whose keys `given` came with the call.
        """
        batch, len_q = q.shape[:2]
        added = k.shape[1] - given
        options: dict[str, Any] = {}
        if is_causal and says_causal(attn_mask):
            attn_mask = None
        if is_causal and not added:
            options.update(causal=True, alignment="upper_left")
        elif is_causal:
            hidden = np.arange(given) > np.arange(len_q)[:, None]
            _add_mask(options, _arrays.beside(q, hidden), added, q.dtype)
        if key_padding_mask is not None or key_mask is not None:
            shape = (batch, given) if batched else (given,)
            name, padding = ("key_padding_mask", key_padding_mask) if key_mask is None else ("key_mask", key_mask)
            _check_mask(name, padding, (shape,))
            padding = padding.reshape(batch, given)
            padding = padding if key_mask is None else ~padding
            if padding.dtype == np.bool_ and not added and attn_mask is None:
                lengths_kv = lengths_of(padding)
                if lengths_kv is not None:
                    options["key_lengths"] = lengths_kv
                    return options
            _add_mask(options, _arrays.beside(q, padding[:, None, None]), added, q.dtype)
        if attn_mask is not None:
            per_head = (batch * self.num_heads, len_q, given)
            _check_mask("attn_mask", attn_mask, ((len_q, given), per_head))
            if attn_mask.ndim == 3:
                attn_mask = attn_mask.reshape(batch, self.num_heads, len_q, given)
            _add_mask(options, _arrays.beside(q, attn_mask), added, q.dtype)
        return options


def says_causal(mask: Any) -> bool:
    """Whether a (len_q, len_kv) mask hides exactly what lies right of the diagonal; one on a GPU is not looked at."""
    if not isinstance(mask, np.ndarray) or mask.ndim != 2:
        return False
    hidden = np.arange(mask.shape[1]) > np.arange(mask.shape[0])[:, None]
    if mask.dtype == np.bool_:
        return bool(np.array_equal(mask, hidden))
    return bool(np.array_equal(mask, np.where(hidden, -np.inf, 0.0)))


def lengths_of(padding: Any) -> np.ndarray | None:
    """int64 (batch,), where a bool padding mask (batch, len) hides the ends of sequences and nothing else.

    It is the usual case, and what is never seen is never computed. A mask on a GPU is not looked at.
    """
    if not isinstance(padding, np.ndarray):
        return None
    length = padding.shape[1]
    lengths = (length - np.count_nonzero(padding, axis=1)).astype(np.int64)
    return lengths if np.array_equal(padding, np.arange(length) >= lengths[:, None]) else None


def _check_mask(name: str, mask: Any, shapes: tuple[tuple[int, ...], ...]) -> None:
    expected = " or ".join(map(str, shapes))
    if not _arrays.is_array(mask) or (mask.dtype.kind != "f" and mask.dtype.name not in ("bool", "bfloat16")):
        raise TypeError(
            f"{name}: expected a bool (True = ignore) or float array of shape {expected}, got {describe(mask)}"
        )
    if mask.shape not in shapes:
        raise ValueError(f"{name}: expected shape {expected}, got {describe(mask)}")


def _add_mask(options: dict[str, Any], mask: Any, added: int, dtype: Any) -> None:
    """Joins a mask of PyTorch's with those in `options`; keys that were added at the end are always seen."""
    if added:
        mask = _arrays.namespace(mask).pad(mask, [(0, 0)] * (mask.ndim - 1) + [(0, added)])
    if mask.dtype == np.bool_:
        seen = ~mask
        options["mask"] = seen & options["mask"] if "mask" in options else seen
    else:
        bias = mask.astype(np.float32 if dtype != np.float64 else dtype, copy=False)
        options["bias"] = bias + options["bias"] if "bias" in options else bias


def _attend_with_weights(q: Any, k: Any, v: Any, out: Any, average: bool, options: dict[str, Any]) -> Any:
    """Attention into `out`, (batch, len_q, heads, dim); its weights (batch[, heads], len_q, len_kv)."""
    if average and isinstance(q, np.ndarray):
        attention(q, k, v, layout="bshd", out=out, **options)
        return scores(q.swapaxes(1, 2), k.swapaxes(1, 2), stage="weights", mean_of_heads=True, **options)
    _, weights = attention(q, k, v, layout="bshd", return_weights=True, out=out, **options)
    if not average:
        return weights
    compute = np.float64 if q.dtype == np.float64 else np.float32
    return weights.astype(compute, copy=False).mean(axis=1).astype(q.dtype, copy=False)
