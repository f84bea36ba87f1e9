"""Generation of sequences, one token at a time: greedy, beam search and sampling.

A model takes part through two methods (:class:`Decoder`), so that what it remembers between steps, such
as :class:`regard.nn.CachedDecoder`'s keys and values, is its own affair.
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from regard import _arrays, _checks

METHODS = ("greedy", "beam", "sample")


class Decoder(Protocol):
    """What generation asks of a model."""

    def step(self, tokens: np.ndarray, lengths: np.ndarray) -> Any:
        """Take tokens that follow those of earlier steps; return the logits of the token that comes next.

        tokens : int64, (rows, len), of which each row's first lengths[row], at least 1, count.
        Returns (rows, vocabulary), floats; those on a GPU are waited for and copied.
        """

    def select(self, rows: np.ndarray) -> None:
        """Go on with these of the rows, int64, in this order; a row may be left out or repeated."""


@dataclass(frozen=True)
class Generation:
    """What was generated for one prompt.

    Attributes
    ----------
    tokens : list of int
        After the prompt; an end-of-sequence token is not among them.
    logprob : float
        Sum of the natural logs of the tokens' probabilities, the end-of-sequence's among them. When
        sampling, of the probabilities before temperature, top_k and top_p.
    reason : "eos", "length" or "interrupted"
        Why it ended.
    score : float
        What beam search ranks by: logprob / length penalty; else logprob.
    """

    tokens: list[int]
    logprob: float
    reason: str
    score: float


class Recomputing:
    """A Decoder of a function of whole sequences, which computes all of them again at each step.

    Parameters
    ----------
    function : callable
        (tokens int64 (rows, len), lengths (rows,)) -> logits (rows, len, vocabulary), those at position i
        a function of the tokens up to i.
    rows : int, optional
        How many rows there are at first. With it the function is given a third argument, int64 (rows,):
        which of the first rows each one stems from, for models that look at something else as well.
    """

    def __init__(self, function: Callable[..., Any], rows: int | None = None) -> None:
        self._function = function
        self._origin = None if rows is None else np.arange(rows)
        self._rows: list[list[int]] | None = None

    def step(self, tokens: np.ndarray, lengths: np.ndarray) -> Any:
        """As Decoder.step."""
        added = [row[:n].tolist() for row, n in zip(tokens, lengths, strict=True)]
        self._rows = added if self._rows is None else [a + b for a, b in zip(self._rows, added, strict=True)]
        table, whole = padded(self._rows)
        context = () if self._origin is None else (self._origin,)
        logits = self._function(table, whole, *context)
        if not _arrays.is_array(logits):
            logits = _arrays.on_host("Recomputing", logits)
        with _arrays.current_device("Recomputing", logits):
            return logits[_arrays.beside(logits, np.arange(len(whole))), _arrays.beside(logits, whole - 1)]

    def select(self, rows: np.ndarray) -> None:
        """As Decoder.select."""
        assert self._rows is not None
        self._rows = [list(self._rows[i]) for i in rows]
        if self._origin is not None:
            self._origin = self._origin[rows]


def generate(
    decoder: Decoder,
    prompts: Any,
    *,
    max_new_tokens: int,
    eos: int | Collection[int] | None = None,
    method: str = "greedy",
    beams: int = 4,
    length_penalty: float = 0.6,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
    adjust: Callable[[np.ndarray, list[list[int]]], Any] | None = None,
    progress: bool = False,
) -> Any:
    """Continue prompts, a batch of them at a time.

    Ctrl-C ends the generation, not the program: what there is by then is returned, with the reason
    "interrupted".

    Parameters
    ----------
    decoder : Decoder
        Fresh: one row for each prompt, no steps taken.
    prompts : ints, or sequences of ints of any lengths, at least 1
        One prompt, or a batch.
    max_new_tokens : int
        How many tokens to add at most.
    eos : int or collection of ints, optional
        Tokens that end a sequence.
    method : "greedy", "beam" or "sample"
        The likeliest token each time; the likeliest sequence that beam search finds; or tokens drawn
        by their probabilities.
    beams : int
        Sequences kept for each prompt. Only for "beam", as is length_penalty.
    length_penalty : float
        alpha: beam search ranks by ``logprob / ((5 + length) / 6) ** alpha`` with the end-of-sequence
        counted in length (Wu et al., 2016, without the coverage term). 0 ranks by logprob.
    temperature, top_k, top_p, seed
        Only for "sample". Logits are divided by temperature; then only the top_k likeliest tokens are
        kept, then the fewest whose probabilities add up to top_p (Holtzman et al., 2020). A seed gives
        the same tokens again, for a prompt at one place of the batch whatever the others are.
    adjust : callable, optional
        adjust(logits (rows, vocabulary), generated), where generated lists the tokens of each row so
        far. Changes the logits in place, before anything else; -inf rules a token out.
    progress : bool
        A bar on stderr, where that is a terminal; drawn by rich if it is installed.

    Returns
    -------
    Generation, or a list of one for each prompt

    Raises
    ------
    TypeError, ValueError
        Naming the argument, what was expected and what came.
    """
    if method not in METHODS:
        raise ValueError(f"method: expected one of {', '.join(map(repr, METHODS))}, got {method!r}")
    single, rows = _prompts(prompts)
    ends = _ends(eos)
    limit = _checks.count("max_new_tokens", max_new_tokens, 1)
    _only_for("beam", method, beams=(beams, 4), length_penalty=(length_penalty, 0.6))
    _only_for("sample", method, temperature=(temperature, 1.0), top_k=(top_k, None), top_p=(top_p, None))
    if method == "beam":
        best = beam_search(
            decoder, rows, max_new_tokens=limit, eos=ends, beams=beams, length_penalty=length_penalty,
            adjust=adjust, progress=progress,
        )  # fmt: skip
        found = [hypotheses[0] for hypotheses in best]
    else:
        choose = _chooser(method, len(rows), temperature, top_k, top_p, seed)
        _check_room(decoder, rows, limit)
        run = _Run(len(rows))
        with progress_bar(limit, progress) as tick, contextlib.suppress(KeyboardInterrupt):
            for _ in run.steps(decoder, rows, limit, ends, choose, adjust):
                tick(f"{sum(map(len, run.tokens))} tokens")
        found = run.results()
    return found[0] if single else found


def stream(
    decoder: Decoder,
    prompts: Any,
    *,
    max_new_tokens: int,
    eos: int | Collection[int] | None = None,
    method: str = "greedy",
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
    adjust: Callable[[np.ndarray, list[list[int]]], Any] | None = None,
) -> Iterator[Any]:
    """The tokens that :func:`generate` would return, each as soon as it is known.

    Yields ints for one prompt; for a batch a list at each step, with None for sequences that have
    ended. Parameters and errors are generate's, without "beam", which knows no token before the end.
    Ctrl-C is raised where the generator is asked for a token.
    """
    if method not in ("greedy", "sample"):
        raise ValueError(f"method: expected 'greedy' or 'sample', got {method!r}")
    single, rows = _prompts(prompts)
    _only_for("sample", method, temperature=(temperature, 1.0), top_k=(top_k, None), top_p=(top_p, None))
    choose = _chooser(method, len(rows), temperature, top_k, top_p, seed)
    limit, ends = _checks.count("max_new_tokens", max_new_tokens, 1), _ends(eos)
    _check_room(decoder, rows, limit)

    def tokens() -> Iterator[Any]:
        for added in _Run(len(rows)).steps(decoder, rows, limit, ends, choose, adjust):
            if single:
                if added[0] is not None:
                    yield added[0]
            elif any(token is not None for token in added):
                yield added

    return tokens()  # arguments are checked at the call, not at the first token


class _Run:
    """Greedy and sampled generation of a batch. Rows that have ended leave the decoder."""

    def __init__(self, count: int) -> None:
        self.tokens: list[list[int]] = [[] for _ in range(count)]
        self.logprobs = [0.0] * count
        self.reasons = ["interrupted"] * count

    def steps(
        self,
        decoder: Decoder,
        prompts: list[list[int]],
        limit: int,
        ends: frozenset[int],
        choose: Callable[[np.ndarray, list[int]], list[int]],
        adjust: Any,
    ) -> Iterator[list[int | None]]:
        live = list(range(len(prompts)))
        given, lengths = padded(prompts)
        while live:
            logits = _logits(decoder.step(given, lengths), len(live))
            if adjust is not None:
                _adjust(adjust, logits, [self.tokens[i] for i in live])
            chosen = choose(logits, live)
            logprobs = logits[np.arange(len(live)), chosen] - _log_sum(logits)
            added: list[int | None] = [None] * len(self.tokens)
            kept = []
            for place, (row, token) in enumerate(zip(live, chosen, strict=True)):
                self.logprobs[row] += float(logprobs[place])
                if token in ends:
                    self.reasons[row] = "eos"
                    continue
                self.tokens[row].append(token)
                added[row] = token
                if len(self.tokens[row]) == limit:
                    self.reasons[row] = "length"
                else:
                    kept.append(place)
            yield added
            if kept and len(kept) < len(live):
                decoder.select(np.array(kept, np.int64))
            live = [live[place] for place in kept]
            given = np.array([self.tokens[row][-1:] for row in live], np.int64)
            lengths = np.ones(len(live), np.int64)

    def results(self) -> list[Generation]:
        parts = zip(self.tokens, self.logprobs, self.reasons, strict=True)
        return [Generation(tokens, logprob, reason, logprob) for tokens, logprob, reason in parts]


# ---- Beam search ----


def beam_search(
    decoder: Decoder,
    prompts: Any,
    *,
    max_new_tokens: int,
    eos: int | Collection[int] | None = None,
    beams: int = 4,
    length_penalty: float = 0.6,
    adjust: Callable[[np.ndarray, list[list[int]]], Any] | None = None,
    progress: bool = False,
) -> list[list[Generation]]:
    """All that beam search ends with: for each prompt up to `beams` Generations, the best first.

    Of all continuations of a prompt's live sequences by one token the likeliest are kept; those that end are
    set aside. A prompt is done when no live sequence could still outrank the best `beams` that ended,
    even if all tokens up to max_new_tokens were certain.

    Parameters and errors are :func:`generate`'s.
    """
    _, rows = _prompts(prompts)
    limit, width = _checks.count("max_new_tokens", max_new_tokens, 1), _checks.count("beams", beams, 1)
    alpha = _number("length_penalty", length_penalty)
    if not alpha >= 0:
        raise ValueError(f"length_penalty: expected a number >= 0, got {length_penalty!r}")
    _check_room(decoder, rows, limit)
    search = [_Beam([([], 0.0)], width, limit, alpha) for _ in rows]
    with progress_bar(limit, progress) as tick, contextlib.suppress(KeyboardInterrupt):
        _search(decoder, rows, search, limit, _ends(eos), adjust, tick)
    return [beam.results() for beam in search]


@dataclass
class _Beam:
    """One prompt's sequences: live ones (tokens, logprob), likeliest first, and those that ended."""

    live: list[tuple[list[int], float]]
    width: int
    limit: int
    alpha: float

    def __post_init__(self) -> None:
        self.ended: list[Generation] = []
        self.done = False

    def rank(self, logprob: float, length: int) -> float:
        return logprob / ((5 + length) / 6) ** self.alpha

    def advance(self, logprobs: np.ndarray, ends: frozenset[int]) -> list[int]:
        """Continue by one token, logprobs (live, vocabulary); returns which live row each new one stems from."""
        total = logprobs + np.array([score for _, score in self.live])[:, None]
        # As many as may end, and a full beam besides.
        count = min(total.size, self.width * (1 + len(ends)))
        vocabulary = total.shape[1]
        live: list[tuple[list[int], float]] = []
        origin = []
        for flat in _largest(total.reshape(-1), count):
            row, token = divmod(int(flat), vocabulary)
            score = float(total[row, token])
            if score == -np.inf or len(live) == self.width:
                break
            tokens = self.live[row][0]
            if token in ends:
                self.add(tokens, score, "eos", len(tokens) + 1)
            else:
                live.append(([*tokens, token], score))
                origin.append(row)
        self.live = live
        if live and len(live[0][0]) == self.limit:
            for tokens, score in live:
                self.add(tokens, score, "length", len(tokens))
            self.live = []
        if not self.live or (
            len(self.ended) == self.width and self.rank(self.live[0][1], self.limit) <= self.ended[-1].score
        ):
            self.done = True
            return []
        return origin

    def add(self, tokens: list[int], logprob: float, reason: str, length: int) -> None:
        self.ended.append(Generation(tokens, logprob, reason, self.rank(logprob, length)))
        self.ended.sort(key=lambda g: -g.score)
        del self.ended[self.width :]

    def results(self) -> list[Generation]:
        if not self.done:
            for tokens, score in self.live:
                self.add(tokens, score, "interrupted", max(len(tokens), 1))
        return self.ended


def _search(
    decoder: Decoder, prompts: list[list[int]], search: list[_Beam], limit: int, ends: frozenset[int],
    adjust: Any, tick: Callable[[str], None],
) -> None:  # fmt: skip
    live = list(range(len(prompts)))
    given, lengths = padded(prompts)
    for step in range(limit):
        logits = _logits(decoder.step(given, lengths), len(given))
        if adjust is not None:
            _adjust(adjust, logits, [tokens for i in live for tokens, _ in search[i].live])
        logprobs = logits - _log_sum(logits)[:, None]
        rows: list[int] = []
        first, still = 0, []
        for i in live:
            count = len(search[i].live)
            rows.extend(first + r for r in search[i].advance(logprobs[first : first + count], ends))
            first += count
            if not search[i].done:
                still.append(i)
        live = still
        tick(f"{step + 1} steps")
        if not live:
            return
        decoder.select(np.array(rows, np.int64))
        given = np.array([tokens[-1:] for i in live for tokens, _ in search[i].live], np.int64)
        lengths = np.ones(len(given), np.int64)


# ---- Choosing a token ----


def _chooser(
    method: str, rows: int, temperature: float, top_k: int | None, top_p: float | None, seed: int | None
) -> Callable[[np.ndarray, list[int]], list[int]]:
    """A function of (logits, which prompts they belong to) to tokens."""
    if method == "greedy":
        return lambda logits, _: logits.argmax(axis=1).tolist()
    if not _number("temperature", temperature) > 0:
        raise ValueError(f"temperature: expected a number > 0, got {temperature!r}")
    kept = None if top_k is None else _checks.count("top_k", top_k, 1)
    if top_p is not None and not 0 < _number("top_p", top_p) <= 1:
        raise ValueError(f"top_p: expected a number above 0 and up to 1, got {top_p!r}")
    try:
        streams = [np.random.default_rng(child) for child in np.random.SeedSequence(seed).spawn(rows)]
    except (TypeError, ValueError):
        raise ValueError(f"seed: expected None or an int >= 0, got {seed!r}") from None

    def draw(logits: np.ndarray, prompts: list[int]) -> list[int]:
        return [_draw(row, temperature, kept, top_p, streams[i]) for row, i in zip(logits, prompts, strict=True)]

    return draw


def _draw(
    logits: np.ndarray, temperature: float, top_k: int | None, top_p: float | None, rng: np.random.Generator
) -> int:
    # Which are likeliest does not depend on the temperature: the rest of a vocabulary is left alone.
    order = np.arange(len(logits)) if top_k is None else _largest(logits, min(top_k, len(logits)))
    # Below the largest, so that a temperature near 0 takes what it divides to -inf, never to inf.
    with np.errstate(over="ignore"):
        probabilities = np.exp((logits[order] - logits.max()).astype(np.float64) / temperature)
    if top_p is not None:
        nucleus = _nucleus(probabilities, top_p)
        order, probabilities = order[nucleus], probabilities[nucleus]
    cumulative = probabilities.cumsum()
    # Probabilities that underflowed to 0 are never drawn: side="right" skips flat stretches.
    return int(order[min(np.searchsorted(cumulative, rng.random() * cumulative[-1], "right"), len(order) - 1)])


def _nucleus(weights: np.ndarray, top_p: float) -> np.ndarray:
    """The fewest of these, largest first, that make up top_p of their sum."""
    needed = top_p * weights.sum()
    count = min(64, len(weights))
    while True:  # a whole vocabulary is rarely worth sorting
        order = _largest(weights, count)
        cumulative = weights[order].cumsum()
        if cumulative[-1] >= needed or count == len(weights):
            return order[: int(np.searchsorted(cumulative, needed)) + 1]
        count = min(8 * count, len(weights))


def _largest(values: np.ndarray, count: int) -> np.ndarray:
    """Where the `count` largest values are, largest first; of equal ones those in front."""
    if 4 * count < len(values):
        bound = np.partition(values, len(values) - count)[len(values) - count]
        places = np.flatnonzero(values >= bound)
    else:
        places = np.arange(len(values))
    return places[np.argsort(-values[places], kind="stable")[:count]]


def _log_sum(logits: np.ndarray) -> np.ndarray:
    """log of the sum of exp, (rows,), float64."""
    highest = logits.max(axis=1)
    return highest + np.log(np.exp(logits - highest[:, None]).sum(axis=1, dtype=np.float64))


# ---- Arguments ----


def _only_for(owner: str, method: str, **given: tuple[Any, Any]) -> None:
    """Refuse another value than the default, (value, default) by name, where another method reads it."""
    for name, (value, default) in given.items():
        if method != owner and value != default:
            raise ValueError(f"{name}: expected {default} unless method is {owner!r}, got {value!r}")


def _check_room(decoder: Any, rows: list[list[int]], limit: int) -> None:
    """Refuse what a decoder that says its rows and its room, such as CachedDecoder, has none for."""
    there = len(getattr(decoder, "lengths", rows))
    if there != len(rows):
        raise ValueError(f"prompts: expected {there}, one for each row of the decoder, got {len(rows)}")
    longest, room = max(map(len, rows)), getattr(decoder, "max_len", None)
    if room is not None and longest + limit - 1 > room:  # the last token is not looked at
        raise ValueError(
            f"max_new_tokens: expected at most {room + 1 - longest}, with the decoder's max_len = {room} and a prompt "
            f"of {longest} tokens, got {limit}"
        )


def _adjust(adjust: Callable[[np.ndarray, list[list[int]]], Any], logits: np.ndarray, tokens: list[list[int]]) -> None:
    adjust(logits, tokens)
    if np.isneginf(logits.max(axis=1)).any():
        raise ValueError("adjust: expected it to leave at least one token possible in each row")


def _logits(given: Any, rows: int) -> np.ndarray:
    """The decoder's logits as an array of float32 or float64 that may be written."""
    logits = _arrays.on_host("generate", given)
    if logits.ndim != 2 or len(logits) != rows or not logits.shape[1]:
        raise ValueError(f"decoder: expected logits of shape (rows = {rows}, vocabulary), got {logits.shape}")
    if logits.dtype not in (np.float32, np.float64):
        logits = logits.astype(np.float32)
    useless = ~np.isfinite(logits.max(axis=1))
    if useless.any():
        row = int(useless.argmax())
        raise ValueError(f"decoder: expected logits without NaN, the largest of them finite, got others in row {row}")
    return logits if logits.flags.writeable else logits.copy()


def padded(rows: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """(rows, longest) with zeros after the shorter ones, and the lengths."""
    lengths = np.array([len(row) for row in rows], np.int64)
    table = np.zeros((len(rows), int(lengths.max(initial=0))), np.int64)
    for into, row in zip(table, rows, strict=True):
        into[: len(row)] = row
    return table, lengths


def _prompts(prompts: Any) -> tuple[bool, list[list[int]]]:
    """Whether it is one prompt, and the rows."""
    expected = "prompts: expected a sequence of ints, or of sequences of ints, none of them empty"
    given = prompts.tolist() if hasattr(prompts, "tolist") else prompts
    if not isinstance(given, Sequence) or isinstance(given, (str, bytes)):
        raise TypeError(f"{expected}, got {type(prompts).__name__}")
    single = bool(given) and not hasattr(given[0], "__len__")
    try:
        rows = [[operator.index(token) for token in row] for row in ([given] if single else given)]
    except TypeError:
        raise TypeError(f"{expected}, got {prompts!r}") from None
    if not rows or not all(rows):
        raise ValueError(f"{expected}, got {prompts!r}")
    return single, rows


def _ends(eos: int | Collection[int] | None) -> frozenset[int]:
    if eos is None:
        return frozenset()
    try:
        return frozenset(map(operator.index, eos if isinstance(eos, Collection) else (eos,)))
    except TypeError:
        raise TypeError(f"eos: expected an int or a collection of ints, got {eos!r}") from None


def _number(name: str, value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        raise TypeError(f"{name}: expected a number, got {value!r}") from None


@contextlib.contextmanager
def progress_bar(total: int, shown: bool) -> Iterator[Callable[[str], None]]:
    """A function to call with a few words at each of `total` steps."""
    if not shown:
        yield lambda _: None
        return
    from regard._cli.table import progress

    with progress(total) as tick:
        yield tick
