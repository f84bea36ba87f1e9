"""Bahdanau's RNNSearch on device arrays, the kernels emulated: its calls, and where its searches run."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from helpers import as_float64, assert_near
from regard import nn
from test_emulated_nn import assert_agree, near, torch, with_random_weights  # noqa: F401


def test_a_recurrent_translator(cupy):
    model = with_random_weights(nn.RNNSearch(9, 8, 6, 5))
    source, target = np.array([[1, 8, 3, 2], [4, 2, 0, 0]]), np.array([[1, 5, 3], [1, 7, 2]])
    lengths = np.array([4, 2])
    assert_agree(cupy, model, "float32", source, target, lengths, return_weights=True, size=8)
    assert_agree(cupy, model, "float32", source, target[:, :0], return_weights=True)


SOURCES = [[1, 8, 3, 2], [4, 2], [5], [7, 6, 5, 4, 3], [2, 2, 3]]


def searched(model: Any, method: str, like: Any) -> list[Any]:
    options = {"beam_size": 3, "length_penalty": 0.7} if method == "beam_search" else {}
    found = getattr(model, method)(SOURCES, max_length=6, batch_size=3, like=like, **options)
    return [t for one in found for t in (one if isinstance(one, list) else [one])]


@pytest.fixture
def translator() -> Any:
    """Ends of translations come at different steps."""
    model = with_random_weights(nn.RNNSearch(9, 8, 6, 5), seed=16)
    model.output.bias = np.array([0, 0, 0.3, 0, 0, 0, 0, 0], np.float32)
    model.output.weight = 6 * model.output.weight
    return model


@pytest.mark.parametrize("method", ["greedy", "beam_search"])
def test_translations_searched_on_a_device(cupy, translator, method):
    want = searched(translator, method, None)
    assert len({len(t.tokens) for t in want}) > 2
    cupy.cuda.copied.clear()
    got = searched(translator, method, cupy.zeros(1, np.float32))
    for a, b in zip(got, want, strict=True):
        assert a.tokens == b.tokens and a.weights.shape == b.weights.shape
        assert abs(a.score - b.score) < 1e-4
        assert_near(a.weights, as_float64(b.weights)[0], near("float32", 8))
    # Loaded from a device's memory, weights decide where the search is.
    translator.load_state_dict({name: cupy.asarray(w) for name, w in translator.state_dict().items()})
    for a, b in zip(searched(translator, method, None), got, strict=True):
        assert a.tokens == b.tokens and a.score == b.score


@pytest.mark.parametrize("method", ["greedy", "beam_search"])
def test_a_step_of_a_search_brings_tokens_and_scores(cupy, translator, method):
    like, options = cupy.zeros(1, np.float32), {"beam_size": 2} if method == "beam_search" else {}
    translator.pack(like=like)
    counts = []
    for steps in (2, 3):  # no end shortens them
        cupy.cuda.copied.clear()
        getattr(translator, method)([[5]], max_length=steps, like=like, **options)
        ways = [way for way, _ in cupy.cuda.copied]
        counts.append((ways.count("to the host"), ways.count("to the device")))
    # A step's tokens with their scores, and its weights at the end; beams are chosen on the host.
    more = tuple(b - a for a, b in zip(*counts, strict=True))
    assert more == {"greedy": (2, 0), "beam_search": (2, 2)}[method]


def test_lengths_are_brought_to_a_device_once(cupy, translator):
    source, lengths = cupy.asarray(np.array([[1, 8, 3, 2], [4, 2, 0, 0]])), np.array([4, 2])
    translator.pack(like=source)
    copied = []
    for steps in (1, 5):
        target = cupy.asarray(np.ones((2, steps), np.int64))
        cupy.cuda.copied.clear()
        translator(source, target, lengths)
        copied.append(list(cupy.cuda.copied))
    assert copied[0] == copied[1] == [("to the device", lengths.nbytes)]


def test_searches_of_pytorch_s_tensors(cupy, request, translator):
    fake = request.getfixturevalue("torch")
    del cupy.cuda.allocated[:]
    got = translator.greedy(SOURCES, 4, like=fake.Tensor(cupy.zeros(1, np.float32)))
    assert set(cupy.cuda.allocated[1:]) == {77}
    assert [t.tokens for t in got] == [t.tokens for t in translator.greedy(SOURCES, 4)]
    with pytest.raises(ValueError, match="input: expected numbers from 0 to num_embeddings - 1 = 8, got 9"):
        translator.greedy([[9]], like=cupy.zeros(1, np.float32))
