"""A cache of keys and values for generation: one contiguous piece of memory for each sequence."""

from __future__ import annotations

from typing import Any

import numpy as np

from regard import _arrays, _checks, _store
from regard.dot_product import attention
from regard.sequences import attention_paged


class KVCache(_store.Cache):
    """Keys and values of `batch` sequences, each of its own length up to `capacity` tokens.

    Parameters
    ----------
    batch, heads_kv, capacity, dim_qk : int
    dim_v : int, optional
        Default: dim_qk.
    dtype : dtype or its name, optional
        What the cache stores: float32, float64, float16, bfloat16, int8 or float8_e4m3fn. int8 and
        float8 (ml_dtypes) hold x / scale with one float32 scale for each token and head, the
        largest magnitude over 127 (448). Default: the dtype of `like`, or float32.
    like : array, optional
        An array whose dtype and device the cache takes: beside CuPy's arrays and PyTorch's tensors
        on a GPU it lives there, in memory of theirs.
    cos, sin : array, (max_positions, pairs), optional
        Rotary tables, held as float32: append then turns keys by their place in the sequence, as
        regard.rotary_embedding does. Queries are turned by whoever makes them.
    interleaved : bool
        How rotary_embedding pairs dimensions, for these tables and those given to append.

    Attributes
    ----------
    lengths : int64 array, (batch,)
        A copy: how many tokens each sequence has.
    key, value : array, (batch, heads_kv, capacity, dim)
        Read-only views of the memory (on a GPU the memory itself, float8 as bytes); what lies beyond a length is
        unspecified.
    key_scales, value_scales : float32 array, (batch, heads_kv, capacity), or None
        x = stored number * scale.
    batch, heads_kv, capacity, dim_qk, dim_v : int
        As given.
    dtype : str
        The name of what is stored.
    nbytes : int
        Memory of keys, values and scales.

    Notes
    -----
    A call that raises leaves the cache as it was. Any number of threads may attend at once, but
    only while none appends, truncates or reorders.
    """

    def __init__(
        self,
        batch: int,
        heads_kv: int,
        capacity: int,
        dim_qk: int,
        dim_v: int | None = None,
        dtype: Any = None,
        like: Any = None,
        *,
        cos: Any = None,
        sin: Any = None,
        interleaved: bool = False,
    ) -> None:
        self.batch, self.heads_kv = _checks.count("batch", batch), _checks.count("heads_kv", heads_kv)
        self.capacity, self.dim_qk = _checks.count("capacity", capacity), _checks.count("dim_qk", dim_qk, 1)
        self.dim_v = self.dim_qk if dim_v is None else _checks.count("dim_v", dim_v)
        leading = {"batch": self.batch, "heads_kv": self.heads_kv, "capacity": self.capacity}
        self._store = _store.Store("KVCache", leading, self.dim_qk, self.dim_v, dtype, like, cos, sin, interleaved)
        self._pages: dict[str, Any] | None = None  # as soon as a step wants them
        self._set_lengths(np.zeros(self.batch, np.int64))

    def _set_lengths(self, lengths: np.ndarray) -> None:
        held = lengths.tolist()  # a few sequences are the rule, where NumPy's maximum takes 2 us, of a step's 8
        self._lengths, self._longest = lengths, max(held, default=0)
        self._even = min(held, default=0) == self._longest

    @property
    def lengths(self) -> np.ndarray:
        """How many tokens each sequence has: a copy."""
        return self._lengths.copy()

    @property
    def key(self) -> Any:
        """Stored keys, (batch, heads_kv, capacity, dim_qk)."""
        return _store.read_only(self._store.key)

    @property
    def value(self) -> Any:
        """Stored values, (batch, heads_kv, capacity, dim_v)."""
        return _store.read_only(self._store.value)

    def __repr__(self) -> str:
        return (
            f"KVCache(batch={self.batch}, heads_kv={self.heads_kv}, capacity={self.capacity}, dim_qk={self.dim_qk}, "
            f"dim_v={self.dim_v}, dtype={self.dtype!r}, lengths={self._lengths.tolist()})"
        )

    def append(
        self,
        key: Any,
        value: Any,
        lengths: Any = None,
        *,
        positions: Any = None,
        cos: Any = None,
        sin: Any = None,
        layout: str = "bhsd",
    ) -> None:
        """Add tokens at each sequence's end, converted to the cache's dtype.

        Parameters
        ----------
        key : array, (batch, heads_kv, len, dim_qk)
            float32, float64, float16 or bfloat16, whatever the cache stores; any strides.
        value : array, (batch, heads_kv, len, dim_v)
            Likewise, of its own dtype.
        lengths : int32 or int64 array, (batch,), optional
            How many of the len tokens, from the first on, each sequence takes. Default: all.
        positions : int32 or int64 array, (len,) or (batch, len), optional
            Rows of the rotary tables. Default: each token's place in its sequence.
        cos, sin : array, (max_positions, pairs) or (batch, len, pairs), optional
            In place of the tables the cache was made with: float32 or key's dtype.
        layout : "bhsd" or "bshd"
            The order of the axes of key and value.

        Raises
        ------
        TypeError, ValueError
            Naming the argument; also where a sequence would grow beyond the capacity. The cache is
            then as it was.
        """
        _checks.choice("layout", layout, _checks.LAYOUTS)
        length = _store.length_of(key, layout)
        added: Any = length
        if lengths is not None:
            added = _store.indices("lengths", lengths, "batch", self.batch, length, "len")
        after = self._lengths + added
        if self._longest + length > self.capacity and after.max(initial=0) > self.capacity:
            b = int((after > self.capacity).argmax())
            held = int(self._lengths[b])
            raise ValueError(
                f"append: expected at most capacity = {self.capacity} tokens a sequence, got {after[b]} "
                f"({held} held and {after[b] - held} new) for sequence {b}"
            )
        places = slots = self._lengths[:, None] if length == 1 else self._lengths[:, None] + np.arange(length)
        if lengths is not None:
            taken = slots < after[:, None]
            places, slots = np.where(taken, places, 0), np.where(taken, slots, -1)
        store = self._store
        views = (store.key, store.value, store.key_scales, store.value_scales)
        store.write(views, key, value, slots, places, (cos, sin, positions), False, layout)
        if lengths is None:  # as _set_lengths(after), in a step of decoding's most frequent case
            self._lengths, self._longest = after, self._longest + (length if self.batch else 0)
        else:
            self._set_lengths(after)

    def attend(self, query: Any, **options: Any) -> Any:
        """Attention of `query` over all that the cache holds; nothing of it is copied.

        Parameters
        ----------
        query : array, (batch, heads, len_q, dim_qk)
            float32, float64, float16 or bfloat16, whatever the cache stores. Those of the tokens
            that were appended last: "causal" and "window" align the last query
            with the last key of its sequence. For tree masks give mask=, (len_q, len_kv) or what
            broadcasts, where len_kv is the longest length.
        **options
            Those of regard.attention, but key_lengths; alignment is "lower_right".

        Returns
        -------
        As regard.attention: of the query's kind and dtype.

        Raises
        ------
        TypeError, ValueError
            Naming the argument, what was expected and what came.
        """
        layout = _store.attend_options(options, ("key_lengths", "key_scales", "value_scales"))
        try:
            return self._attention(query, layout, {**options, "alignment": "lower_right"})
        except (TypeError, ValueError):
            _store.check_query(query, "batch", self.batch, self.heads_kv, self.dim_qk, layout)
            raise

    def _attention(self, query: Any, layout: str, options: dict[str, Any]) -> Any:
        longest, store = self._longest, self._store
        dtype = getattr(query, "dtype", store.key.dtype)
        if dtype == store.key.dtype or _arrays.name_of_dtype(dtype) == self.dtype:
            key, value = store.key[:, :, :longest], store.value[:, :, :longest]
            if layout == "bshd":
                key, value = key.swapaxes(1, 2), value.swapaxes(1, 2)
            if not self._even:
                options["key_lengths"] = self._lengths
            return attention(query, key, value, **options)
        if self._pages is None:
            self._pages = self._as_pages()
        return attention_paged(query, **self._pages, key_lengths=self._lengths, **options)

    def _as_pages(self) -> dict[str, Any]:
        """The arrays as the kernels of pages take them, which read any dtype: each sequence is one page."""
        store = self._store

        def paged(x: Any) -> Any:  # (batch, capacity, heads_kv, ...); a page holds one token or more
            if self.capacity == 0:
                return store.zeros((self.batch, 1, self.heads_kv, *x.shape[3:]), x.dtype)
            return x.swapaxes(1, 2)

        pages = {"key_pages": store.numbers(paged(store.key)), "value_pages": store.numbers(paged(store.value))}
        if store.quantised:
            pages |= {"key_scales": paged(store.key_scales), "value_scales": paged(store.value_scales)}
        return {**pages, "page_table": np.arange(self.batch)[:, None]}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_pages": None}  # views of the arrays, which a deep copy would take apart from them

    def truncate(self, lengths: Any) -> None:
        """Forget the tokens from `lengths` on.

        Parameters
        ----------
        lengths : int, or int32 or int64 array, (batch,)
            From 0 to each sequence's own length.
        """
        length = _store.one_number("lengths", lengths)
        if length is not None:
            lengths = np.full(self.batch, length, np.int64)
            if length <= min(self._lengths.tolist(), default=0):
                self._set_lengths(lengths)
                return
        self._set_lengths(_store.indices("lengths", lengths, "batch", self.batch, self._lengths, "the length held"))

    def reorder(self, indices: Any) -> None:
        """Let each sequence b go on from what sequence indices[b] holds, as beam search needs.

        As many sequences as there are indices: `batch` may grow or shrink. Where it stays, only rows that
        change are copied (one row's tokens may serve many); regard.PagedKVCache shares them instead.

        Parameters
        ----------
        indices : int32 or int64 array, (n,)
            From 0 to batch - 1.
        """
        shape = () if isinstance(indices, type) else getattr(indices, "shape", None) or np.shape(indices)
        n = int(shape[0]) if shape else 1
        source = _store.indices("indices", indices, "n", n, self.batch - 1, "batch - 1")
        if n == self.batch:
            changed = np.flatnonzero(source != np.arange(n))
            self._store.copy(source[changed], changed, int(self._lengths[source[changed]].max(initial=0)))
        else:
            self._store.take(source, int(self._lengths[source].max(initial=0)))
            self.batch, self._pages = n, None
        self._set_lengths(self._lengths[source])
