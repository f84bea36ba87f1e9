"""A progress bar for the examples."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import Any


def progress(steps: Sequence[Any], label: str) -> Iterator[Any]:
    """The steps, with a bar on standard error where somebody watches: rich's if it is installed."""
    if len(steps) < 2 or not sys.stderr.isatty():
        yield from steps
        return
    try:
        from rich.console import Console
        from rich.progress import track
    except ImportError:
        for done, step in enumerate(steps):
            filled = 40 * done // len(steps)
            bar = f"{label} [{'#' * filled}{'.' * (40 - filled)}] {done}/{len(steps)}"
            print(f"\r{bar}", end="", file=sys.stderr, flush=True)
            yield step
        print(f"\r{label} [{'#' * 40}] {len(steps)}/{len(steps)}", file=sys.stderr)
    else:
        yield from track(steps, label, console=Console(stderr=True))
