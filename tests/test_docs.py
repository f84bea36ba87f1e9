"""The examples in docs/ run as they stand."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

DOCS = Path(__file__).resolve().parent.parent / "docs"
EXAMPLES = [
    pytest.param(code, id=f"{path.stem}-{i}")
    for path in sorted(DOCS.glob("transformer.md"))
    for i, code in enumerate(re.findall(r"```python\n(.*?)```", path.read_text(), re.DOTALL))
]


@pytest.mark.skipif(not DOCS.is_dir(), reason="needs the repository")
@pytest.mark.parametrize("code", EXAMPLES)
def test_example(code: str) -> None:
    if "regard.plot" in code:
        pytest.importorskip("matplotlib", reason="the example draws")
    exec(compile(code, "example", "exec"), {})
