"""regard.nn: PyTorch's modules with their state dicts loaded, and the same built from the reference."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import numpy as np
import pytest
import regard
from cases import DTYPES
from helpers import EPSILON, assert_same_bits, normal
from regard import nn, reference

#: PyTorch computes in float32 itself: both err, by some epsilon times the depth of the sums.
AGREES = {"rtol": 1e-5, "atol": 1e-5}


def random_state(module: nn.Module, seed: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return {
        name: (rng.standard_normal(value.shape) / max(value.shape[-1], 1) ** 0.5).astype(np.float32)
        for name, value in module.state_dict().items()
    }


# ---- Parameters ----------------------------------------------------------------------------------


def test_state_dict_gives_back_what_was_loaded():
    module = nn.TransformerEncoder(nn.TransformerEncoderLayer(24, 3, 40), 2, nn.LayerNorm(24))
    state = random_state(module)
    assert module.load_state_dict(state) == ([], [])
    again = module.state_dict()
    assert list(again) == list(state)
    assert all(again[name] is state[name] for name in state)


@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_of_every_dtype(backend, dtype):
    layer = nn.Linear(20, 30)
    weight, bias = normal(0, 30, 20, dtype=dtype), normal(1, 30, dtype=dtype)
    layer.load_state_dict({"weight": weight, "bias": bias})
    x = normal(2, 5, 20)
    within = 1e-5 if dtype != "float64" else 1e-4  # float64 weights are rounded to the input's float32
    np.testing.assert_allclose(
        layer(x), reference.linear(x, np.float32(weight), np.float32(bias)), rtol=within, atol=within
    )
    assert layer.state_dict()["weight"] is weight


def test_mistakes_in_a_state_dict_are_all_named():
    module = nn.MultiheadAttention(8, 2)
    state = random_state(module)
    before = module.in_proj_weight
    wrong = dict(state, in_proj_weight=np.zeros((24, 9), np.float32), extra=np.zeros(3))
    del wrong["out_proj.bias"]
    with pytest.raises(ValueError) as caught:
        module.load_state_dict(wrong)
    for words in ("missing: out_proj.bias", "unexpected: extra", "in_proj_weight: expected shape (24, 8)"):
        assert words in str(caught.value)
    assert module.in_proj_weight is before  # nothing was loaded
    del wrong["in_proj_weight"]
    assert module.load_state_dict(wrong, strict=False) == (["in_proj_weight", "out_proj.bias"], ["extra"])
    with pytest.raises(TypeError, match=r"out_proj.bias|expected dtype"):
        module.load_state_dict(dict(state, in_proj_bias=np.zeros(24, np.int64)))
    with pytest.raises(TypeError, match="expected an array"):
        module.load_state_dict(dict(state, in_proj_bias=[0.0] * 24))


def test_weights_loaded_while_others_are_packed_are_the_ones_used(backend, monkeypatch):
    module, pack = nn.Linear(3, 2, bias=False), nn.Linear._pack
    ones = {"weight": np.ones((2, 3), np.float32)}

    def interrupted(self: Any, *args: Any) -> Any:
        packed = pack(self, *args)
        monkeypatch.undo()
        module.load_state_dict(ones)  # as another thread might
        return packed

    monkeypatch.setattr(nn.Linear, "_pack", interrupted)
    x = normal(0, 4, 3)
    module(x)
    np.testing.assert_allclose(module(x), x @ ones["weight"].T, rtol=1e-6)


def test_loading_again_replaces_what_was_packed(backend):
    module, x = nn.MultiheadAttention(8, 2), normal(0, 4, 1, 8)
    first = module(x, x, x)[0]
    state = random_state(module, 1)
    module.load_state_dict(state)
    second = module(x, x, x)[0]
    assert not np.allclose(first, second)
    fresh = nn.MultiheadAttention(8, 2)
    fresh.load_state_dict(state)
    assert_same_bits(second, fresh(x, x, x)[0])
    module.in_proj_bias = np.ones(24, np.float32)
    assert not np.allclose(second, module(x, x, x)[0])
    with pytest.raises(ValueError, match="in_proj_bias"):
        module.in_proj_bias = np.ones(23, np.float32)


def test_layers_of_a_stack_are_copies():
    stack = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16), 2)
    stack.layers[0].linear1.bias = np.ones(16, np.float32)
    assert not np.array_equal(stack.layers[1].linear1.bias, stack.layers[0].linear1.bias)


# ---- Against the reference, without PyTorch --------------------------------------------------------


def attention_by_reference(module: Any, query: Any, key: Any, value: Any, mask: Any = None) -> Any:
    """Batch-first multi-head attention in float64; mask True = attend."""
    w = {name: np.asarray(x).astype(np.float64) for name, x in module.state_dict().items()}
    bias = np.split(w["in_proj_bias"], 3)
    weights = np.split(w["in_proj_weight"], 3)
    inputs = (np.asarray(x).astype(np.float64) for x in (query, key, value))
    q, k, v = (
        reference.linear(x, weight, b).reshape(*x.shape[:2], module.num_heads, -1)
        for x, weight, b in zip(inputs, weights, bias, strict=True)
    )
    out, weights = reference.attention(q, k, v, mask=mask, layout="bshd", return_weights=True)
    return reference.linear(out.reshape(*out.shape[:2], -1), w["out_proj.weight"], w["out_proj.bias"]), weights


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_against_the_reference(backend, dtype, batch_first):
    module = nn.MultiheadAttention(24, 3, batch_first=batch_first)
    module.load_state_dict(random_state(module))
    query, key = normal(0, 2, 7, 24, dtype=dtype), normal(1, 2, 11, 24, dtype=dtype)
    padding = np.arange(11) >= np.array([5, 11])[:, None]
    want, want_weights = attention_by_reference(module, query, key, key, ~padding[:, None, None])
    order = (lambda x: x) if batch_first else (lambda x: x.swapaxes(0, 1))
    out, weights = module(order(query), order(key), order(key), key_padding_mask=padding)
    assert out.dtype == weights.dtype == DTYPES[dtype]
    within = max(1e-5, 4 * EPSILON[dtype])  # two-byte dtypes round between the three steps
    np.testing.assert_allclose(np.float64(order(out)), want, rtol=within, atol=within)
    np.testing.assert_allclose(np.float64(weights), want_weights.mean(1), rtol=within, atol=within)


def test_weights_of_float64_are_of_its_precision(backend):
    module = nn.MultiheadAttention(24, 3, batch_first=True, dtype="float64")
    x = normal(0, 2, 7, 24, dtype="float64")
    _, want = attention_by_reference(module, x, x, x)
    for average in (False, True):
        _, weights = module(x, x, x, average_attn_weights=average)
        np.testing.assert_allclose(weights, want.mean(1) if average else want, rtol=0, atol=1e-14)


def test_a_query_that_sees_nothing_gives_the_output_bias(backend):
    module = nn.MultiheadAttention(8, 2, batch_first=True)
    module.load_state_dict(random_state(module))
    x = normal(0, 2, 5, 8)
    padding = np.array([[True] * 5, [False] * 5])
    for mask in (padding, np.where(padding, -np.inf, 0.0)):
        out, weights = module(x, x, x, key_padding_mask=mask)
        np.testing.assert_array_equal(out[0], np.broadcast_to(module.out_proj.bias, (5, 8)))
        assert (weights[0] == 0).all()
        np.testing.assert_allclose(weights[1].sum(-1), 1, rtol=1e-6)


def test_padding_does_not_leak(backend):
    module = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    module.load_state_dict(random_state(module))
    x = normal(0, 2, 45, 16)
    alone = module(x[:1, :40])  # many queries either way: few have a path of their own, whose bits may differ
    x[0, 40:] = np.nan
    padding = np.arange(45) >= np.array([40, 45])[:, None]
    out = module(x, src_key_padding_mask=padding)
    assert_same_bits(np.ascontiguousarray(out[:1, :40]), alone)
    assert np.isfinite(out[1]).all()


@pytest.mark.parametrize("holes", [False, True])
@pytest.mark.parametrize("kind", ["bool", "float"])
def test_masks_of_every_kind_agree(backend, holes, kind):
    module = nn.MultiheadAttention(16, 4, batch_first=True)
    module.load_state_dict(random_state(module))
    x = normal(0, 3, 8, 16)
    padding = np.arange(8) >= np.array([8, 3, 6])[:, None]
    if holes:
        padding[:, 1] = True
    hidden = np.triu(np.ones((8, 8), bool), 1)
    seen = (~hidden)[None, None] & ~padding[:, None, None]
    want, want_weights = attention_by_reference(module, x, x, x, seen)
    per_head = np.broadcast_to(hidden, (12, 8, 8))

    def as_kind(mask: Any) -> Any:
        return mask if kind == "bool" else np.where(mask, -np.inf, 0.0).astype(np.float32)

    given = {"key_padding_mask": as_kind(padding), "average_attn_weights": False}
    for extra in ({"attn_mask": as_kind(hidden)}, {"attn_mask": as_kind(per_head)}, {"is_causal": True}):
        out, weights = module(x, x, x, **given, **extra)
        np.testing.assert_allclose(out, want, **AGREES)
        np.testing.assert_allclose(weights, want_weights, **AGREES)


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("activation", ["relu", "gelu", "silu", "gelu_tanh", np.tanh])
def test_encoder_layer_against_the_reference(backend, norm_first, activation):
    module = nn.TransformerEncoderLayer(
        24, 3, 40, activation=activation, batch_first=True, norm_first=norm_first, layer_norm_eps=1e-3
    )
    module.load_state_dict(random_state(module))
    w = {name: x.astype(np.float64) for name, x in module.state_dict().items()}
    x = normal(5, 2, 6, 24).astype(np.float64)

    def norm(y: Any, i: int) -> Any:
        return reference.layer_norm(y, w[f"norm{i}.weight"], w[f"norm{i}.bias"], 1e-3)

    def attend(y: Any) -> Any:
        return attention_by_reference(module.self_attn, y, y, y)[0]

    def feed_forward(y: Any) -> Any:
        fused = activation if isinstance(activation, str) else None
        hidden = reference.linear(y, w["linear1.weight"], w["linear1.bias"], fused)
        return reference.linear(hidden if fused else activation(hidden), w["linear2.weight"], w["linear2.bias"])

    if norm_first:
        want = x + attend(norm(x, 1))
        want = want + feed_forward(norm(want, 2))
    else:
        want = norm(x + attend(x), 1)
        want = norm(want + feed_forward(want), 2)
    np.testing.assert_allclose(module(x.astype(np.float32)), want, **AGREES)
    np.testing.assert_allclose(module(x), want, rtol=1e-12, atol=1e-12)


def test_an_unknown_approximation_of_gelu_is_refused():
    def gelu(x: Any, approximate: str = "none") -> Any:
        return x

    with pytest.raises(NotImplementedError, match=r"activation.*'by sigmoid'"):
        nn.FeedForward(4, 8, functools.partial(gelu, approximate="by sigmoid"))
    assert nn.FeedForward(4, 8, functools.partial(gelu, approximate="none")).activation == "gelu"
    assert nn.FeedForward(4, 8, functools.partial(gelu, approximate="tanh")).activation == "gelu_tanh"


@pytest.mark.parametrize("name", ["gelu", "gelu_tanh", "swiglu", "geglu", "geglu_tanh", "reglu"])
def test_feed_forward(backend, name):
    x = normal(0, 3, 5, 16)
    module = nn.FeedForward(16, 24, name)
    module.load_state_dict(random_state(module))
    w = module.state_dict()
    gated = {"swiglu": "silu", "geglu": "gelu", "geglu_tanh": "gelu_tanh", "reglu": "relu"}
    hidden = reference.linear(x, w["linear1.weight"], w["linear1.bias"], gated.get(name, name))
    assert ("linear3.weight" in w) == (name in gated)
    if name in gated:
        hidden = hidden * reference.linear(x, w["linear3.weight"], w["linear3.bias"])
    np.testing.assert_allclose(module(x), reference.linear(hidden, w["linear2.weight"], w["linear2.bias"]), **AGREES)


def test_embedding_and_positions():
    table = nn.Embedding(10, 6, padding_idx=0)
    assert (table.weight[0] == 0).all()
    ids = np.array([[1, 9], [0, 3]])
    np.testing.assert_array_equal(table(ids), table.weight[ids])
    for bad, error in (
        (np.array([10]), ValueError),
        (np.array([-1]), ValueError),
        (np.array([1.0]), TypeError),
    ):
        with pytest.raises(error, match="input: expected"):
            table(bad)
    x = normal(0, 2, 5, 6)
    first = nn.PositionalEncoding(6, 20, batch_first=True)
    added = first(x, start=3) - x
    positions = np.arange(3, 8)
    np.testing.assert_allclose(added[0, :, 0], np.sin(positions), atol=1e-6)
    np.testing.assert_allclose(added[1, :, 3], np.cos(positions / 10000 ** (2 / 6)), atol=1e-6)
    with pytest.raises(ValueError, match="max_len"):
        first(x, start=16)
    learned = nn.PositionalEncoding(6, 20, learned=True)
    np.testing.assert_array_equal(learned(x)[1], x[1] + learned.weight[1])


def test_norms_over_several_axes(backend):
    x = normal(0, 4, 3, 5)
    module = nn.LayerNorm((3, 5))
    module.load_state_dict(random_state(module))
    want = reference.layer_norm(x.reshape(4, 15), module.weight.reshape(-1), module.bias.reshape(-1)).reshape(x.shape)
    np.testing.assert_allclose(module(x), want, **AGREES)
    np.testing.assert_allclose(nn.RMSNorm(5)(x), reference.rms_norm(x, None, 2.0**-23), **AGREES)
    with pytest.raises(ValueError, match=r"expected shape \(\.\.\., 3, 5\)"):
        module(x[:, :2])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (((5, 2, 9), (5, 2, 8), (5, 2, 8)), "query: expected shape"),
        (((5, 2, 8), (5, 3, 8), (5, 3, 8)), "key: expected the batch of query, 2"),
        (((5, 2, 8), (6, 2, 8), (5, 2, 8)), "value: expected the batch and length of key"),
        (((5, 8), (5, 2, 8), (5, 2, 8)), "key: expected shape"),
        (((8,), (8,), (8,)), "query: expected shape"),
    ],
)
def test_shapes_that_do_not_fit(arguments, words):
    module = nn.MultiheadAttention(8, 2)
    with pytest.raises(ValueError, match=words):
        module(*(np.zeros(shape, np.float32) for shape in arguments))


def test_other_mistakes():
    x = np.zeros((5, 2, 8), np.float32)
    module = nn.MultiheadAttention(8, 2)
    with pytest.raises(TypeError, match="query: expected an array of dtype"):
        module(x.astype(int), x.astype(int), x.astype(int))
    with pytest.raises(TypeError, match="key: expected the dtype of query"):
        module(x, x.astype(np.float64), x)
    with pytest.raises(TypeError, match="key_padding_mask: expected a bool"):
        module(x, x, x, key_padding_mask=np.zeros((2, 5), int))
    with pytest.raises(ValueError, match=r"key_padding_mask: expected shape \(2, 5\)"):
        module(x, x, x, key_padding_mask=np.zeros((5, 2), bool))
    with pytest.raises(ValueError, match=r"attn_mask: expected shape \(5, 5\) or \(4, 5, 5\)"):
        module(x, x, x, attn_mask=np.zeros((2, 5, 5), bool))
    with pytest.raises(ValueError, match="multiple of num_heads"):
        nn.MultiheadAttention(8, 3)
    with pytest.raises(ValueError, match="activation: expected"):
        nn.TransformerEncoderLayer(8, 2, activation="softplus")
    with pytest.raises(NotImplementedError, match="device cuda"):
        nn.Linear(3, 3, device="cuda")
    with pytest.raises(TypeError, match="dtype: expected"):
        nn.Linear(3, 3, dtype=np.int32)


def test_empty_batches_and_lengths(backend):
    module = nn.TransformerEncoderLayer(8, 2, 16)
    for shape in ((0, 2, 8), (5, 0, 8), (0, 8)):
        assert module(np.zeros(shape, np.float32)).shape == shape
    out, weights = nn.MultiheadAttention(8, 2)(*(np.zeros((n, 2, 8), np.float32) for n in (3, 0, 0)))
    assert (out.shape, weights.shape) == ((3, 2, 8), (2, 3, 0))


def test_results_do_not_depend_on_batch_or_threads(backend):
    module = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), 2)
    x = normal(0, 5, 13, 32)
    want, threads = module(x), regard.get_num_threads()
    try:
        for n in (1, 3):
            regard.set_num_threads(n)
            assert_same_bits(module(x), want)
    finally:
        regard.set_num_threads(threads)
    assert_same_bits(module(x[2:3]), np.ascontiguousarray(want[2:3]))


# ---- Against PyTorch -----------------------------------------------------------------------------


@pytest.fixture
def torch() -> Any:
    found = pytest.importorskip("torch")
    found.manual_seed(0)
    # The fast path for evaluation takes float masks for bool ones and may write zeros where padding is.
    fast = found.backends.mha.get_fastpath_enabled()
    found.backends.mha.set_fastpath_enabled(False)
    with found.no_grad():
        yield found
    found.backends.mha.set_fastpath_enabled(fast)


def pair(torch: Any, name: str, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
    """PyTorch's module with random weights, and ours with its state dict."""
    theirs = getattr(torch.nn, name)(*args, **kwargs).eval()
    for parameter in theirs.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.1)  # biases start as zeros, norms as ones
    ours = getattr(nn, name)(*args, **kwargs)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def agrees(ours: Any, theirs: Any) -> None:
    assert (type(ours), ours.dtype) == (type(theirs), theirs.dtype)
    np.testing.assert_allclose(ours.float().numpy(), theirs.float().numpy(), **AGREES)


def attention_configurations() -> list[dict[str, Any]]:
    """24 draws from PyTorch's whole space of MultiheadAttention options."""
    rng = np.random.default_rng(7)
    made = []
    for i in range(24):
        heads = int(rng.integers(1, 5))
        made.append(
            {
                "embed_dim": heads * int(rng.integers(1, 12)),
                "num_heads": heads,
                "bias": bool(rng.integers(2)),
                "add_bias_kv": bool(rng.integers(2)) and i % 3 == 0,
                "add_zero_attn": bool(rng.integers(2)) and i % 2 == 0,
                "kdim": [None, int(rng.integers(1, 20))][i % 4 == 1],
                "vdim": [None, int(rng.integers(1, 20))][i % 4 == 2],
                "batch_first": bool(rng.integers(2)),
            }
        )
    return made


@pytest.mark.parametrize("options", attention_configurations(), ids=lambda o: "-".join(map(str, o.values())))
def test_attention_agrees_with_torch(torch, backend, options):
    theirs, ours = pair(torch, "MultiheadAttention", **options)
    seed = sum(map(ord, str(options)))
    rng = np.random.default_rng(seed)
    batch, len_q, len_kv = (int(n) for n in rng.integers(1, 9, 3))
    width, heads = options["embed_dim"], options["num_heads"]
    for batched, same in itertools.product((True, False), (True, False)):

        def inputs(length: int, dim: int, batched: bool = batched) -> Any:
            shape = (batch, length) if options["batch_first"] else (length, batch)
            return torch.randn(*(shape if batched else (length,)), dim)

        query = inputs(len_q, width)
        key, value = inputs(len_kv, theirs.kdim), inputs(len_kv, theirs.vdim)
        keys = len_kv
        if same and theirs.kdim == width == theirs.vdim:
            key = value = query
            keys = len_q
        padding = torch.rand(batch, keys) < 0.4
        padding[:, 0] = False
        mask = torch.rand(len_q, keys) < 0.3
        mask[:, 0] = False
        padding = padding if batched else padding[0]
        per_head = torch.randn(batch * heads if batched else heads, len_q, keys)
        for key_padding_mask, attn_mask, need, average in (
            (None, None, True, True),
            (padding, None, False, True),
            (padding, mask, True, False),
            (None, torch.randn(len_q, keys), True, True),
            (torch.where(padding, -torch.inf, 0.0), per_head, False, True),
        ):
            call = {"need_weights": need, "average_attn_weights": average}
            call |= {"key_padding_mask": key_padding_mask, "attn_mask": attn_mask}
            want, want_weights = theirs(query, key, value, **call)
            out, weights = ours(query, key, value, **call)
            agrees(out, want)
            assert (weights is None) == (want_weights is None)
            if need:
                agrees(weights, want_weights)


@pytest.mark.parametrize("seed", range(6))
def test_encoder_agrees_with_torch(torch, backend, seed):
    rng = np.random.default_rng(seed)
    heads, batch_first, norm_first = int(rng.integers(1, 5)), bool(seed % 2), bool(seed // 2 % 2)
    width = heads * 2 * int(rng.integers(1, 9))
    by_tanh = functools.partial(torch.nn.functional.gelu, approximate="tanh")
    activations = ["relu", "gelu", torch.nn.functional.silu, torch.nn.GELU(), by_tanh, torch.nn.GELU("tanh")]
    activation = activations[seed]
    layer = {
        "dim_feedforward": int(rng.integers(1, 80)),
        "activation": activation,
        "batch_first": batch_first,
    }
    layer |= {"norm_first": norm_first, "bias": seed != 4, "layer_norm_eps": 1e-4}
    theirs = torch.nn.TransformerEncoder(
        torch.nn.TransformerEncoderLayer(width, heads, **layer),
        2,
        torch.nn.LayerNorm(width),
        enable_nested_tensor=False,
    ).eval()
    ours = nn.TransformerEncoder(nn.TransformerEncoderLayer(width, heads, **layer), 2, nn.LayerNorm(width))
    ours.load_state_dict(theirs.state_dict())
    batch, length = 3, int(rng.integers(1, 20))
    src = torch.randn(*((batch, length) if batch_first else (length, batch)), width)
    padding = torch.arange(length) >= torch.tensor([[length], [max(1, length // 2)], [1]])
    causal = torch.nn.Transformer.generate_square_subsequent_mask(length)
    keep = ~padding if batch_first else ~padding.T
    for call in (
        {},
        {"mask": causal},
        {"mask": causal, "is_causal": True},
        {"mask": torch.randn(length, length)},
    ):
        agrees(ours(src, **call), theirs(src, **call))
    agrees(ours(src, src_key_padding_mask=padding)[keep], theirs(src, src_key_padding_mask=padding)[keep])
    agrees(ours(src[:, 0] if not batch_first else src[0]), theirs(src[:, 0] if not batch_first else src[0]))


@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
@pytest.mark.parametrize("seed", range(4))
def test_whole_transformer_agrees_with_torch(torch, backend, seed):
    options = {
        "batch_first": bool(seed % 2),
        "norm_first": seed > 1,
        "activation": ["relu", "gelu"][seed // 2],
    }
    theirs, ours = pair(torch, "Transformer", 16, 4, 2, 2, 24, bias=seed != 3, **options)
    shape = (lambda n: (3, n, 16)) if seed % 2 else (lambda n: (n, 3, 16))
    src, tgt = torch.randn(*shape(7)), torch.randn(*shape(5))
    mask = torch.nn.Transformer.generate_square_subsequent_mask(5)
    padding = torch.arange(7) >= torch.tensor([[7], [4], [1]])
    call = {"tgt_mask": mask, "memory_key_padding_mask": padding}
    agrees(ours(src, tgt, **call), theirs(src, tgt, **call))
    agrees(ours(src, tgt, tgt_mask=mask, tgt_is_causal=True), theirs(src, tgt, tgt_mask=mask, tgt_is_causal=True))
    np.testing.assert_array_equal(nn.Transformer.generate_square_subsequent_mask(5), mask.numpy())


def test_small_modules_agree_with_torch(torch, backend):
    x = torch.randn(4, 3, 10)
    for name, args, kwargs in (
        ("Linear", (10, 7), {}),
        ("Linear", (10, 7), {"bias": False}),
        ("LayerNorm", (10,), {"eps": 1e-3}),
        ("LayerNorm", ((3, 10),), {}),
        ("LayerNorm", (10,), {"bias": False}),
        ("LayerNorm", (10,), {"elementwise_affine": False}),
        ("RMSNorm", (10,), {}),
        ("RMSNorm", (10,), {"eps": 1e-2}),
    ):
        theirs, ours = pair(torch, name, *args, **kwargs)
        agrees(ours(x), theirs(x))
    theirs, ours = pair(torch, "Embedding", 12, 5)
    ids = torch.tensor([[0, 11], [3, 3]])
    agrees(ours(ids), theirs(ids))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_torch_tensors_of_other_dtypes(torch, backend, dtype):
    pytest.importorskip("ml_dtypes")
    kind = getattr(torch, dtype)
    theirs = torch.nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dtype=kind).eval()
    ours = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    ours.load_state_dict(theirs.state_dict())
    assert ours.state_dict()["linear1.weight"].dtype == kind
    x = torch.randn(2, 5, 16).to(kind)
    out = ours(x)
    assert (type(out), out.dtype) == (torch.Tensor, kind)
    # Both round to the dtype some ten times on the way, at values up to about 4.
    within = max(1e-5, 16 * EPSILON[dtype])
    want = theirs.double()(x.double())
    np.testing.assert_allclose(out.double().numpy(), want.numpy(), rtol=0, atol=within)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64"])
def test_rms_norm_of_small_values_agrees_with_torch(torch, dtype):
    """Where eps counts: left out, it is that of the dtype that is computed in."""
    pytest.importorskip("ml_dtypes")
    x = (torch.randn(4, 64) * 1e-3).to(getattr(torch, dtype))
    theirs, ours = torch.nn.RMSNorm(64, dtype=x.dtype), nn.RMSNorm(64)
    np.testing.assert_allclose(ours(x).double().numpy(), theirs(x).double().numpy(), rtol=4 * EPSILON[dtype])


def test_a_float_mask_beside_is_causal_is_added(torch, backend):
    theirs, ours = pair(torch, "MultiheadAttention", 16, 2, batch_first=True)
    distance = torch.arange(5)[:, None] - torch.arange(5)
    mask = (-0.5 * distance.float()).masked_fill(distance < 0, -np.inf)
    x = torch.randn(2, 5, 16)
    want, weights = theirs(x, x, x, attn_mask=mask, is_causal=True)
    for given in (mask, mask.masked_fill(distance < 0, 0.0)):  # what is_causal hides, a mask need not
        out, found = ours(x, x, x, attn_mask=given, is_causal=True)
        agrees(out, want)
        agrees(found, weights)
    both = nn.MultiheadAttention(16, 2, batch_first=True, add_bias_kv=True, add_zero_attn=True)
    y = x.numpy()
    alone, _ = both(y, y, y, attn_mask=mask.numpy())
    np.testing.assert_array_equal(both(y, y, y, attn_mask=mask.numpy(), is_causal=True)[0], alone)
