"""A cache of keys and values in pages, which sequences share as far as they begin alike.

Kwon et al., "Efficient memory management for large language model serving with PagedAttention" (2023).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from regard import _checks, _store
from regard.sequences import attention_paged


@dataclasses.dataclass
class _Sequence:
    pages: list[int]
    length: int


class PagedKVCache(_store.Cache):
    """Keys and values of any number of sequences in a pool of pages of `page_size` tokens each.

    A sequence is a number that new_sequence() or fork() gives; its pages need not lie together.
    Forks share pages, counted; a shared page that one of them appends to is copied first.

    Parameters
    ----------
    pages, page_size, heads_kv, dim_qk : int
    dim_v : int, optional
        Default: dim_qk.
    dtype, like, cos, sin, interleaved
        As regard.KVCache has them.

    Attributes
    ----------
    key_pages, value_pages : array, (pages, page_size, heads_kv, dim)
        Read-only views of the memory (on a GPU the memory itself, float8 as bytes); what lies beyond a sequence's
        length is unspecified.
    key_scales, value_scales : float32 array, (pages, page_size, heads_kv), or None
        x = stored number * scale.
    free_pages : int
        Pages that no sequence uses.
    sequences : list of int
        Those that exist, oldest first.
    pages, page_size, heads_kv, dim_qk, dim_v : int
        As given.
    dtype : str
        The name of what is stored.
    nbytes : int
        Memory of keys, values and scales.

    Notes
    -----
    A call that raises leaves the cache as it was. Any number of threads may attend at once, but
    only while none changes the cache.
    """

    def __init__(
        self,
        pages: int,
        page_size: int,
        heads_kv: int,
        dim_qk: int,
        dim_v: int | None = None,
        dtype: Any = None,
        like: Any = None,
        *,
        cos: Any = None,
        sin: Any = None,
        interleaved: bool = False,
    ) -> None:
        self.pages, self.page_size = _checks.count("pages", pages), _checks.count("page_size", page_size, 1)
        self.heads_kv, self.dim_qk = _checks.count("heads_kv", heads_kv), _checks.count("dim_qk", dim_qk, 1)
        self.dim_v = self.dim_qk if dim_v is None else _checks.count("dim_v", dim_v)
        leading = {"pages": self.pages, "page_size": self.page_size, "heads_kv": self.heads_kv}
        self._store = _store.Store("PagedKVCache", leading, self.dim_qk, self.dim_v, dtype, like, cos, sin, interleaved)
        self._users = np.zeros(self.pages, np.int64)  # how many sequences use each page
        self._free = list(range(self.pages - 1, -1, -1))  # taken from the end
        self._sequences: dict[int, _Sequence] = {}
        self._next = 0

    @property
    def key_pages(self) -> Any:
        """Stored keys, (pages, page_size, heads_kv, dim_qk)."""
        return _store.read_only(self._store.key)

    @property
    def value_pages(self) -> Any:
        """Stored values, (pages, page_size, heads_kv, dim_v)."""
        return _store.read_only(self._store.value)

    @property
    def free_pages(self) -> int:
        """Pages that no sequence uses."""
        return len(self._free)

    @property
    def sequences(self) -> list[int]:
        """The sequences that exist, oldest first."""
        return list(self._sequences)

    def __repr__(self) -> str:
        return (
            f"PagedKVCache(pages={self.pages}, page_size={self.page_size}, heads_kv={self.heads_kv}, "
            f"dim_qk={self.dim_qk}, dim_v={self.dim_v}, dtype={self.dtype!r}, free_pages={self.free_pages}, "
            f"sequences={len(self._sequences)})"
        )

    def _found(self, sequences: Any, once: bool = False) -> list[_Sequence]:
        """The sequences of those numbers; with `once`, none may come twice."""
        numbers = _store.numbers("sequences", sequences)
        for place, number in enumerate(numbers):
            if number not in self._sequences:
                raise ValueError(f"sequences: expected sequences of this cache, got {number} at index {place}")
            if once and numbers.index(number) != place:
                raise ValueError(f"sequences: expected each sequence once, got {number} again at index {place}")
        return [self._sequences[number] for number in numbers]

    def new_sequence(self) -> int:
        """A new sequence, without tokens or pages; its number is never used again."""
        return self._add(_Sequence([], 0))

    def _add(self, sequence: _Sequence) -> int:
        number, self._next = self._next, self._next + 1
        self._sequences[number] = sequence
        return number

    def fork(self, sequence: int, length: int | None = None) -> int:
        """A new sequence that begins with the first `length` tokens of another and shares their pages.

        Parameters
        ----------
        sequence : int
        length : int, optional
            From 0 to the sequence's length, the default.
        """
        (source,) = self._found([sequence])
        n = source.length if length is None else _checks.count("length", length)
        if n > source.length:
            raise ValueError(f"length: expected at most {source.length}, the length of sequence {sequence}, got {n}")
        pages = source.pages[: self._pages_of(n)]
        self._users[pages] += 1
        return self._add(_Sequence(pages, n))

    def _pages_of(self, length: int) -> int:
        return -(-length // self.page_size)

    def _release(self, pages: list[int]) -> None:
        for page in pages:
            self._users[page] -= 1
            if self._users[page] == 0:
                self._free.append(page)

    def free(self, sequences: Any) -> None:
        """End sequences: pages that no other one uses are free again.

        Parameters
        ----------
        sequences : int, or a sequence or array of ints, each once
        """
        for sequence in self._found(sequences, once=True):
            self._release(sequence.pages)
        for number in _store.numbers("sequences", sequences):
            del self._sequences[number]

    def truncate(self, sequences: Any, lengths: Any) -> None:
        """Forget the tokens from `lengths` on, and free pages that hold no other.

        Parameters
        ----------
        sequences : int, or a sequence or array of ints, each once
        lengths : int, or int32 or int64 array, (len(sequences),)
            From 0 to each sequence's own length.
        """
        found = self._found(sequences, once=True)
        held = np.array([s.length for s in found], np.int64)
        same = _store.one_number("lengths", lengths)
        if same is not None:
            lengths = np.full(len(found), same, np.int64)
        after = _store.indices("lengths", lengths, "sequences", len(found), held, "the length held")
        for sequence, length in zip(found, after.tolist(), strict=True):
            kept = self._pages_of(length)
            self._release(sequence.pages[kept:])
            del sequence.pages[kept:]
            sequence.length = length

    def lengths(self, sequences: Any) -> np.ndarray:
        """int64 array, (len(sequences),): how many tokens each has."""
        return np.array([s.length for s in self._found(sequences)], np.int64)

    def page_table(self, sequences: Any) -> np.ndarray:
        """int32 array, (len(sequences), pages of the longest): each sequence's pages in order, then 0."""
        found = self._found(sequences)
        table = np.zeros((len(found), max((len(s.pages) for s in found), default=0)), np.int32)
        for row, sequence in zip(table, found, strict=True):
            row[: len(sequence.pages)] = sequence.pages
        return table

    def append(
        self,
        sequences: Any,
        key: Any,
        value: Any,
        lengths: Any = None,
        *,
        positions: Any = None,
        cos: Any = None,
        sin: Any = None,
        layout: str = "bhsd",
    ) -> None:
        """Add tokens at each sequence's end, converted to the cache's dtype, in new pages where needed.

        Parameters
        ----------
        sequences : int, or a sequence or array of ints, each once
            As many as key and value have in their batch.
        key, value, lengths, positions, cos, sin, layout
            As regard.KVCache.append has them.

        Raises
        ------
        TypeError, ValueError
            Naming the argument; also where there are not enough free pages. The cache is then as it was.
        """
        _checks.choice("layout", layout, _checks.LAYOUTS)
        found = self._found(sequences, once=True)
        length = _store.length_of(key, layout)
        added = np.full(len(found), length)
        if lengths is not None:
            added = _store.indices("lengths", lengths, "sequences", len(found), length, "len")
        tables, fresh, copied = self._plan(found, added.tolist())
        before = np.array([s.length for s in found], np.int64)
        taken = np.arange(length) < added[:, None]
        places = np.where(taken, before[:, None] + np.arange(length), 0)
        slots = np.full(places.shape, -1, np.int64)
        for row, (table, where) in enumerate(zip(tables, taken, strict=True)):
            place = places[row, where]
            slots[row, where] = np.asarray(table, np.int64)[place // self.page_size] * self.page_size
            slots[row, where] += place % self.page_size

        # Until the lines after the write, nothing that is written belongs to any sequence.
        for old, new, held in copied:
            for x in self._store.arrays():
                x[new, :held] = x[old, :held]
        store = self._store
        key_slots, value_slots, key_scales, value_scales = (
            self._as_slots(x) for x in (store.key, store.value, store.key_scales, store.value_scales)
        )
        views = (key_slots, value_slots, key_scales, value_scales)
        store.write(views, key, value, slots, places, (cos, sin, positions), True, layout)

        del self._free[len(self._free) - len(fresh) :]
        self._users[fresh] = 1
        for old, _, _ in copied:
            self._users[old] -= 1
        for sequence, table, n in zip(found, tables, added.tolist(), strict=True):
            sequence.pages = table
            sequence.length += n

    def _plan(
        self, found: list[_Sequence], added: list[int]
    ) -> tuple[list[list[int]], list[int], list[tuple[int, int, int]]]:
        """The sequences' pages after an append, which of them are fresh, and (old, new, tokens held) to copy."""
        tables: list[list[int]] = []
        fresh: list[int] = []
        copied: list[tuple[int, int, int]] = []
        left: dict[int, int] = {}  # users of a page, once earlier sequences of this call have left it
        missing = 0

        def take() -> int:
            nonlocal missing
            if len(fresh) == len(self._free):
                missing += 1
                return 0
            fresh.append(self._free[-1 - len(fresh)])
            return fresh[-1]

        for sequence, n in zip(found, added, strict=True):
            table = list(sequence.pages)
            held = sequence.length % self.page_size
            if n > 0 and held > 0:
                last = table[-1]
                users = left.get(last, int(self._users[last]))
                if users > 1:
                    left[last] = users - 1
                    table[-1] = take()
                    copied.append((last, table[-1], held))
            table += [take() for _ in range(self._pages_of(sequence.length + n) - len(table))]
            tables.append(table)
        if missing > 0:
            raise ValueError(
                f"append: expected at least {len(fresh) + missing} free pages of {self.page_size} tokens, got "
                f"{len(self._free)}"
            )
        return tables, fresh, copied

    def _as_slots(self, x: Any) -> Any:
        """(pages, page_size, heads_kv, ...) as (1, heads_kv, pages * page_size, ...)."""
        if x is None:
            return None
        return x.reshape(1, self.pages * self.page_size, *x.shape[2:]).swapaxes(1, 2)

    def attend(self, query: Any, sequences: Any, **options: Any) -> Any:
        """Attention of `query` over all that the sequences hold; nothing of it is copied.

        Parameters
        ----------
        query : array, (len(sequences), heads, len_q, dim_qk)
            float32, float64, float16 or bfloat16, whatever the cache stores. Those of the tokens
            that were appended last: "causal" and "window" align the last query
            with the last key of its sequence.
        sequences : int, or a sequence or array of ints
        **options
            Those of regard.attention_paged, but page_table, key_lengths and scales; alignment is "lower_right".

        Returns
        -------
        As regard.attention_paged: of the query's kind and dtype.

        Raises
        ------
        TypeError, ValueError
            Naming the argument, what was expected and what came.
        """
        layout = _store.attend_options(options, ("page_table", "key_lengths", "key_scales", "value_scales"))
        options = {**options, "alignment": "lower_right"}
        table, lengths = self.page_table(sequences), self.lengths(sequences)
        store = self._store
        if store.quantised:
            options |= {"key_scales": store.key_scales, "value_scales": store.value_scales}
        key, value = store.numbers(store.key), store.numbers(store.value)
        try:
            return attention_paged(query, key, value, table, lengths, **options)
        except (TypeError, ValueError):
            _store.check_query(query, "sequences", len(lengths), self.heads_kv, self.dim_qk, layout)
            raise
