"""The code of the pages on caches and rotary embedding runs as a reader would run it, top to bottom."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

DOCS = Path(__file__).resolve().parent.parent / "docs"


@pytest.mark.parametrize("page", ["caches.md", "rotary.md"])
def test_examples_run(page, capsys):
    if not (DOCS / page).exists():
        pytest.skip("needs the repository")
    blocks = re.findall(r"^```python\n(.*?)^```", (DOCS / page).read_text(), re.DOTALL | re.MULTILINE)
    assert blocks
    names: dict = {}
    for block in blocks:
        exec(compile(block, page, "exec"), names)
    assert capsys.readouterr().out
