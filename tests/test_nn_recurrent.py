"""regard.nn.GRU, LSTM and RNNSearch: PyTorch's modules, names, arguments and returns."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import regard
from cases import DTYPES
from helpers import assert_near, assert_same_bits, normal
from regard import nn

CELLS = {"GRU": nn.GRU, "LSTM": nn.LSTM}
#: Some layers of sums of some twenty terms below 1, in float32: see test_recurrent.py for one layer's.
NEAR = 40 * 2.0**-23


def drawn(module: Any, dtype: str = "float32") -> Any:
    """The module with weights that all differ: initial biases of norms and the like do not."""
    shapes = {name: np.shape(x) for name, x in module.state_dict().items()}
    module.load_state_dict({n: normal(i, *s, dtype=dtype) * np.asarray(0.3, DTYPES[dtype])
                            for i, (n, s) in enumerate(shapes.items())})  # fmt: skip
    return module


def flat(x: Any) -> list[Any]:
    return [z for y in x for z in flat(y)] if isinstance(x, tuple) else [x]


@pytest.mark.parametrize("name", CELLS)
@pytest.mark.parametrize(
    ("layers", "bias", "batch_first", "bidirectional"),
    [(1, True, False, False), (1, False, True, True), (2, True, True, False), (3, True, False, True)],
)
def test_modules_are_torch_s(backend, name, layers, bias, batch_first, bidirectional):
    torch = pytest.importorskip("torch")
    options = dict(num_layers=layers, bias=bias, batch_first=batch_first, bidirectional=bidirectional)
    if layers > 1:
        options["dropout"] = 0.5
    theirs = getattr(torch.nn, name)(6, 10, **options).eval()
    ours = CELLS[name](6, 10, **options)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict())
    x = torch.from_numpy(normal(0, 5, 4, 6))
    batch = 5 if batch_first else 4
    states = tuple(torch.from_numpy(normal(i, layers * (1 + bidirectional), batch, 10)) for i in (1, 2))
    hx = states if name == "LSTM" else states[0]
    with torch.inference_mode():
        for arguments in ((x,), (x, hx), (x, list(hx) if name == "LSTM" else hx)):
            got, want = ours(*arguments), theirs(*arguments)
            assert isinstance(got, tuple) and isinstance(got[1], torch.Tensor if name == "GRU" else tuple)
            for a, w in zip(flat(got), flat(want), strict=True):
                assert isinstance(a, torch.Tensor) and a.shape == w.shape
                assert_near(a.numpy(), w.numpy(), NEAR)
        # Without a batch, and in the other frame of arrays.
        one = (x[0], tuple(s[:, 0] for s in hx) if name == "LSTM" else hx[:, 0])
        got = ours(x[0].numpy(), tuple(s.numpy() for s in one[1]) if name == "LSTM" else one[1].numpy())
        for a, w in zip(flat(got), flat(theirs(*one)), strict=True):
            assert isinstance(a, np.ndarray) and a.shape == w.shape
            assert_near(a, w.numpy(), NEAR)


@pytest.mark.parametrize("kind", [tuple, list])
def test_states_of_another_framework_than_the_input_s(kind):
    torch = pytest.importorskip("torch")
    module, x, states = nn.LSTM(6, 10), normal(0, 5, 4, 6), [normal(i, 1, 4, 10) for i in (1, 2)]
    want = flat(module(x, tuple(states)))
    theirs = list(map(torch.from_numpy, states))
    for given in (kind(theirs), kind([states[0], theirs[1]])):
        for made, wanted in zip(flat(module(x, given)), want, strict=True):
            assert_same_bits(made, wanted)


@pytest.mark.parametrize("name", CELLS)
def test_lengths_are_torch_s_packed_sequences(backend, name):
    torch = pytest.importorskip("torch")
    from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

    options = dict(num_layers=2, batch_first=True, bidirectional=True)
    theirs = getattr(torch.nn, name)(6, 10, **options).eval()
    ours = CELLS[name](6, 10, **options)
    ours.load_state_dict(theirs.state_dict())
    x, lengths = torch.from_numpy(normal(0, 5, 9, 6)), torch.tensor([3, 9, 1, 7, 9])
    with torch.inference_mode():
        packed, last = theirs(pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False))
        want = (pad_packed_sequence(packed, batch_first=True)[0], last)
        got = ours(x, lengths=lengths)
    for a, w in zip(flat(got), flat(want), strict=True):
        assert_near(a.numpy(), w.numpy(), NEAR)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CELLS)
def test_modules_are_the_functions(backend, name, dtype):
    """Two directions at once are each of them alone."""
    module = drawn(CELLS[name](5, 9, batch_first=True, bidirectional=True), dtype)
    x, lengths = normal(0, 4, 6, 5, dtype=dtype), np.array([6, 2, 0, 5])
    out, last = module(x, lengths=lengths)
    for d, suffix in enumerate(("_l0", "_l0_reverse")):
        w = [getattr(module, n + suffix) for n in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")]
        want = getattr(regard, name.lower())(x, *w, lengths=lengths, reverse=d == 1)
        assert_same_bits(out[..., 9 * d : 9 * d + 9].copy(), want[0])
        for s, v in zip(last if name == "LSTM" else (last,), want[1:], strict=True):
            assert_same_bits(s[d].copy(), v)


def test_time_major_is_the_same(backend):
    module = drawn(nn.GRU(5, 9, bidirectional=True))
    first = nn.GRU(5, 9, bidirectional=True, batch_first=True)
    first.load_state_dict(module.state_dict())
    x = normal(0, 4, 6, 5)
    out, last = module(np.ascontiguousarray(x.swapaxes(0, 1)))
    want, want_last = first(x)
    assert out.flags.c_contiguous
    assert_same_bits(np.ascontiguousarray(out.swapaxes(0, 1)), want)
    assert_same_bits(last, want_last)


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="hidden_size: expected a count >= 1, got 0"):
        nn.GRU(3, 0)
    with pytest.raises(NotImplementedError, match="proj_size = 2"):
        nn.LSTM(3, 4, proj_size=2)
    gru, x = nn.GRU(3, 4), normal(0, 5, 2, 3)
    with pytest.raises(ValueError, match=r"input: .*\(len, batch, input_size = 3\)"):
        gru(x[..., :2])
    with pytest.raises(ValueError, match=r"h0: .*= \(1, 2, 4\), got .*\(1, 5, 4\)"):
        gru(x, normal(0, 1, 5, 4))
    with pytest.raises(TypeError, match="h0: expected the dtype of input"):
        gru(x, np.zeros((1, 2, 4)))
    with pytest.raises(ValueError, match=r"lengths: .*from 0 to len = 5, got 6"):
        gru(x, lengths=np.array([6, 1]))
    with pytest.raises(TypeError, match=r"hx: expected \(h0, c0\)"):
        nn.LSTM(3, 4)(x, normal(0, 1, 2, 4))


# ---- RNNSearch ----

SOURCES = [[3, 4, 5, 3, 6], [5], [6, 6, 3], [], [4, 3, 6, 5, 4, 3, 3], [3, 4]]


@pytest.fixture(scope="module")
def model() -> nn.RNNSearch:
    return drawn(nn.RNNSearch(8, 7, dim_embedding=6, dim_hidden=11, dim_attention=9))


def log_probabilities(model: nn.RNNSearch, source: list[int], tokens: list[int]) -> np.ndarray:
    """Of each token and then of the end, by teacher forcing."""
    target = np.array([[model.begin, *tokens]])
    logits = model(np.array(source, np.int64)[None], target)[0].astype(float)
    p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return p[np.arange(len(tokens) + 1), [*tokens, model.end]]


def test_rnn_search_is_its_equations(model):
    """Against the reference's functions in float64, one sequence at a time."""
    w = {n: np.asarray(a, np.float64) for n, a in model.state_dict().items()}
    target = np.array([[1, 3, 4, 6], [1, 5, 5, 2]])
    source, lengths = np.array([[3, 4, 5, 3, 6], [7, 1, 0, 0, 0]]), np.array([5, 2])
    logits, weights = model(source, target, lengths, return_weights=True)

    def gru(x: Any, name: str, suffix: str, **options: Any) -> Any:
        names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        return regard.reference.gru(x, *(w[f"{name}.{n}_l0{suffix}"] for n in names), **options)

    for b in range(2):
        x = w["source_embedding.weight"][source[b : b + 1, : lengths[b]]]
        forwards, backwards = gru(x, "encoder", "")[0], gru(x, "encoder", "_reverse", reverse=True)[0]
        h = np.concatenate((forwards, backwards), -1)
        s = np.tanh(w["bridge.weight"] @ backwards[0, 0] + w["bridge.bias"])[None]
        for i in range(4):
            y = w["target_embedding.weight"][target[b, i]][None]
            c, alpha = regard.reference.additive_attention(
                s[:, None],
                h,
                h,
                **{n: w[f"attention.{n}"] for n in ("v", "w_query", "w_key", "bias")},
                return_weights=True,
            )
            t = w["readout.weight"] @ np.concatenate((s[0], y[0], c[0, 0])) + w["readout.bias"]
            want = w["output.weight"] @ t.reshape(-1, 2).max(1) + w["output.bias"]
            assert_near(logits[b, i], want, NEAR * 4)
            assert_near(weights[b, i, : lengths[b]], alpha[0, 0], NEAR)
            assert not weights[b, i, lengths[b] :].any()
            s = gru(np.concatenate((y, c[0]), -1)[:, None], "decoder", "", h0=s)[1]


def test_tokens_are_whole_numbers(model):
    with pytest.raises(TypeError, match=r"sources: expected sequences of ints, got .* at index 1"):
        model.greedy([[1, 2], [1.5]], max_length=3)


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_greedy_takes_the_likeliest(model, batch_size):
    found = model.greedy(SOURCES, max_length=8, batch_size=batch_size)
    alone = [model.greedy([s], max_length=8)[0] for s in SOURCES]
    for source, t, one in zip(SOURCES, found, alone, strict=True):
        assert t.tokens == one.tokens and model.end not in t.tokens
        assert_same_bits(t.weights, one.weights)
        assert t.weights.shape == (len(t.tokens), len(source))
        if source:
            assert_near(t.weights.sum(1), np.ones(len(t.tokens)), 1e-6)
        log_p = log_probabilities(model, source, t.tokens)
        assert math.isclose(t.score, log_p[: min(len(t.tokens) + 1, 8)].sum(), rel_tol=1e-5)
        target = np.array([[model.begin, *t.tokens]])
        best = model(np.array(source, np.int64)[None], target)[0].argmax(-1)
        assert list(best[: len(t.tokens)]) == t.tokens
        assert len(t.tokens) == 8 or best[-1] == model.end


def test_beam_of_one_is_greedy(model):
    for beam, greedy in zip(model.beam_search(SOURCES, 1, 8), model.greedy(SOURCES, 8), strict=True):
        assert len(beam) == 1 and beam[0].tokens == greedy.tokens
        assert math.isclose(beam[0].score, greedy.score, rel_tol=1e-9)


@pytest.mark.parametrize("length_penalty", [0.0, 1.0])
def test_a_wide_beam_holds_every_translation(model, length_penalty):
    """300 beams lose none of the 6 x 6 x 7 candidates of the third step: all of up to two tokens end among them."""
    others = [t for t in range(7) if t != model.end]
    every = [list(tokens) for n in range(3) for tokens in itertools.product(others, repeat=n)]
    for source, found in zip(SOURCES, model.beam_search(SOURCES, 300, 3, length_penalty=length_penalty), strict=True):
        assert sorted(t.tokens for t in found) == sorted(every)
        for t in found[::7]:
            assert math.isclose(t.score, log_probabilities(model, source, t.tokens).sum(), rel_tol=1e-5)
        values = [t.score / (len(t.tokens) + 1) ** length_penalty for t in found]
        assert values == sorted(values, reverse=True)


def test_beams_in_a_batch_are_beams_alone(model):
    for source, found in zip(SOURCES, model.beam_search(SOURCES, 3, 8), strict=True):
        (alone,) = model.beam_search([source], 3, 8)
        assert [t.tokens for t in found] == [t.tokens for t in alone]
        for t in found:
            log_p = log_probabilities(model, source, t.tokens)
            assert math.isclose(t.score, log_p[: min(len(t.tokens) + 1, 8)].sum(), rel_tol=1e-5)


def test_a_translation_without_end_is_cut(model):
    state = dict(model.state_dict())
    state["output.bias"] = state["output.bias"].copy()
    state["output.bias"][model.end] = -1e4
    endless = nn.RNNSearch(8, 7, dim_embedding=6, dim_hidden=11, dim_attention=9)
    endless.load_state_dict(state)
    assert [len(t.tokens) for t in endless.greedy(SOURCES, 5)] == [5] * len(SOURCES)
    assert [len(t[0].tokens) for t in endless.beam_search(SOURCES, 2, 5)] == [5] * len(SOURCES)
    assert [t.tokens for t in endless.greedy(SOURCES, 0)] == [[]] * len(SOURCES)
    assert endless.greedy([]) == [] and endless.beam_search([]) == []


@pytest.mark.parametrize("dtype", DTYPES)
def test_rnn_search_in_every_dtype(backend, dtype):
    module = drawn(nn.RNNSearch(8, 7, dim_embedding=6, dim_hidden=11, dtype=dtype), dtype)
    (found,) = module.greedy([[3, 4, 5]], 6)
    assert found.weights.dtype == DTYPES[dtype]
    assert module(np.array([[3, 4]]), np.array([[1, 5]])).dtype == DTYPES[dtype]
