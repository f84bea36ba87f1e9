"""Decoder-only models of today's parts: RMS norms, rotary positions, grouped heads, windows, softcap, gated layers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from helpers import assert_near
from regard import nn

WIDTH, HEADS, HEADS_KV, INNER, LAYERS, VOCABULARY = 48, 6, 2, 80, 3, 29
DIM = WIDTH // HEADS
TOKENS = np.random.default_rng(0).integers(0, VOCABULARY, (2, 17))
VARIANTS: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"window": (4, 0)},
    "gemma 2": {"softcap": 2.0, "activation": "geglu_tanh"},
    "a window and a cap": {"window": (6, None), "softcap": 1.5, "activation": "reglu"},
}


def stack(options: dict[str, Any]) -> nn.TransformerEncoder:
    layer = nn.TransformerEncoderLayer(
        WIDTH, HEADS, INNER, activation=options.get("activation", "swiglu"), batch_first=True, norm_first=True,
        bias=False, rotary=nn.RotaryEmbedding(DIM, max_positions=64), num_heads_kv=HEADS_KV, norm="rms",
        window=options.get("window"), softcap=options.get("softcap"),
    )  # fmt: skip
    made = nn.TransformerEncoder(layer, LAYERS, nn.RMSNorm(WIDTH, 1e-5))
    rng = np.random.default_rng(1)
    made.load_state_dict(
        {
            name: (rng.standard_normal(x.shape) * (0.3 if x.ndim > 1 else 0.1) + (x.ndim == 1)).astype(np.float32)
            for name, x in made.state_dict().items()
        }
    )
    return made


TABLE = np.random.default_rng(2).standard_normal((VOCABULARY, WIDTH)).astype(np.float32)


def written_out(state: dict[str, Any], tokens: np.ndarray, options: dict[str, Any]) -> np.ndarray:
    """The logits after each token, (batch, len, vocabulary), in float64."""
    state = {name: np.asarray(x, np.float64) for name, x in state.items()}
    x = TABLE.astype(np.float64)[tokens]
    batch, length, _ = x.shape

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5) * state[name]

    def turned(x: np.ndarray) -> np.ndarray:  # (batch, len, heads, dim): halves are pairs
        angle = np.arange(length)[:, None] * 10000.0 ** (-np.arange(0, DIM, 2) / DIM)
        cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]
        a, b = np.split(x, 2, axis=-1)
        return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)

    def gate(x: np.ndarray) -> np.ndarray:
        kind = options.get("activation", "swiglu")
        if kind == "swiglu":
            return x / (1 + np.exp(-x))
        if kind == "reglu":
            return np.maximum(x, 0)
        return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))

    distance = np.arange(length)[:, None] - np.arange(length)
    left = options.get("window", (None, None))[0]
    seen = (distance >= 0) & (distance <= (length if left is None else left))
    for i in range(LAYERS):
        at = f"layers.{i}."
        y = norm(x, at + "norm1.weight")
        q, k, v = np.split(y @ state[at + "self_attn.in_proj_weight"].T, [WIDTH, WIDTH + HEADS_KV * DIM], axis=-1)
        q = turned(q.reshape(batch, length, HEADS, DIM))
        k = turned(k.reshape(batch, length, HEADS_KV, DIM)).repeat(HEADS // HEADS_KV, axis=2)
        v = v.reshape(batch, length, HEADS_KV, DIM).repeat(HEADS // HEADS_KV, axis=2)
        s = np.einsum("bihd,bjhd->bhij", q, k) / np.sqrt(DIM)
        if "softcap" in options:
            s = options["softcap"] * np.tanh(s / options["softcap"])
        p = np.exp(np.where(seen, s, -np.inf))
        p /= p.sum(-1, keepdims=True)
        heads = np.einsum("bhij,bjhd->bihd", p, v).reshape(batch, length, WIDTH)
        x = x + heads @ state[at + "self_attn.out_proj.weight"].T
        y = norm(x, at + "norm2.weight")
        hidden = gate(y @ state[at + "linear1.weight"].T) * (y @ state[at + "linear3.weight"].T)
        x = x + hidden @ state[at + "linear2.weight"].T
    return norm(x, "norm.weight") @ TABLE.astype(np.float64).T


def cached(model: nn.TransformerEncoder, rows: int = 2, **options: Any) -> nn.CachedDecoder:
    options = {"max_len": 40, **options}
    return nn.CachedDecoder(
        model, embed=lambda tokens, _: TABLE[tokens], project=lambda h: h @ TABLE.T, rows=rows, **options
    )


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_whole_and_step_by_step(backend: str, options: dict[str, Any]) -> None:
    model = stack(options)
    want = written_out(model.state_dict(), TOKENS, options)
    assert_near(model(TABLE[TOKENS], is_causal=True) @ TABLE.T, want, 2e-4 * np.abs(want).max())
    decoder = cached(model)
    assert_near(decoder.step_each(TOKENS[:, :5]), want[:, :5], 2e-4 * np.abs(want).max())
    for i in range(5, TOKENS.shape[1]):
        assert_near(decoder.step(TOKENS[:, i : i + 1]), want[:, i], 2e-4 * np.abs(want).max(), f"token {i}")


def test_weights_are_those_of_the_attention(backend: str) -> None:
    module = nn.MultiheadAttention(
        WIDTH, HEADS, batch_first=True, num_heads_kv=HEADS_KV, window=(3, 1), softcap=0.5, bias=False
    )
    x = TABLE[TOKENS]
    out, weights = module(x, x, x, average_attn_weights=False)
    distance = np.arange(17)[:, None] - np.arange(17)
    assert ((weights == 0) == ((distance > 3) | (distance < -1))).all()
    value = module._project(x, x, x)[2].repeat(HEADS // HEADS_KV, axis=2)
    joined = np.einsum("bhij,bjhd->bihd", weights, value).reshape(x.shape)
    assert_near(module.out_proj(joined), out, 1e-5)
    assert_near(module(x, x, x)[1], weights.mean(axis=1), 1e-6)


def test_a_draft_is_checked_and_what_does_not_fit_forgotten(backend: str) -> None:
    """Speculative decoding by hand: several tokens at once, then back to where they differ."""
    model = stack({})
    prompt = TOKENS[:1, :4]
    want = nn.generate(cached(model, rows=1), prompt[0].tolist(), max_new_tokens=12).tokens
    decoder, tokens = cached(model, rows=1), []
    token = int(decoder.step(prompt)[0].argmax())
    rng = np.random.default_rng(3)
    while len(tokens) < 12:
        known = [*tokens, token]
        # A draft that is right for some tokens.
        draft = [
            want[n] if n < 12 and rng.random() < 0.7 else int(rng.integers(VOCABULARY))
            for n in range(len(known), len(known) + 3)
        ]
        follows = decoder.step_each(np.array([[token, *draft]]))[0].argmax(axis=1).tolist()
        right = next((n for n in range(3) if draft[n] != follows[n]), 3)
        tokens, token = [*known, *draft[:right]], follows[right]
        decoder.truncate(prompt.shape[1] + len(tokens))
    assert tokens[:12] == want


def test_a_cache_of_fewer_bits(backend: str) -> None:
    model = stack({})
    for dtype, error in (("bfloat16", 0.03), ("int8", 0.05), ("float32", 2e-4)):
        decoder = cached(model, cache_dtype=dtype)
        want = written_out(model.state_dict(), TOKENS, {})[:, -1]
        decoder.step(TOKENS[:, :-1])
        assert_near(decoder.step(TOKENS[:, -1:]), want, error * np.abs(want).max(), dtype)
        assert decoder._caches[0].dtype == dtype


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^norm: expected one of 'layer', 'rms', got 'batch'"):
        nn.TransformerEncoderLayer(8, 2, norm="batch")
    with pytest.raises(ValueError, match=r"^num_heads_kv"):
        nn.TransformerDecoderLayer(8, 2, num_heads_kv=3)
    with pytest.raises(ValueError, match=r"^window: expected"):
        nn.TransformerEncoderLayer(8, 2, window=(-1, 0))
    with pytest.raises(ValueError, match=r"^window: expected None with add_bias_kv"):
        nn.MultiheadAttention(8, 2, add_zero_attn=True, window=(1, 0))
    with pytest.raises(ValueError, match=r"^softcap"):
        nn.MultiheadAttention(8, 2, softcap=0.0)
    with pytest.raises(ValueError, match=r"^lengths: expected 0"):
        cached(stack({})).truncate(1)
    for name, value in (("temperature", 0.5), ("top_k", 3), ("top_p", 0.5), ("beams", 2), ("length_penalty", 0.0)):
        with pytest.raises(ValueError, match=rf"^{name}: expected"):
            nn.generate(cached(stack({})), TOKENS, max_new_tokens=3, **{name: value})
    with pytest.raises(ValueError, match=r"^top_k: expected"):
        nn.generate(cached(stack({})), TOKENS, max_new_tokens=3, method="beam", top_k=3)
