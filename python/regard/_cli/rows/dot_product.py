"""Scaled dot-product attention."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from regard._cli import peers
from regard._cli.operation import Arguments, Case, Operation, Shape


def _attention_terms(a: Arguments) -> int:
    return max(a["key"].shape[-2:]) + a["value"].shape[-1]


def _attention(
    label: str,
    query: Shape,
    keys: tuple[int, int],
    dim_v: int | None = None,
    more: Mapping[str, Shape] | None = None,
    **options: Any,
) -> Case:
    """`keys` is (heads_kv, len_kv)."""
    batch, _, _, dim = query
    shapes = {"query": query, "key": (batch, *keys, dim), "value": (batch, *keys, dim_v or dim)}
    return Case(label, {**shapes, **(more or {})}, options)


def _varlen(label: str, lengths: Shape, heads: Shape, dims: Shape, keys: Shape | None = None, **options: Any) -> Case:
    """Sequences of `lengths`, with `keys` where those differ; `heads` is (heads, heads_kv), `dims` (dim_qk, dim_v)."""
    keys = keys or lengths
    shapes = {
        "query": (sum(lengths), heads[0], dims[0]),
        "key": (sum(keys), heads[1], dims[0]),
        "value": (sum(keys), heads[1], dims[1]),
    }
    starts = {"cu_seqlens_q": np.cumsum([0, *lengths]), "cu_seqlens_kv": np.cumsum([0, *keys])}
    return Case(label, shapes, {**starts, **options})


def _paged(label: str, query: Shape, lengths: Shape, heads_kv: int, page_size: int, **options: Any) -> Case:
    """Keys of `lengths`, their pages in no order."""
    a_sequence = -(-max(lengths) // page_size)
    pages = len(lengths) * a_sequence
    table = np.random.default_rng(0).permutation(pages).reshape(len(lengths), a_sequence)
    shape = (pages, page_size, heads_kv, query[3])
    shapes = {"query": query, "key_pages": shape, "value_pages": shape}
    return Case(label, shapes, {"page_table": table, "key_lengths": np.array(lengths), **options})


_LOWER = "lower_right"

ROWS: tuple[Operation, ...] = (
    Operation(
        "attention",
        _attention_terms,
        check=(
            _attention("plain", (2, 3, 37, 64), (3, 150), return_lse=True),
            _attention("causal, grouped", (1, 4, 50, 80), (2, 131), 48, causal=True, alignment=_LOWER),
            _attention("window", (1, 2, 130, 16), (1, 130), window=(20, 3), layout="bhsd"),
            _attention(
                "mask, bias, softcap",
                (2, 2, 33, 17),
                (2, 65),
                more={"mask": (2, 1, 33, 65), "bias": (2, 33, 65)},
                softcap=20.0,
            ),
            _attention(
                "slopes, sinks, lengths",
                (2, 4, 40, 32),
                (4, 40),
                more={"alibi_slopes": (4,), "sinks": (4,), "query_lengths": (2,), "key_lengths": (2,)},
            ),
            _attention("one query", (1, 8, 1, 128), (2, 700)),
            _attention("no keys", (1, 2, 3, 8), (2, 0), return_lse=True),
        ),
        bench=(
            _attention("BERT-base 8x12x128x64", (8, 12, 128, 64), (12, 128)),
            _attention("GPT-2 medium 1x16x1024x64", (1, 16, 1024, 64), (16, 1024)),
            _attention("Llama-7B causal 1x32x2048x128", (1, 32, 2048, 128), (32, 2048), causal=True),
            _attention("decode 1x32/8x1/8192x128", (1, 32, 1, 128), (8, 8192)),
            _attention("tiny 1x1x8x64", (1, 1, 8, 64), (1, 8)),
        ),
        numpy=peers.numpy_attention,
        torch=peers.torch_attention,
    ),
    Operation(
        "scaled_dot_product_attention",
        _attention_terms,
        check=(
            _attention("plain", (2, 3, 37, 64), (3, 53)),
            _attention("causal", (1, 2, 70, 24), (2, 41), is_causal=True),
            _attention("mask, grouped", (1, 4, 9, 16), (2, 30), more={"attn_mask": (9, 30)}, enable_gqa=True),
        ),
        bench=(
            _attention("ViT-B/16 8x12x197x64", (8, 12, 197, 64), (12, 197)),
            _attention("one image 1x12x197x64", (1, 12, 197, 64), (12, 197)),
        ),
        numpy=peers.numpy_attention,
        torch=peers.torch_attention,
    ),
    Operation(
        "attention_varlen",
        lambda a: int(np.diff(a["cu_seqlens_kv"]).max() + a["key"].shape[2]),
        check=(
            _varlen("plain", (5, 0, 70, 33), (4, 2), (24, 17), return_lse=True),
            _varlen("causal", (1, 64, 40), (2, 2), (64, 64), causal=True),
            _varlen("other keys", (3, 20), (2, 1), (16, 16), (40, 90), causal=True, alignment=_LOWER),
        ),
        bench=(
            _varlen("BERT-base, 8 of 20 to 128", (128, 20, 96, 44, 71, 128, 33, 60), (12, 12), (64, 64)),
            _varlen("Llama-7B prefill, 4 of 100 to 900", (900, 100, 300, 700), (32, 32), (128, 128), causal=True),
        ),
        numpy=peers.numpy_attention_varlen,
        torch=peers.torch_attention_varlen,
    ),
    Operation(
        "attention_paged",
        lambda a: int(a["key_lengths"].max() + a["key_pages"].shape[3]),
        check=(
            _paged("one query", (3, 4, 1, 64), (70, 1, 33), 2, 16, return_lse=True),
            _paged("causal", (2, 2, 9, 24), (40, 61), 2, 7, causal=True, alignment=_LOWER),
            _paged("no keys", (2, 2, 3, 16), (0, 20), 1, 8),
        ),
        bench=(_paged("Qwen2-7B decode, 8 of 4096, pages of 16", (8, 28, 1, 128), (4096,) * 8, 4, 16),),
        numpy=peers.numpy_attention_paged,
        torch=peers.torch_attention_paged,
    ),
)
