"""Recurrent layers with their weights (Cho et al., 2014; Hochreiter & Schmidhuber, 1997)."""

from __future__ import annotations

from typing import Any

import numpy as np

from regard import _arrays
from regard._checks import describe
from regard.nn.module import Memory, Module, fan_in_uniform
from regard.recurrent import PackedDirection, run_packed


class _Recurrent(Module):
    """What GRU and LSTM share: layers of one direction or two, under PyTorch's names."""

    _float32_serves_16_bit = ("cpu",)
    _lstm: bool
    _gates: int

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(device, dtype)
        for name, size in (("hidden_size", hidden_size), ("num_layers", num_layers)):
            if not isinstance(size, (int, np.integer)) or size < 1:
                raise ValueError(f"{name}: expected a count >= 1, got {size!r}")
        self.input_size, self.hidden_size, self.num_layers = input_size, hidden_size, num_layers
        self.bias, self.batch_first, self.bidirectional, self.dropout = bias, batch_first, bidirectional, dropout
        self.num_directions = 2 if bidirectional else 1
        rows = self._gates * hidden_size
        for k in range(num_layers):
            width = input_size if k == 0 else self.num_directions * hidden_size
            for suffix in self._suffixes(k):
                shapes = {"weight_ih": (rows, width), "weight_hh": (rows, hidden_size)}
                if bias:
                    shapes |= {"bias_ih": (rows,), "bias_hh": (rows,)}  # type: ignore[dict-item]
                for name, shape in shapes.items():
                    self.add_parameter(name + suffix, shape, fan_in_uniform(hidden_size, *shape))

    def _suffixes(self, layer: int) -> list[str]:
        return [f"_l{layer}", f"_l{layer}_reverse"][: self.num_directions]

    def _pack(self, dtype: Any, memory: Memory) -> Any:
        arrays = super()._pack(dtype, memory)
        names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        return [
            tuple(PackedDirection(self._lstm, *(arrays.get(n + suffix) for n in names)) for suffix in self._suffixes(k))
            for k in range(self.num_layers)
        ]

    def _run(self, input: Any, states: tuple[Any, ...], lengths: Any) -> tuple[Any, list[Any]]:
        """All layers: the output, and the last states of each kind."""
        layers = self._weights_for("input", input)
        axes = "batch, len" if self.batch_first else "len, batch"
        if input.ndim not in (2, 3) or input.shape[-1] != self.input_size:
            shape = f"({axes}, input_size = {self.input_size})"
            raise ValueError(f"input: expected shape {shape}, or without batch, got {describe(input)}")
        batched = input.ndim == 3
        x = input if batched else input[:, None]
        time_major = not (batched and self.batch_first)
        batch = (x.shape[1 if time_major else 0],) if batched else ()
        wanted = (self.num_layers * self.num_directions, *batch, self.hidden_size)
        for name, state in zip(("h0", "c0"), states, strict=False):
            if state is not None and getattr(state, "shape", None) != wanted:
                names = (
                    "(num_layers x directions, batch, hidden_size)" if batched else "(num_layers x directions, hidden)"
                )
                raise ValueError(f"{name}: expected shape {names} = {wanted}, got {describe(state)}")
            if state is not None and state.dtype != input.dtype:
                raise TypeError(f"{name}: expected the dtype of input, {input.dtype}, got {describe(state)}")
        if not batched:
            states = tuple(s if s is None else s[:, None] for s in states)
        found: list[list[Any]] = []
        for k, directions in enumerate(layers):
            first = k * self.num_directions
            own = [s if s is None else s[first : first + self.num_directions] for s in states]
            h0, c0 = own if self._lstm else (*own, None)
            x, *last = run_packed(directions, x, h0, c0, lengths, lstm=self._lstm, time_major=time_major)
            found.append(last)
        xp = _arrays.namespace(x)
        final = [xp.concatenate(kind) if len(kind) > 1 else kind[0] for kind in zip(*found, strict=True)]
        return (x, final) if batched else (x[:, 0], [s[:, 0] for s in final])


class GRU(_Recurrent):
    """Gated recurrent units, with PyTorch's weights: reset after the product, two biases.

    Parameters
    ----------
    input_size, hidden_size : int
        weight_ih_l0 is (3 hidden_size, input_size), weight_hh_l0 (3 hidden_size, hidden_size); gates r, z, n.
    num_layers : int
        Each takes what the one before gives.
    bias : bool
        Whether there are bias_ih_l0 and bias_hh_l0, (3 hidden_size,).
    batch_first : bool
        Whether inputs are (batch, len, input_size) or (len, batch, input_size).
    dropout : float
        Between layers, in training: nothing here.
    bidirectional : bool
        Whether each layer also runs against time; its states follow the others on the last axis.

    Notes
    -----
    Two-byte dtypes are computed in float32 from step to step; a layer's output is rounded once.
    """

    _lstm, _gates = False, 3

    def forward(self, input: Any, hx: Any = None, *, lengths: Any = None) -> Any:
        """Run over all steps.

        Parameters
        ----------
        input : array, (len, batch, input_size), with batch_first (batch, len, input_size), or (len, input_size)
        hx : array, (num_layers directions, batch, hidden_size), optional
            The states before the first step; zeros where left out. Without batch in input it has none.
        lengths : int32 or int64 array, (batch,), optional
            Valid prefixes, in any order, as PyTorch's packed sequences have them: outputs beyond them are 0, the last
            states are those of the last valid step, and the second direction begins there.

        Returns
        -------
        output : array, like input with directions x hidden_size on the last axis
        h_n : array, like hx
            The states after the last step.
        """
        output, (h_n,) = self._run(input, (hx,), lengths)
        return output, h_n


class LSTM(_Recurrent):
    """Long short-term memory, with PyTorch's weights.

    Parameters
    ----------
    input_size, hidden_size : int
        weight_ih_l0 is (4 hidden_size, input_size), weight_hh_l0 (4 hidden_size, hidden_size); gates i, f, g, o.
    num_layers, bias, batch_first, dropout, bidirectional
        As for GRU.
    proj_size : int
        Only 0: projected states have no kernel.
    """

    _lstm, _gates = True, 4

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, device, dtype)
        if proj_size:
            raise NotImplementedError(f"LSTM: no kernel for projected states (proj_size = {proj_size})")

    def forward(self, input: Any, hx: Any = None, *, lengths: Any = None) -> Any:
        """Run over all steps: output, (h_n, c_n).

        hx is (h0, c0), each (num_layers directions, batch, hidden_size); all else as for GRU.
        """
        if hx is None:
            hx = (None, None)
        elif not isinstance(hx, (tuple, list)) or len(hx) != 2:
            raise TypeError(f"hx: expected (h0, c0), got {describe(hx)}")
        output, (h_n, c_n) = self._run(input, tuple(hx), lengths)
        return output, (h_n, c_n)
