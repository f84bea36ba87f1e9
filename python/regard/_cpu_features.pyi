# Written by tools/stubs.py from the compiled _cpu_features; do not edit.
from __future__ import annotations
import typing
__all__: list[str] = ['compiler', 'instruction_sets']

def instruction_sets() -> dict[str, str | None]:
    ...
compiler: str
