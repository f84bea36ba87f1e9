"""regard.nn.generate against a plain recomputation, and beam search against every sequence there is."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import regard
from regard import _backend, nn

VOCABULARY, WIDTH, END = 7, 16, 0

rng = np.random.default_rng(5)
TABLE = rng.normal(size=(VOCABULARY, WIDTH)).astype(np.float32)
PLACES = rng.normal(size=(40, WIDTH)).astype(np.float32)
MEMORY = rng.normal(size=(3, 5, WIDTH)).astype(np.float32)
PADDING = np.arange(5) >= np.array([5, 3, 4])[:, None]
PROMPTS = [[1, 2, 3], [4], [5, 6]]


def decoder_stack(batch_first=True, norm_first=False):
    layer = nn.TransformerDecoderLayer(WIDTH, 4, 24, batch_first=batch_first, norm_first=norm_first)
    stack = nn.TransformerDecoder(layer, 2, nn.LayerNorm(WIDTH) if norm_first else None)
    # Initial weights would depend on how many modules other tests have made before.
    draw = np.random.default_rng(7)
    shapes = {name: x.shape for name, x in stack.state_dict().items()}
    stack.load_state_dict(
        {
            name: draw.normal(float("norm" in name and name.endswith("weight")), 0.25, shape)
            for name, shape in shapes.items()
        }
    )
    return stack


STACK = decoder_stack()


def embed(tokens, positions):
    return TABLE[tokens] + PLACES[positions]


def project(hidden):
    return regard.linear(hidden, 3 * TABLE)  # rows do not depend on one another, to the bit


def whole(stack=STACK, padding=PADDING):
    """The same model, computed again from all tokens at each step."""

    def function(tokens, lengths, origin):
        x = embed(tokens, np.arange(tokens.shape[1])[None])
        hidden = stack(
            x, MEMORY[origin], tgt_is_causal=True, memory_key_padding_mask=None if padding is None else padding[origin]
        )
        return project(hidden)

    return nn.Recomputing(function, rows=len(MEMORY))


def cached(stack=STACK, padding=PADDING, memory=MEMORY, max_len=24):
    return nn.CachedDecoder(stack, memory, padding, embed=embed, project=project, max_len=max_len)


def one(k, decoder):
    """A decoder of sequence k of the memory alone."""
    return nn.CachedDecoder(STACK, MEMORY[k : k + 1], PADDING[k : k + 1], embed=embed, project=project, max_len=24)


def close(a, b):
    """Generations of two ways to compute one model: float32 sums in another order."""
    assert [g.tokens for g in a] == [g.tokens for g in b]
    assert [g.reason for g in a] == [g.reason for g in b]
    np.testing.assert_allclose([g.logprob for g in a], [g.logprob for g in b], rtol=1e-4)


@pytest.mark.parametrize("isa", _backend.possible())
@pytest.mark.parametrize(
    "options",
    [
        {"method": "greedy"},
        {"method": "beam", "beams": 3},
        {"method": "sample", "seed": 3, "temperature": 1.3},
        {"method": "sample", "seed": 4, "top_k": 3, "top_p": 0.8},
    ],
    ids=lambda o: "-".join(map(str, o.values())),
)
def test_cache_gives_what_recomputation_gives(isa, options):
    with _backend.using(isa):
        ours = nn.generate(cached(), PROMPTS, max_new_tokens=12, eos=END, **options)
        plain = nn.generate(whole(), PROMPTS, max_new_tokens=12, eos=END, **options)
    close(ours, plain)
    assert any(len(g.tokens) > 2 for g in ours)


@pytest.mark.parametrize("norm_first", [False, True])
def test_steps_give_the_logits_of_the_whole_sequence(norm_first):
    stack = decoder_stack(False, norm_first)
    tokens = np.random.default_rng(1).integers(0, VOCABULARY, (3, 9))
    x = embed(tokens, np.arange(9)[None]).swapaxes(0, 1)
    memory = np.ascontiguousarray(MEMORY.swapaxes(0, 1))
    expected = project(stack(x, memory, tgt_is_causal=True).swapaxes(0, 1))
    stepper = nn.CachedDecoder(stack, memory, embed=embed, project=project, max_len=9)
    got = [stepper.step(tokens[:, a:b]) for a, b in ((0, 4), (4, 5), (5, 8), (8, 9))]
    for logits, place in zip(got, (3, 4, 7, 8), strict=True):
        np.testing.assert_allclose(logits, expected[:, place], atol=2e-5)
    assert stepper.lengths.tolist() == [9, 9, 9]


def test_an_encoder_is_a_model_without_memory():
    layer = nn.TransformerEncoderLayer(WIDTH, 2, 20, batch_first=True, norm_first=True)
    stack = nn.TransformerEncoder(layer, 2, nn.LayerNorm(WIDTH))

    def function(tokens, lengths):
        return project(stack(embed(tokens, np.arange(tokens.shape[1])[None]), is_causal=True))

    ours = nn.CachedDecoder(stack, embed=embed, project=project, max_len=20, rows=3)
    close(
        nn.generate(ours, PROMPTS, max_new_tokens=10),
        nn.generate(nn.Recomputing(function), PROMPTS, max_new_tokens=10),
    )


@pytest.mark.parametrize("method", ["greedy", "sample"])
def test_neighbours_in_the_batch_change_nothing(method):
    together = nn.generate(cached(), PROMPTS, max_new_tokens=12, eos=END, method=method, seed=8)
    if method == "greedy":
        alone = [nn.generate(one(k, None), [PROMPTS[k]], max_new_tokens=12, eos=END)[0] for k in range(3)]
        assert together == alone  # to the last bit
    again = nn.generate(cached(), PROMPTS, max_new_tokens=12, eos=END, method=method, seed=8)
    assert together == again


# ---- Beam search ----


def chain(seed, vocabulary=4):
    """A decoder whose next token depends on the row, the position and the last token."""
    table = np.random.default_rng(seed).normal(size=(2, 8, vocabulary, vocabulary)) * 2

    def function(tokens, lengths, origin):
        return table[origin[:, None], np.arange(tokens.shape[1]), tokens]

    return table, lambda: nn.Recomputing(function, rows=2)


def log_softmax(x):
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def every_sequence(table, first, limit, alpha):
    """All that can be generated, best first: (score, tokens)."""
    logprobs = log_softmax(table)
    found = []
    for length in range(limit + 1):
        for tokens in itertools.product(range(1, table.shape[1]), repeat=length):
            full = tokens if length == limit else (*tokens, END)
            total = sum(logprobs[i, a, b] for i, (a, b) in enumerate(itertools.pairwise((first, *full))))
            found.append((total / ((5 + len(full)) / 6) ** alpha, list(tokens)))
    return sorted(found, reverse=True)


@pytest.mark.parametrize("alpha", [0.0, 0.6, 2.0])
@pytest.mark.parametrize("seed", range(4))
def test_a_beam_as_wide_as_all_sequences_finds_the_best(seed, alpha):
    table, decoder = chain(seed)
    found = nn.beam_search(decoder(), [[1], [2]], max_new_tokens=4, eos=END, beams=200, length_penalty=alpha)
    for row, first in enumerate((1, 2)):
        expected = every_sequence(table[row], first, 4, alpha)
        assert len(found[row]) == len(expected)
        np.testing.assert_allclose([g.score for g in found[row]], [score for score, _ in expected], rtol=1e-9)
        assert [g.tokens for g in found[row]] == [tokens for _, tokens in expected]


def plain_beam_search(table, first, limit, beams, alpha):
    """Beam search as one writes it down, without stopping early."""
    logprobs = log_softmax(table)
    live, ended = [(0.0, [first])], []
    for length in range(1, limit + 1):
        following = sorted(
            ((s + logprobs[length - 1, t[-1], b], [*t, b]) for s, t in live for b in range(6)), reverse=True
        )
        live = []
        for score, tokens in following:
            if len(live) == beams:
                break
            if tokens[-1] == END:
                ended.append((score / ((5 + length) / 6) ** alpha, tokens[1:-1]))
            else:
                live.append((score, tokens))
    ended += [(score / ((5 + limit) / 6) ** alpha, tokens[1:]) for score, tokens in live]
    return sorted(ended, reverse=True)[:beams]


@pytest.mark.parametrize("beams", [1, 2, 3])
@pytest.mark.parametrize("seed", range(6))
def test_narrow_beams_find_what_the_plain_algorithm_finds(seed, beams):
    table, decoder = chain(seed + 10, 6)
    found = nn.beam_search(decoder(), [[3], [5]], max_new_tokens=7, eos=END, beams=beams, length_penalty=0.6)
    for row, first in enumerate((3, 5)):
        expected = plain_beam_search(table[row], first, 7, beams, 0.6)
        assert [g.tokens for g in found[row]] == [tokens for _, tokens in expected]
        np.testing.assert_allclose([g.score for g in found[row]], [score for score, _ in expected])


def test_one_beam_without_penalty_is_greedy_up_to_an_early_end():
    greedy = nn.generate(cached(), PROMPTS, max_new_tokens=10)
    beam = nn.generate(cached(), PROMPTS, max_new_tokens=10, method="beam", beams=1, length_penalty=0)
    close(greedy, beam)


# ---- Sampling ----


def fixed(logits):
    return nn.Recomputing(lambda tokens, lengths: np.broadcast_to(logits, (*tokens.shape, len(logits))))


def counts(logits, draws=4000, **options):
    drawn = nn.generate(fixed(logits), [1], max_new_tokens=draws, method="sample", seed=2, **options).tokens
    return np.bincount(drawn, minlength=len(logits)) / draws


def test_samples_follow_the_probabilities():
    logits = np.array([1.0, -np.inf, 0.0, 2.0])
    expected = np.exp(logits / 0.7) / np.exp(logits / 0.7).sum()
    # Four deviations of a mean of 4000 draws.
    np.testing.assert_allclose(counts(logits, temperature=0.7), expected, atol=4 * 0.5 / 4000**0.5)


@pytest.mark.parametrize(
    "options, kept",
    [
        ({"top_k": 2}, [1, 3]),
        ({"top_k": 9}, [0, 1, 2, 3]),
        ({"top_p": 0.5}, [3]),
        ({"top_p": 0.7}, [1, 3]),
        ({"top_p": 1.0}, [0, 1, 2, 3]),
        ({"top_k": 3, "top_p": 0.8}, [1, 3]),
        ({"top_k": 1, "top_p": 0.1}, [3]),
    ],
)
def test_top_k_and_top_p_keep_the_likeliest(options, kept):
    probabilities = np.array([0.05, 0.3, 0.1, 0.55])
    cut = np.where(np.isin(np.arange(4), kept), probabilities, 0)
    got = counts(np.log(probabilities), draws=2000, **options)
    np.testing.assert_allclose(got, cut / cut.sum(), atol=4 * 0.5 / 2000**0.5)
    assert set(np.flatnonzero(got)) == set(kept)


def test_top_p_over_a_large_vocabulary_keeps_the_fewest_that_suffice():
    from regard.nn.generate import _nucleus

    weights = np.random.default_rng(0).exponential(size=5000)
    order = np.argsort(-weights, kind="stable")
    for p in (0.01, 0.2, 0.9, 1.0):
        count = int(np.searchsorted(weights[order].cumsum(), p * weights.sum())) + 1
        np.testing.assert_array_equal(_nucleus(weights, p), order[:count])


def test_seeds_differ_and_repeat():
    def tokens(seed):
        return nn.generate(fixed(np.zeros(50)), [1], max_new_tokens=20, method="sample", seed=seed).tokens

    assert tokens(1) == tokens(1) != tokens(2)


# ---- Ends, streams, interruptions, errors ----


def test_ends_are_not_among_the_tokens_and_several_may_end():
    logits = np.full((6, 6), -9.0)
    logits[np.arange(5), np.arange(1, 6)] = 9  # counts upwards
    up = lambda: nn.Recomputing(lambda tokens, lengths: logits[tokens])  # noqa: E731
    g = nn.generate(up(), [[1], [3]], max_new_tokens=3, eos=[5])
    assert [(r.tokens, r.reason) for r in g] == [([2, 3, 4], "length"), ([4], "eos")]
    g = nn.generate(up(), [[1], [3]], max_new_tokens=3, eos={3, 5}, method="beam", beams=2)
    assert [(r.tokens, r.reason) for r in g] == [([2], "eos"), ([4], "eos")]


def test_streams_give_the_same_tokens_one_by_one():
    expected = nn.generate(cached(), PROMPTS, max_new_tokens=12, eos=END)
    columns = list(nn.stream(cached(), PROMPTS, max_new_tokens=12, eos=END))
    assert [[c[i] for c in columns if c[i] is not None] for i in range(3)] == [g.tokens for g in expected]
    single = nn.generate(one(0, None), PROMPTS[0], max_new_tokens=12, eos=END)
    assert list(nn.stream(one(0, None), PROMPTS[0], max_new_tokens=12, eos=END)) == single.tokens


def test_adjust_rules_tokens_out():
    def adjust(logits, generated):
        assert len(generated) == len(logits)
        logits[:, [2, 4]] = -np.inf

    for method in ("greedy", "beam", "sample"):
        found = nn.generate(cached(), PROMPTS, max_new_tokens=8, method=method, adjust=adjust)
        assert not {2, 4} & {t for g in found for t in g.tokens}
    with pytest.raises(ValueError, match="adjust"):
        nn.generate(cached(), PROMPTS, max_new_tokens=2, adjust=lambda logits, _: logits.fill(-np.inf))


@pytest.mark.parametrize("method", ["greedy", "beam", "sample"])
def test_ctrl_c_leaves_the_tokens_so_far(method):
    class Interrupted(nn.Recomputing):
        steps = 0

        def step(self, tokens, lengths):
            self.steps += 1
            if self.steps == 4:
                raise KeyboardInterrupt
            return super().step(tokens, lengths)

    g = nn.generate(
        Interrupted(lambda t, n: np.broadcast_to(np.arange(5.0), (*t.shape, 5))),
        [[1], [2]],
        max_new_tokens=9,
        method=method,
    )
    assert [r.reason for r in g] == ["interrupted"] * 2
    assert all(len(r.tokens) == 3 for r in g)


def test_progress_is_silent_where_nobody_looks(capsys):
    nn.generate(cached(), PROMPTS, max_new_tokens=3, progress=True)
    nn.generate(cached(), PROMPTS, max_new_tokens=3, progress=True, method="beam")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "error, name, prompts, options",
    [
        (TypeError, "prompts", "words", {}),
        (TypeError, "prompts", [1.5], {}),
        (ValueError, "prompts", [], {}),
        (ValueError, "prompts", [[1], []], {}),
        (ValueError, "max_new_tokens", [1], {"max_new_tokens": 0}),
        (TypeError, "max_new_tokens", [1], {"max_new_tokens": 2.5}),
        (TypeError, "eos", [1], {"eos": "x"}),
        (ValueError, "method", [1], {"method": "best"}),
        (ValueError, "beams", [1], {"method": "beam", "beams": 0}),
        (ValueError, "length_penalty", [1], {"method": "beam", "length_penalty": -1}),
        (ValueError, "temperature", [1], {"method": "sample", "temperature": 0}),
        (ValueError, "top_k", [1], {"method": "sample", "top_k": 0}),
        (ValueError, "top_p", [1], {"method": "sample", "top_p": 1.5}),
        (TypeError, "top_p", [1], {"method": "sample", "top_p": "much"}),
        (ValueError, "length_penalty", [1], {"method": "beam", "length_penalty": float("nan")}),
        (ValueError, "seed", [1], {"method": "sample", "seed": -1}),
        (ValueError, "seed", [1], {"method": "sample", "seed": "a"}),
    ],
)
def test_errors_name_the_argument(error, name, prompts, options):
    with pytest.raises(error, match=rf"^{name}: expected"):
        nn.generate(fixed(np.zeros(4)), prompts, **{"max_new_tokens": 3, **options})


@pytest.mark.parametrize("method", ["greedy", "beam", "sample"])
@pytest.mark.parametrize("logits", [[0, np.nan, 1], [0, np.inf, 1], [-np.inf] * 3], ids=str)
def test_logits_that_say_nothing_are_refused(method, logits):
    with pytest.raises(ValueError, match="decoder: expected logits without NaN"):
        nn.generate(fixed(np.array(logits)), [1], max_new_tokens=3, method=method)


def test_the_least_temperature_draws_the_likeliest():
    logits = np.array([0.0, 50.0, 0.0, -np.inf], np.float32)
    for temperature in (1e-37, 5e-324):
        found = nn.generate(fixed(logits), [1], max_new_tokens=3, method="sample", temperature=temperature, seed=0)
        assert found.tokens == [1, 1, 1]


def test_cached_decoder_refuses_what_does_not_fit():
    with pytest.raises(TypeError, match=r"^memory: expected a memory"):
        cached(memory=None)
    with pytest.raises(TypeError, match=r"^stack"):
        cached(stack=nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"^memory: expected shape"):
        cached(memory=MEMORY[..., :3])
    with pytest.raises(TypeError, match=r"^memory_key_padding_mask: expected a bool"):
        cached(padding=np.zeros((3, 5)))
    with pytest.raises(ValueError, match=r"^memory_key_padding_mask: expected a bool"):
        cached(padding=np.zeros((3, 4), bool))
    with pytest.raises(ValueError, match=r"^max_new_tokens: expected at most 2, with the decoder's max_len = 4"):
        nn.generate(cached(max_len=4), PROMPTS, max_new_tokens=3)
    with pytest.raises(ValueError, match=r"^prompts: expected 3, one for each row of the decoder, got 2"):
        nn.generate(cached(), PROMPTS[:2], max_new_tokens=3)
    with pytest.raises(ValueError, match=r"^tokens: expected no more than max_len = 4"):
        cached(max_len=4).step(np.zeros((3, 5), np.int64))
    with pytest.raises(ValueError, match=r"^tokens: expected shape"):
        cached().step(np.zeros((2, 1), np.int64))
    with pytest.raises(ValueError, match=r"^lengths"):
        cached().step(np.zeros((3, 1), np.int64), np.array([1, 2, 1]))


def test_padding_inside_the_memory_is_not_attended():
    padding = np.zeros((3, 5), bool)
    padding[:, 1] = True
    close(
        nn.generate(cached(padding=padding), PROMPTS, max_new_tokens=8, method="beam", beams=3),
        nn.generate(whole(padding=padding), PROMPTS, max_new_tokens=8, method="beam", beams=3),
    )


def test_logits_of_sixteen_bit_models_are_read():
    half = nn.CachedDecoder(
        STACK, MEMORY.astype(np.float16), PADDING, project=lambda h: h.astype(np.float16) @ TABLE.T.astype(np.float16),
        embed=lambda t, p: embed(t, p).astype(np.float16), max_len=12,
    )  # fmt: skip
    assert len(nn.generate(half, PROMPTS, max_new_tokens=4)) == 3
    assert regard.nn.generate is nn.generate
