"""The examples with recurrent networks: dates to ISO 8601, and hama's pronunciation against its own engine."""

from __future__ import annotations

import datetime
import importlib.util
import random
import sys
from typing import Any

import numpy as np
import pytest
import regard
from helpers import assert_near
from regard import nn

pytestmark = pytest.mark.usefixtures("importable_examples")


# ---- Dates ----


def test_dates_are_written_and_held_out():
    import dates

    assert [dates.ordinal(n) for n in (1, 2, 3, 4, 11, 12, 13, 21, 22, 23, 31)] == [
        "1st", "2nd", "3rd", "4th", "11th", "12th", "13th", "21st", "22nd", "23rd", "31st",
    ]  # fmt: skip
    assert [dates.ordinal_word(n) for n in (3, 20, 21, 30, 31)] == [
        "third", "twentieth", "twenty-first", "thirtieth", "thirty-first",
    ]  # fmt: skip
    rng = random.Random(0)
    for held_out in (False, True):
        for text, iso in [dates.pair(rng, held_out) for _ in range(300)]:
            assert dates.is_held_out(datetime.date.fromisoformat(iso)) == held_out
            assert max(dates.to_source(text)) < dates.SIZES["source_vocabulary"]
            assert dates.from_target([dates.BEGIN, *dates.to_target(iso), dates.END]) == iso
    assert dates.pairs(20, 3, True) == dates.pairs(20, 3, True)
    with pytest.raises(ValueError, match=r"5 März.*got \['ä'\]"):
        dates.to_source("5 März 2021")


@pytest.fixture
def model() -> nn.RNNSearch:
    import translate_dates

    return translate_dates.load()


def test_held_out_dates_are_translated(backend, model, capsys):
    """A sample; `translate_dates.py --test 1000` takes the full count."""
    import translate_dates

    assert translate_dates.test(model, 100, beam=1) >= 0.99
    assert translate_dates.test(model, 20, beam=3) >= 0.95
    assert "held-out strings exact" in capsys.readouterr().out


def test_each_date_looks_at_its_own_words(model):
    import translate_dates

    text = "Tuesday, March the fifth, 2019"
    (found,) = translate_dates.translate(model, [text])
    assert found.weights.shape == (10, len(text))
    assert text[found.weights[3].argmax()] == "9"
    assert "March".find(text[found.weights[6].argmax()]) >= 0
    assert found.weights[9, text.index("fifth") : text.index("fifth") + 5].sum() > 0.5


def test_the_alignment_is_drawn(model, tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib", reason="it draws the picture")
    import translate_dates

    path = tmp_path / "alignment.png"
    monkeypatch.setattr(sys, "argv", ["translate_dates.py", "--picture", str(path), "5 March 2021"])
    translate_dates.main()
    assert "2021-03-05" in capsys.readouterr().out
    assert path.read_bytes()[:4] == b"\x89PNG"


def test_torch_s_model_is_the_same(model):
    """train_dates.py's model in PyTorch, with these weights, gives the logits that regard gives."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("safetensors", reason="train_dates.py stores its weights with it")
    import dates
    import train_dates

    theirs = train_dates.RNNSearch(**dates.SIZES)
    theirs.load_state_dict({name: torch.from_numpy(np.array(x)) for name, x in model.state_dict().items()})
    source, lengths, target = train_dates.batch(random.Random(5), 6)
    with torch.inference_mode():
        want = theirs(source, lengths, target[:, :-1]).numpy()
    got = model(source.numpy(), target[:, :-1].numpy(), lengths.numpy())
    assert_near(got, want, 2e-4)  # logits of some size 10, after up to 40 steps of float32


# ---- hama ----


@pytest.fixture(scope="module")
def hama(importable_examples: None) -> Any:
    """(the engine's sessions, the model on regard, letters of words)."""
    if importlib.util.find_spec("hama") is None:
        pytest.skip("the weights and the engine come with the package hama")
    import hama_pronounce as example
    from hama import _engine
    from hama.inference import G2PModel

    if not _engine.available():
        pytest.skip("hama has no engine for this platform")
    g2p = G2PModel()
    words = ("attention", "through", "psychology", "학교")
    letters = [(e := g2p.tokenizer.encode(w)).ids[: e.length] for w in words]
    return example, g2p, letters


#: The engine's own sigmoid and tanh are approximate: its GRU's states lie up to 3e-4 from float64's.
ENGINE = 3e-3


def encoder_feeds(g2p: Any, letters: np.ndarray) -> dict[str, Any]:
    names = ["encoder_outputs", "projected_keys", "hidden", "encoder_mask", "prev_attn"]
    feeds = {"input_ids": letters[None], "input_lengths": np.array([len(letters)])}
    found = dict(zip(names, g2p.encoder_session.run(names, feeds), strict=True))
    return found | {"positions": np.arange(len(letters), dtype=np.float32)}


def test_hama_s_encoder(backend, hama):
    example, g2p, words = hama
    pronounce = example.load()
    for letters in words:
        feeds = encoder_feeds(g2p, letters)
        encoded = pronounce.encode(letters)
        assert_near(encoded.annotations, feeds["encoder_outputs"], ENGINE)
        assert_near(encoded.state, feeds["hidden"], ENGINE)
        # Sums over 192 annotations.
        assert_near(encoded.keys, feeds["projected_keys"], 4 * ENGINE)


@pytest.mark.parametrize("distances", [False, True])
def test_hama_s_attention_step(backend, hama, distances):
    """The same inputs into both: the engine's states, keys and previous weights, for some steps of each word.

    With all positions 0 the engine's term of distances is 0, and what is left is location-sensitive attention alone.
    """
    example, g2p, words = hama
    pronounce = example.load()
    d = pronounce.d
    for letters in words:
        feeds = encoder_feeds(g2p, letters)
        if not distances:
            feeds["positions"] = feeds["positions"] * 0
        encoded = example.Encoded(feeds["encoder_outputs"], feeds["projected_keys"], feeds["hidden"])
        token = g2p.vocab.sos_id
        for _ in range(4):
            names = ["next_token_ids", "hidden_out", "prev_attn_out"]
            result = g2p.decoder_step_session.run(names, feeds | {"decoder_input_ids": np.array([token])})
            embedded = d["decoder_embedding.weight"][[[token]]]
            query = result[1][1:] + regard.linear(embedded, d["onnx::MatMul_302"].T)
            query = regard.layer_norm(query, d["decoder_state_norm.weight"], d["decoder_state_norm.bias"])
            _, weights = pronounce.attend(query, encoded, feeds["prev_attn"], feeds["positions"])
            assert_near(weights, result[2], 1e-3)
            token, feeds["hidden"], feeds["prev_attn"] = int(result[0][0]), result[1], result[2]


def test_hama_s_pronunciations(hama):
    example, g2p, words = hama
    pronounce = example.load()
    for letters in words:
        ids, weights = pronounce(letters, g2p.vocab.sos_id, g2p.vocab.eos_id)
        theirs, their_weights = example.engine_s(letters, g2p.vocab.sos_id, g2p.vocab.eos_id)
        assert ids == theirs
        assert_near(weights, their_weights, ENGINE)
