"""Translation by a recurrent encoder and decoder that align as they go (Bahdanau et al., 2014)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from regard import _arrays
from regard._checks import describe
from regard.nn.additive import AdditiveAttention, ProjectedKeys
from regard.nn.generate import padded, progress_bar
from regard.nn.linear import Embedding, Linear
from regard.nn.module import Module
from regard.nn.recurrent import GRU


class Translation(NamedTuple):
    """What RNNSearch found for one sequence.

    Attributes
    ----------
    tokens : list of int
        Numbers of the target's vocabulary, without the end's.
    score : float
        Log-probability of the tokens, and of the end where it was reached.
    weights : array, (len(tokens), source length)
        What each token's step gave to each source token; rows sum to 1.
    """

    tokens: list[int]
    score: float
    weights: np.ndarray


class _Decoding(NamedTuple):
    """Sequences in decoding: what stays as encoded, and the decoder's states."""

    keys: ProjectedKeys  # of (batch, len_source, 2 dim_hidden)
    lengths: Any  # (batch,), where the keys are: kernels read them at each step
    state: Any  # (batch, beams, dim_hidden)

    def of(self, which: Any, longest: int) -> _Decoding:
        """Some of the sequences, as far as the longest of them."""
        keys = ProjectedKeys(self.keys.projected[which, :longest], self.keys.keys[which, :longest])
        return _Decoding(keys, self.lengths[which], self.state[which])


class _Found(NamedTuple):
    """A translation whose weights are still where they were computed."""

    value: float  # by which translations are compared
    tokens: list[int]
    score: float
    rows: list[int]  # of each step's weights
    length: int  # of the source

    def translation(self, history: list[np.ndarray], dtype: Any) -> Translation:
        """`history` is each step's weights, (rows, len_source), of `dtype`."""
        weights = [step[row, : self.length] for step, row in zip(history, self.rows, strict=False)]
        return Translation(self.tokens, self.score, np.array(weights, dtype).reshape(len(self.rows), self.length))


class RNNSearch(Module):
    """Bahdanau's model: a bidirectional GRU encodes, a GRU decodes what additive attention shows it.

    With h_j both directions' states at source token j, and s the decoder's states:
    ``s_0 = tanh(W_s h_1 (against time) + b)``; ``c_i = sum_j softmax_j(v . tanh(W_a s_{i-1} + U_a h_j + b)) h_j``;
    ``s_i = GRU(s_{i-1}, [E y_{i-1}, c_i])``; token i has the logits ``W_o t_i + b`` with t_i the larger of each two
    neighbours (maxout) of ``W_r [s_{i-1}, E y_{i-1}, c_i] + b``.

    Parameters
    ----------
    source_vocabulary, target_vocabulary : int
        How many tokens there are.
    dim_embedding, dim_hidden : int
        Widths of an embedding and of a state (the paper's 620 and 1000).
    dim_attention, dim_readout : int, optional
        Widths of the space in which states and annotations are added, and of t; dim_hidden where left out.
    begin, end : int
        The target's tokens that stand for y_0, and for the end.

    Notes
    -----
    The GRUs are PyTorch's, whose reset gate follows the product with the state; the paper's precedes it. Weights have
    the names ``source_embedding.weight``, ``encoder.*``, ``bridge.*``, ``attention.*``, ``target_embedding.weight``,
    ``decoder.*``, ``readout.*`` and ``output.*``.
    """

    def __init__(
        self,
        source_vocabulary: int,
        target_vocabulary: int,
        dim_embedding: int = 620,
        dim_hidden: int = 1000,
        dim_attention: int | None = None,
        dim_readout: int | None = None,
        begin: int = 1,
        end: int = 2,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(device, dtype)
        for name, token in (("begin", begin), ("end", end)):
            if not 0 <= token < target_vocabulary:
                raise ValueError(f"{name}: expected a token below target_vocabulary = {target_vocabulary}, got {token}")
        wide = 2 * dim_hidden
        dim_readout = dim_readout or dim_hidden
        self.begin, self.end, self.target_vocabulary = begin, end, target_vocabulary
        self.source_embedding = Embedding(source_vocabulary, dim_embedding, dtype=dtype)
        self.encoder = GRU(dim_embedding, dim_hidden, batch_first=True, bidirectional=True, dtype=dtype)
        self.bridge = Linear(dim_hidden, dim_hidden, dtype=dtype)
        self.attention = AdditiveAttention(dim_hidden, wide, dim_attention or dim_hidden, dtype=dtype)
        self.target_embedding = Embedding(target_vocabulary, dim_embedding, dtype=dtype)
        self.decoder = GRU(dim_embedding + wide, dim_hidden, batch_first=True, dtype=dtype)
        self.readout = Linear(dim_hidden + dim_embedding + wide, 2 * dim_readout, dtype=dtype)
        self.output = Linear(dim_readout, target_vocabulary, dtype=dtype)

    # ---- The model ----

    def _encode(self, source: Any, lengths: Any, beams: int = 1) -> _Decoding:
        annotations, last = self.encoder.forward(self.source_embedding.forward(source), lengths=lengths)
        xp = _arrays.namespace(annotations)
        state = xp.tanh(self.bridge.forward(last[1]))
        lengths = _arrays.beside(annotations, lengths)
        return _Decoding(self.attention.precompute(annotations), lengths, xp.repeat(state[:, None], beams, axis=1))

    def _step(self, previous: Any, decoding: _Decoding) -> tuple[Any, Any, _Decoding]:
        """After tokens `previous` (batch, beams): features for the next one's logits, weights, new states."""
        state = decoding.state
        embedded = self.target_embedding.forward(previous)
        context, weights = self.attention.forward(
            state, decoding.keys, key_lengths=decoding.lengths, return_weights=True
        )
        features = _arrays.namespace(state).concatenate((state, embedded, context), axis=-1)
        rows = features.shape[0] * features.shape[1]
        given = features[..., state.shape[2] :].reshape(rows, 1, -1)
        _, after = self.decoder.forward(given, state.reshape(1, rows, -1))
        return features, weights, decoding._replace(state=after.reshape(state.shape))

    def _logits(self, features: Any) -> Any:
        pairs = self.readout.forward(features)
        return self.output.forward(pairs.reshape(*pairs.shape[:-1], -1, 2).max(axis=-1))

    def forward(self, source: Any, target: Any, source_lengths: Any = None, return_weights: bool = False) -> Any:
        """The logits of each target token's successor, given the target (teacher forcing).

        Parameters
        ----------
        source : array of integers, (batch, len_source)
        target : array of integers, (batch, len_target)
            The tokens before those that are asked for: begin first.
        source_lengths : int32 or int64 array, (batch,), optional
            Valid prefixes of source.
        return_weights : bool
            Also return the attention's weights.

        Returns
        -------
        logits : array, (batch, len_target, target_vocabulary)
            Of the module's dtype.
        weights : array, (batch, len_target, len_source)
        """
        for name, x in (("source", source), ("target", target)):
            if getattr(x, "ndim", 0) != 2:
                raise ValueError(f"{name}: expected shape (batch, len_{name}), got {describe(x)}")
        if _arrays.device_of(target) != _arrays.device_of(source):
            raise TypeError(f"target: expected an array on the device of source, got {describe(target)}")
        batch, length = target.shape
        lengths = np.full(batch, source.shape[1]) if source_lengths is None else source_lengths
        decoding, xp = self._encode(source, lengths), _arrays.namespace(source)
        features, weights = [], []
        for i in range(length):
            f, w, decoding = self._step(target[:, i : i + 1], decoding)
            features.append(f)
            weights.append(w)
        if length == 0:
            empty = xp.zeros((batch, 0, self.target_vocabulary), self.dtype)
            return (empty, xp.zeros((batch, 0, source.shape[1]), self.dtype)) if return_weights else empty
        logits = self._logits(xp.concatenate(features, axis=1))
        return (logits, xp.concatenate(weights, axis=1)) if return_weights else logits

    # ---- Search ----

    def greedy(
        self,
        sources: Sequence[Sequence[int]],
        max_length: int = 50,
        *,
        batch_size: int = 64,
        progress: bool = False,
        like: Any = None,
    ) -> list[Translation]:
        """Translate by the most probable token at each step.

        Parameters
        ----------
        sources : sequences of integers
            Of any lengths; those of like length are translated together.
        max_length : int
            Tokens at most.
        batch_size : int
            Sequences at a time.
        progress : bool
            Show a bar on standard error, where that is a terminal; rich draws it where installed.
        like : array, optional
            The search runs where this is: on the CPU, or on the GPU of CuPy's arrays or PyTorch's, where each
            step waits for its tokens. By default on the CPU, or on the GPU from whose memory weights were loaded.

        Returns
        -------
        list of Translation, in the order of sources
        """

        def run(source: Any, lengths: np.ndarray, one_more: Callable[[], None]) -> list[Translation]:
            return self._greedy(source, lengths, one_more, max_length)

        return self._search(sources, batch_size, progress, like, run)

    def beam_search(
        self,
        sources: Sequence[Sequence[int]],
        beam_size: int = 12,
        max_length: int = 50,
        *,
        length_penalty: float = 1.0,
        batch_size: int = 32,
        progress: bool = False,
        like: Any = None,
    ) -> list[list[Translation]]:
        """Translate, keeping the beam_size best beginnings at each step.

        Parameters
        ----------
        sources, max_length, batch_size, progress, like
            As for greedy.
        beam_size : int
            Beginnings kept of each sequence, and translations returned at most.
        length_penalty : float
            Translations are compared by score / steps ** length_penalty: 0 by probability, 1 by that of a token.

        Returns
        -------
        list of lists of Translation
            For each source, best first. One that found no end within max_length gives its best beginning.
        """
        if beam_size < 1:
            raise ValueError(f"beam_size: expected a count >= 1, got {beam_size}")

        def run(source: Any, lengths: np.ndarray, one_more: Callable[[], None]) -> list[list[Translation]]:
            return self._beam(source, lengths, one_more, beam_size, max_length, length_penalty)

        return self._search(sources, batch_size, progress, like, run)

    def _search(
        self, sources: Any, batch_size: int, progress: bool, like: Any, run: Callable[..., list[Any]]
    ) -> list[Any]:
        """run(padded tokens, lengths, a function to call for each translation) over batches of like length."""
        if batch_size < 1:
            raise ValueError(f"batch_size: expected a count >= 1, got {batch_size}")
        for i, row in enumerate(sources):
            if len(row) and np.asarray(row).dtype.kind not in "iu":
                raise TypeError(f"sources: expected sequences of ints, got {describe(row)} at index {i}")
        like = self._loaded_on_gpu() if like is None else like
        memory = _arrays.memory_of(_NAME, like)
        order = sorted(range(len(sources)), key=lambda i: len(sources[i]))
        found: list[Any] = [None] * len(order)
        with _arrays.working_beside(_NAME, like), progress_bar(len(order), progress) as tick:
            for start in range(0, len(order), batch_size):
                which = order[start : start + batch_size]
                tokens, lengths = padded([sources[i] for i in which])
                self.source_embedding._check(tokens)
                source = memory.put(_NAME, tokens, tokens.dtype)
                for i, result in zip(which, run(source, lengths, lambda: tick("translating")), strict=True):
                    found[i] = result
        return found

    def _greedy(
        self, source: Any, lengths: np.ndarray, one_more: Callable[[], None], max_length: int
    ) -> list[Translation]:
        batch, xp = len(lengths), _arrays.namespace(source)
        tokens: list[list[int]] = [[] for _ in range(batch)]
        rows: list[list[int]] = [[] for _ in range(batch)]
        history: list[Any] = []
        scores = np.zeros(batch)
        decoding = self._encode(source, lengths)
        running = np.arange(batch)
        previous = _arrays.beside(source, np.full(batch, self.begin))
        for _ in range(max_length):
            features, weights, decoding = self._step(previous[:, None], decoding)
            history.append(weights[:, 0])
            log_p = _log_softmax(self._logits(features)[:, 0])
            previous = log_p.argmax(axis=-1)
            gained = xp.take_along_axis(log_p, previous[:, None], axis=-1)[:, 0]
            chosen, gained = _on_host(xp.stack((previous.astype(np.float64), gained)))  # one copy a step
            scores[running] += gained
            going = chosen != self.end
            for k in np.flatnonzero(going):
                tokens[running[k]].append(int(chosen[k]))
                rows[running[k]].append(int(k))
            if not going.all():
                for _ in range(int((~going).sum())):
                    one_more()
                kept = np.flatnonzero(going)
                running = running[kept]
                if not len(running):
                    break
                which = _arrays.beside(source, kept)
                previous, decoding = previous[which], decoding.of(which, int(lengths[running].max()))
        for _ in running:
            one_more()
        seen = list(map(_on_host, history))
        ends = zip(scores.tolist(), tokens, scores.tolist(), rows, lengths.tolist(), strict=True)
        return [_Found(*end).translation(seen, self.dtype) for end in ends]

    def _beam(
        self,
        source: Any,
        lengths: np.ndarray,
        one_more: Callable[[], None],
        beams: int,
        max_length: int,
        length_penalty: float,
    ) -> list[list[Translation]]:
        batch, vocabulary = len(lengths), self.target_vocabulary
        done: list[list[_Found]] = [[] for _ in range(batch)]
        history: list[Any] = []
        decoding = self._encode(source, lengths, beams)
        running = np.arange(batch)
        scores = np.full((batch, beams), -np.inf)
        scores[:, 0] = 0.0
        tokens, rows = np.zeros((2, batch, beams, 0), np.int64)
        previous = _arrays.beside(source, np.full((batch, beams), self.begin))

        def ending(k: int, beam: int, score: float, steps: int) -> _Found:
            value = score / max(steps, 1) ** length_penalty
            i = running[k]
            return _Found(value, tokens[k, beam].tolist(), score, rows[k, beam].tolist(), int(lengths[i]))

        for step in range(1, max_length + 1):
            features, weights, decoding = self._step(previous, decoding)
            history.append(weights.reshape(len(running) * beams, weights.shape[-1]))
            totals = _arrays.beside(source, scores)[..., None] + _log_softmax(self._logits(features))
            # A beam ends in one way only: among twice as many, enough go on.
            best, scores = _largest(totals.reshape(len(running), -1), min(2 * beams, beams * vocabulary))
            origin, chosen = best // vocabulary, best % vocabulary
            ended = chosen == self.end
            for k, j in zip(*np.nonzero(ended[:, :beams] & np.isfinite(scores[:, :beams])), strict=True):
                done[running[k]].append(ending(int(k), int(origin[k, j]), float(scores[k, j]), step))
            on = np.argsort(ended, axis=1, kind="stable")[:, :beams]
            scores, origin, chosen = (np.take_along_axis(x, on, axis=1) for x in (scores, origin, chosen))
            each = np.arange(len(running))[:, None]
            row = each * beams + origin
            tokens = np.concatenate((tokens[each, origin], chosen[..., None]), axis=2)
            rows = np.concatenate((rows[each, origin], row[..., None]), axis=2)
            # What still runs can be no better than its score over the most steps that it might take.
            bound = scores[:, 0] / max_length**length_penalty
            kept = [k for k, i in enumerate(running) if not _settled(done[i], beams, bound[k])]
            state = decoding.state.reshape(len(running) * beams, -1)
            if len(kept) < len(running):
                for _ in range(len(running) - len(kept)):
                    one_more()
                which = np.array(kept, np.int64)
                running, scores, chosen, tokens, rows, row = (
                    x[which] for x in (running, scores, chosen, tokens, rows, row)
                )
                if not kept:
                    break
                decoding = decoding.of(_arrays.beside(source, which), int(lengths[running].max()))
            moved = _arrays.beside(source, np.stack((chosen, row)))
            previous, decoding = moved[0], decoding._replace(state=state.take(moved[1], axis=0))
        for k, i in enumerate(running):
            if not done[i]:
                done[i].append(ending(k, 0, float(scores[k, 0]), max_length))
            one_more()
        seen = list(map(_on_host, history))
        return [[f.translation(seen, self.dtype) for f in sorted(d, key=lambda f: -f.value)[:beams]] for d in done]


_NAME = RNNSearch.__name__


def _on_host(x: Any) -> np.ndarray:
    return _arrays.on_host(_NAME, x)


def _settled(done: list[_Found], beams: int, bound: float) -> bool:
    """Whether no running beginning can be among the best any more."""
    return len(done) >= beams and sorted((found.value for found in done), reverse=True)[beams - 1] >= bound


def _log_softmax(x: Any) -> Any:
    xp = _arrays.namespace(x)
    x = x.astype(np.float64)
    x -= x.max(axis=-1, keepdims=True)
    return x - xp.log(xp.exp(x).sum(axis=-1, keepdims=True))


def _largest(x: Any, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Places of the n largest in each row and what they hold, largest first: on the host, by one copy."""
    xp = _arrays.namespace(x)
    some = xp.argpartition(-x, n - 1, axis=1)[:, :n]
    places, values = _on_host(xp.stack((some.astype(np.float64), xp.take_along_axis(x, some, axis=1))))
    order = np.lexsort((places, -values))
    return np.take_along_axis(places.astype(np.int64), order, axis=1), np.take_along_axis(values, order, axis=1)
