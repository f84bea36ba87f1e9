"""regard.nn.RotaryEmbedding, and attention, layers and cached decoding with it."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import regard
from cases import DTYPES
from helpers import EPSILON, as_float64, assert_same_bits, compute_epsilon, normal
from regard import nn, reference


def complex_rotation(x: np.ndarray, dim: int, positions: Any, interleaved: bool, base: float = 10000.0) -> np.ndarray:
    """x (..., len, width) float64: each pair a complex number, times exp(i position base^(-2 i / dim))."""
    angles = np.asarray(positions)[..., None] * base ** (-np.arange(0, dim, 2) / dim)
    part = x[..., :dim]
    pairs = part.reshape(*part.shape[:-1], dim // 2, 2)
    if not interleaved:
        pairs = part.reshape(*part.shape[:-1], 2, dim // 2).swapaxes(-1, -2)
    turned = (pairs[..., 0] + 1j * pairs[..., 1]) * np.exp(1j * angles)
    parts = np.stack([turned.real, turned.imag], -1 if interleaved else -2)
    return np.concatenate([parts.reshape(part.shape), x[..., dim:]], axis=-1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
def test_embedding_is_a_complex_rotation(backend, dtype, interleaved, layout):
    module = nn.RotaryEmbedding(12, 50, base=500.0, interleaved=interleaved)
    x = normal(0, 2, 3, 7, 16, dtype=dtype)
    given = x if layout == "bhsd" else x.swapaxes(1, 2).copy()
    wide = as_float64(x)[0]
    # Tables and arithmetic are float32's (float64's), the result is rounded once.
    within = 8 * (compute_epsilon(dtype) + EPSILON[dtype] / 8) * (np.abs(wide).max() + 1)
    for positions in (None, np.arange(3, 10), np.array([[4, 9, 0, 49, 7, 7, 1], [0, 1, 2, 3, 4, 5, 6]], np.int32)):
        out = module(given, positions, layout)
        assert (out.dtype, out.shape) == (x.dtype, given.shape)
        at = np.arange(7) if positions is None else positions
        want = complex_rotation(wide, 12, at if at.ndim == 1 else at[:, None], interleaved, 500.0)
        out = out if layout == "bhsd" else out.swapaxes(1, 2)
        assert np.abs(as_float64(out)[0] - want).max() <= within


def test_scaling_and_frequencies_are_those_of_the_tables(backend):
    x = normal(0, 1, 2, 9, 8)
    waves = np.array([1.0, 0.3, 0.2, 0.01])
    for options in ({"scaling": 4.0}, {"frequencies": waves}, {"base": 5e5, "scaling": 2.0}):
        want = regard.rotary_embedding(x, *regard.rotary_tables(8, 9, **options))
        assert_same_bits(nn.RotaryEmbedding(8, 20, **options)(x), want)


def test_there_are_no_weights_and_copies_share_the_table():
    layer = nn.TransformerEncoderLayer(16, 2, 24, batch_first=True, rotary=nn.RotaryEmbedding(8))
    plain = nn.TransformerEncoderLayer(16, 2, 24, batch_first=True)
    assert list(layer.state_dict()) == list(plain.state_dict())
    stack = nn.TransformerEncoder(layer, 3)
    assert {id(each.self_attn.rotary) for each in stack.layers} == {id(layer.self_attn.rotary)}
    assert (
        copy.deepcopy(layer).self_attn.rotary._weights(np.dtype(np.float32))[0]
        is (layer.self_attn.rotary._weights(np.dtype(np.float16))[0])
    )


def by_hand(module: Any, query: np.ndarray, key: np.ndarray, at: Any, key_at: Any, **options: Any) -> np.ndarray:
    """Attention of batch-first inputs with rotary, in float64 from the state dict."""
    w, rotary = {k: np.float64(v) for k, v in module.state_dict().items()}, module.rotary
    rows = module._rows
    q, k, v = (
        reference.linear(x, w["in_proj_weight"][a:b], w["in_proj_bias"][a:b])
        .reshape(*x.shape[:2], -1, module.head_dim)
        .swapaxes(1, 2)
        for x, a, b in zip((query, key, key), rows[:3], rows[1:], strict=True)
    )
    q, k = (complex_rotation(x, rotary.dim, p, rotary.interleaved) for x, p in ((q, at), (k, key_at)))
    out = reference.attention(q, k, v, **options).swapaxes(1, 2).reshape(query.shape)
    return np.asarray(reference.linear(out, w["out_proj.weight"], w["out_proj.bias"]))


@pytest.mark.parametrize("heads_kv", [4, 2, 1])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
def test_attention_with_rotary(backend, heads_kv, interleaved, batch_first):
    rotary = nn.RotaryEmbedding(6, 64, interleaved=interleaved)  # of 8 dimensions, two pass through
    module = nn.MultiheadAttention(32, 4, batch_first=batch_first, num_heads_kv=heads_kv, rotary=rotary)
    x, memory = normal(0, 2, 9, 32), normal(1, 2, 5, 32)

    def called(query: Any, key: Any, **options: Any) -> Any:
        if not batch_first:
            same = key is query
            query = query.swapaxes(0, 1)
            key = query if same else key.swapaxes(0, 1)
        out = module(query, key, key, need_weights=False, **options)[0]
        return out if batch_first else out.swapaxes(0, 1)

    near = {"rtol": 1e-5, "atol": 1e-5}
    wide, wide_memory = as_float64(x, memory)
    want = by_hand(module, wide, wide, np.arange(9), np.arange(9), causal=True)
    np.testing.assert_allclose(called(x, x, is_causal=True), want, **near)
    at, key_at = np.array([[3, 1, 4, 1, 5, 9, 2, 6, 5], [0, 1, 2, 3, 4, 5, 6, 7, 63]]), np.arange(7, 12, dtype=np.int32)
    want = by_hand(module, wide, wide, at[:, None], at[:, None])
    np.testing.assert_allclose(called(x, x, positions=at), want, **near)
    want = by_hand(module, wide, wide_memory, at[:, None], key_at)
    np.testing.assert_allclose(called(x, memory, positions=at, key_positions=key_at), want, **near)
    # Unbatched is a batch of one.
    alone = module(x[0], x[0], x[0], need_weights=False)[0]
    np.testing.assert_allclose(alone, called(x, x)[0], rtol=1e-6, atol=1e-6)


def test_only_distances_count(backend):
    rotary = nn.RotaryEmbedding(16, 3000)
    module = nn.MultiheadAttention(64, 4, batch_first=True, rotary=rotary)
    x = normal(0, 2, 11, 64)
    out, weights = module(x, x, x, average_attn_weights=False)
    for start in (1, 100, 2900):
        moved, moved_weights = module(x, x, x, average_attn_weights=False, positions=np.arange(start, start + 11))
        # Angles of up to 3000 rad are exact to 1e-7 in the tables; scores are sums of 16 such products.
        np.testing.assert_allclose(moved, out, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(moved_weights, weights, rtol=1e-5, atol=1e-5)
    # Without it, attention does not see the order; with it, it does.
    order = np.random.default_rng(0).permutation(11)
    assert np.abs(module(x[:, order], x[:, order], x[:, order])[0] - out[:, order]).max() > 1e-3
    turned = module(*3 * (x[:, order],), positions=order)[0]
    assert np.abs(turned - out[:, order]).max() < 1e-5


def test_weights_and_learned_keys_beside_rotary(backend):
    """The learned key and the zeros have no position; weights are those that made the output."""
    module = nn.MultiheadAttention(
        16, 2, add_bias_kv=True, add_zero_attn=True, batch_first=True, rotary=nn.RotaryEmbedding(8)
    )
    x = normal(0, 1, 6, 16)
    out, weights = module(x, x, x, average_attn_weights=False)
    q, k, v = (t.swapaxes(1, 2) for t in module._project(x, x, x))
    q, k = (complex_rotation(t.astype(np.float64), 8, np.arange(6), False) for t in (q, k))
    learned = [module.state_dict()[name].reshape(1, 2, 1, 8) for name in ("bias_k", "bias_v")]
    k, v = (np.concatenate([a, b, 0 * b], axis=2) for a, b in zip((k, v), learned, strict=True))
    want, lse = reference.attention(q, k, np.float64(v), return_lse=True)
    scores = q @ k.swapaxes(2, 3) / np.sqrt(8)
    np.testing.assert_allclose(weights, np.exp(scores - lse[..., None]), rtol=1e-5, atol=1e-6)
    joined = np.float32(want.swapaxes(1, 2).reshape(1, 6, 16))
    np.testing.assert_allclose(out, module.out_proj(joined), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("norm_first", [False, True])
def test_encoder_layer_is_its_parts(backend, norm_first):
    rotary = nn.RotaryEmbedding(8)
    layer = nn.TransformerEncoderLayer(24, 3, 40, batch_first=True, norm_first=norm_first, rotary=rotary)
    x = normal(0, 2, 7, 24)
    padding = np.arange(7) >= np.array([[7], [4]])

    def attend(y: Any) -> Any:
        return layer.self_attn(y, y, y, key_padding_mask=padding, need_weights=False)[0]

    def feed(y: Any) -> Any:
        return layer.linear2(layer.linear1(y, "relu"))

    if norm_first:
        want = x + attend(layer.norm1(x))
        want = want + feed(layer.norm2(want))
    else:
        want = layer.norm1(x + attend(x))
        want = layer.norm2(want + feed(want))
    out = layer(x, src_key_padding_mask=padding)
    np.testing.assert_allclose(out, want, rtol=1e-5, atol=1e-5)
    plain = nn.TransformerEncoderLayer(24, 3, 40, batch_first=True, norm_first=norm_first)
    plain.load_state_dict(layer.state_dict())
    assert np.abs(plain(x, src_key_padding_mask=padding) - out).max() > 1e-3


@pytest.mark.parametrize("with_memory", [False, True])
def test_cached_decoding_gives_what_the_whole_stack_gives(backend, with_memory):
    rng = np.random.default_rng(3)
    table = rng.standard_normal((9, 16)).astype(np.float32)
    memory = rng.standard_normal((3, 5, 16)).astype(np.float32)
    options = {"batch_first": True, "norm_first": True, "rotary": nn.RotaryEmbedding(8, 20)}
    stack: Any
    if with_memory:
        stack = nn.TransformerDecoder(nn.TransformerDecoderLayer(16, 2, 24, **options), 2, nn.LayerNorm(16))
    else:
        stack = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 24, **options), 2, nn.LayerNorm(16))

    def decoder(max_len: int) -> nn.CachedDecoder:
        return nn.CachedDecoder(
            stack, memory if with_memory else None, rows=3, max_len=max_len,
            embed=lambda tokens, positions: table[tokens], project=lambda hidden: hidden,
        )  # fmt: skip

    cached, tokens = decoder(20), [[1, 2, 3], [4], [5, 6]]
    steps = [(np.array([[1, 2, 3], [4, 0, 0], [5, 6, 0]]), np.array([3, 1, 2])), (np.array([[7], [8], [0]]), None)]
    steps.append((np.array([[1, 2], [2, 0], [3, 3]]), np.array([2, 1, 2])))
    held: list[list[int]] = [[] for _ in tokens]
    for step, lengths in steps:
        out = cached.step(step, lengths)
        for row, (new, of_row) in enumerate(zip(step, held, strict=True)):
            of_row += new[: len(new) if lengths is None else lengths[row]].tolist()
            x = table[np.array(of_row)][None]
            if with_memory:
                want = stack(x, memory[row : row + 1], tgt_is_causal=True)
            else:
                want = stack(x, is_causal=True)
            np.testing.assert_allclose(out[row], want[0, -1], rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="max_len: expected at most rotary's max_positions = 20, got 21"):
        decoder(21)


def test_a_memory_with_rotary_has_no_cache():
    layer = nn.TransformerDecoderLayer(16, 2, 24, batch_first=True)
    layer.multihead_attn = nn.MultiheadAttention(16, 2, batch_first=True, rotary=nn.RotaryEmbedding(8))
    stack = nn.TransformerDecoder(layer, 1)
    with pytest.raises(NotImplementedError, match="rotary"):
        nn.CachedDecoder(
            stack, np.zeros((1, 3, 16), np.float32), max_len=4, embed=lambda t, p: t, project=lambda hidden: hidden
        )


def test_torch_tensors(backend):
    torch = pytest.importorskip("torch", reason="compares with PyTorch")
    module = nn.RotaryEmbedding(8, 30)
    x = torch.randn(2, 3, 5, 8)
    cos, sin = (torch.from_numpy(np.concatenate([t, t], -1)) for t in regard.rotary_tables(8, 30))
    at = torch.tensor([4, 0, 29, 7, 7])
    half = torch.cat([-x[..., 4:], x[..., :4]], -1)
    out = module(x, at)
    assert isinstance(out, torch.Tensor)
    np.testing.assert_allclose(out.numpy(), (x * cos[at] + half * sin[at]).numpy(), rtol=1e-5, atol=1e-6)
    attention = nn.MultiheadAttention(16, 2, batch_first=True, rotary=module)
    y = torch.randn(1, 5, 16)
    assert_same_bits(attention(y, y, y, positions=at)[0].numpy(), attention(*3 * (y.numpy(),), positions=at.numpy())[0])


def test_mistakes_are_named():
    rotary = nn.RotaryEmbedding(8, 10)
    module = nn.MultiheadAttention(16, 2, batch_first=True, rotary=rotary)
    plain = nn.MultiheadAttention(16, 2, batch_first=True)
    x, long, y = (np.zeros((1, n, 16), np.float32) for n in (4, 11, 3))
    calls: list[tuple[type[Exception], str, Any]] = [
        (ValueError, "dim: expected an even number > 0, got 7", lambda: nn.RotaryEmbedding(7)),
        (ValueError, "max_positions: expected", lambda: nn.RotaryEmbedding(8, 0)),
        (ValueError, "base: expected", lambda: nn.RotaryEmbedding(8, base=0.0)),
        (ValueError, "scaling: expected", lambda: nn.RotaryEmbedding(8, scaling=-1.0)),
        (ValueError, "frequencies: expected shape", lambda: nn.RotaryEmbedding(8, frequencies=np.ones(3))),
        (ValueError, "x: expected at least dim = 8", lambda: rotary(np.zeros((1, 2, 4, 6), np.float32))),
        (ValueError, "max_positions = 10 tokens", lambda: rotary(np.zeros((1, 2, 11, 8), np.float32))),
        (ValueError, "x: expected shape", lambda: rotary(np.zeros((2, 4, 8), np.float32))),
        (TypeError, "x: expected an array", lambda: rotary([1.0])),
        (ValueError, "layout: expected", lambda: rotary(np.zeros((1, 2, 4, 8), np.float32), layout="sbhd")),
        (ValueError, "positions: expected entries", lambda: rotary(x.reshape(1, 2, 4, 8), np.array([0, 1, 2, 10]))),
        (TypeError, "rotary: expected None or", lambda: nn.MultiheadAttention(16, 2, rotary=True)),  # type: ignore
        (ValueError, "rotary: expected dim <= .* = 8, got 10",
         lambda: nn.MultiheadAttention(16, 2, rotary=nn.RotaryEmbedding(10))),
        (ValueError, "positions: expected None without rotary", lambda: plain(x, x, x, positions=np.arange(4))),
        (ValueError, "key_positions: expected None without", lambda: plain(x, x, x, key_positions=np.arange(4))),
        (ValueError, "query: expected at most rotary's max_positions = 10", lambda: module(long, long, long)),
        (ValueError, "key: expected at most rotary's max_positions = 10", lambda: module(x, long, long)),
        (TypeError, "positions: expected an int32", lambda: module(x, x, x, positions=np.arange(4.0))),
        (ValueError, "^positions: expected shape", lambda: module(x, x, x, positions=np.arange(5))),
        (ValueError, "key_positions: expected shape", lambda: module(x, y, y, key_positions=np.arange(4))),
        (ValueError, "key_positions: .* 9, got -1", lambda: module(x, y, y, key_positions=np.arange(3) - 1)),
    ]  # fmt: skip
    for error, words, call in calls:
        with pytest.raises(error, match=words):
            call()


def test_empty_inputs(backend):
    module = nn.MultiheadAttention(16, 2, batch_first=True, rotary=nn.RotaryEmbedding(8))
    for shape in ((0, 3, 16), (2, 0, 16)):
        x = np.zeros(shape, np.float32)
        assert module(x, x, x)[0].shape == shape
