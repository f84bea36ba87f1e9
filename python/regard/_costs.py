"""What operations cost at least: arithmetic that the answer needs, bytes that must move. Counts, no measurements."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

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
        The share of key and value that is read at all: a window leaves the rest alone.
    """

    flops: float
    exponentials: float = 0.0
    read: float = 1.0


def size(x: Any) -> int:
    """Bytes of an array of any framework: each element once, however often a stride of 0 repeats it."""
    if not hasattr(x, "shape") or not hasattr(x, "dtype"):
        return 0
    strides = x.stride() if callable(getattr(x, "stride", None)) else getattr(x, "strides", None)
    strides = strides or (1,) * len(x.shape)
    item = int(getattr(x, "itemsize", 0) or x.dtype.itemsize)
    return item * math.prod(n for n, stride in zip(x.shape, strides, strict=True) if stride or not n)


def attention(a: Arguments) -> Cost:
    """Only the keys that a query may see by window, causality and lengths; a mask hides without saving work."""
    axes = (0, 2, 1, 3) if a.get("layout") == "bshd" else (0, 1, 2, 3)
    batch, heads, len_q, dim_qk = (a["query"].shape[i] for i in axes)
    _, _, len_kv, dim_v = (a["value"].shape[i] for i in axes)
    left, right = a.get("window") or (None, None)
    seen, read = _seen(
        _lengths(a.get("query_lengths"), batch, len_q),
        _lengths(a.get("key_lengths"), batch, len_kv),
        left,
        0 if a.get("causal") else right,
        lower_right=a.get("alignment") == "lower_right",
    )
    pairs = float(heads) * seen
    return Cost(2 * pairs * (dim_qk + dim_v), pairs, read / (batch * len_kv) if batch * len_kv else 1.0)


def scaled_dot_product_attention(a: Arguments) -> Cost:
    query, value = a["query"], a["value"]
    lead = np.broadcast_shapes(tuple(query.shape[:-3]), tuple(value.shape[:-3]))
    heads = max([1, *(x.shape[-3] for x in (query, value) if len(x.shape) > 2)])
    shape = (math.prod(lead), heads)
    return attention(
        {
            "query": _Shaped((*shape, *query.shape[-2:])),
            "value": _Shaped((*shape, *value.shape[-2:])),
            "causal": a.get("is_causal"),
        }
    )


class _Shaped(NamedTuple):
    shape: tuple[int, ...]


def _lengths(lengths: Any, batch: int, full: int) -> np.ndarray:
    return np.full(batch, full) if lengths is None else np.asarray(lengths).astype(np.int64)


def _seen(
    queries: np.ndarray, keys: np.ndarray, left: int | None, right: int | None, *, lower_right: bool
) -> tuple[int, int]:
    """Pairs of a query and a key that it may see, and keys that any query may see, over all sequences."""
    pairs = read = 0
    for (n, m), times in _counted(queries, keys):
        centre = np.arange(n) + (m - n if lower_right else 0)
        first = np.zeros(n, np.int64) if left is None else np.clip(centre - left, 0, m)
        last = np.full(n, m) if right is None else np.clip(centre + right + 1, first, m)
        pairs += times * int((last - first).sum())
        read += times * (int(last[-1]) - int(first[0]) if n else 0)
    return pairs, read


def _counted(queries: np.ndarray, keys: np.ndarray) -> list[tuple[tuple[int, int], int]]:
    lengths, times = np.unique(np.stack((queries, keys)), axis=1, return_counts=True)
    return [((int(n), int(m)), int(t)) for n, m, t in zip(*lengths, times, strict=True)]


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
    "scaled_dot_product_attention": scaled_dot_product_attention,
    "additive_attention": _additive,
    "location_sensitive_attention": _location,
    "multiplicative_attention": _multiplicative,
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
