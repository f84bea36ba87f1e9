"""Any configuration of PyTorch's attention and Transformer modules, with its state dict loaded: the same output."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from cases import DTYPES
from helpers import normal
from hypothesis import given
from hypothesis import strategies as st
from regard import nn, reference

#: PyTorch computes in float32 itself: both err, by some epsilon times the depth of the sums.
AGREES = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture
def torch() -> Iterator[Any]:
    found = pytest.importorskip("torch", reason="PyTorch's modules are what is compared with")
    # The fast path for evaluation takes float masks for bool ones and may write zeros where padding is.
    fast = found.backends.mha.get_fastpath_enabled()
    found.backends.mha.set_fastpath_enabled(False)
    with found.no_grad():
        yield found
    found.backends.mha.set_fastpath_enabled(fast)


def pair(torch: Any, seed: int, name: str, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
    """PyTorch's module with random weights, and ours with its state dict."""
    torch.manual_seed(seed)
    theirs = getattr(torch.nn, name)(*args, **kwargs).eval()
    for parameter in theirs.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.1)  # biases start as zeros, norms as ones
    ours = getattr(nn, name)(*args, **kwargs)
    assert ours.load_state_dict(theirs.state_dict()) == ([], [])
    return theirs, ours


def agrees(ours: Any, theirs: Any, where: Any = None) -> None:
    assert (type(ours), ours.dtype, ours.shape) == (type(theirs), theirs.dtype, theirs.shape)
    ours, theirs = (x.double().numpy() if where is None else x.double()[where].numpy() for x in (ours, theirs))
    np.testing.assert_allclose(ours, theirs, **AGREES)


# ---- What may be drawn -----------------------------------------------------------------------------

seeds = st.integers(0, 2**31 - 1)
flags = st.booleans()


@st.composite
def attentions(draw: st.DrawFn) -> dict[str, Any]:
    heads = draw(st.integers(1, 6))
    widths = st.none() | st.integers(1, 20)
    return {
        "embed_dim": heads * draw(st.integers(1, 17)),
        "num_heads": heads,
        "dropout": draw(st.sampled_from([0.0, 0.3])),
        "bias": draw(flags),
        "add_bias_kv": draw(flags),
        "add_zero_attn": draw(flags),
        "kdim": draw(widths),
        "vdim": draw(widths),
        "batch_first": draw(flags),
    }


@st.composite
def transformers(draw: st.DrawFn) -> dict[str, Any]:
    heads = draw(st.integers(1, 4))
    return {
        "d_model": heads * draw(st.integers(1, 9)),
        "nhead": heads,
        "num_encoder_layers": draw(st.integers(1, 3)),
        "num_decoder_layers": draw(st.integers(1, 3)),
        "dim_feedforward": draw(st.integers(1, 70)),
        "dropout": draw(st.sampled_from([0.0, 0.1])),
        "activation": draw(st.sampled_from(["relu", "gelu"])),
        "layer_norm_eps": draw(st.sampled_from([1e-5, 1e-3])),
        "batch_first": draw(flags),
        "norm_first": draw(flags),
        "bias": draw(flags),
    }


def masks(torch: Any, kind: str, *shape: int) -> Any:
    """A mask of PyTorch's that hides no query's first key: "none", "bool", "inf" or "float"."""
    hidden = torch.rand(shape) < 0.4
    hidden[..., 0] = False
    if kind == "inf":
        return torch.where(hidden, -torch.inf, 0.0)
    return {"none": None, "bool": hidden, "float": torch.randn(shape)}[kind]


kinds = st.sampled_from(["none", "bool", "inf", "float"])


@given(options=attentions(), seed=seeds, data=st.data())
def test_multihead_attention(torch, backend, options, seed, data):
    theirs, ours = pair(torch, seed, "MultiheadAttention", **options)
    batched, per_head, same = data.draw(flags), data.draw(flags), data.draw(flags)
    batch, len_q, len_kv = (data.draw(st.integers(1, 9)) for _ in range(3))
    heads, width = options["num_heads"], options["embed_dim"]

    def inputs(length: int, dim: int) -> Any:
        shape = (batch, length) if options["batch_first"] else (length, batch)
        return torch.randn(*(shape if batched else (length,)), dim)

    query, key, value = inputs(len_q, width), inputs(len_kv, theirs.kdim), inputs(len_kv, theirs.vdim)
    if same and theirs.kdim == width == theirs.vdim:
        key = value = query
        len_kv = len_q
    elif same and theirs.kdim == theirs.vdim:
        value = key
    mask_shape = (batch * heads if batched else heads, len_q, len_kv) if per_head else (len_q, len_kv)
    padding, mask = data.draw(kinds), data.draw(kinds)
    if "none" not in (padding, mask) and (padding == "bool") != (mask == "bool"):
        padding = mask  # PyTorch wants both of one kind
    call = {
        "key_padding_mask": masks(torch, padding, *((batch, len_kv) if batched else (len_kv,))),
        "attn_mask": masks(torch, mask, *mask_shape),
        "need_weights": data.draw(flags),
        "average_attn_weights": data.draw(flags),
    }
    # Keys that were added are seen by all queries; PyTorch hides them where is_causal replaces the mask, not elsewhere.
    if data.draw(flags) and not (options["add_bias_kv"] or options["add_zero_attn"]):
        call["is_causal"] = True
        call["attn_mask"] = torch.triu(torch.ones(len_q, len_kv, dtype=torch.bool), 1)
        if padding in ("inf", "float"):
            call["attn_mask"] = torch.where(call["attn_mask"], -torch.inf, 0.0)
    want, want_weights = theirs(query, key, value, **call)
    out, weights = ours(query, key, value, **call)
    agrees(out, want)
    assert (weights is None) == (want_weights is None)
    if weights is not None:
        agrees(weights, want_weights)


@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
@given(options=transformers(), seed=seeds, data=st.data())
def test_transformer(torch, backend, options, seed, data):
    theirs, ours = pair(torch, seed, "Transformer", **options)
    batched = data.draw(flags)
    batch, len_q, len_kv = (data.draw(st.integers(1, 9)) for _ in range(3))

    def inputs(length: int) -> Any:
        shape = (batch, length) if options["batch_first"] else (length, batch)
        return torch.randn(*(shape if batched else (length,)), options["d_model"])

    def padding(kind: str, length: int) -> Any:
        return masks(torch, kind, *((batch, length) if batched else (length,)))

    # Each attention's two masks are of one kind, as PyTorch wants them.
    own, causal, memory = data.draw(kinds), data.draw(kinds), data.draw(kinds)
    triangle = theirs.generate_square_subsequent_mask(len_q)
    call = {
        "src_mask": masks(torch, own, len_kv, len_kv),
        "src_key_padding_mask": padding(own, len_kv),
        "tgt_mask": {"bool": torch.isinf(triangle), "inf": triangle}.get(causal, masks(torch, causal, len_q, len_q)),
        "tgt_key_padding_mask": padding(causal, len_q),
        "memory_mask": masks(torch, memory, len_q, len_kv),
        "memory_key_padding_mask": padding(memory, len_kv),
    }
    src, tgt = inputs(len_kv), inputs(len_q)
    agrees(ours(src, tgt, **call), theirs(src, tgt, **call))


@given(options=transformers(), seed=seeds, silu=flags)
def test_layers_with_functions_as_activation(torch, backend, options, seed, silu):
    """Encoder and decoder layers take modules and functions too; stacks take norms of any width."""
    activation = torch.nn.functional.silu if silu else torch.nn.GELU()
    words = ("d_model", "nhead", "dim_feedforward", "dropout", "layer_norm_eps", "batch_first", "norm_first", "bias")
    layer = {name: options[name] for name in words} | {"activation": activation}
    x = torch.randn(3, 3, options["d_model"])
    for name, inputs in (("TransformerEncoderLayer", (x,)), ("TransformerDecoderLayer", (x, x.flip(0)))):
        theirs, ours = pair(torch, seed, name, **layer)
        agrees(ours(*inputs), theirs(*inputs))


# ---- What PyTorch's modules lack ---------------------------------------------------------------------


@pytest.mark.parametrize("widths", [(None, None), (10, 7)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_grouped_query_attention(backend, dtype, widths):
    """heads_kv heads of keys and values: as num_heads of them whose projections are repeated."""
    kdim, vdim = widths
    grouped = nn.MultiheadAttention(24, 6, kdim=kdim, vdim=vdim, add_bias_kv=True, batch_first=True, num_heads_kv=2)
    plain = nn.MultiheadAttention(24, 6, kdim=kdim, vdim=vdim, add_bias_kv=True, batch_first=True)
    rng = np.random.default_rng(3)
    state = {n: rng.standard_normal(x.shape).astype(np.float32) / 4 for n, x in grouped.state_dict().items()}
    grouped.load_state_dict(state)

    def repeated(x: np.ndarray) -> np.ndarray:
        """Each head's 4 rows, three times."""
        return np.repeat(x.reshape(2, 4, *x.shape[1:]), 3, axis=0).reshape(24, *x.shape[1:])

    wide = dict(state)
    for name in ("bias_k", "bias_v"):
        wide[name] = repeated(state[name].reshape(8)).reshape(1, 1, 24)
    q, k, v = np.split(state["in_proj_bias"], [24, 32])
    wide["in_proj_bias"] = np.concatenate([q, repeated(k), repeated(v)])
    if kdim is None:
        q, k, v = np.split(state["in_proj_weight"], [24, 32])
        wide["in_proj_weight"] = np.concatenate([q, repeated(k), repeated(v)])
    else:
        wide |= {name: repeated(state[name]) for name in ("k_proj_weight", "v_proj_weight")}
    plain.load_state_dict(wide)
    query, key, value = (
        normal(i, 2, n, w or 24, dtype=dtype) for i, (n, w) in enumerate(((5, 24), (7, kdim), (7, vdim)))
    )
    within = {"rtol": 1e-2, "atol": 1e-2} if DTYPES[dtype].itemsize == 2 else AGREES
    for average in (True, False):
        out, weights = grouped(query, key, value, average_attn_weights=average)
        want, want_weights = plain(query, key, value, average_attn_weights=average)
        np.testing.assert_allclose(np.float64(out), np.float64(want), **within)
        np.testing.assert_allclose(np.float64(weights), np.float64(want_weights), **within)
    with pytest.raises(ValueError, match="num_heads_kv: expected a divisor of num_heads = 6, got 4"):
        nn.MultiheadAttention(24, 6, num_heads_kv=4)


def test_key_mask_is_padding_the_other_way_round(backend):
    module, x = nn.MultiheadAttention(16, 4, batch_first=True), normal(0, 3, 8, 16)
    rng = np.random.default_rng(1)
    for seen in (rng.random((3, 8)) < 0.6, np.arange(8) < np.array([[8], [0], [3]])):
        for mask in (None, rng.random((8, 8)) < 0.3):
            want = module(x, x, x, key_padding_mask=~seen, attn_mask=mask)
            out = module(x, x, x, key_mask=seen, attn_mask=mask)
            for a, b in zip(out, want, strict=True):
                np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(module(x[0], x[0], x[0], key_mask=seen[0])[0], module(x[0], x[0], x[0])[0])
    with pytest.raises(ValueError, match="key_mask: expected None where key_padding_mask"):
        module(x, x, x, ~seen, key_mask=seen)
    with pytest.raises(TypeError, match="key_mask: expected a bool array"):
        module(x, x, x, key_mask=seen.astype(np.float32))
    with pytest.raises(ValueError, match=r"key_mask: expected shape \(3, 8\)"):
        module(x, x, x, key_mask=seen[:2])


@pytest.mark.parametrize("norm_type", [1.0, 2.0])
def test_embedding_with_a_largest_norm(torch, norm_type):
    theirs = torch.nn.Embedding(9, 5, 2, 1.5, norm_type)
    ours = nn.Embedding(9, 5, 2, 1.5, norm_type)
    state = {"weight": theirs.weight.detach().numpy().copy()}
    ours.load_state_dict(state)
    ids = torch.arange(9)
    agrees(ours(ids), theirs(ids))
    assert ours.state_dict()["weight"] is state["weight"]


def test_gated_feed_forward_of_every_dtype(backend):
    for dtype in DTYPES:
        module = nn.FeedForward(12, 20, "swiglu", bias=False)
        x = normal(0, 4, 12, dtype=dtype)
        w = {name: np.float64(value) for name, value in module.state_dict().items()}
        hidden = reference.linear(np.float64(x), w["linear1.weight"], None, "silu")
        hidden = hidden * reference.linear(np.float64(x), w["linear3.weight"])
        want = reference.linear(hidden, w["linear2.weight"])
        within = {"float64": 1e-12, "float32": 1e-5, "float16": 4e-3, "bfloat16": 3e-2}[dtype]
        out = module(x)
        assert out.dtype == x.dtype
        np.testing.assert_allclose(np.float64(out), want, rtol=within, atol=within)
