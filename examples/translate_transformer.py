"""stub"""

from pathlib import Path

import english_german as corpus

PAD, BOS, EOS = 0, 1, 2
SHAPE = {"d_model": 128, "nhead": 4, "num_encoder_layers": 2, "num_decoder_layers": 2, "dim_feedforward": 320}
WEIGHTS = Path(__file__).resolve().parent / "weights" / "english_german.safetensors"


def vocabularies() -> tuple[list[str], list[str]]:
    """The words of a large sample of the corpus, behind three of our own."""
    import itertools

    own = ["<pad>", "<s>", "</s>"]
    sample = list(itertools.islice(corpus.pairs(0, test=False), 20000))
    english = {w for e, _ in sample for w in corpus.tokens(e)}
    german = {w for _, g in sample for w in corpus.tokens(g)}
    return [*own, *sorted(english)], [*own, *sorted(german)]
