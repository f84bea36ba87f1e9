"""Linear layers and norms."""

from __future__ import annotations

from regard._cli import peers
from regard._cli.operation import Arguments, Case, Operation


def _norm_terms(a: Arguments) -> int:
    return int(a["x"].shape[-1])


ROWS: tuple[Operation, ...] = (
    Operation(
        "linear",
        _norm_terms,
        check=(
            Case("plain", {"x": (37, 70), "weight": (45, 70)}),
            Case("bias, relu", {"x": (3, 5, 129), "weight": (64, 129), "bias": (64,)}, {"activation": "relu"}),
            Case("gelu", {"x": (17, 64), "weight": (33, 64), "bias": (33,)}, {"activation": "gelu"}),
            Case("silu", {"x": (1, 300), "weight": (19, 300)}, {"activation": "silu"}),
            Case("no features", {"x": (4, 0), "weight": (5, 0), "bias": (5,)}),
        ),
        bench=(
            Case("BERT-base 1024x768 -> 3072", {"x": (1024, 768), "weight": (3072, 768), "bias": (3072,)}),
            Case("MiniLM 20x384 -> 1536", {"x": (20, 384), "weight": (1536, 384), "bias": (1536,)}),
            Case("decode 1x4096 -> 4096", {"x": (1, 4096), "weight": (4096, 4096), "bias": (4096,)}),
        ),
        numpy=peers.numpy_linear,
        torch=peers.torch_linear,
    ),
    Operation(
        "layer_norm",
        _norm_terms,
        check=(
            Case("plain", {"x": (5, 77)}),
            Case("weight, bias", {"x": (2, 9, 384), "weight": (384,), "bias": (384,)}),
        ),
        bench=(Case("BERT-base 1024x768", {"x": (1024, 768), "weight": (768,), "bias": (768,)}),),
        numpy=peers.numpy_layer_norm,
        torch=peers.torch_layer_norm,
    ),
    Operation(
        "rms_norm",
        _norm_terms,
        check=(Case("plain", {"x": (5, 77)}), Case("weight", {"x": (2, 9, 384), "weight": (384,)})),
        bench=(
            Case("Llama-7B 2048x4096", {"x": (2048, 4096), "weight": (4096,)}),
            Case("decode 1x4096", {"x": (1, 4096), "weight": (4096,)}),
        ),
        numpy=peers.numpy_rms_norm,
        torch=peers.torch_rms_norm,
    ),
)
