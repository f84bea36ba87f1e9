"""Additive, multiplicative and location-sensitive attention."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from regard._cli import peers
from regard._cli.operation import Arguments, Case, Operation, Shape


def _pair_terms(a: Arguments) -> int:
    return int(sum(a["key"].shape[1:]) + a["query"].shape[2] + (a["v"].size if "v" in a else 0))


def _pairs(label: str, sizes: Shape, dims: Shape, more: Mapping[str, Shape] | None = None, **options: Any) -> Case:
    """`sizes` is (batch, len_q, len_kv), `dims` (dim_q, dim_k, dim_v)."""
    batch, len_q, len_kv = sizes
    shapes = {
        "query": (batch, len_q, dims[0]),
        "key": (batch, len_kv, dims[1]),
        "value": (batch, len_kv, dims[2]),
        **(more or {}),
    }
    return Case(label, shapes, options)


def _additive(label: str, sizes: Shape, dims: Shape, dim: int, more: Mapping[str, Shape] | None = None) -> Case:
    """Projections only where the query or the key is not `dim` wide."""
    shapes: dict[str, Shape] = {"v": (dim,)}
    if dims[0] != dim:
        shapes["w_query"] = (dim, dims[0])
    if dims[1] != dim:
        shapes["w_key"] = (dim, dims[1])
    return _pairs(label, sizes, dims, {**shapes, **(more or {})})


def _location(label: str, sizes: Shape, dims: Shape, dim: int, kernel: Shape, **more: Shape) -> Case:
    """`kernel` is (filters, channels, width)."""
    previous = (sizes[0], kernel[1], sizes[2]) if kernel[1] > 1 else (sizes[0], sizes[2])
    shapes = {"previous_weights": previous, "w_location": (dim, kernel[0]), "location_kernel": kernel}
    return _additive(label, sizes, dims, dim, {**shapes, **more})


ROWS: tuple[Operation, ...] = (
    Operation(
        "additive_attention",
        _pair_terms,
        check=(
            _additive("plain", (2, 5, 37), (33, 33, 12), 33),
            _additive("projections, bias, lengths", (3, 4, 40), (17, 24, 9), 32, {"bias": (32,), "key_lengths": (3,)}),
            _additive("mask", (2, 20, 65), (16, 7, 64), 16, {"mask": (2, 20, 65)}),
            _additive("no keys", (1, 3, 0), (8, 8, 5), 8),
        ),
        bench=(
            _additive("batch 8, 64 on 512, dim 256", (8, 64, 512), (256, 256, 256), 256),
            _additive("RNNsearch step, batch 80", (80, 1, 50), (1000, 1000, 2000), 1000, {"bias": (1000,)}),
        ),
        numpy=peers.numpy_additive_attention,
        torch=peers.torch_additive_attention,
    ),
    Operation(
        "multiplicative_attention",
        _pair_terms,
        check=(
            _pairs("dot", (2, 5, 37), (33, 33, 12)),
            _pairs("general, lengths", (3, 4, 40), (17, 24, 9), {"w": (17, 24), "key_lengths": (3,)}),
            _pairs("mask, weights", (2, 20, 65), (16, 16, 64), {"mask": (2, 1, 65)}, return_weights=True),
        ),
        bench=(_pairs("Luong, general, batch 32", (32, 50, 50), (1000, 1000, 1000), {"w": (1000, 1000)}),),
        numpy=peers.numpy_multiplicative_attention,
        torch=peers.torch_multiplicative_attention,
    ),
    Operation(
        "location_sensitive_attention",
        _pair_terms,
        check=(
            _location("plain", (2, 3, 37), (16, 16, 12), 16, (5, 1, 7)),
            _location("projections, two channels", (2, 1, 50), (24, 20, 20), 32, (8, 2, 31), bias=(32,)),
            _location("mask, even width", (2, 2, 20), (9, 9, 4), 9, (3, 1, 4), mask=(2, 2, 20), location_bias=(3,)),
        ),
        bench=(_location("Tacotron 2 step, batch 32", (32, 1, 150), (1024, 128, 512), 128, (32, 2, 31)),),
        numpy=peers.numpy_location_sensitive_attention,
        torch=peers.torch_location_sensitive_attention,
    ),
)
