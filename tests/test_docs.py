"""Every Python block of the documentation runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import regard

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)


def blocks(page: Path) -> list[tuple[int, str]]:
    """(line, code) of each block."""
    text = page.read_text()
    return [(text.count("\n", 0, match.start()) + 1, match[1]) for match in BLOCK.finditer(text)]


PAGES_WITH_CODE = [page for page in PAGES if page.exists() and blocks(page)]


@pytest.mark.parametrize("page", PAGES_WITH_CODE, ids=lambda page: page.name)
def test_page(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As a reader would run it: top to bottom, each block with the names of those before it."""
    if any("regard.plot" in code for _, code in blocks(page)):
        pytest.importorskip("matplotlib", reason="the page draws, with matplotlib (the extra `examples`)")
    names: dict[str, object] = {"__name__": "__main__"}
    threads = regard.get_num_threads()
    try:
        for line, code in blocks(page):
            # Blank lines before it make the line numbers of a traceback the page's.
            exec(compile("\n" * line + code, str(page), "exec"), names)
    finally:
        regard.set_num_threads(threads)


@pytest.mark.skipif(not (ROOT / "docs").is_dir(), reason="needs the repository")
def test_every_public_name_is_listed() -> None:
    listed = set(re.findall(r"`([\w.]+)`", (ROOT / "docs" / "api.md").read_text()))
    names = {*regard.__all__, *regard.nn.__all__, *(f"onnx.{name}" for name in regard.onnx.__all__)}
    assert not names - listed
    assert not {name for name in listed if "." not in name} - names - {"reference"}


@pytest.mark.skipif(not (ROOT / "docs").is_dir(), reason="needs the repository")
def test_links_between_pages_lead_somewhere() -> None:
    broken = [
        f"{page.name}: {target}"
        for page in PAGES
        for target in re.findall(r"\]\(([^)#:]+?)(?:#[^)]*)?\)", page.read_text())
        if not (page.parent / target).exists()
    ]
    assert not broken
