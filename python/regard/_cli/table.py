"""Tables and progress on a terminal: aligned text, which rich decorates where it is installed."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any


def show(
    title: str,
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    left: int = 1,
    plain: bool = False,
    bad: Callable[[Sequence[str]], bool] = lambda _: False,
) -> None:
    """Print a table.

    Parameters
    ----------
    title, header, rows
        An empty header is left out.
    left : int
        How many columns are words, set to the left; the others are numbers.
    plain : bool
        Without rich even where it is installed.
    bad : callable
        Which rows to print in red.
    """
    if not plain and _show_rich(title, header, rows, left, bad):
        return
    print(text(title, header, rows, left=left))


def text(title: str, header: Sequence[str], rows: Sequence[Sequence[str]], *, left: int = 1) -> str:
    """The table as aligned text."""
    lines = [*([header] if any(header) else []), *rows]
    widths = [max(len(line[c]) for line in lines) for c in range(len(header))] if lines else []

    def aligned(cells: Sequence[str]) -> str:
        pairs = zip(cells, widths, strict=True)
        return "  ".join(x.ljust(w) if c < left else x.rjust(w) for c, (x, w) in enumerate(pairs)).rstrip()

    body = [aligned(line) for line in lines]
    if any(header):
        body.insert(1, "  ".join("-" * w for w in widths))
    return "\n".join([title, "", *body] if title else body)


def _show_rich(title: str, header: Sequence[str], rows: Any, left: int, bad: Callable[[Any], bool]) -> bool:
    try:
        from rich import box
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text
    except ImportError:
        return False
    table = Table(
        title=title or None,
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        show_header=any(header),
    )
    for c, name in enumerate(header):
        words = c < left
        table.add_column(name, justify="left" if words else "right", no_wrap=not words, overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row), style="red" if bad(row) else None)
    console = Console()
    if not console.is_terminal:
        # In a file or a pipe nothing may be wrapped to a guessed width.
        console.width = 500
    console.print(table)
    return True


@contextlib.contextmanager
def progress(total: int, plain: bool = False) -> Iterator[Callable[[str], None]]:
    """Within the block, call the function given with what comes next, `total` times in all.

    Goes to stderr, and only where that is a terminal.
    """
    if not sys.stderr.isatty():
        yield lambda _: None
        return
    try:
        if plain:
            raise ImportError
        from rich.console import Console
        from rich.progress import Progress
    except ImportError:
        yield _counter(total)
        print("\r\033[K", end="", file=sys.stderr, flush=True)
        return
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=total)
        begun = 0

        def step(what: str) -> None:
            nonlocal begun
            bar.update(task, description=what, completed=begun)
            begun += 1

        yield step


def _counter(total: int) -> Callable[[str], None]:
    begun = 0

    def step(what: str) -> None:
        nonlocal begun
        begun += 1
        print(f"\r\033[K{begun}/{total} {what}", end="", file=sys.stderr, flush=True)

    return step
