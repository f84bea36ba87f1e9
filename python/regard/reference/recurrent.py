"""Gated recurrent units and long short-term memory in plain NumPy: what the kernels must compute.

Names: x (batch, len, in_features), states (batch, hidden); weights as PyTorch's, the gates one under the other:
r, z, n in a GRU's (3 hidden, ..) and i, f, g, o in an LSTM's (4 hidden, ..).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from regard.reference._functions import Array, affine, dtypes_of, sigmoid, unwarned

States = tuple[Array, ...]


def _run(
    step: Callable[[Array, States], States], x: Array, states: States, lengths: Array | None, reverse: bool
) -> tuple[Array, States]:
    """The first state after each step, and all of them in the end: (batch, len, hidden), states.

    Steps from a sequence's length on are not its own: they leave its states as they are and give 0.
    """
    batch, length, _ = x.shape
    lengths = np.full(batch, length) if lengths is None else np.asarray(lengths)
    out = np.zeros((batch, length, states[0].shape[1]), x.dtype)
    for t in reversed(range(length)) if reverse else range(length):
        own = (t < lengths)[:, None]
        states = tuple(np.where(own, new, old) for new, old in zip(step(x[:, t], states), states, strict=True))
        out[:, t] = np.where(own, states[0], 0)
    return out, states


def _initial(state: Array | None, x: Array, hidden: int) -> Array:
    return np.zeros((x.shape[0], hidden), x.dtype) if state is None else np.asarray(state).astype(x.dtype)


@unwarned
def gru(
    x: Array,
    w_input: Array,
    w_hidden: Array,
    b_input: Array | None = None,
    b_hidden: Array | None = None,
    *,
    h0: Array | None = None,
    lengths: Array | None = None,
    reverse: bool = False,
) -> tuple[Array, Array]:
    """Cho et al. (2014), with the reset after the product: (out, h_n).

    r = sigmoid(W_ir x + b_ir + W_hr h + b_hr), z = sigmoid(W_iz x + b_iz + W_hz h + b_hz),
    n = tanh(W_in x + b_in + r (W_hn h + b_hn)), h = (1 - z) n + z h.
    """
    dtype, compute = dtypes_of(x, w_input, w_hidden)
    x = np.asarray(x).astype(compute)

    def step(x_t: Array, states: States) -> States:
        (h,) = states
        x_r, x_z, x_n = np.split(affine(x_t, w_input, b_input), 3, axis=1)
        h_r, h_z, h_n = np.split(affine(h, w_hidden, b_hidden), 3, axis=1)
        r = sigmoid(x_r + h_r)
        z = sigmoid(x_z + h_z)
        n = np.tanh(x_n + r * h_n)
        return ((1 - z) * n + z * h,)

    out, (h_n,) = _run(step, x, (_initial(h0, x, w_hidden.shape[1]),), lengths, reverse)
    return out.astype(dtype), h_n.astype(dtype)


@unwarned
def lstm(
    x: Array,
    w_input: Array,
    w_hidden: Array,
    b_input: Array | None = None,
    b_hidden: Array | None = None,
    *,
    h0: Array | None = None,
    c0: Array | None = None,
    lengths: Array | None = None,
    reverse: bool = False,
) -> tuple[Array, Array, Array]:
    """Hochreiter & Schmidhuber (1997), with forget gates: (out, h_n, c_n).

    i, f, o = sigmoid(W_i x + b_i + W_h h + b_h) and g = tanh(likewise), c = f c + i g, h = o tanh(c).
    """
    dtype, compute = dtypes_of(x, w_input, w_hidden)
    x = np.asarray(x).astype(compute)

    def step(x_t: Array, states: States) -> States:
        h, c = states
        i, f, g, o = np.split(affine(x_t, w_input, b_input) + affine(h, w_hidden, b_hidden), 4, axis=1)
        c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
        return sigmoid(o) * np.tanh(c), c

    hidden = w_hidden.shape[1]
    out, (h_n, c_n) = _run(step, x, (_initial(h0, x, hidden), _initial(c0, x, hidden)), lengths, reverse)
    return out.astype(dtype), h_n.astype(dtype), c_n.astype(dtype)
