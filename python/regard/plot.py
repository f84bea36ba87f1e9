"""Pictures of attention, with matplotlib; imported on demand. Figures belong to the caller: pyplot is not touched."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from regard import _arrays
from regard._checks import describe

#: Inches a token takes on an axis, within the bounds that keep one panel readable on a page.
_INCHES_PER_TOKEN = 0.22
_PANEL_INCHES = (1.6, 6.0)
#: Above this many tokens on an axis, only some are labelled.
_LABELS = 48


def attention_map(
    weights: Any,
    queries: Sequence[str] | None = None,
    keys: Sequence[str] | None = None,
    *,
    heads: Sequence[int] | None = None,
    columns: int | None = None,
    title: str | None = None,
    cmap: str = "viridis",
    shared_scale: bool = True,
) -> Any:
    """Draw attention weights: a panel for each head, keys across, queries down.

    Parameters
    ----------
    weights : array, (heads, len_q, len_kv) or (len_q, len_kv)
        What each query gives each key; one sequence of a batch. Floats of any framework on the CPU.
    queries, keys : sequence of str, optional
        Tokens along the axes: len_q and len_kv of them. Positions where not given.
    heads : sequence of int, optional
        The heads to draw, in this order; all by default. Negative numbers count from the last one.
    columns : int, optional
        Panels in a row; about as many as rows by default.
    title : str, optional
    cmap : str
        A colour map's name in matplotlib.
    shared_scale : bool
        One colour scale from 0 to the largest weight drawn, with a bar beside the panels. False:
        each panel has a scale of its own, and there is no bar.

    Returns
    -------
    matplotlib.figure.Figure
        To save (``figure.savefig("heads.png")``) or to show.

    Raises
    ------
    TypeError, ValueError
        Naming the argument, what was expected and what came.
    ImportError
        matplotlib is not installed.
    """
    drawn, numbers = _chosen(weights, heads)
    len_q, len_kv = drawn.shape[1:]
    labels = {
        "y": _tokens("queries", queries, "len_q", len_q),
        "x": _tokens("keys", keys, "len_kv", len_kv),
    }
    if columns is None:
        columns = math.ceil(math.sqrt(len(numbers)))
    if columns < 1:
        raise ValueError(f"columns: expected None or a count >= 1, got {columns}")
    columns = min(columns, len(numbers))
    rows = math.ceil(len(numbers) / columns)
    top = float(np.nanmax(drawn, initial=0.0)) or 1.0

    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError("regard.plot needs the matplotlib package") from None
    width, height = (min(max(n * _INCHES_PER_TOKEN, _PANEL_INCHES[0]), _PANEL_INCHES[1]) for n in (len_kv, len_q))
    figure = Figure(figsize=(columns * width + 1.6, rows * height + 1.2), layout="constrained")
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).ravel()
    for panel, head, number in zip(panels, drawn, numbers, strict=False):
        # Cells are images, one pixel a weight: no blending between tokens.
        image = panel.imshow(
            head, cmap=cmap, vmin=0.0, vmax=top if shared_scale else None, aspect="auto", interpolation="nearest"
        )
        if number is not None:
            panel.set_title(f"head {number}", fontsize="small")
        _label(panel, labels)
    for panel in panels[len(numbers) :]:
        panel.set_axis_off()
    _label_above_gaps(panels, len(numbers), columns)
    if shared_scale:
        figure.colorbar(image, ax=list(panels), label="weight", shrink=0.8)
    figure.supxlabel("keys", fontsize="small")
    figure.supylabel("queries", fontsize="small")
    if title is not None:
        figure.suptitle(title)
    return figure


def _chosen(weights: Any, heads: Sequence[int] | None) -> tuple[np.ndarray, list[int | None]]:
    """The heads to draw as (heads, len_q, len_kv), float64, and their numbers (None: there are no heads)."""
    expected = "weights: expected floats of shape (heads, len_q, len_kv) or (len_q, len_kv), none of them 0"
    if not hasattr(weights, "shape") or not hasattr(weights, "dtype"):
        raise TypeError(f"{expected}, got {describe(weights)}")
    x = _arrays.on_host("attention_map", weights)
    if x.dtype.kind != "f" and x.dtype.name != "bfloat16":
        raise TypeError(f"{expected}, got {describe(weights)}")
    if x.ndim not in (2, 3) or not x.size:
        hint = "; give one sequence of the batch" if x.ndim == 4 else ""
        raise ValueError(f"{expected}, got {describe(weights)}{hint}")
    x = x.astype(np.float64)
    if x.ndim == 2:
        if heads is not None:
            raise ValueError(f"heads: expected None, because weights have no axis of heads, got {heads!r}")
        return x[None], [None]
    count = x.shape[0]
    numbers = list(range(count)) if heads is None else [int(h) for h in heads]
    if not numbers or any(not -count <= h < count for h in numbers):
        raise ValueError(f"heads: expected numbers from 0 to {count - 1}, at least one, got {heads!r}")
    numbers = [h % count for h in numbers]
    return x[numbers], list(numbers)


def _tokens(argument: str, tokens: Sequence[str] | None, dimension: str, length: int) -> list[str]:
    if tokens is None:
        return [str(i) for i in range(length)]
    if isinstance(tokens, str) or not all(isinstance(t, str) for t in tokens):
        raise TypeError(f"{argument}: expected a sequence of str, got {describe(tokens)}")
    if len(tokens) != length:
        raise ValueError(f"{argument}: expected {dimension} = {length} tokens, got {len(tokens)}")
    # A dollar sign would begin mathematics.
    return [t.replace("$", r"\$") for t in tokens]


def _label(panel: Any, labels: dict[str, list[str]]) -> None:
    for axis, tokens in labels.items():
        step = math.ceil(len(tokens) / _LABELS)
        at = range(0, len(tokens), step)
        getattr(panel, f"set_{axis}ticks")(list(at), labels=[tokens[i] for i in at], fontsize="x-small")
    panel.tick_params(axis="x", rotation=90)
    panel.tick_params(length=0)


def _label_above_gaps(panels: np.ndarray, count: int, columns: int) -> None:
    """Panels that share an axis are labelled in the last row only: here also where the last row has no panel."""
    for i in range(max(0, count - columns), count):
        panels[i].tick_params(axis="x", labelbottom=True)
