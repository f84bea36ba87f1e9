"""Translate English to German with a small Transformer on regard, by beam search.

    python examples/translate_transformer.py "Tomorrow the old gardener will sell twenty-three red apples."
    python examples/translate_transformer.py --picture heads.png "I know that she did not see the small bird."
    python examples/translate_transformer.py --test 500      # sentences that it was never trained on

It knows the sentences that english_german.py makes: some three hundred words, all numbers up to a million,
and a good part of German grammar. train_translator.py made the weights, english_german.safetensors.

A picture needs matplotlib (pip install ".[examples]").
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import english_german as corpus
import numpy as np
import regard
from progress import progress
from regard import nn

PAD, BOS, EOS = 0, 1, 2
SHAPE = {"d_model": 128, "nhead": 4, "num_encoder_layers": 2, "num_decoder_layers": 2, "dim_feedforward": 320}
WEIGHTS = Path(__file__).resolve().parent / "english_german.safetensors"
#: The longest translation, in tokens; the corpus has none above 60.
LONGEST = 80


def vocabularies() -> tuple[list[str], list[str]]:
    """The words of a large sample of the corpus, English and German, behind three of our own."""
    own = ["<pad>", "<s>", "</s>"]
    sample = list(itertools.islice(corpus.pairs(0, test=False), 20000))
    english = {w for e, _ in sample for w in corpus.tokens(e)}
    german = {w for _, g in sample for w in corpus.tokens(g)}
    return [*own, *sorted(english)], [*own, *sorted(german)]


def padded(rows: Sequence[Sequence[int]]) -> np.ndarray:
    """int64 (rows, longest), PAD behind the shorter ones."""
    table = np.full((len(rows), max(map(len, rows))), PAD, np.int64)
    for into, row in zip(table, rows, strict=True):
        into[: len(row)] = row
    return table


class Model(nn.Module):
    """Embeddings, sinusoids and nn.Transformer; the target's embedding is also the output layer.

    Computed in float32, whatever the weights' dtype.
    """

    def __init__(self, shape: Mapping[str, int], source: int, target: int) -> None:
        super().__init__()
        width = shape["d_model"]
        self.source_embedding = nn.Embedding(source, width)
        self.target_embedding = nn.Embedding(target, width)
        self.transformer = nn.Transformer(**shape, batch_first=True)
        self.output = nn.Linear(width, target, bias=False)
        self._places = nn.PositionalEncoding(width, 2 * LONGEST)(np.zeros((2 * LONGEST, width), np.float32))
        self._scale = np.float32(width**0.5)

    def placed(self, table: nn.Embedding, ids: np.ndarray, positions: np.ndarray) -> np.ndarray:
        return np.asarray(table.forward(ids) * self._scale + self._places[positions])

    def encode(self, ids: np.ndarray, padding: np.ndarray) -> np.ndarray:
        """ids, padding (batch, len) -> (batch, len, width)."""
        x = self.placed(self.source_embedding, ids, np.arange(ids.shape[1]))
        return self.transformer.encoder.forward(x, src_key_padding_mask=padding)

    def decoding(self, ids: np.ndarray) -> nn.CachedDecoder:
        """A Decoder for regard.nn.generate: of source sentences (batch, len), PAD behind the shorter ones."""
        padding = ids == PAD
        embed = functools.partial(self.placed, self.target_embedding)
        memory = self.encode(ids, padding)
        return nn.CachedDecoder(
            self.transformer.decoder, memory, padding, embed=embed, project=self.output.forward, max_len=LONGEST + 1
        )

    def cross_attention(self, source: Sequence[int], target: Sequence[int]) -> np.ndarray:
        """(layers, heads, len_target, len_source): what each word of a translation looks at."""
        ids = np.array([source])
        memory = self.encode(ids, np.zeros(ids.shape, bool))
        x = self.placed(self.target_embedding, np.array([target]), np.arange(len(target)))
        found = []
        for layer in self.transformer.decoder.layers:
            x = layer.norm1.of_sum(layer.self_attn(x, x, x, need_weights=False, is_causal=True)[0], x)
            y, weights = layer.multihead_attn(x, memory, memory, average_attn_weights=False)
            x = layer.norm2.of_sum(y, x)
            x = layer.norm3.of_sum(layer.linear2(layer.linear1(x, "relu")), x)
            found.append(weights[0])
        return np.stack(found)


class Translator:
    """Model and vocabularies, from a file of train_translator.py's."""

    def __init__(self, path: Path = WEIGHTS) -> None:
        state = nn.Safetensors(path)
        about = state.metadata
        self.english, self.german = json.loads(about["english"]), json.loads(about["german"])
        self._numbers = {word: i for i, word in enumerate(self.english)}
        self.model = Model(json.loads(about["shape"]), len(self.english), len(self.german))
        self.model.load_state_dict({**state, "output.weight": state["target_embedding.weight"]})

    def ids(self, sentence: str) -> list[int]:
        """The tokens of an English sentence.

        Raises
        ------
        ValueError
            Naming the words that it does not know.
        """
        words = corpus.tokens(sentence)
        unknown = [word for word in words if word not in self._numbers]
        if unknown or not words:
            what = f"the model does not know {', '.join(map(repr, unknown))}" if unknown else "there are no words"
            raise ValueError(f"{sentence!r}: {what}")
        return [self._numbers[word] for word in words]

    def text(self, tokens: Sequence[int]) -> str:
        return corpus.text_of([self.german[t] for t in tokens])

    def search(self, sentences: Sequence[str], beams: int) -> list[list[nn.Generation]]:
        """For each sentence what beam search ends with, the best translation first."""
        ids = padded([self.ids(sentence) for sentence in sentences])
        prompts = [[BOS]] * len(ids)
        return nn.beam_search(self.model.decoding(ids), prompts, max_new_tokens=LONGEST, eos=EOS, beams=beams)

    def translate(self, sentences: Sequence[str], beams: int = 4) -> list[str]:
        return [self.text(found[0].tokens) for found in self.search(sentences, beams)]

    def picture(self, sentence: str, path: Path) -> None:
        """Draw the cross-attention heads of the last layer for a sentence and its translation."""
        from regard import plot

        source = self.ids(sentence)
        best = self.search([sentence], 4)[0][0].tokens
        weights = self.model.cross_attention(source, [BOS, *best])[-1]
        # Each row is drawn beside the word that it led to.
        said = [self.german[t] for t in (*best, EOS)]
        figure = plot.attention_map(weights, said, [self.english[i] for i in source], title="Cross-attention")
        figure.savefig(path, dpi=120)


def test(translator: Translator, count: int, beams: int, size: int) -> float:
    """Translate sentences that were kept from training; the share that comes out word for word."""
    pairs = list(itertools.islice(corpus.pairs(12345, test=True), count))
    pairs.sort(key=lambda pair: len(pair[0]))  # like lengths together: little padding
    right, tokens, wrong = 0, 0, []
    start = time.perf_counter()
    for first in progress(range(0, count, size), "Translating"):
        part = pairs[first : first + size]
        for (english, german), found in zip(part, translator.search([e for e, _ in part], beams), strict=True):
            text = translator.text(found[0].tokens)
            tokens += len(found[0].tokens) + 1
            right += text == german
            if text != german:
                wrong.append((english, text, german))
    seconds = time.perf_counter() - start
    for english, text, german in wrong[:10]:
        print(f"{english}\n  got  {text}\n  not  {german}")
    print(
        f"{right} of {count} sentences right ({100 * right / count:.1f} %), "
        f"{count / seconds:.0f} sentences and {tokens / seconds:.0f} tokens a second with {beams} beams"
    )
    return right / count


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("sentences", nargs="*", help="English sentences (default: some of the corpus)")
    add("--beams", type=int, default=4, metavar="N", help="sequences that beam search keeps (default 4)")
    add("--all", action="store_true", help="print all that beam search ends with, and their scores")
    add("--picture", type=Path, metavar="FILE", help="draw the last layer's heads for the first sentence")
    add("--test", type=int, metavar="N", help="translate N sentences that were kept from training")
    add("--batch", type=int, default=32, metavar="N", help="sentences a batch in --test (default 32)")
    add("--threads", type=int, metavar="N", help="threads to use (default: regard's own choice)")
    given = parser.parse_args(argv)
    if min(given.beams, given.batch, 1 if given.test is None else given.test) < 1:
        parser.error("--beams, --batch and --test: expected at least 1")
    return given


def main(argv: Sequence[str] | None = None) -> int:
    given = arguments(argv)
    if given.threads is not None:
        regard.set_num_threads(given.threads)
    translator = Translator()
    if given.test is not None:
        return 0 if test(translator, given.test, given.beams, given.batch) > 0.9 else 1
    sentences: list[Any] = given.sentences or [e for e, _ in itertools.islice(corpus.pairs(99, test=True), 5)]
    try:
        results = translator.search(sentences, given.beams)
    except ValueError as refused:
        print(refused, file=sys.stderr)
        return 1
    for sentence, found in zip(sentences, results, strict=True):
        print(f"{sentence}\n  {translator.text(found[0].tokens)}")
        if given.all:
            for g in found[1:]:
                print(f"    {g.score - found[0].score:6.2f}  {translator.text(g.tokens)}")
    if given.picture:
        translator.picture(sentences[0], given.picture)
        print(f"\n{given.picture}: the heads of the last layer's cross-attention")
    return 0


if __name__ == "__main__":
    sys.exit(main())
