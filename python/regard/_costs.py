"""What operations cost at least: arithmetic that the answer needs, bytes that must move. Counts, no measurements."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from regard.block_mask import BlockMask

Arguments = Mapping[str, Any]


class Cost(NamedTuple):
    """Of one call.

    Attributes
    ----------
    flops : float
        A multiply-add is two; activations and norms count by their plain formula.
    exponentials : float
        Of the softmax, which cost more than all else outside of products.
    read : float
        The share of keys and values that is read at all: a window leaves the rest alone.
    """

    flops: float
    exponentials: float = 0.0
    read: float = 1.0


def size(x: Any) -> int:
    """Bytes of an array, or a list of them, of any framework: each element once, though a stride of 0 repeats it."""
    if isinstance(x, (list, tuple)):
        return sum(map(size, x))
    if hasattr(x, "packed"):  # a PackedLinear
        return sum(map(size, (x.packed, x.bias, x.scale)))
    if not hasattr(x, "shape") or not hasattr(x, "dtype"):
        return 0
    strides = x.stride() if callable(getattr(x, "stride", None)) else getattr(x, "strides", None)
    strides = strides or (1,) * len(x.shape)
    item = int(getattr(x, "itemsize", 0) or x.dtype.itemsize)
    return item * math.prod(n for n, stride in zip(x.shape, strides, strict=True) if stride or not n)


class Sequences(NamedTuple):
    """Of one batch: how many queries and keys each sequence has, and which keys a query may see."""

    queries: np.ndarray
    keys: np.ndarray
    left: int | None
    right: int | None
    lower_right: bool

    def ranges(self, n: int, m: int) -> tuple[np.ndarray, np.ndarray]:
        """First and end of the keys that each of n queries sees of m keys."""
        centre = np.arange(n) + (m - n if self.lower_right else 0)
        first = np.zeros(n, np.int64) if self.left is None else np.clip(centre - self.left, 0, m)
        end = np.full(n, m) if self.right is None else np.clip(centre + self.right + 1, first, m)
        return first, end

    def counted(self) -> Iterator[tuple[int, int, int]]:
        """(queries, keys, how many sequences have so many)."""
        lengths, times = np.unique(np.stack((self.queries, self.keys)), axis=1, return_counts=True)
        for n, m, t in zip(*lengths, times, strict=True):
            yield int(n), int(m), int(t)

    def seen(self) -> tuple[float, float]:
        """Pairs of a query and a key it may see, and keys that any query may see, over all sequences."""
        pairs = read = 0.0
        for n, m, times in self.counted():
            first, end = self.ranges(n, m)
            pairs += times * float((end - first).sum())
            read += times * float(end[-1] - first[0]) if n else 0.0
        return pairs, read

    def seen_in_blocks(self, mask: BlockMask) -> tuple[float, float]:
        """The same for one head, where a block mask leaves out what it does not name."""
        batch, heads, len_q, _ = mask.shape
        block_q, block_kv = mask.block_size
        rows = np.repeat(np.arange(len(mask.row_offsets) - 1), np.diff(mask.row_offsets))
        by_head, row = np.divmod(rows, max(-(-len_q // block_q), 1))
        i = (row[:, None] * block_q + np.arange(block_q)).ravel()
        j = np.repeat(mask.columns * block_kv, block_q)
        owner = np.repeat(by_head // max(heads, 1), block_q)
        pairs = 0.0
        for b, (n, m) in enumerate(zip(self.queries, self.keys, strict=True)):
            first, end = self.ranges(int(n), int(m))
            mine = (i < n) & ((owner == b) | (batch == 1))
            overlap = np.minimum(end[i[mine]], j[mine] + block_kv) - np.maximum(first[i[mine]], j[mine])
            pairs += float(np.maximum(overlap, 0).sum())
        used = len(np.unique(np.stack((by_head, mask.columns)), axis=1).T) * block_kv
        read = self.seen()[1]
        return pairs / max(heads, 1), min(read, used / max(batch * heads, 1) * len(self.queries))


def _cost(
    a: Arguments, heads: int, dims: tuple[int, int], queries: np.ndarray, keys: np.ndarray, stored: float
) -> Cost:
    """Of dot-product attention, over the keys that a query may see by window, causality, lengths and block mask.

    A bool mask hides without saving work. `stored` is the keys that key and value have room for.
    """
    left, right = a.get("window") or (None, None)
    right = 0 if a.get("causal") else right
    sequences = Sequences(queries, keys, left, right, a.get("alignment") == "lower_right")
    mask = a.get("mask")
    seen, read = sequences.seen_in_blocks(mask) if type(mask) is BlockMask else sequences.seen()
    pairs = heads * seen
    return Cost(2 * pairs * sum(dims), pairs, min(read / stored, 1.0) if stored else 1.0)


def _query(a: Arguments) -> tuple[int, int, int, int]:
    """(batch, heads, len_q, dim_qk)."""
    batch, heads, len_q, dim = a["query"].shape
    return (batch, len_q, heads, dim) if a.get("layout") == "bshd" else (batch, heads, len_q, dim)


def attention(a: Arguments) -> Cost:
    batch, heads, len_q, dim_qk = _query(a)
    len_kv = a["key"].shape[1 if a.get("layout") == "bshd" else 2]
    return _cost(
        a,
        heads,
        (dim_qk, a["value"].shape[3]),
        _lengths(a.get("query_lengths"), batch, len_q),
        _lengths(a.get("key_lengths"), batch, len_kv),
        batch * len_kv,
    )


def _varlen(a: Arguments) -> Cost:
    total_kv = a["key"].shape[0]
    queries, keys = (
        np.diff(np.asarray(a[name]).astype(np.int64)) if a.get(valid) is None else _lengths(a[valid], 0, 0)
        for name, valid in (("cu_seqlens_q", "query_lengths"), ("cu_seqlens_kv", "key_lengths"))
    )
    _, heads, dim_qk = a["query"].shape
    return _cost(a, heads, (dim_qk, a["value"].shape[2]), queries, keys, total_kv)


def _paged(a: Arguments) -> Cost:
    batch, heads, len_q, dim_qk = _query(a)
    pages, page_size, _, dim_v = a["value_pages"].shape
    queries = _lengths(a.get("query_lengths"), batch, len_q)
    return _cost(a, heads, (dim_qk, dim_v), queries, _lengths(a["key_lengths"], batch, 0), pages * page_size)


def _broadcast(a: Arguments) -> Cost:
    """PyTorch's signature: leading axes broadcast, and one pair of lengths serves all."""
    query, value = a["query"], a["value"]
    lead = np.broadcast_shapes(tuple(query.shape[:-3]), tuple(value.shape[:-3]))
    heads = max([1, *(x.shape[-3] for x in (query, value) if len(x.shape) > 2)])
    (len_q, dim_qk), (len_kv, dim_v) = query.shape[-2:], value.shape[-2:]
    one = np.ones(1, np.int64)
    options = {"causal": a.get("is_causal"), "alignment": "upper_left"}
    return _cost(options, heads * math.prod(lead), (dim_qk, dim_v), one * len_q, one * len_kv, len_kv)


def _lengths(lengths: Any, batch: int, full: int) -> np.ndarray:
    return np.full(batch, full) if lengths is None else np.asarray(lengths).astype(np.int64)


def _projected(x: Any, weight: Any) -> float:
    """Flops of x weight^T, with weight (out, in)."""
    return 0.0 if weight is None else 2.0 * math.prod(x.shape) * weight.shape[0]


#: Operations of tanh(query + key) with its sum over dim, as the kernel does it: exponentials of both sides are taken
#: once, and a pair then costs a product, a division and a multiply-add.
_TANH_OPERATIONS = 8


def _additive(a: Arguments) -> Cost:
    batch, len_q, _ = a["query"].shape
    _, len_kv, dim_v = a["value"].shape
    dim = a["v"].shape[0]
    pairs = float(len_q) * float(_lengths(a.get("key_lengths"), batch, len_kv).sum())
    flops = _projected(a["query"], a.get("w_query")) + _projected(a["key"], a.get("w_key"))
    flops += pairs * (_TANH_OPERATIONS * dim + 2 * dim_v)
    return Cost(flops, pairs)


def _location(a: Arguments) -> Cost:
    batch, len_q, _ = a["query"].shape
    len_kv = a["key"].shape[1]
    dim, filters = a["w_location"].shape
    taps = math.prod(a["location_kernel"].shape) / max(filters, 1)
    plain = _additive(a)
    return plain._replace(flops=plain.flops + 2.0 * batch * len_q * len_kv * filters * (taps + dim))


def _multiplicative(a: Arguments) -> Cost:
    batch, len_q, dim_q = a["query"].shape
    dim_k = a["key"].shape[2]
    _, len_kv, dim_v = a["value"].shape
    pairs = float(len_q) * float(_lengths(a.get("key_lengths"), batch, len_kv).sum())
    projected = 0.0 if a.get("w") is None else 2.0 * batch * len_q * dim_q * dim_k
    return Cost(projected + 2 * pairs * (dim_k + dim_v), pairs)


def _merged(a: Arguments) -> Cost:
    """A multiply-add for each number of each part, an exponential for each of its rows."""
    outs = a["outs"]
    shapes = [tuple(x.shape) for x in outs] if isinstance(outs, (list, tuple)) else [tuple(outs.shape)]
    return Cost(2.0 * sum(map(math.prod, shapes)), float(sum(math.prod(s[:-1]) for s in shapes)))


def _rotary(a: Arguments) -> Cost:
    """Four products and two sums a pair."""
    return Cost(6 * _elements(a) / max(a["x"].shape[-1], 1) * a["cos"].shape[-1])


def _recurrent(a: Arguments) -> Cost:
    """The products with input and state of every step, and an exponential a gate."""
    batch, length, features = a["x"].shape
    gates, hidden = a["w_hidden"].shape
    steps = float(_lengths(a.get("lengths"), batch, length).sum())
    return Cost(2 * steps * gates * (features + hidden), steps * gates)


def _elements(a: Arguments) -> float:
    return float(math.prod(a["x"].shape))


def _mlp(a: Arguments, vectors: int) -> float:
    """The two layers between pooling and gate."""
    return 4.0 * vectors * a["x"].shape[0] * math.prod(a["w_reduce"].shape)


def _spatial(a: Arguments) -> float:
    """Mean and maximum over channels, two planes convolved, and the product with the map."""
    positions = _elements(a) / max(a["x"].shape[3 if a.get("layout") == "nhwc" else 1], 1)
    return 3 * _elements(a) + 2 * positions * math.prod(a["w_spatial"].shape)


#: By the public name; arguments as the function's signature names them.
COSTS: dict[str, Callable[[Arguments], Cost]] = {
    "attention": attention,
    "attention_paged": _paged,
    "attention_varlen": _varlen,
    "scaled_dot_product_attention": _broadcast,
    "additive_attention": _additive,
    "location_sensitive_attention": _location,
    "multiplicative_attention": _multiplicative,
    "gru": _recurrent,
    "lstm": _recurrent,
    "merge_attention": _merged,
    "rotary_embedding": _rotary,
    "linear": lambda a: Cost(2 * _elements(a) * a["weight"].shape[0]),
    "layer_norm": lambda a: Cost(8 * _elements(a)),
    "rms_norm": lambda a: Cost(4 * _elements(a)),
    "global_average_pool": lambda a: Cost(_elements(a)),
    "global_max_pool": lambda a: Cost(_elements(a)),
    "squeeze_excitation": lambda a: Cost(2 * _elements(a) + _mlp(a, 1)),
    "channel_attention": lambda a: Cost(3 * _elements(a) + _mlp(a, 2)),
    "spatial_attention": lambda a: Cost(_spatial(a)),
    "cbam": lambda a: Cost(3 * _elements(a) + _mlp(a, 2) + _spatial(a)),
    "efficient_channel_attention": lambda a: Cost(2 * _elements(a)),
}
