"""Covering arrays: few rows in which every pair of values of two factors occurs (Cohen et al., "AETG", 1997)."""

from __future__ import annotations

import itertools
import random
from collections.abc import Mapping, Sequence

Row = dict[str, int]
Pair = tuple[str, int, str, int]


def pairs_of(row: Row) -> set[Pair]:
    return {(a, row[a], b, row[b]) for a, b in itertools.combinations(sorted(row), 2)}


def all_pairs(sizes: Mapping[str, int]) -> set[Pair]:
    return {
        (a, x, b, y)
        for a, b in itertools.combinations(sorted(sizes), 2)
        for x in range(sizes[a])
        for y in range(sizes[b])
    }


def covering_rows(factors: Mapping[str, Sequence[object]], candidates: int = 20) -> list[Row]:
    """Rows {factor: index of a value}, the same ones every time.

    Greedy: each row is the best of some candidates, and each candidate starts from a pair that no row has yet, then
    gives every other factor, in random order, the value that adds most pairs.
    """
    sizes = {name: len(values) for name, values in factors.items()}
    draw = random.Random(0)
    missing = all_pairs(sizes)
    rows: list[Row] = []
    while missing:
        ordered = sorted(missing)
        best = max(
            (candidate(sizes, missing, draw, draw.choice(ordered)) for _ in range(candidates)), key=gain(missing)
        )
        missing -= pairs_of(best)
        rows.append(best)
    return rows


def gain(missing: set[Pair]):
    return lambda row: len(pairs_of(row) & missing)


def candidate(sizes: Mapping[str, int], missing: set[Pair], draw: random.Random, start: Pair) -> Row:
    row = {start[0]: start[1], start[2]: start[3]}
    rest = [name for name in sizes if name not in row]
    draw.shuffle(rest)
    for name in rest:

        def added(value: int, name: str = name) -> int:
            return sum(
                ((name, value, other, row[other]) if name < other else (other, row[other], name, value)) in missing
                for other in row
            )

        most = max(added(value) for value in range(sizes[name]))
        row[name] = draw.choice([value for value in range(sizes[name]) if added(value) == most])
    return row
