"""Shapes of real models, by name: what the benchmarks run."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Attention:
    """One attention call. dim_v is dim_qk unless given."""

    name: str
    batch: int
    heads: int
    heads_kv: int
    len_q: int
    len_kv: int
    dim_qk: int
    dim_v: int
    causal: bool = False

    @property
    def label(self) -> str:
        lengths = str(self.len_q) if self.len_q == self.len_kv else f"{self.len_q}/{self.len_kv}"
        heads = str(self.heads) if self.heads == self.heads_kv else f"{self.heads}/{self.heads_kv}"
        dims = str(self.dim_qk) if self.dim_qk == self.dim_v else f"{self.dim_qk}/{self.dim_v}"
        return f"{self.batch}x{heads}x{lengths}x{dims}{' causal' if self.causal else ''}"

    @property
    def flops(self) -> float:
        """Two products, two operations a multiply-add; half of them where causal hides half of the scores."""
        full = 2.0 * self.batch * self.heads * self.len_q * self.len_kv * (self.dim_qk + self.dim_v)
        return full / 2 if self.causal else full

    def bytes(self, itemsize: int) -> float:
        """What must move at least: each input read once, the output written once."""
        query = self.batch * self.heads * self.len_q * self.dim_qk
        out = self.batch * self.heads * self.len_q * self.dim_v
        keys_values = self.batch * self.heads_kv * self.len_kv * (self.dim_qk + self.dim_v)
        return float(itemsize * (query + out + keys_values))


def _square(
    name: str, batch: int, heads: int, length: int, dim: int, heads_kv: int = 0, causal: bool = False
) -> Attention:
    return Attention(name, batch, heads, heads_kv or heads, length, length, dim, dim, causal)


ATTENTION = (
    _square("BERT-base", 8, 12, 128, 64),
    _square("ViT-B/16", 8, 12, 197, 64),
    _square("GPT-2 medium", 1, 16, 1024, 64),
    _square("4k context", 1, 16, 4096, 64),
    _square("Llama-7B prefill", 1, 32, 2048, 128, causal=True),
    _square("Llama-3-8B prefill", 1, 32, 2048, 128, heads_kv=8, causal=True),
    _square("8k context", 1, 8, 8192, 128, causal=True),
    # DeepSeek's multi-head latent attention: 128 dims + 64 rotary against values of 128.
    Attention("MLA prefill", 1, 16, 16, 1024, 1024, 192, 128, causal=True),
    # One new token against a cache: bound by the bytes of key and value.
    Attention("Llama-3-8B decode", 1, 32, 8, 1, 8192, 128, 128),
    Attention("Llama-7B decode, batch 16", 16, 32, 32, 1, 1024, 128, 128),
    # Stable Diffusion 1.5: image queries against 77 text tokens.
    Attention("SD 1.5 cross", 2, 8, 8, 4096, 77, 40, 40),
    # As small as calls get: the cost of the call itself.
    _square("tiny", 1, 1, 8, 64),
)

#: (name, rows, features in, features out)
LINEAR = (
    ("BERT-base projection", 1024, 768, 768),
    ("BERT-base feed-forward", 1024, 768, 3072),
    ("MiniLM feed-forward", 4096, 384, 1536),
    ("Llama-7B decode", 1, 4096, 4096),
)

#: (name, rows, features)
NORM = (
    ("BERT-base", 1024, 768),
    ("Llama-7B", 2048, 4096),
)

#: (name, batch, channels, height, width, reduced)
CHANNEL = (
    ("SE-ResNet-50, stage 1", 8, 256, 56, 56, 16),
    ("SE-ResNet-50, stage 2", 8, 512, 28, 28, 32),
    ("MobileNetV3, late", 8, 960, 7, 7, 240),
    ("small map", 8, 256, 7, 7, 16),
)
