"""Scaled dot-product attention."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from regard._cli import peers
from regard._cli.operation import Arguments, Case, Operation, Shape


def _attention_terms(a: Arguments) -> int:
    return max(a["key"].shape[-2:]) + a["value"].shape[-1]


def _attention_flops(a: Arguments) -> float:
    batch, heads, len_q, dim_qk = a["query"].shape
    pairs = float(batch * heads * len_q * a["key"].shape[2])
    hidden = 0.5 if a.get("causal") or a.get("is_causal") else 1.0
    return 2 * pairs * hidden * (dim_qk + a["value"].shape[3])


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


_LOWER = "lower_right"

ROWS: tuple[Operation, ...] = (
    Operation(
        "attention",
        _attention_terms,
        _attention_flops,
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
        _attention_flops,
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
)
