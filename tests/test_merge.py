"""merge_attention: the whole equals its merged parts, and parts that saw nothing weigh nothing."""

from __future__ import annotations

import numpy as np
import pytest
import regard
from cases import DTYPES, STRIDES
from helpers import EPSILON, as_float64, assert_near, assert_same_bits, compute_epsilon, normal
from regard import reference

SHAPES = [(2, 3, 5, 64), (1, 8, 1, 128), (1, 2, 300, 16), (4, 7), (33, 1), (17, 33), (1, 1, 1, 1, 8), (5, 0), (0, 8)]


def parts(count, shape, dtype, seed=0):
    outs = [normal(seed + i, *shape, dtype=dtype) for i in range(count)]
    lses = [5 * normal(seed + 100 + i, *shape[:-1]) for i in range(count)]
    return outs, lses


def tolerance(outs, lses, dtype):
    """Weights err by a few epsilon and by that of exp's argument; the sum and, in two bytes, the output round once."""
    size = max(float(np.abs(x[np.isfinite(x)]).max(initial=0)) for x in as_float64(*outs))
    spread = max(float(np.abs(x[np.isfinite(x)]).max(initial=0)) for x in lses)
    own = EPSILON[dtype] if dtype in ("float16", "bfloat16") else 0.0
    return size * (compute_epsilon(dtype) * (8 + 2 * len(outs) + 2 * spread) + own)


@pytest.mark.parametrize("count", [1, 2, 3, 9])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_the_reference(backend, shape, dtype, count):
    outs, lses = parts(count, shape, dtype)
    if shape[0] > 1:
        for i, x in enumerate(lses):
            x[..., i % 3 :: 3] = -np.inf  # of three parts, all; of two, one or none
    out, lse = regard.merge_attention(outs, lses)
    want, want_lse = reference.merge_attention(as_float64(*outs), as_float64(*lses))
    assert out.dtype == DTYPES[dtype] and out.shape == shape and lse.dtype == np.float32 and lse.shape == shape[:-1]
    assert_near(out, want, tolerance(outs, lses, dtype))
    assert_near(lse, want_lse, EPSILON["float32"] * (4 + 30))
    stacked, stacked_lse = regard.merge_attention(np.stack(outs), np.stack(lses))
    assert_same_bits(stacked, out)
    assert_same_bits(stacked_lse, lse)


@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_whole_is_its_merged_parts(backend, dtype, layout):
    query, key, value = (normal(i, 2, 4, n, 32, dtype=dtype) for i, n in enumerate((9, 150, 150)))
    if layout == "bshd":
        query, key, value = (np.ascontiguousarray(x.swapaxes(1, 2)) for x in (query, key, value))
    axis = 1 if layout == "bshd" else 2
    results = []
    for part in (slice(0, 40), slice(40, 41), slice(41, 41), slice(41, 150)):
        cut = (slice(None),) * axis + (part,)
        results.append(regard.attention(query, key[cut], value[cut], return_lse=True, layout=layout))
    outs, lses = zip(*results, strict=True)
    out, lse = regard.merge_attention(outs, lses, layout=layout)
    whole, whole_lse = regard.attention(query, key, value, return_lse=True, layout=layout)
    # Both err by this against float64; parts of two bytes were rounded once more. lse is float32 for float64 too.
    near = 3 * tolerance(outs, lses, "float32" if dtype == "float64" else dtype)
    assert_near(out, as_float64(whole)[0], near)
    assert_near(lse, whole_lse, 64 * EPSILON["float32"])


@pytest.mark.parametrize("dtype", DTYPES)
def test_parts_that_saw_nothing(backend, dtype):
    outs, lses = parts(3, (2, 5, 20), dtype)
    for bad in (np.nan, np.inf, 0.0):
        outs[0][...] = outs[2][...] = bad
        lses[0][...] = lses[2][...] = -np.inf
        out, lse = regard.merge_attention(outs, lses)
        assert_same_bits(out, outs[1])  # a part alone keeps its bits
        assert_same_bits(lse, lses[1])
    out, lse = regard.merge_attention([outs[0], outs[2]], [lses[0], lses[2]])
    assert (as_float64(out)[0] == 0).all() and (lse == -np.inf).all()


def test_values_that_are_not_finite(backend):
    outs, lses = parts(2, (6, 20), "float32")
    lses[0][0], lses[1][1] = np.nan, np.inf
    outs[1][2, 3] = np.nan
    outs[0][3, 4], lses[0][3] = np.inf, -1e30  # a weight of 0 times inf, as over all keys at once
    lses[0][4], lses[1][4] = np.nan, -np.inf
    out, lse = regard.merge_attention(outs, lses)
    want, want_lse = reference.merge_attention(as_float64(*outs), as_float64(*lses))
    assert_near(out, want, tolerance(outs, [x[5:] for x in lses], "float32"))
    assert_near(lse, want_lse, 34 * EPSILON["float32"])
    assert np.isnan(out[[0, 1, 4]]).all() and np.isnan(lse[[0, 1, 4]]).all()
    assert np.flatnonzero(np.isnan(out[2])).tolist() == [3] and np.isnan(out[3, 4])
    assert np.isfinite(out[5]).all()


def test_large_numbers_do_not_overflow(backend):
    largest = np.finfo(np.float32).max
    outs = [np.full((4, 20), largest, np.float32)] * 5
    out, lse = regard.merge_attention(outs, [np.full(4, 1e5, np.float32)] * 5)
    np.testing.assert_allclose(out, largest, rtol=8 * EPSILON["float32"])
    np.testing.assert_allclose(lse, 1e5 + np.log(5), rtol=EPSILON["float32"])
    out, lse = regard.merge_attention([outs[0], -outs[0]], np.array([[3e38] * 4, [-3e38] * 4], np.float32))
    assert (out == largest).all() and (lse == np.float32(3e38)).all()


def test_float64_keeps_its_precision(backend):
    outs, lses = parts(3, (7, 40), "float64")
    lses = as_float64(*lses)
    out, lse = regard.merge_attention(outs, lses)
    want, want_lse = reference.merge_attention(outs, lses)
    assert lse.dtype == np.float64
    assert_near(out, want, tolerance(outs, lses, "float64"))
    assert_near(lse, want_lse, 64 * EPSILON["float64"])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [32, 33])
def test_bits_do_not_depend_on_strides_rows_or_threads(backend, dtype, dim):
    outs, lses = parts(3, (2, 3, 50, dim), dtype)
    want, want_lse = regard.merge_attention(outs, lses)
    for name in ("reversed", "every_other", "last_axis_slow", "misaligned"):
        out, lse = regard.merge_attention([STRIDES[name](x) for x in outs], [STRIDES[name](x) for x in lses])
        assert_same_bits(out, want, name)
        assert_same_bits(lse, want_lse, name)
    out, lse = regard.merge_attention([x[1:, 2:, 7:9] for x in outs], [x[1:, 2:, 7:9] for x in lses])
    assert_same_bits(out, want[1:, 2:, 7:9].copy())
    assert_same_bits(lse, want_lse[1:, 2:, 7:9].copy())
    before = regard.get_num_threads()
    try:
        for threads in (1, 3, 8):
            regard.set_num_threads(threads)
            assert_same_bits(regard.merge_attention(outs, lses)[0], want)
    finally:
        regard.set_num_threads(before)


def test_other_frameworks(backend):
    torch = pytest.importorskip("torch")
    outs, lses = parts(2, (3, 4, 16), "float32")
    want, want_lse = regard.merge_attention(outs, lses)
    out, lse = regard.merge_attention([torch.from_numpy(x) for x in outs], torch.from_numpy(np.stack(lses)))
    assert isinstance(out, torch.Tensor) and isinstance(lse, torch.Tensor)
    assert_same_bits(out.numpy(), want)
    assert_same_bits(lse.numpy(), want_lse)
    out, lse = regard.merge_attention(
        torch.from_numpy(np.stack(outs)).to(torch.bfloat16), [torch.from_numpy(x) for x in lses]
    )
    assert out.dtype == torch.bfloat16 and lse.dtype == torch.float32
    assert_near(out.float().numpy(), want, 4 * EPSILON["bfloat16"] * float(np.abs(outs).max()))


def test_parts_of_one_row_in_one_array(backend):
    outs, lses = normal(0, 3, 8), normal(1, 3)
    out, lse = regard.merge_attention(outs, lses)
    want, want_lse = regard.merge_attention(outs[:, None], lses[:, None])
    assert_same_bits(out, want[0])
    assert_same_bits(lse, want_lse[0])


OUT, LSE = normal(0, 2, 3, 5, 8), normal(1, 2, 3, 5)
ERRORS = {
    "no parts": (([], []), ValueError, "outs: expected one part or more, got 0"),
    "no sequence": ((None, LSE), TypeError, "outs: expected a sequence of arrays"),
    "parts differ": (([OUT, OUT], [LSE]), ValueError, "lses: expected 2 parts, as outs has, got 1"),
    "lists inside": (([OUT.tolist()], [LSE]), TypeError, "outs: expected arrays on the CPU"),
    "ints": (([OUT.astype(int)], [LSE]), TypeError, "outs: expected dtype float32"),
    "dtypes apart": (([OUT, OUT.astype(np.float64)], [LSE, LSE]), TypeError, "outs: expected the same dtype"),
    "shapes apart": (([OUT, OUT[:1]], [LSE, LSE]), ValueError,
                    r"outs: expected each part to have the shape \(2, 3, 5, 8\)"),
    "ranks apart": (([OUT, OUT[0]], [LSE, LSE]), ValueError, "outs: expected each part"),
    "lse of the wrong shape": (([OUT, OUT], [LSE, LSE[:1]]), ValueError, r"lses: .* shape \(2, 3, 5\)"),
    "lse in float16": (([OUT], [LSE.astype(np.float16)]), TypeError, "lses: expected dtype float32"),
    "lse in float64": (([OUT], [LSE.astype(np.float64)]), TypeError, "lses: expected dtype float32"),
    "lses mixed": (([OUT.astype(float)] * 2, [LSE, LSE.astype(float)]), TypeError, "lses: .* all the same"),
    "layout": (([OUT], [LSE], "sbhd"), ValueError, "layout: expected one of"),
    "lse of the other layout": (([OUT], [LSE], "bshd"), ValueError, r"lses: .* shape \(2, 5, 3\)"),
}  # fmt: skip


@pytest.mark.parametrize("name", ERRORS)
def test_errors_name_the_argument(name):
    arguments, kind, message = ERRORS[name]
    with pytest.raises(kind, match=message):
        regard.merge_attention(*arguments)
