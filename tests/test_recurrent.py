"""GRU and LSTM layers: kernels against the reference, at the edges of their blocks, and what must not change a bit."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import regard
from cases import DTYPES, STRIDES
from helpers import as_float64, assert_near, assert_same_bits, normal
from layers import GATES, layer, near, states
from regard import reference

#: Around a vector, a block of units and a tile's rows, of every instruction set.
HIDDEN = (1, 3, 8, 15, 16, 17, 33, 130)
BATCHES = (1, 2, 3, 4, 5, 7, 8, 9, 17)


@pytest.fixture(autouse=True)
def _threads_restored() -> Iterator[None]:
    before = regard.get_num_threads()
    yield
    regard.set_num_threads(before)


def check(cell: str, x: Any, weights: dict[str, Any], dtype: str, **options: Any) -> tuple[Any, ...]:
    out = getattr(regard, cell)(x, **weights, **options)
    wide = {n: as_float64(a)[0] if n != "lengths" and n != "reverse" else a for n, a in (weights | options).items()}
    want = getattr(reference, cell)(as_float64(x)[0], **wide)
    hidden = weights["w_hidden"].shape[1]
    for name, a, w in zip(("out", "h_n", "c_n"), out, want, strict=False):
        assert a.dtype == x.dtype
        assert a.shape == w.shape
        assert_near(a, w, near(dtype, hidden, x.shape[2]), name)
    return out


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cell", GATES)
def test_every_edge(backend, cell, dtype):
    for hidden in HIDDEN:
        weights = layer(cell, 5, hidden, dtype)
        check(cell, normal(0, 3, 4, 5, dtype=dtype), weights, dtype, **states(cell, 3, hidden, dtype))
    weights = layer(cell, 6, 20, dtype)
    for batch in BATCHES:
        check(cell, normal(0, batch, 3, 6, dtype=dtype), weights, dtype, **states(cell, batch, 20, dtype))


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cell", GATES)
def test_lengths_and_directions(backend, cell, dtype, reverse):
    lengths = np.array([7, 0, 11, 1, 5, 11, 3, 10, 2], np.int32)
    x = normal(0, 9, 11, 6, dtype=dtype)
    for b, n in enumerate(lengths):
        x[b, n:] = np.nan  # nothing behind the ends is used
    weights, initial = layer(cell, 6, 19, dtype, bias=False), states(cell, 9, 19, dtype)
    found = check(cell, x, weights, dtype, lengths=lengths, reverse=reverse, **initial)
    check(cell, np.nan_to_num(x), weights, dtype, reverse=reverse)
    for b, n in enumerate(lengths):
        alone = getattr(regard, cell)(
            x[b : b + 1, :n], **weights, reverse=reverse, **{k: s[b : b + 1] for k, s in initial.items()}
        )
        assert_same_bits(found[0][b, :n].copy(), alone[0][0].copy())
        assert not np.asarray(found[0][b, n:]).astype(float).any()
        for s, a in zip(found[1:], alone[1:], strict=True):
            assert_same_bits(s[b].copy(), a[0].copy())


@pytest.mark.parametrize("cell", GATES)
def test_more_steps_than_a_chunk(backend, cell):
    """Input products come in chunks of about a MiB: 3 of these, and more sequences than an item takes."""
    x = normal(0, 70, 29, 3)
    lengths = np.random.default_rng(0).integers(0, 30, 70)
    for reverse in (False, True):
        check(cell, x, layer(cell, 3, 70, "float32"), "float32", lengths=lengths, reverse=reverse)


@pytest.mark.parametrize("cell", GATES)
def test_threads_change_no_bit(backend, cell):
    """Neither by whole sequences nor, where a step is long, by blocks of units."""
    for batch, hidden, steps in ((13, 40, 9), (2, 300, 5)):
        x, weights = normal(0, batch, steps, 10), layer(cell, 10, hidden, "float32")
        regard.set_num_threads(1)
        want = getattr(regard, cell)(x, **weights)
        for threads in (2, 3, 8):
            regard.set_num_threads(threads)
            for a, w in zip(getattr(regard, cell)(x, **weights), want, strict=True):
                assert_same_bits(a, w, f"{threads} threads")


@pytest.mark.parametrize("strides", STRIDES)
def test_strides_change_no_bit(backend, strides):
    def arranged(a: Any) -> Any:
        more = 4 - a.ndim
        return STRIDES[strides](a[(None,) * more])[(0,) * more]

    x, weights = arranged(normal(0, 4, 6, 9)), [arranged(a) for a in layer("lstm", 9, 21, "float32").values()]
    initial = {n: arranged(a) for n, a in states("lstm", 4, 21, "float32").items()}
    got = regard.lstm(x, *weights, **initial)
    plain = {n: np.ascontiguousarray(a) for n, a in initial.items()}
    for a, w in zip(got, regard.lstm(*map(np.ascontiguousarray, (x, *weights)), **plain), strict=True):
        assert_same_bits(a, w)


@pytest.mark.parametrize("cell", GATES)
def test_empty_sizes(backend, cell):
    weights, call = layer(cell, 5, 6, "float32"), getattr(regard, cell)
    out, *last = call(np.zeros((0, 4, 5), np.float32), **weights)
    assert out.shape == (0, 4, 6) and all(s.shape == (0, 6) for s in last)
    initial = states(cell, 3, 6, "float32")
    out, *last = call(np.zeros((3, 0, 5), np.float32), **weights, **initial)
    assert out.shape == (3, 0, 6)
    for s, w in zip(last, initial.values(), strict=True):
        assert_same_bits(s, w)
    check(cell, np.zeros((2, 3, 0), np.float32), layer(cell, 0, 6, "float32"), "float32")
    out, *last = call(np.zeros((2, 3, 5), np.float32), **layer(cell, 5, 0, "float32"))
    assert out.shape == (2, 3, 0) and all(s.shape == (2, 0) for s in last)


@pytest.mark.parametrize("cell", GATES)
def test_saturated_gates_and_non_finite_inputs(backend, cell):
    """Gates of any size are 0 or 1; a NaN or infinity stays in its own sequence."""
    x, weights = normal(0, 5, 6, 4), layer(cell, 4, 18, "float32")
    for large in (1e4, float(np.finfo(np.float32).max) / 100):
        # Arguments of this size err by more than the gates' width where they cancel, but not by their sign.
        weights_of_x = {**weights, "w_input": np.sign(weights["w_input"])}
        ones = np.sign(x) * np.float32(large) * np.array([1, 2, 4, 8], np.float32)
        check(cell, ones, weights_of_x, "float32")
    want = getattr(regard, cell)(x, **weights)
    bad = x.copy()
    bad[1, 2], bad[3, 0] = np.nan, np.inf
    got = getattr(regard, cell)(bad, **weights)
    for a, w in zip(got, want, strict=True):
        assert_same_bits(a[[0, 2, 4]], w[[0, 2, 4]])
    assert np.isnan(got[0][1, 2:]).all() and np.isfinite(got[0][1, :2]).all()


@pytest.mark.parametrize("cell", GATES)
def test_float32_is_as_accurate_as_numpy(backend, cell):
    """RMS error at most 1.2 times that of the same formula in NumPy's float32; without FMA, 2 times."""
    x, weights = normal(0, 4, 40, 100), layer(cell, 100, 256, "float32")
    wide = {n: a.astype(float) for n, a in weights.items()}
    want = getattr(reference, cell)(x.astype(float), **wide)[0]
    ours, plain = (np.sqrt(np.mean((f(x, **weights)[0] - want) ** 2)) for f in
                   (getattr(regard, cell), getattr(reference, cell)))  # fmt: skip
    assert ours <= (2.0 if backend == "baseline" else 1.2) * plain


def test_other_frameworks(backend):
    torch = pytest.importorskip("torch")
    for dtype in ("float32", "bfloat16"):
        x, weights = normal(0, 3, 5, 4, dtype=dtype), layer("gru", 4, 12, dtype)

        def tensor(a: Any) -> Any:
            return torch.from_numpy(a.astype(np.float32)).to(getattr(torch, dtype))  # noqa: B023

        want = regard.gru(x, **weights, h0=normal(9, 3, 12, dtype=dtype))
        h0 = tensor(normal(9, 3, 12, dtype=dtype))
        got = regard.gru(tensor(x), **{n: tensor(a) for n, a in weights.items()}, h0=h0)
        for a, w in zip(got, want, strict=True):
            assert isinstance(a, torch.Tensor)
            np.testing.assert_array_equal(a.float().numpy(), w.astype(np.float32))


MISTAKES = {
    "x_rank": ({"x": normal(0, 2, 3)}, ValueError, r"x: expected shape \(batch, len, in_features"),
    "x_dtype": ({"x": np.zeros((2, 3, 4), int)}, TypeError, r"x: expected dtype float32.*got int64"),
    "w_input": ({"w_input": normal(0, 20, 4)}, ValueError, r"w_input: .*3\*hidden = 21, in_features = 4.*\(20, 4\)"),
    "w_hidden": ({"w_hidden": normal(0, 20, 7)}, ValueError, r"w_hidden: .*3\*hidden = 21, hidden = 7.*\(20, 7\)"),
    "w_missing": ({"w_hidden": None}, TypeError, "w_hidden: expected an array"),
    "b_input": ({"b_input": normal(0, 20)}, ValueError, r"b_input: .*3\*hidden = 21"),
    "b_dtype": ({"b_hidden": np.zeros(21)}, TypeError, "b_hidden: expected the dtype of x, float32"),
    "h0": ({"h0": normal(0, 3, 7)}, ValueError, r"h0: .*batch = 2, hidden = 7.*\(3, 7\)"),
    "lengths": ({"lengths": np.array([3, 4])}, ValueError, "lengths: .*from 0 to len = 3, got 4 at index 1"),
    "lengths_dtype": ({"lengths": np.array([3.0, 1.0])}, TypeError, "lengths: expected dtype int32 or int64"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_named(name):
    changed, error, pattern = MISTAKES[name]
    arguments = {"x": normal(0, 2, 3, 4), **layer("gru", 4, 7, "float32")} | changed
    with pytest.raises(error, match=pattern):
        regard.gru(**arguments)


def test_reference_against_loops():
    """The equations once more, number by number."""

    def sigmoid(a: float) -> float:
        return 1 / (1 + np.exp(-a))

    for cell in GATES:
        w = {n: a.astype(float) for n, a in layer(cell, 3, 2, "float64").items()}
        x, h, c = normal(0, 1, 4, 3, dtype="float64"), np.zeros(2), np.zeros(2)
        out = getattr(reference, cell)(x, **w)[0][0]
        for t in range(4):
            a = w["w_input"] @ x[0, t] + w["b_input"]
            b = w["w_hidden"] @ h + w["b_hidden"]
            new_h, new_c = h.copy(), c.copy()
            for j in range(2):
                if cell == "gru":
                    r, z = sigmoid(a[j] + b[j]), sigmoid(a[2 + j] + b[2 + j])
                    new_h[j] = (1 - z) * np.tanh(a[4 + j] + r * b[4 + j]) + z * h[j]
                else:
                    i, f, g, o = (a[2 * k + j] + b[2 * k + j] for k in range(4))
                    new_c[j] = sigmoid(f) * c[j] + sigmoid(i) * np.tanh(g)
                    new_h[j] = sigmoid(o) * np.tanh(new_c[j])
            h, c = new_h, new_c
            assert_near(out[t], h, 20 * 2.0**-52)
