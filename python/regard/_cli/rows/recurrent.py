"""Recurrent layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from regard._cli import peers
from regard._cli.operation import Arguments, Case, Operation, Shape


def _recurrent_terms(a: Arguments) -> int:
    """A state's products, and errors carried over from some steps before."""
    return 4 * int(a["w_input"].shape[1] + a["w_hidden"].shape[1])


def _recurrent(
    label: str,
    gates: int,
    x: Shape,
    hidden: int,
    bias: bool = True,
    more: Mapping[str, Shape] | None = None,
    **options: Any,
) -> Case:
    rows = gates * hidden
    shapes: dict[str, Shape] = {"x": x, "w_input": (rows, x[2]), "w_hidden": (rows, hidden)}
    if bias:
        shapes |= {"b_input": (rows,), "b_hidden": (rows,)}
    return Case(label, {**shapes, **(more or {})}, options)


ROWS: tuple[Operation, ...] = (
    Operation(
        "gru",
        _recurrent_terms,
        check=(
            _recurrent("plain", 3, (3, 7, 20), 33),
            _recurrent("reverse, lengths", 3, (5, 40, 9), 17, False, {"h0": (5, 17), "lengths": (5,)}, reverse=True),
        ),
        bench=(
            _recurrent("RNNSearch 32x30x620 -> 1000", 3, (32, 30, 620), 1000),
            _recurrent("one sentence 1x50x256 -> 256", 3, (1, 50, 256), 256),
        ),
        numpy=peers.numpy_gru,
        torch=peers.torch_gru,
    ),
    Operation(
        "lstm",
        _recurrent_terms,
        check=(
            _recurrent("plain", 4, (3, 7, 20), 33),
            _recurrent("states, lengths", 4, (5, 40, 9), 17, more={"h0": (5, 17), "c0": (5, 17), "lengths": (5,)}),
        ),
        bench=(_recurrent("series 64x100x16 -> 128", 4, (64, 100, 16), 128),),
        numpy=peers.numpy_lstm,
        torch=peers.torch_lstm,
    ),
)
