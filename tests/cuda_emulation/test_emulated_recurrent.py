"""Recurrent layers on device arrays, the kernels emulated, against the reference."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import regard
from cases import DTYPES, every_other, reversed_view
from helpers import as_float64, assert_near, assert_same_bits, normal
from layers import GATES, layer, near, states
from regard import reference
from regard.recurrent import PackedDirection, run_packed

# (batch, steps, features, hidden): around the sequences and units of a block, grains of 16 bytes and 32 of them.
SIZES = [
    (1, 2, 5, 1),
    (2, 3, 1, 3),
    (7, 2, 3, 4),
    (8, 2, 20, 5),
    (9, 2, 6, 8),
    (17, 2, 6, 9),
    (3, 2, 65, 33),
    (2, 2, 4, 130),
]


def on(cupy: Any, arrays: dict[str, Any]) -> dict[str, Any]:
    return {name: cupy.asarray(x) for name, x in arrays.items()}


def check(cupy: Any, cell: str, x: Any, weights: dict[str, Any], dtype: str, **options: Any) -> list[Any]:
    """What the kernel made, on the host, after comparing it with the reference's."""
    arrays = {n: a for n, a in options.items() if n in ("h0", "c0")}
    given = {**options, **on(cupy, weights | arrays)}
    found = [cupy.asnumpy(a) for a in getattr(regard, cell)(cupy.asarray(x), **given)]
    wide = {n: as_float64(a)[0] for n, a in (weights | arrays).items()}
    want = getattr(reference, cell)(as_float64(x)[0], **{**options, **wide})
    for name, a, w in zip(("out", "h_n", "c_n"), found, want, strict=False):
        assert a.dtype == DTYPES[dtype] and a.shape == w.shape
        assert_near(a, w, near(dtype, weights["w_hidden"].shape[1], x.shape[2]), name)
    return found


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cell", GATES)
def test_every_edge(cupy, cell, dtype):
    for batch, steps, features, hidden in SIZES:
        x = normal(0, batch, steps, features, dtype=dtype)
        weights = layer(cell, features, hidden, dtype, bias=batch != 3)
        check(cupy, cell, x, weights, dtype, **states(cell, batch, hidden, dtype))


def test_a_state_longer_than_shared_memory_holds_at_a_time(cupy):
    x = normal(0, 2, 2, 3, dtype="float64")
    check(cupy, "gru", x, layer("gru", 3, 515, "float64"), "float64")


@pytest.mark.parametrize(("cell", "reverse"), [("gru", False), ("lstm", True)])
def test_more_steps_than_a_chunk(cupy, cell, reverse):
    x = normal(0, 80, 53, 2)  # 4240 input products, held 4080 at a time
    lengths = np.random.default_rng(0).integers(0, 54, 80)
    check(cupy, cell, x, layer(cell, 2, 2, "float32"), "float32", lengths=lengths, reverse=reverse)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("cell", GATES)
def test_lengths_and_directions(cupy, cell, dtype, reverse):
    lengths = np.array([4, 0, 5, 1, 3, 5, 2, 5, 1, 0], np.int32)
    x = normal(0, 10, 5, 6, dtype=dtype)
    for b, n in enumerate(lengths):
        x[b, n:] = np.nan  # nothing behind the ends is used
    weights, initial = layer(cell, 6, 7, dtype), states(cell, 10, 7, dtype)
    found = check(cupy, cell, x, weights, dtype, lengths=lengths, reverse=reverse, **initial)
    call, device = getattr(regard, cell), on(cupy, weights)
    for b, n in ((0, 4), (8, 1)):
        start = on(cupy, {name: s[b : b + 1] for name, s in initial.items()})
        alone = call(cupy.asarray(x[b : b + 1, :n]), **device, **start, reverse=reverse)
        assert_same_bits(found[0][b, :n].copy(), cupy.asnumpy(alone[0])[0])
        assert not as_float64(found[0][b, n:])[0].any()
        for s, a in zip(found[1:], alone[1:], strict=True):
            assert_same_bits(s[b].copy(), cupy.asnumpy(a)[0])
    # On the device nobody has checked them: they are held to the steps that there are.
    wild = np.where(lengths == 0, -7, np.where(lengths == 5, 1000, lengths)).astype(np.int64)
    moved = call(cupy.asarray(x), **device, **on(cupy, initial), lengths=cupy.asarray(wild), reverse=reverse)
    for a, w in zip(moved, found, strict=True):
        assert_same_bits(cupy.asnumpy(a), w)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("arrange", [every_other, reversed_view, np.asfortranarray], ids=lambda f: f.__name__)
def test_strides_change_no_bit(cupy, arrange, dtype):
    x, weights, initial = normal(0, 3, 2, 9, dtype=dtype), layer("lstm", 9, 16, dtype), states("lstm", 3, 16, dtype)
    want = regard.lstm(cupy.asarray(x), **on(cupy, weights), **on(cupy, initial))
    moved = {name: arrange(a) for name, a in (weights | initial).items()}
    for a, w in zip(regard.lstm(cupy.asarray(arrange(x)), **on(cupy, moved)), want, strict=True):
        assert_same_bits(cupy.asnumpy(a), cupy.asnumpy(w))


@pytest.mark.parametrize("cell", GATES)
def test_empty_sizes(cupy, cell):
    weights = layer(cell, 5, 6, "float32")
    for batch, steps in ((0, 4), (3, 0)):
        initial = states(cell, batch, 6, "float32")
        check(cupy, cell, np.zeros((batch, steps, 5), np.float32), weights, "float32", **initial)
        check(cupy, cell, np.zeros((batch, steps, 5), np.float32), weights, "float32", lengths=np.zeros(batch, int))
    check(cupy, cell, np.zeros((2, 3, 0), np.float32), layer(cell, 0, 6, "float32"), "float32")
    out, *last = getattr(regard, cell)(
        cupy.asarray(np.zeros((2, 3, 5), np.float32)), **on(cupy, layer(cell, 5, 0, "float32"))
    )
    assert out.shape == (2, 3, 0) and all(s.shape == (2, 0) for s in last)


@pytest.mark.parametrize("cell", GATES)
def test_saturated_gates_and_non_finite_inputs(cupy, cell):
    """Gates of any size are 0 or 1; a NaN or infinity stays in its own sequence."""
    x, weights = normal(0, 5, 4, 4), layer(cell, 4, 6, "float32")
    # Arguments of this size err by more than the gates' width where they cancel, but not by their sign.
    ones = np.sign(x) * np.float32(np.finfo(np.float32).max / 100) * np.array([1, 2, 4, 8], np.float32)
    check(cupy, cell, ones, {**weights, "w_input": np.sign(weights["w_input"])}, "float32")
    want = check(cupy, cell, x, weights, "float32")
    x[1, 2], x[3, 0] = np.nan, np.inf
    got = [cupy.asnumpy(a) for a in getattr(regard, cell)(cupy.asarray(x), **on(cupy, weights))]
    for a, w in zip(got, want, strict=True):
        assert_same_bits(a[[0, 2, 4]], w[[0, 2, 4]])
    assert np.isnan(got[0][1, 2:]).all() and np.isfinite(got[0][1, :2]).all()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("time_major", [False, True])
@pytest.mark.parametrize("cell", GATES)
def test_two_directions_are_two_layers(cupy, cell, time_major, dtype):
    """What modules run: the bits of one direction each, side by side."""
    x, lengths = normal(0, 9, 4, 6, dtype=dtype), np.array([4, 1, 0, 3, 4, 2, 4, 1, 3])
    both = [on(cupy, layer(cell, 6, 7, dtype)), on(cupy, layer(cell, 6, 7, dtype, bias=False))]
    both[1]["w_hidden"] = cupy.asarray(normal(8, GATES[cell] * 7, 7, dtype=dtype))
    names = ("w_input", "w_hidden", "b_input", "b_hidden")
    lstm = cell == "lstm"
    packed = tuple(PackedDirection(lstm, *(weights.get(n) for n in names)) for weights in both)
    given = cupy.asarray(x.swapaxes(0, 1) if time_major else x)
    h0, c0 = (cupy.asarray(normal(i, 2, 9, 7, dtype=dtype)) for i in (5, 6))
    found = run_packed(packed, given, h0, c0 if lstm else None, lengths, lstm=lstm, time_major=time_major)
    out, *last = map(cupy.asnumpy, found)
    out = out.swapaxes(0, 1) if time_major else out
    for d, weights in enumerate(both):
        initial = {"h0": h0[d], "c0": c0[d]} if lstm else {"h0": h0[d]}
        alone = getattr(regard, cell)(cupy.asarray(x), **weights, **initial, lengths=lengths, reverse=d == 1)
        assert_same_bits(out[:, :, d * 7 : d * 7 + 7].copy(), cupy.asnumpy(alone[0]))
        for s, a in zip(last, alone[1:], strict=True):
            assert_same_bits(s[d].copy(), cupy.asnumpy(a))
    single = run_packed(packed[:1], given, None, None, None, lstm=lstm, time_major=time_major)[0]
    assert single.shape == (*given.shape[:2], 7)
    with pytest.raises(ValueError, match="h0: expected shape"):
        run_packed(packed, given, h0[:1], None, None, lstm=lstm, time_major=time_major)


def test_memory_is_of_the_current_stream(cupy):
    x, weights = cupy.asarray(normal(0, 2, 2, 3)), on(cupy, layer("gru", 3, 4, "float32"))
    cupy.cuda.allocated.clear()
    with cupy.cuda.Stream(77):
        regard.gru(x, **weights)
    assert set(cupy.cuda.allocated) == {77}


def test_errors_name_the_argument(cupy):
    x, weights = cupy.asarray(normal(0, 2, 3, 4)), layer("gru", 4, 7, "float32")
    device = on(cupy, weights)
    with pytest.raises(TypeError, match="w_input: expected an array on the device of x"):
        regard.gru(x, **weights)
    with pytest.raises(TypeError, match=r"w_hidden: expected an array of shape \(.*\) on the device of x, got None"):
        regard.gru(x, **{**device, "w_hidden": None})
    with pytest.raises(ValueError, match=r"b_input: .*3\*hidden = 21"):
        regard.gru(x, **{**device, "b_input": cupy.asarray(normal(0, 20))})
    with pytest.raises(ValueError, match=r"h0: .*batch = 2, hidden = 7.*\(3, 7\)"):
        regard.gru(x, **device, h0=cupy.asarray(normal(0, 3, 7)))
    with pytest.raises(ValueError, match=r"lengths: .*from 0 to len = 3, got 4 at index 1"):
        regard.gru(x, **device, lengths=np.array([3, 4]))


def test_the_order_of_lanes_does_not_matter(cupy, emulator):
    x, weights = normal(0, 9, 3, 6, dtype="float16"), layer("lstm", 6, 19, "float16")

    def run() -> list[Any]:
        return [cupy.asnumpy(a) for a in regard.lstm(cupy.asarray(x), **on(cupy, weights))]

    want = run()
    for seed in (1, 2):
        emulator.set_order(True, seed)
        for a, w in zip(run(), want, strict=True):
            assert_same_bits(a, w)
