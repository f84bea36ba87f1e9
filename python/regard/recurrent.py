"""Recurrent layers: gated recurrent units (Cho, 2014), long short-term memory (Hochreiter & Schmidhuber, 1997)."""

from __future__ import annotations

from typing import Any

from regard import _arrays, _backend, _checks, dense


class PackedDirection:
    """The weights of one direction of a recurrent layer as the kernels read them.

    On the CPU they are packed, biases with them; on a GPU they stay as they are.
    """

    __slots__ = ("hidden", "weights")

    def __init__(self, lstm: bool, w_input: Any, w_hidden: Any, b_input: Any, b_hidden: Any) -> None:
        if _arrays.on_gpu(w_hidden):
            self.weights = (w_input, w_hidden, b_input, b_hidden)
        else:
            packed_input = dense.pack_linear(w_input, b_input).packed
            result = _backend.cpu.pack_recurrent(w_hidden, b_hidden, lstm)
            if type(result) is tuple:
                given = {"w_hidden": w_hidden, "b_hidden": b_hidden}
                raise _checks.error("lstm" if lstm else "gru", result, given)
            self.weights = (packed_input, result[0], None, None)
        self.hidden = int(w_hidden.shape[1])


def run_packed(
    directions: tuple[PackedDirection, ...],
    x: Any,
    h0: Any,
    c0: Any,
    lengths: Any,
    *,
    lstm: bool,
    time_major: bool,
) -> list[Any]:
    """One layer of one direction or two: [out, h_n] or [out, h_n, c_n], states (directions, batch, hidden).

    Arrays are NumPy's, or all of them, the weights too, one GPU's.
    """
    first = directions[0]
    second = directions[1].weights if len(directions) == 2 else (None, None, None, None)
    given = (x, h0, c0, lengths, *first.weights, *second)
    if _arrays.on_gpu(x):
        result = _arrays.call_on_gpu("lstm" if lstm else "gru", "recurrent_layer", given, (lstm, time_major))
    else:
        result = _backend.cpu.recurrent(*given[:10], lstm, False, time_major, first.hidden)
    if type(result) is tuple:
        named = {"x": x, "h0": h0, "c0": c0, "lengths": lengths}
        raise _checks.error("recurrent", result, named, "time_major" if time_major else "")
    return result


def _call(arrays: dict[str, Any], reverse: bool) -> tuple[Any, ...]:
    operation = "lstm" if "c0" in arrays else "gru"
    a = dict(arrays)
    for name in ("h0", "c0"):
        if getattr(a.get(name), "ndim", 0) == 2:
            a[name] = a[name][None]
    given = (
        a["x"], a["h0"], a.get("c0"), a["lengths"], a["w_input"], a["w_hidden"], a["b_input"], a["b_hidden"], None, None
    )  # fmt: skip
    options = (operation == "lstm", bool(reverse), False, -1)
    result = _arrays.call(operation, _backend.cpu.recurrent, given, options)
    if type(result) is tuple:
        raise _checks.error(operation, result, arrays)
    out, *states = result
    return (out, *(state[0] for state in states))


def gru(
    x: Any,
    w_input: Any,
    w_hidden: Any,
    b_input: Any = None,
    b_hidden: Any = None,
    *,
    h0: Any = None,
    lengths: Any = None,
    reverse: bool = False,
) -> tuple[Any, Any]:
    """Gated recurrent units: one layer, in one direction, over all steps.

    ``h = (1 - z) n + z h`` with ``r = sigmoid(W_ir x + b_ir + W_hr h + b_hr)``, z likewise and
    ``n = tanh(W_in x + b_in + r (W_hn h + b_hn))``. The products with x of all steps are one matrix product; the state
    stays in float32 (float64 for float64) from step to step, and what is returned is rounded once.

    Parameters
    ----------
    x : array, (batch, len, in_features)
        float32, float64, float16 or bfloat16; any strides.
    w_input : array, (3 hidden, in_features)
        Of x's dtype, like all that follow except lengths. The gates r, z and n one under the other, as PyTorch's
        weight_ih has them.
    w_hidden : array, (3 hidden, hidden)
        Likewise, PyTorch's weight_hh.
    b_input, b_hidden : array, (3 hidden,), optional
        Their biases.
    h0 : array, (batch, hidden), optional
        The state before the first step; zeros where left out.
    lengths : int32 or int64 array, (batch,), optional
        Valid prefixes. Steps beyond them leave the state as it is and give 0; nothing in x there is used.
    reverse : bool
        From the last valid step to the first.

    Returns
    -------
    out : array, (batch, len, hidden)
        The state after each step; of x's kind and dtype.
    h_n : array, (batch, hidden)
        The state after the last one: after step lengths - 1, or, with reverse, after step 0.

    Raises
    ------
    TypeError, ValueError
        Naming the argument, what was expected and what came.

    References
    ----------
    Cho et al., "Learning Phrase Representations using RNN Encoder-Decoder for Statistical Machine Translation", 2014.
    """
    arrays = {
        "x": x, "w_input": w_input, "w_hidden": w_hidden, "b_input": b_input, "b_hidden": b_hidden, "h0": h0,
        "lengths": lengths,
    }  # fmt: skip
    out, h_n = _call(arrays, reverse)
    return out, h_n


def lstm(
    x: Any,
    w_input: Any,
    w_hidden: Any,
    b_input: Any = None,
    b_hidden: Any = None,
    *,
    h0: Any = None,
    c0: Any = None,
    lengths: Any = None,
    reverse: bool = False,
) -> tuple[Any, Any, Any]:
    """Long short-term memory: one layer, in one direction, over all steps.

    ``c = f c + i g`` and ``h = o tanh(c)`` with ``i, f, o = sigmoid(W_i x + b_i + W_h h + b_h)`` and g the tanh of the
    same. Both states stay in float32 (float64 for float64) from step to step; what is returned is rounded once.

    Parameters
    ----------
    x : array, (batch, len, in_features)
        float32, float64, float16 or bfloat16; any strides.
    w_input : array, (4 hidden, in_features)
        Of x's dtype, like all that follow except lengths. The gates i, f, g and o one under the other, as PyTorch's
        weight_ih has them.
    w_hidden : array, (4 hidden, hidden)
        Likewise, PyTorch's weight_hh.
    b_input, b_hidden : array, (4 hidden,), optional
        Their biases.
    h0, c0 : array, (batch, hidden), optional
        The states before the first step; zeros where left out.
    lengths : int32 or int64 array, (batch,), optional
        Valid prefixes. Steps beyond them leave the states as they are and give 0; nothing in x there is used.
    reverse : bool
        From the last valid step to the first.

    Returns
    -------
    out : array, (batch, len, hidden)
        h after each step; of x's kind and dtype.
    h_n, c_n : array, (batch, hidden)
        The states after the last one.

    Raises
    ------
    TypeError, ValueError
        Naming the argument, what was expected and what came.

    References
    ----------
    Hochreiter, Schmidhuber, "Long Short-Term Memory", 1997.
    Gers, Schmidhuber, Cummins, "Learning to Forget: Continual Prediction with LSTM", 2000.
    """
    arrays = {
        "x": x, "w_input": w_input, "w_hidden": w_hidden, "b_input": b_input, "b_hidden": b_hidden, "h0": h0, "c0": c0,
        "lengths": lengths,
    }  # fmt: skip
    out, h_n, c_n = _call(arrays, reverse)
    return out, h_n, c_n
