"""regard.nn on device arrays, the kernels emulated, against the same modules on NumPy arrays."""

from __future__ import annotations

import copy
import sys
import types
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import regard
from cases import DTYPES
from helpers import EPSILON, as_float64, assert_near, assert_same_bits, normal
from regard import dense, nn

FLOATS = ["float32", "float16", "bfloat16"]


def near(dtype: str, size: float = 1) -> float:
    """Both sides err: float32's sums by some epsilon, 16-bit ones by a rounding a step."""
    return size * (8 * EPSILON[dtype] if dtype in ("float16", "bfloat16") else 64 * EPSILON[dtype])


def on_device(cupy: Any, x: Any) -> Any:
    return cupy.asarray(x) if isinstance(x, np.ndarray) else x


def with_random_weights(module: Any, seed: int = 0) -> Any:
    rng = np.random.default_rng(seed)
    module.load_state_dict(
        {
            name: (rng.standard_normal(x.shape) / max(x.shape[-1], 1) ** 0.5).astype(np.float32)
            for name, x in module.state_dict().items()
        }
    )
    return module


def assert_agree(cupy: Any, module: Callable[..., Any], dtype: str, *arrays: Any, size: float = 1, **options: Any):
    """module(*arrays, **options) on the device is the module on NumPy arrays; returns what the device gave."""
    want = module(*arrays, **options)
    put = {id(x): on_device(cupy, x) for x in (*arrays, *options.values())}  # one array given twice stays one
    got = module(*(put[id(x)] for x in arrays), **{k: put[id(x)] for k, x in options.items()})
    pairs = list(zip(got, want, strict=True)) if isinstance(want, tuple) else [(got, want)]
    for g, w in pairs:
        if w is None:
            assert g is None
            continue
        out = cupy.asnumpy(g)
        assert out.shape == w.shape and out.dtype == w.dtype
        largest = max(1.0, np.abs(as_float64(w)[0]).max(initial=0.0))
        assert_near(out, as_float64(w)[0], near(dtype, size) * largest)
    return got


# ---- Layers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(5,), (3, 5), (2, 0, 5), (2, 3, 5)], ids=str)
def test_linear_modules(cupy, shape, dtype):
    layer = with_random_weights(nn.Linear(5, 7))
    x, residual = normal(0, *shape, dtype=dtype), normal(1, *shape[:-1], 7, dtype=dtype)
    assert_agree(cupy, layer, dtype, x)
    assert_agree(cupy, layer, dtype, x, activation="gelu", residual=residual, size=2)
    assert_agree(cupy, with_random_weights(nn.Linear(5, 7, bias=False)), dtype, x)
    out = on_device(cupy, residual)
    assert layer(on_device(cupy, x), out=out) is out


@pytest.mark.parametrize("dtype", DTYPES)
def test_norm_modules(cupy, dtype):
    x = normal(0, 2, 3, 4, 6, dtype=dtype)
    for module in (
        nn.LayerNorm(6), nn.LayerNorm((4, 6), bias=False), nn.LayerNorm(6, elementwise_affine=False), nn.RMSNorm(6),
        nn.RMSNorm((4, 6), eps=1e-3),
    ):  # fmt: skip
        assert_agree(cupy, with_random_weights(module), dtype, x, size=2)


@pytest.mark.parametrize("dtype", FLOATS)
def test_embeddings(cupy, dtype):
    table = nn.Embedding(9, 4, padding_idx=2, dtype=dtype)
    for ids in (np.array([[0, 8, 3], [2, 2, 1]]), np.int32([4]), np.zeros((0, 2), np.int64)):
        assert_same_bits(cupy.asnumpy(table(cupy.asarray(ids))), table(ids))
    beyond = cupy.asnumpy(table(cupy.asarray(np.int64([-3, 2**40]))))  # held to the table
    assert_same_bits(beyond, table(np.int64([0, 8])))
    assert_agree(cupy, nn.Embedding(9, 4, max_norm=1.0, dtype=dtype), dtype, np.arange(9))
    with pytest.raises(TypeError, match="input: expected an array of integers"):
        table(cupy.asarray(normal(0, 3)))


@pytest.mark.parametrize("dtype", FLOATS)
def test_position_modules(cupy, dtype):
    x = normal(0, 3, 2, 8, dtype=dtype)
    assert_agree(cupy, nn.PositionalEncoding(8, 20), dtype, x, start=4)
    assert_agree(cupy, nn.PositionalEncoding(8, 20, learned=True, batch_first=True), dtype, x)
    assert_agree(cupy, nn.PositionalEncoding(8, 20), dtype, x[:, 0])
    rotary, heads = nn.RotaryEmbedding(4, 10, interleaved=True), normal(1, 2, 3, 5, 8, dtype=dtype)
    assert_agree(cupy, rotary, dtype, heads)
    where = np.array([[3, 1, 0, 9, 2]] * 2)
    got = assert_agree(cupy, rotary, dtype, heads, where)
    assert_same_bits(cupy.asnumpy(rotary(cupy.asarray(heads), where)), cupy.asnumpy(got))  # host positions
    packed = [held for key, held in rotary._packed.items() if isinstance(key, tuple)]
    assert all(held is packed[0] for held in packed)  # angles are float32's for 16-bit arrays too


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("activation", ["relu", "swiglu", "function"])
def test_feed_forward_modules(cupy, activation, dtype):
    doubled = lambda x: x + x  # noqa: E731
    module = with_random_weights(nn.FeedForward(6, 10, doubled if activation == "function" else activation))
    assert_agree(cupy, module, dtype, normal(0, 2, 3, 6, dtype=dtype), size=4)


# ---- Attention -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch_first", [False, True])
def test_attention_modules(cupy, batch_first, dtype):
    module = with_random_weights(nn.MultiheadAttention(16, 2, batch_first=batch_first))
    x, memory = normal(0, 3, 2, 16, dtype=dtype), normal(1, 3 if batch_first else 5, 5 if batch_first else 2, 16)
    memory = memory.astype(x.dtype)
    assert_agree(cupy, module, dtype, x, x, x, size=2)
    assert_agree(cupy, module, dtype, x, memory, memory, need_weights=False, size=2)
    assert_agree(cupy, module, dtype, x, memory, memory.copy(), average_attn_weights=False, size=2)
    assert_agree(cupy, module, dtype, x[:, 0], x[:, 0], x[:, 0], size=2)  # unbatched
    assert {"qkv", "q", "kv", "k", "v"} <= set(module._packed[x.dtype, 0])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("where", ["host", "device"])
def test_masks_of_modules(cupy, where, dtype):
    module = with_random_weights(nn.MultiheadAttention(16, 2, batch_first=True))
    x, rng = normal(0, 2, 6, 16, dtype=dtype), np.random.default_rng(1)
    ends, holes = np.arange(6) >= np.array([[6], [4]]), rng.random((2, 6)) < 0.4
    holes[:, 0] = False
    pairs, heads = rng.random((6, 6)) < 0.4, rng.random((4, 6, 6)) < 0.4
    scores, seen = normal(2, 6, 6), ~holes
    cases: list[dict[str, Any]] = [
        {"key_padding_mask": ends}, {"key_padding_mask": holes}, {"key_mask": seen}, {"attn_mask": pairs},
        {"attn_mask": heads}, {"attn_mask": scores}, {"is_causal": True}, {"is_causal": True, "key_padding_mask": ends},
        {"attn_mask": scores, "key_padding_mask": np.where(ends, -np.inf, 0).astype(np.float32)},
        {"attn_mask": pairs, "key_padding_mask": holes},
    ]  # fmt: skip
    for options in cases:
        want, weights = module(x, x, x, **options)
        on = {k: v if where == "host" else on_device(cupy, v) for k, v in options.items()}
        got = module(*[cupy.asarray(x)] * 3, **on)
        assert_near(cupy.asnumpy(got[0]), as_float64(want)[0], near(dtype, 4))
        assert_near(cupy.asnumpy(got[1]), as_float64(weights)[0], near(dtype))


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_attention_modules_options(cupy, dtype):
    x, key, value = (normal(i, 2, n, d, dtype=dtype) for i, (n, d) in enumerate(((4, 16), (5, 6), (5, 9))))
    made = [
        nn.MultiheadAttention(16, 2, batch_first=True, add_bias_kv=True, add_zero_attn=True, kdim=6, vdim=9),
        nn.MultiheadAttention(16, 4, batch_first=True, num_heads_kv=2, kdim=6, vdim=9, bias=False),
    ]
    for module in map(with_random_weights, made):
        assert_agree(cupy, module, dtype, x, key, value, size=2)
        mask = np.random.default_rng(0).random((4, 5)) < 0.4
        assert_agree(cupy, module, dtype, x, key, value, attn_mask=mask, is_causal=True, size=2)
    rotary = nn.RotaryEmbedding(4, 30)
    module = with_random_weights(nn.MultiheadAttention(16, 2, batch_first=True, rotary=rotary, num_heads_kv=1))
    where = np.array([7, 1, 2, 25])
    assert_agree(cupy, module, dtype, x, x, x, is_causal=True, size=2)
    assert_agree(cupy, module, dtype, x, x, x, positions=where, residual=x, size=2)
    device = cupy.asarray(x)
    module(device, device, device, positions=cupy.asarray(np.array([-5, 1, 2, 99])))  # held to their range


def test_weights_are_drawn(cupy):
    pytest.importorskip("matplotlib")
    x = cupy.asarray(normal(0, 1, 3, 16))
    _, weights = nn.MultiheadAttention(16, 2, batch_first=True)(x, x, x)
    assert regard.plot.attention_map(weights[0]).axes


# ---- The Transformer -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("norm_first", [False, True])
def test_transformers(cupy, norm_first, dtype):
    model = nn.Transformer(16, 2, 2, 2, 24, activation="gelu", batch_first=True, norm_first=norm_first)
    with_random_weights(model)
    source, target = normal(0, 2, 5, 16, dtype=dtype), normal(1, 2, 3, 16, dtype=dtype)
    padding = np.arange(5) >= np.array([[5], [3]])
    causal = model.generate_square_subsequent_mask(3)
    assert_agree(
        cupy, model, dtype, source, target, tgt_mask=causal, src_key_padding_mask=padding,
        memory_key_padding_mask=padding, size=16,
    )  # fmt: skip
    assert_agree(cupy, model, dtype, source, target, tgt_is_causal=True, size=16)


def test_a_stack_without_batch_and_with_rotary(cupy):
    layer = nn.TransformerEncoderLayer(16, 2, 24, activation=lambda x: x + x, rotary=nn.RotaryEmbedding(8))
    stack = with_random_weights(nn.TransformerEncoder(layer, 3, nn.RMSNorm(16)))
    assert_agree(cupy, stack, "float32", normal(0, 5, 16), size=16)


def test_masks_on_the_host_may_be_named_first(cupy):
    heads, x = nn.MultiheadAttention(16, 2, batch_first=True), normal(0, 2, 5, 16)
    mask, on = np.random.default_rng(1).random((5, 5)) < 0.3, cupy.asarray(x)
    got, _ = heads(attn_mask=mask, query=on, key=on, value=on)
    assert_near(cupy.asnumpy(got), heads(x, x, x, attn_mask=mask)[0], near("float32", 16))


def test_masks_on_the_host_are_looked_at_and_copied_once(cupy):
    stack = with_random_weights(nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 24, batch_first=True), 3))
    x = normal(0, 2, 5, 16)
    causal = nn.Transformer.generate_square_subsequent_mask(5)
    ends, some = np.arange(5) >= np.array([[5], [3]]), np.random.default_rng(1).random((5, 5)) < 0.3
    stack(cupy.asarray(x))
    for mask, copies in ((causal, []), (some, [some.nbytes])):
        padding = ends if mask is causal else None
        on = cupy.asarray(x)
        cupy.cuda.copied.clear()
        got = stack(on, mask, padding)
        assert [n for _, n in cupy.cuda.copied] == copies
        assert_near(cupy.asnumpy(got), stack(x, mask, padding), near("float32", 16))


@pytest.mark.parametrize("dtype", FLOATS)
def test_vision_transformers(cupy, dtype):
    vit = nn.VisionTransformer(8, 4, 2, 2, 16, 24, num_classes=5, representation_size=6, activation="relu")
    assert_agree(cupy, with_random_weights(vit), dtype, normal(0, 2, 3, 8, 8, dtype=dtype), size=16)


# ---- Convolutional networks' modules, and additive attention ---------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_channel_modules(cupy, layout, dtype):
    x = normal(0, 2, 8, 5, 6, dtype=dtype)
    x = np.ascontiguousarray(np.moveaxis(x, 1, -1)) if layout == "nhwc" else x
    for module in (
        nn.SqueezeExcitation(8, 2, scale_activation="hard_sigmoid", layout=layout),
        nn.CBAM(8, 2, kernel_size=3, spatial_bias=True, layout=layout),
        nn.EfficientChannelAttention(8, layout=layout),
    ):
        assert_agree(cupy, with_random_weights(module), dtype, x, size=2)


@pytest.mark.parametrize("dtype", FLOATS)
def test_additive_modules(cupy, dtype):
    module = with_random_weights(nn.AdditiveAttention(6, 8, 10))
    query, keys, values = (normal(i, 2, n, d, dtype=dtype) for i, (n, d) in enumerate(((3, 6), (5, 8), (5, 4))))
    lengths = np.array([5, 3])
    assert_agree(cupy, module, dtype, query, keys, values, key_lengths=lengths, return_weights=True, size=2)
    mask = np.random.default_rng(0).random((3, 5)) < 0.7
    assert_agree(cupy, module, dtype, query, keys, mask=mask, size=2)
    there = module.precompute(cupy.asarray(keys))
    for value in (None, values):
        want = module(query, module.precompute(keys), value, key_lengths=lengths)
        got = module(cupy.asarray(query), there, on_device(cupy, value), key_lengths=lengths)
        assert_near(cupy.asnumpy(got), as_float64(want)[0], near(dtype, 4))


# ---- Recurrent modules ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("cell", [nn.GRU, nn.LSTM])
def test_recurrent_modules(cupy, cell, dtype):
    module = with_random_weights(cell(6, 5, num_layers=2, bidirectional=True, batch_first=True))
    x, lengths = normal(0, 3, 4, 6, dtype=dtype), np.array([4, 0, 2])
    h0, c0 = (normal(i, 4, 3, 5, dtype=dtype) for i in (1, 2))
    states, on = (h0, cupy.asarray(h0)) if cell is nn.GRU else ((h0, c0), (cupy.asarray(h0), cupy.asarray(c0)))
    for given, device in ((None, None), (states, on)):
        want = module(x, given, lengths=lengths)
        got = module(cupy.asarray(x), device, lengths=lengths)
        for g, w in zip(flat(got), flat(want), strict=True):
            assert_near(cupy.asnumpy(g), as_float64(w)[0], near(dtype, 4))
    one = with_random_weights(cell(6, 5, bias=False))
    for g, w in zip(flat(one(cupy.asarray(x[0]))), flat(one(x[0])), strict=True):  # without a batch
        assert_near(cupy.asnumpy(g), as_float64(w)[0], near(dtype, 4))


def flat(x: Any) -> list[Any]:
    return [z for y in x for z in flat(y)] if isinstance(x, tuple) else [x]


# ---- Generation ----------------------------------------------------------------------------------------------


def language_model(cupy: Any, rotary: bool) -> tuple[Callable[..., nn.CachedDecoder], Callable[[Any], Any]]:
    """A decoder of so many rows, on the device or not, and the embedding of a memory."""
    turned = nn.RotaryEmbedding(8) if rotary else None
    layer = nn.TransformerDecoderLayer(16, 2, 24, batch_first=True, norm_first=True, rotary=turned)
    stack = with_random_weights(nn.TransformerDecoder(layer, 2, nn.LayerNorm(16)))
    table, places, head = (with_random_weights(m) for m in (
        nn.Embedding(11, 16), nn.PositionalEncoding(16, 30, batch_first=True, learned=True), nn.Linear(16, 11)
    ))  # fmt: skip
    head.bias = 3 * normal(5, 11)

    def decoder(memory: Any, padding: Any, put: Callable[[np.ndarray], Any]) -> nn.CachedDecoder:
        return nn.CachedDecoder(
            stack, memory, padding, embed=lambda tokens, _: table(put(tokens)), project=head, max_len=16
        )

    return decoder, places


@pytest.mark.parametrize(("padding", "rotary"), [("ends", True), ("holes", False), ("on the device", True)])
def test_generation(cupy, padding, rotary):
    decoder, _ = language_model(cupy, rotary)
    memory = normal(3, 2, 5, 16)
    hidden = np.arange(5) >= np.array([[5], [3]])
    hidden[1, 1] = padding != "ends"
    prompts = [[1, 2, 3], [4]]
    there = on_device(cupy, hidden) if padding == "on the device" else hidden
    for options in ({"method": "greedy"}, {"method": "beam", "beams": 3}, {"method": "sample", "seed": 1}):
        want = nn.generate(decoder(memory, hidden, lambda x: x), prompts, max_new_tokens=4, **options)
        device = decoder(cupy.asarray(memory), there, cupy.asarray)
        got = nn.generate(device, prompts, max_new_tokens=4, **options)
        assert [g.tokens for g in got] == [w.tokens for w in want]
        np.testing.assert_allclose([g.logprob for g in got], [w.logprob for w in want], rtol=1e-4)


@pytest.mark.parametrize("cache_dtype", [None, "int8"])
def test_a_model_of_today_s_parts(cupy, cache_dtype):
    """Gated, grouped, RMS norms, a window, a cap, a head tied to the table; a draft checked and forgotten."""
    layer = nn.TransformerEncoderLayer(
        16, 4, 24, activation="swiglu", batch_first=True, norm_first=True, bias=False, rotary=nn.RotaryEmbedding(4),
        num_heads_kv=2, window=(3, 0), softcap=2.0, norm="rms",
    )  # fmt: skip
    stack = with_random_weights(nn.TransformerEncoder(layer, 2, nn.RMSNorm(16)))
    table, head = nn.Embedding(11, 16), nn.Linear(16, 11, bias=False)
    head.tie("weight", table)
    with_random_weights(table)
    tokens = np.random.default_rng(0).integers(0, 11, (2, 9))
    assert_agree(cupy, lambda x: stack(x, is_causal=True), "float32", table(tokens), size=4)

    def logits(put: Callable[[Any], Any]) -> list[Any]:
        decoder = nn.CachedDecoder(
            stack, embed=lambda t, _: table(put(t)), project=head, max_len=16, rows=2, cache_dtype=cache_dtype
        )
        first, draft = decoder.step(tokens[:, :4]), decoder.step_each(tokens[:, 4:7])
        decoder.truncate(np.array([5, 6]))
        return [first, draft, decoder.step(tokens[:, 7:], np.array([2, 1]))]

    for got, want in zip(logits(cupy.asarray), logits(lambda x: x), strict=True):
        assert_near(cupy.asnumpy(got), want, 1e-4 if cache_dtype is None else 1e-2)


def test_only_tokens_and_logits_pass_between_host_and_device(cupy):
    decoder, _ = language_model(cupy, False)
    device = decoder(cupy.asarray(normal(3, 2, 5, 16)), None, cupy.asarray)
    nn.generate(device, [[1], [2]], max_new_tokens=1)
    device = decoder(cupy.asarray(normal(3, 2, 5, 16)), None, cupy.asarray)
    cupy.cuda.copied.clear()
    nn.generate(device, [[1], [2]], max_new_tokens=4)
    assert cupy.cuda.copied == [("to the device", 16), ("to the host", 2 * 11 * 4)] * 4


def test_recomputing(cupy):
    stack = with_random_weights(nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 24, batch_first=True), 1))
    table, head = with_random_weights(nn.Embedding(11, 16)), with_random_weights(nn.Linear(16, 11))

    def model(put: Callable[[Any], Any]) -> nn.Recomputing:
        return nn.Recomputing(lambda tokens, _: head(stack(table(put(tokens)), is_causal=True)))

    prompts = [[1, 2], [3]]
    want = nn.generate(model(lambda x: x), prompts, max_new_tokens=3)
    got = nn.generate(model(cupy.asarray), prompts, max_new_tokens=3)
    assert [g.tokens for g in got] == [w.tokens for w in want]


# ---- Weights -------------------------------------------------------------------------------------------------


def test_weights_are_copied_once(cupy):
    module = with_random_weights(nn.TransformerEncoderLayer(16, 2, 24, batch_first=True))
    whole = sum(x.nbytes for x in module.state_dict().values())
    x = cupy.asarray(normal(0, 2, 3, 16))
    cupy.cuda.copied.clear()
    first = module(x)
    assert sum(n for _, n in cupy.cuda.copied) == whole and {way for way, _ in cupy.cuda.copied} == {"to the device"}
    cupy.cuda.copied.clear()
    assert_same_bits(cupy.asnumpy(module(x)), cupy.asnumpy(first))
    module(cupy.asarray(normal(1, 1, 4, 16)))
    assert [way for way, _ in cupy.cuda.copied].count("to the device") == 1  # that input
    state = {name: 2 * w for name, w in module.state_dict().items()}
    module.load_state_dict(state)
    assert_agree(cupy, module, "float32", normal(0, 2, 3, 16), size=16)
    copied = copy.deepcopy(module)
    assert_same_bits(cupy.asnumpy(copied(x)), cupy.asnumpy(module(x)))


def test_threads_find_weights_that_the_device_has(cupy, monkeypatch):
    module = nn.MultiheadAttention(8, 2, batch_first=True)
    x, found = cupy.asarray(normal(0, 1, 3, 8)), []

    def wait(_: Any) -> None:
        (packed,) = module._packed.values()  # what other threads see, whose streams know nothing of this one
        found.append(set(packed))

    module._weights_for("query", x)
    monkeypatch.setattr(type(module._weights_for("query", x)["memory"]), "wait", wait)
    module._packed_projection(module._weights_for("query", x), "qkv")
    assert found == [{"dtype", "memory"}]


def test_weights_from_a_device_serve_both_sides(cupy):
    module, host = nn.Linear(5, 7), with_random_weights(nn.Linear(5, 7))
    state = {name: cupy.asarray(w) for name, w in host.state_dict().items()}
    cupy.cuda.copied.clear()
    module.load_state_dict(state)
    x = normal(0, 3, 5)
    got = module(cupy.asarray(x))
    assert [n for _, n in cupy.cuda.copied] == [x.nbytes]
    assert module.weight is state["weight"]
    assert_same_bits(module(x), host(x))  # copied to the host
    assert_near(cupy.asnumpy(got), host(x), near("float32"))


@pytest.mark.parametrize("dtype", FLOATS)
def test_packed_weights(cupy, dtype):
    x, weight, bias = normal(0, 3, 5, dtype=dtype), normal(1, 7, 5), normal(2, 7)
    on = [cupy.asarray(a) for a in (weight, bias)]
    for held, size in (("float32", 2), ("bfloat16", 2 if dtype != "float16" else 4)):
        want = regard.linear(x, dense.pack_linear(weight, bias, held), activation="relu")
        packed = dense.pack_linear(*on, held)
        assert packed.packed.dtype.name == held and packed.shape == (7, 5)
        got = regard.linear(cupy.asarray(x), packed, activation="relu")
        assert_near(cupy.asnumpy(got), as_float64(want)[0], near(dtype, size) * 4)
    module = with_random_weights(nn.Linear(5, 7)).to(weights="bfloat16")
    assert_agree(cupy, module, dtype, x, size=2)
    assert module._packed[x.dtype, 0].packed.dtype.name == "bfloat16"


# ---- PyTorch's tensors: a stand-in for it, over the one for CuPy -------------------------------------------------


@pytest.fixture
def torch(cupy: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """As much of PyTorch as modules use: tensors with CuPy's memory, and a stream of its own."""

    class Tensor:
        __module__ = "torch"

        def __init__(self, of: Any) -> None:
            self.of, self.shape, self.dtype = of, of.shape, f"torch.{of.dtype.name}"

        def detach(self) -> Tensor:
            return self

        def view(self, dtype: Any) -> Tensor:
            return Tensor(self.of.view(dtype))

        def __dlpack_device__(self) -> tuple[int, int]:
            return (2, 0)

        def __dlpack__(self, stream: Any) -> Any:
            assert stream in (0, 77) and self.of.dtype.name != "bfloat16"
            return self.of

    module = types.ModuleType("torch")
    current = types.SimpleNamespace(current_stream=lambda device: types.SimpleNamespace(cuda_stream=77))
    module.__dict__.update(Tensor=Tensor, from_dlpack=Tensor, cuda=current, int16=np.int16, bfloat16=DTYPES["bfloat16"])
    monkeypatch.setitem(sys.modules, "torch", module)
    return module


@pytest.mark.parametrize("dtype", FLOATS)
def test_tensors_of_pytorch(cupy, torch, dtype):
    module = with_random_weights(nn.MultiheadAttention(16, 2, batch_first=True))
    x = normal(0, 2, 3, 16, dtype=dtype)
    given = torch.Tensor(cupy.asarray(x))
    del cupy.cuda.allocated[:]
    out, weights = module(given, given, given)
    assert set(cupy.cuda.allocated) == {77}  # memory in the order of PyTorch's stream
    assert type(out) is type(weights) is torch.Tensor and out.dtype == f"torch.{dtype}"
    want = module(*[cupy.asarray(x)] * 3)
    for got, wanted in zip((out, weights), want, strict=True):
        assert_same_bits(cupy.asnumpy(got.of), cupy.asnumpy(wanted))
    loaded = nn.Linear(16, 4)
    loaded.load_state_dict({"weight": torch.Tensor(cupy.asarray(normal(1, 4, 16))), "bias": normal(2, 4)})
    assert loaded(given).shape == (2, 3, 4)


def test_pytorch_needs_cupy(cupy, torch, monkeypatch):
    x = torch.Tensor(cupy.asarray(normal(0, 3, 5)))
    monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.raises(NotImplementedError, match="Linear: PyTorch's tensors on a GPU need the cupy package"):
        nn.Linear(5, 7)(x)


# ---- Errors --------------------------------------------------------------------------------------------------


def test_errors(cupy):
    x, heads = cupy.asarray(normal(0, 2, 3, 16)), nn.MultiheadAttention(16, 2, batch_first=True)
    with pytest.raises(TypeError, match="key: expected an array on the device of query"):
        heads(x, normal(0, 2, 3, 16), x)
    with pytest.raises(TypeError, match="out: expected an array on the device of x"):
        heads(x, x, x, out=normal(0, 2, 3, 16))
    with pytest.raises(TypeError, match="target: expected an array on the device of source"):
        nn.RNNSearch(9, 8, 6, 5)(cupy.asarray(np.array([[1, 2]])), np.array([[1, 2]]))
    for misplaced in ((normal(0, 2, 3, 16), x, x), (normal(0, 2, 3, 16), normal(1, 2, 3, 16), x)):
        name = "key" if misplaced[1] is x else "value"
        with pytest.raises(TypeError, match=f"{name}: expected an array on the CPU, where query is, got one on a GPU"):
            heads(*misplaced)
    with pytest.raises(TypeError, match="hx: expected an array on the CPU, where input is, got one on a GPU"):
        nn.LSTM(16, 4)(normal(0, 2, 3, 16), (x, x))
    with pytest.raises(TypeError, match="source_lengths: expected an array on the CPU, where target is"):
        nn.RNNSearch(9, 8, 6, 5)(target=np.array([[1]]), source=np.array([[1]]), source_lengths=x)

    class Named(nn.Module):
        def forward(self, given, **named):
            return given

    with pytest.raises(TypeError, match="other: expected an array on the CPU, where given is, got one on a GPU"):
        Named()(normal(0, 2, 3), other=x)
    with pytest.raises(ValueError, match=r"input: expected shape \(\.\.\., in_features = 5\)"):
        nn.Linear(5, 7)(x)
    with pytest.raises(TypeError, match="input: expected an array of dtype float32"):
        nn.LayerNorm(16)(cupy.asarray(np.zeros((3, 16), np.int64)))
    with pytest.raises(TypeError, match="because weights are held as int8, got float64"):
        nn.Linear(16, 4).to(weights="int8")(x.astype(np.float64))
    with pytest.raises(TypeError, match="because weights are held as bfloat16, got float64"):
        nn.Linear(16, 4).to(weights="bfloat16")(x.astype(np.float64))
    with pytest.raises(TypeError, match="embed: expected it to give arrays on the device of memory"):
        language_model(cupy, False)[0](normal(0, 1, 5, 16), None, cupy.asarray).step(np.array([[1]]))


def test_arrays_on_another_gpu_are_refused(cupy, monkeypatch):
    x, other = (cupy.asarray(normal(i, 2, 3, 16)) for i in range(2))
    monkeypatch.setattr(cupy.ndarray, "device", property(lambda self: cupy.cuda.Device(int(self is other))))
    with pytest.raises(TypeError, match="key: expected an array on the device of query"):
        nn.MultiheadAttention(16, 2, batch_first=True)(x, other, other)


def test_errors_of_packed_weights(cupy):
    x, weight, bias = (normal(i, *n) for i, n in enumerate(((3, 5), (7, 5), (7,))))
    on = [cupy.asarray(a) for a in (x, weight, bias)]
    packed = dense.pack_linear(*on[1:])
    with pytest.raises(TypeError, match="weight: expected a PackedLinear on the CPU"):
        regard.linear(x, packed)
    with pytest.raises(TypeError, match="weight: expected a PackedLinear on the device of x"):
        regard.linear(on[0], dense.pack_linear(weight, bias))
    with pytest.raises(ValueError, match="bias: expected None, because the packed weight holds its own"):
        regard.linear(on[0], packed, on[2])
    with pytest.raises(TypeError, match="weight: expected the dtype of x"):
        regard.linear(on[0].astype(np.float64), packed)
    with pytest.raises(ValueError, match=r"weight: expected shape \(out_features = 7, in_features = 4\)"):
        regard.linear(cupy.asarray(normal(0, 3, 4)), packed)
    with pytest.raises(ValueError, match="bias: expected shape"):
        dense.pack_linear(on[1], cupy.asarray(normal(0, 6)))
    with pytest.raises(TypeError, match="bias: expected an array on the device of weight"):
        dense.pack_linear(on[1], bias)
    with pytest.raises(TypeError, match="weight: expected dtype float32"):
        dense.pack_linear(on[1].astype(np.int64))
    with pytest.raises(ValueError, match="weight: expected no float64 where held = 'bfloat16'"):
        dense.pack_linear(on[1].astype(np.float64), None, "bfloat16")
