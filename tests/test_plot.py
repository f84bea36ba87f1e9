"""regard.plot: what is on the axes, what is refused, and that a picture can be written without a display."""

from __future__ import annotations

import io
import sys
from typing import Any

import numpy as np
import pytest
import regard
from cases import DTYPES
from helpers import run_python

pytest.importorskip("matplotlib", reason="pictures are drawn with matplotlib")


def weights(*shape: int, dtype: str = "float32") -> Any:
    x = np.random.default_rng(0).random(shape)
    return (x / x.sum(-1, keepdims=True)).astype(DTYPES[dtype])


def drawn_panels(figure: Any) -> list[Any]:
    return [a for a in figure.axes if a.images]


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_panel_for_each_head(dtype):
    w = weights(5, 3, 4, dtype=dtype)
    figure = regard.plot.attention_map(w, ["le", "chat", "dort"], ["the", "cat", "sleeps", "."], title="layer 1")
    panels = drawn_panels(figure)
    assert [p.get_title() for p in panels] == [f"head {i}" for i in range(5)]
    for panel, head in zip(panels, w, strict=True):
        np.testing.assert_array_equal(panel.images[0].get_array(), head.astype(np.float64))
        assert panel.images[0].get_clim() == (0.0, float(w.astype(np.float64).max()))
    # Axes are shared: labelled below the lowest panels and left of the first column.
    assert [t.get_text() for t in panels[-1].get_xticklabels()] == ["the", "cat", "sleeps", "."]
    assert [t.get_text() for t in panels[0].get_yticklabels()] == ["le", "chat", "dort"]
    assert figure.get_suptitle() == "layer 1"
    file = io.BytesIO()
    figure.savefig(file, format="png")  # without a display: matplotlib takes Agg
    assert file.getvalue().startswith(b"\x89PNG")


def test_heads_columns_and_scales():
    w = weights(6, 2, 2)
    figure = regard.plot.attention_map(w, heads=[4, -1], columns=1, shared_scale=False)
    panels = drawn_panels(figure)
    assert [p.get_title() for p in panels] == ["head 4", "head 5"]
    assert panels[0].get_subplotspec().get_gridspec().ncols == 1
    np.testing.assert_array_equal(panels[1].images[0].get_array(), w[5])
    assert len(figure.axes) == 2  # no colour bar
    (panel,) = drawn_panels(regard.plot.attention_map(w[0]))
    assert panel.get_title() == ""
    assert [t.get_text() for t in panel.get_xticklabels()] == ["0", "1"]


def test_the_lowest_panel_of_each_column_is_labelled():
    figure = regard.plot.attention_map(weights(5, 2, 2), columns=3)
    labelled = [p.xaxis.get_tick_params()["labelbottom"] for p in drawn_panels(figure)]
    assert labelled == [False, False, True, True, True]


def test_long_sequences_are_labelled_at_some_positions():
    (panel,) = drawn_panels(regard.plot.attention_map(weights(200, 1000)))
    texts = [t.get_text() for t in panel.get_xticklabels()]
    assert len(texts) < 60
    assert texts[:2] == ["0", "21"]


def test_tokens_are_no_mathematics():
    figure = regard.plot.attention_map(weights(2, 2), ["$", "a$b$"], ["_", "^"])
    figure.savefig(io.BytesIO(), format="svg")


def test_weights_of_a_module():
    module = regard.nn.MultiheadAttention(8, 2, batch_first=True)
    x = np.ones((1, 3, 8), np.float32)
    _, w = module(x, x, x, average_attn_weights=False)
    assert len(drawn_panels(regard.plot.attention_map(w[0]))) == 2


def test_tensors():
    torch = pytest.importorskip("torch")
    w = torch.softmax(torch.randn(2, 3, 3), -1)
    (first, _) = drawn_panels(regard.plot.attention_map(w.bfloat16()))
    np.testing.assert_array_equal(first.images[0].get_array(), w[0].bfloat16().double().numpy())


@pytest.mark.parametrize(
    ("arguments", "options", "error", "words"),
    [
        ((np.ones((1, 2, 3, 3)),), {}, ValueError, "weights: expected floats of shape .* one sequence of the batch"),
        ((np.ones(3),), {}, ValueError, "weights: expected floats of shape"),
        ((np.ones((0, 3)),), {}, ValueError, "weights: expected floats of shape"),
        ((np.ones((3, 3), int),), {}, TypeError, "weights: expected floats"),
        (([[1.0]],), {}, TypeError, "weights: expected floats"),
        ((np.ones((2, 3)), ["a"]), {}, ValueError, "queries: expected len_q = 2 tokens, got 1"),
        ((np.ones((2, 3)), None, ["a"] * 4), {}, ValueError, "keys: expected len_kv = 3 tokens, got 4"),
        ((np.ones((2, 3)), "ab"), {}, TypeError, "queries: expected a sequence of str"),
        ((np.ones((2, 3)), None, [1, 2, 3]), {}, TypeError, "keys: expected a sequence of str"),
        ((np.ones((2, 3)),), {"heads": [0]}, ValueError, "heads: expected None"),
        ((np.ones((2, 2, 3)),), {"heads": [2]}, ValueError, "heads: expected numbers from 0 to 1"),
        ((np.ones((2, 2, 3)),), {"heads": []}, ValueError, "heads: expected numbers from 0 to 1"),
        ((np.ones((2, 2, 3)),), {"columns": 0}, ValueError, "columns: expected"),
    ],
)
def test_mistakes(arguments, options, error, words):
    with pytest.raises(error, match=words):
        regard.plot.attention_map(*arguments, **options)


def test_pyplot_is_left_alone():
    code = (
        "import sys, numpy as np, regard; regard.plot.attention_map(np.ones((2, 2)));"
        "print('matplotlib.pyplot' in sys.modules)"
    )
    assert run_python(code).stdout.strip() == "False"


def test_without_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match="matplotlib"):
        regard.plot.attention_map(np.ones((2, 2)))
