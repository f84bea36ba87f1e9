"""Dates as people write them, with the ISO 8601 date that each means: data without end, and its alphabet."""

from __future__ import annotations

import datetime
import random
from collections.abc import Callable

PAD, BEGIN, END = 0, 1, 2
_FIRST = 3

#: What is written, and what is answered: character i of each is number i + 3.
SOURCE = " '-,./0123456789abcdefghijklmnopqrstuvwxyz"
TARGET = "-0123456789"

MONTHS = (
    "January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November",
    "December",
)  # fmt: skip
_ORDINALS = (
    "zeroth", "first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth", "eleventh",
    "twelfth", "thirteenth", "fourteenth", "fifteenth", "sixteenth", "seventeenth", "eighteenth", "nineteenth",
    "twentieth",
)  # fmt: skip

_FIRST_DAY = datetime.date(1900, 1, 1).toordinal()
_LAST_DAY = datetime.date(2099, 12, 31).toordinal()
#: Years of two digits mean one of these.
_SHORT_YEARS = range(1970, 2070)


def is_held_out(day: datetime.date) -> bool:
    """Whether a date is kept for testing: one in twenty, and no string of it is ever trained on."""
    return day.toordinal() * 2654435761 % 2**32 < 2**32 // 20


def ordinal_word(n: int) -> str:
    """1 to 31 in letters."""
    if n <= 20:
        return _ORDINALS[n]
    return "thirtieth" if n == 30 else f"{'twenty' if n < 30 else 'thirty'}-{_ORDINALS[n % 10]}"


def ordinal(n: int) -> str:
    """1st, 2nd, ... 31st."""
    ending = "th" if 10 < n < 20 else {1: "st", 2: "nd", 3: "rd"}.get(n % 10, "th")
    return f"{n}{ending}"


def _day(rng: random.Random, d: datetime.date) -> str:
    return rng.choice((str(d.day), f"{d.day:02}", ordinal(d.day)))


def _month(rng: random.Random, d: datetime.date) -> str:
    name = MONTHS[d.month - 1]
    short = "Sept" if d.month == 9 and rng.random() < 0.5 else name[:3]
    return rng.choice((name, name, short, f"{short}."))


def _year(rng: random.Random, d: datetime.date) -> str:
    if d.year in _SHORT_YEARS and rng.random() < 0.2:
        return f"'{d.year % 100:02}"
    return str(d.year)


def _with_weekday(rng: random.Random, d: datetime.date, text: str) -> str:
    if rng.random() < 0.75:
        return text
    name = d.strftime("%A")
    return f"{rng.choice((name, name[:3], name[:3] + '.'))}{rng.choice((', ', ' '))}{text}"


def _numbers(rng: random.Random, d: datetime.date) -> str:
    """Slashes between the parts are American, points European, and a year in front says what follows."""
    day, month = (str(d.day), str(d.month)) if rng.random() < 0.5 else (f"{d.day:02}", f"{d.month:02}")
    year = str(d.year)
    if d.year in _SHORT_YEARS and rng.random() < 0.25:
        year = f"{d.year % 100:02}"
    which = rng.randrange(4)
    if which == 0:
        return f"{month}/{day}/{year}"
    if which == 1:
        return f"{day}.{month}.{year}"
    if which == 2:
        return f"{day}. {month}. {year}"
    return rng.choice("-/.").join((str(d.year), month, day))


_WAYS: tuple[Callable[[random.Random, datetime.date], str], ...] = (
    _numbers,
    _numbers,
    lambda rng, d: _with_weekday(rng, d, f"{_day(rng, d)} {_month(rng, d)} {_year(rng, d)}"),
    lambda rng, d: _with_weekday(rng, d, f"{_month(rng, d)} {_day(rng, d)}, {_year(rng, d)}"),
    lambda rng, d: _with_weekday(rng, d, f"{_month(rng, d)} {_day(rng, d)} {_year(rng, d)}"),
    lambda rng, d: _with_weekday(
        rng, d, f"the {ordinal(d.day)} of {_month(rng, d)}{rng.choice((' ', ', '))}{_year(rng, d)}"
    ),
    lambda rng, d: f"{_year(rng, d)} {_month(rng, d)} {_day(rng, d)}",
    lambda rng, d: f"{d.day}-{MONTHS[d.month - 1][:3]}-{d.year}",
    lambda rng, d: f"{rng.choice(('the ', ''))}{ordinal_word(d.day)} of {MONTHS[d.month - 1]} {d.year}",
    lambda rng, d: f"{MONTHS[d.month - 1]} the {ordinal_word(d.day)}, {d.year}",
)  # fmt: skip


def written(rng: random.Random, day: datetime.date) -> str:
    """A date in one of the many ways in which people write it."""
    text = rng.choice(_WAYS)(rng, day)
    case = rng.random()
    return text.lower() if case < 0.15 else text.upper() if case < 0.25 else text


def pair(rng: random.Random, held_out: bool) -> tuple[str, str]:
    """(as written, in ISO 8601), of a date of the half that is asked for."""
    while True:
        day = datetime.date.fromordinal(rng.randint(_FIRST_DAY, _LAST_DAY))
        if is_held_out(day) == held_out:
            return written(rng, day), day.isoformat()


def pairs(count: int, seed: int, held_out: bool) -> list[tuple[str, str]]:
    rng = random.Random(seed)
    return [pair(rng, held_out) for _ in range(count)]


def to_source(text: str) -> list[int]:
    """Characters as numbers, without regard to case.

    Raises
    ------
    ValueError
        A character that no date has.
    """
    unknown = sorted(set(text.lower()) - set(SOURCE))
    if unknown:
        raise ValueError(f"{text!r}: dates are written in letters, digits, spaces and ',./-; got {unknown}")
    return [SOURCE.index(c) + _FIRST for c in text.lower()]


def to_target(text: str) -> list[int]:
    return [TARGET.index(c) + _FIRST for c in text]


def from_target(numbers: list[int]) -> str:
    return "".join(TARGET[n - _FIRST] for n in numbers if n >= _FIRST)


#: Sizes of the two alphabets, for a model: dates.SIZES and nothing else decides its shapes.
SIZES = {
    "source_vocabulary": len(SOURCE) + _FIRST,
    "target_vocabulary": len(TARGET) + _FIRST,
    "dim_embedding": 32,
    "dim_hidden": 64,
    "begin": BEGIN,
    "end": END,
}
