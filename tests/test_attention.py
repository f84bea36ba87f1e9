"""regard.attention against the reference in float64: every case, dtype and instruction set."""

from __future__ import annotations

import numpy as np
import pytest
import regard
from cases import CASES, DTYPES
from helpers import (
    assert_case,
    assert_near,
    assert_same_bits,
    expected,
    lse_tolerance,
    normal,
    output_tolerance,
    problem,
)
from regard import reference

ALL_DTYPES = [name for name, case in CASES.items() if "dtypes" in case.tags]


def check(name: str, dtype: str) -> None:
    query, key, value, options = problem(name, dtype)
    out, lse = regard.attention(query, key, value, return_lse=True, **options)
    assert_case(name, dtype, out, lse)


@pytest.mark.parametrize("name", CASES)
def test_float32(backend, name):
    check(name, "float32")


@pytest.mark.parametrize("dtype", ["float64", "float16", "bfloat16"])
@pytest.mark.parametrize("name", ALL_DTYPES)
def test_other_dtypes(backend, name, dtype):
    check(name, dtype)


@pytest.mark.parametrize("name", ["bert", "llama_decode", "mask_and_bias_and_causal", "bshd"])
def test_lse_does_not_change_out(backend, name):
    query, key, value, options = problem(name, "float32")
    alone = regard.attention(query, key, value, **options)
    with_lse = regard.attention(query, key, value, return_lse=True, **options)
    assert isinstance(with_lse, tuple) and len(with_lse) == 2
    assert_same_bits(with_lse[0], alone)


@pytest.mark.parametrize("name", ["rows_fully_masked", "all_masked", "causal_rows_see_nothing"])
def test_rows_without_keys_are_zero_and_minus_infinity(backend, name):
    query, key, value, options = problem(name, "float32")
    _, want_lse = expected(name, "float32")
    blind = want_lse == -np.inf
    assert blind.any()
    out, lse = regard.attention(query, key, value, return_lse=True, **options)
    assert (out[blind] == 0).all()
    assert (lse == -np.inf).tolist() == blind.tolist()


@pytest.mark.parametrize("name", ["minilm", "mask_and_bias_and_causal", "rows_fully_masked"])
def test_weights(backend, name):
    query, key, value, options = problem(name, "float32")
    out, lse, weights = regard.attention(query, key, value, return_lse=True, return_weights=True, **options)
    x = [a.astype(np.float64) for a in (query, key, value)]
    want, want_lse, want_weights = reference.attention(*x, return_lse=True, return_weights=True, **options)
    tolerance = output_tolerance(query, key, value, options, "float32")
    assert_near(out, want, tolerance)
    assert_near(lse, want_lse, lse_tolerance(query, key, want_lse, options, "float32"))
    # Weights err as an output over values of magnitude 1 does.
    ones = np.ones_like(value)
    assert_near(weights, want_weights, output_tolerance(query, key, ones, options, "float32"))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["bert", "llama_decode", "bshd"])
def test_out_is_written_and_returned(backend, name, dtype):
    query, key, value, options = problem(name, dtype)
    want = regard.attention(query, key, value, **options)
    out = np.full_like(want, 7)
    assert regard.attention(query, key, value, out=out, **options) is out
    assert_same_bits(out, want)


def test_out_of_any_strides(backend):
    query, key, value = (normal(i, 2, 3, 40, 24) for i in range(3))
    want = regard.attention(query, key, value)
    wide = np.full((4, 3, 80, 48), 7, np.float32)
    for view in (wide[::2, :, ::2, ::2], wide[1::-1, ::-1, 39::-1, 23::-1]):
        wide[...] = 7
        assert regard.attention(query, key, value, out=view) is view
        assert_same_bits(np.ascontiguousarray(view), want)
        assert (wide == 7).sum() == wide.size - view.size  # and nothing beside it


@pytest.mark.parametrize("overlapped", [0, 1, 2])
@pytest.mark.parametrize("shift", [0, 1])
def test_out_may_overlap_an_input(backend, overlapped, shift):
    inputs = [normal(i, 2, 3, 70, 24) for i in range(3)]
    want = regard.attention(*inputs)
    both = np.empty(inputs[0].size + 24, np.float32)
    arrays = list(inputs)
    arrays[overlapped] = both[: inputs[0].size].reshape(inputs[0].shape)
    arrays[overlapped][...] = inputs[overlapped]
    out = both[24 * shift :][: inputs[0].size].reshape(inputs[0].shape)
    regard.attention(*arrays, out=out)
    assert_same_bits(out, want)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("strided", [False, True])
def test_a_call_without_options_gives_the_bits_of_one_with(backend, causal, strided):
    """It has a binding of its own: of NumPy's own arrays, with or without an output."""
    dims = (2, 3, 30, 16)
    arrays = [normal(n, *dims)[:, ::-1, ::2, ::2] if strided else normal(n, 2, 3, 15, 8) for n in range(3)]
    wanted = regard.attention(*arrays, causal=causal, scale=8**-0.5)
    assert_same_bits(regard.attention(*arrays, causal=causal), wanted)
    turned = regard.attention(*(x.swapaxes(1, 2) for x in arrays), causal=causal, layout="bshd")
    assert_same_bits(turned.swapaxes(1, 2), wanted)
    for alignment in ("upper_left", "lower_right"):
        few = (arrays[0][:, :, :4], *arrays[1:])
        with_options = regard.attention(*few, causal=causal, alignment=alignment, scale=8**-0.5)
        assert_same_bits(regard.attention(*few, causal=causal, alignment=alignment), with_options)
    out = np.full(dims, 5, np.float32)[:, ::-1, ::2, ::2]
    assert regard.attention(*arrays, causal=causal, out=out) is out
    assert_same_bits(out, wanted)

    class Other(np.ndarray):
        pass

    assert_same_bits(regard.attention(arrays[0], arrays[1].view(Other), arrays[2], causal=causal), wanted)


def test_inputs_are_left_as_they_were(backend):
    query, key, value, options = problem("mask_and_bias_and_causal", "float32")
    before = [x.copy() for x in (query, key, value, options["mask"], options["bias"])]
    regard.attention(query, key, value, **options)
    for x, y in zip((query, key, value, options["mask"], options["bias"]), before, strict=True):
        assert_same_bits(x, y)


def test_mask_and_bias_of_any_strides(backend):
    query, key, value = normal(0, 1, 2, 70, 16), normal(1, 1, 2, 150, 16), normal(2, 1, 2, 150, 16)
    bias = normal(3, 2, 150, 70).swapaxes(1, 2)  # keys lie far apart, queries side by side
    far = np.zeros((70, 150, 1 << 12), bool)[..., 0]  # a page from key to key
    far[:] = np.random.default_rng(4).random((70, 150)) < 0.5
    for arranged in ({"bias": bias}, {"bias": bias[..., ::-1, ::-1]}, {"mask": far}, {"mask": far[:, ::-1]}):
        plain = {name: np.ascontiguousarray(x) for name, x in arranged.items()}
        for weights in (False, True):
            got = regard.attention(query, key, value, return_weights=weights, **arranged)
            want = regard.attention(query, key, value, return_weights=weights, **plain)
            for one, other in zip(got, want, strict=True):
                assert_same_bits(one, other)


@pytest.mark.parametrize("axes", [0, 1, 2, 3])
def test_mask_of_fewer_axes_broadcasts(backend, axes):
    query, key, value = (normal(i, 2, 3, 9, 8) for i in range(3))
    shape = (2, 3, 9, 9)[4 - axes :]
    mask = np.asarray(np.random.default_rng(3).random(shape) > 0.4)
    bias = normal(4, *shape)
    full = dict(mask=np.broadcast_to(mask, (2, 3, 9, 9)), bias=np.broadcast_to(bias, (2, 3, 9, 9)))
    want = regard.attention(query, key, value, **full)
    assert_same_bits(regard.attention(query, key, value, mask=mask, bias=bias), want)


def test_causal_in_a_square_needs_no_alignment(backend):
    x = normal(0, 1, 2, 20, 8)
    want = regard.attention(x, x, x, causal=True)
    for alignment in ("upper_left", "lower_right"):
        assert_same_bits(regard.attention(x, x, x, causal=True, alignment=alignment), want)


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_lower_precisions_stay_near(backend, precision):
    # "high" is at least three bfloat16 products (about 2**-16 relative), "medium" at least one
    # (2**-8); scores here are below 8, and the values below 5.
    relative = {"high": 2.0**-16, "medium": 2.0**-8}[precision]
    query, key, value, options = problem("bert", "float32")
    out = regard.attention(query, key, value, precision=precision, **options)
    assert_near(out, expected("bert", "float32")[0], 5 * 8 * relative)
