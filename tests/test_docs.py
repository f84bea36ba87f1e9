"""Every Python block of the documentation runs, each by itself."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)


def blocks() -> list[pytest.param]:
    found = []
    for page in PAGES:
        text = page.read_text() if page.exists() else ""
        for match in BLOCK.finditer(text):
            line = text.count("\n", 0, match.start()) + 1
            found.append(pytest.param(page, line, match[1], id=f"{page.relative_to(ROOT)}:{line}"))
    return found


@pytest.mark.parametrize(("page", "line", "code"), blocks())
def test_block(page: Path, line: int, code: str, capsys: pytest.CaptureFixture[str]) -> None:
    # Blank lines before it make the line numbers of a traceback the page's.
    exec(compile("\n" * line + code, str(page), "exec"), {"__name__": "__main__"})


@pytest.mark.skipif(not (ROOT / "docs").is_dir(), reason="needs the repository")
def test_links_between_pages_lead_somewhere() -> None:
    broken = [
        f"{page.name}: {target}"
        for page in PAGES
        for target in re.findall(r"\]\(([^)#:]+?)(?:#[^)]*)?\)", page.read_text())
        if not (page.parent / target).exists()
    ]
    assert not broken
