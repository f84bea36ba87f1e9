"""NaN, inf, and magnitudes near the ends of float32: nothing leaks, and nothing is hidden."""

from __future__ import annotations

import numpy as np
import pytest
import regard
from cases import DTYPES
from helpers import as_float64, assert_near, normal
from regard import reference

BAD = [np.nan, np.inf, -np.inf]
# (heads, heads_kv, len_q, len_kv, dim): a few rows, tiles in full, and the decode path.
SHAPES = [(2, 2, 5, 9, 8), (4, 2, 70, 130, 64), (4, 1, 1, 300, 64)]


def arrays(shape, dtype="float32"):
    heads, heads_kv, len_q, len_kv, dim = shape
    return (
        normal(0, 2, heads, len_q, dim, dtype=dtype),
        normal(1, 2, heads_kv, len_kv, dim, dtype=dtype),
        normal(2, 2, heads_kv, len_kv, dim, dtype=dtype),
    )


def tolerance(dtype, value):
    """Scores here are below 10 and sum terms of up to 20: 200 epsilon cover their errors twice.

    A two-byte dtype rounds the output once and may round the weights once.
    """
    epsilon = {"float64": 2.0**-52}.get(dtype, 2.0**-23)
    own = {"float16": 2.0**-10, "bfloat16": 2.0**-7}.get(dtype, 0.0)
    finite = np.abs(as_float64(value)[0])
    return (200 * epsilon + 2 * own) * finite[np.isfinite(finite)].max(initial=0.0)


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_nothing_leaks_from_behind_a_mask(backend, shape, dtype, bad):
    query, key, value = arrays(shape, dtype)
    mask = np.ones((1, 1, shape[2], shape[3]), bool)
    mask[..., [1, shape[3] - 1]] = False  # for every row,
    mask[:, :, 0, 3] = False  # for one row only, in a key that other rows see
    want = regard.attention(query, key, value, mask=mask)
    for x in (key, value):
        x[:, :, [1, shape[3] - 1]] = bad
    # The rows may now be computed by the plain path, so they are near and not the same.
    near = 2 * tolerance(dtype, want)
    assert_near(regard.attention(query, key, value, mask=mask), as_float64(want)[0], near)
    value[:, :, 3] = bad
    out = regard.attention(query, key, value, mask=mask)
    assert_near(out[:, :, :1], as_float64(want[:, :, :1])[0], near)


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("shape", SHAPES)
def test_nothing_leaks_from_beyond_the_diagonal(backend, shape, bad):
    query, key, value = arrays(shape)
    options = dict(causal=True, alignment="upper_left")
    want = regard.attention(query, key, value, **options)
    first = min(shape[2], shape[3] - 1)  # beyond every row's diagonal
    key[:, :, first:], value[:, :, first:] = bad, bad
    near = 2 * tolerance("float32", want)
    assert_near(regard.attention(query, key, value, **options), as_float64(want)[0], near)


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_values_do_not_leak_from_behind_a_bias_of_minus_infinity(backend, shape, dtype, bad):
    query, key, value = arrays(shape, dtype)
    bias = normal(3, 1, 1, shape[2], shape[3])
    bias[..., [0, 4]] = -np.inf
    hidden = np.isfinite(bias)
    value[:, :, [0, 4]] = bad
    out = regard.attention(query, key, value, bias=bias)
    assert np.isfinite(as_float64(out)[0]).all()
    clean = as_float64(query, key, np.where(np.isfinite(value), value, value.dtype.type(0)))
    want = reference.attention(*clean, bias=bias, mask=hidden)
    assert_near(out, want, tolerance(dtype, value))


def test_a_bias_of_minus_infinity_throughout_is_a_fully_masked_row(backend):
    query, key, value = arrays(SHAPES[1])
    bias = np.zeros((1, 1, 70, 1), np.float32)
    bias[:, :, [0, 33, 69]] = -np.inf
    out, lse = regard.attention(query, key, value, bias=bias, return_lse=True)
    rows = np.zeros(70, bool)
    rows[[0, 33, 69]] = True
    assert (out[:, :, rows] == 0).all() and (lse[:, :, rows] == -np.inf).all()
    assert np.isfinite(lse[:, :, ~rows]).all() and (out[:, :, ~rows] != 0).any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("len_q", [40, 150])
def test_a_visible_nan_key_gives_nan_in_exactly_the_rows_that_see_it(backend, dtype, len_q):
    query, key, value = arrays((2, 1, len_q, len_q, 64), dtype)
    want = reference.attention(*as_float64(query, key, value), causal=True)
    key[0, 0, 30, 5] = np.nan
    out = as_float64(regard.attention(query, key, value, causal=True))[0]
    assert np.isnan(out[0, :, 30:]).all()
    assert_near(out[0, :, :30], want[0, :, :30], tolerance(dtype, value))
    assert_near(out[1], want[1], tolerance(dtype, value))  # nor in the other sequence


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", BAD)
def test_a_bad_value_shows_in_its_own_column_and_in_the_rows_that_see_it(backend, dtype, bad):
    query, key, value = arrays((2, 2, 70, 70, 24), dtype)
    want = reference.attention(*as_float64(query, key, value), causal=True)
    value[0, :, 20, 7] = bad
    want[0, :, 20:, 7] = bad
    assert_near(regard.attention(query, key, value, causal=True), want, tolerance(dtype, value))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_nan_query_gives_nan_in_its_row_alone(backend, dtype):
    query, key, value = arrays((2, 2, 70, 33, 24), dtype)
    want, want_lse = reference.attention(*as_float64(query, key, value), return_lse=True)
    query[1, 0, 40, 3] = np.nan
    want[1, 0, 40], want_lse[1, 0, 40] = np.nan, np.nan
    out, lse = regard.attention(query, key, value, return_lse=True)
    assert_near(out, want, tolerance(dtype, value))
    assert_near(lse, want_lse, 100 * 2.0**-23)


def test_a_nan_query_that_sees_nothing_is_zero(backend):
    query, key, value = arrays(SHAPES[1])
    query[:, :, 3] = np.nan
    mask = np.ones((70, 1), bool)
    mask[3] = False
    out, lse = regard.attention(query, key, value, mask=mask, return_lse=True)
    assert (out[:, :, 3] == 0).all() and (lse[:, :, 3] == -np.inf).all()
    assert np.isfinite(out).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_bias_of_nan_or_plus_infinity_makes_its_row_nan(backend, shape, bad):
    query, key, value = arrays(shape)
    bias = np.zeros((1, shape[0], shape[2], shape[3]), np.float32)
    bias[0, 1, 0, 3] = bad
    out = regard.attention(query, key, value, bias=bias)
    rows = np.zeros(out.shape[1:3], bool)
    rows[1, 0] = True
    assert (np.isnan(out) == rows[None, :, :, None]).all()


@pytest.mark.parametrize("sign", [1, -1])
def test_infinite_keys_follow_arithmetic(backend, sign):
    # A score of +inf leaves no softmax (NaN); one of -inf weighs exactly nothing.
    query, key, value = arrays((1, 1, 40, 50, 16))
    query[..., 0] = np.abs(query[..., 0]) + 1
    key[:, :, 7, 0] = sign * np.inf
    value[:, :, 7] = np.nan if sign < 0 else 1.0
    out = regard.attention(query, key, value)
    if sign > 0:
        assert np.isnan(out).all()
    else:
        keep = np.arange(50) != 7
        want = reference.attention(*as_float64(query, key[:, :, keep], value[:, :, keep]))
        assert_near(out, want, tolerance("float32", value))


def test_infinities_of_both_signs_in_one_column_are_nan(backend):
    query, key, value = arrays((1, 1, 20, 30, 8))
    value[:, :, 3, 2], value[:, :, 9, 2] = np.inf, -np.inf
    out = regard.attention(query, key, value)
    assert np.isnan(out[..., 2]).all()
    assert np.isfinite(np.delete(out, 2, axis=-1)).all()


@pytest.mark.parametrize("magnitude", [1e19, 1e25, 3e37])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", SHAPES)
def test_products_beyond_float32(backend, shape, dtype, magnitude):
    # query . key overflows float32, to +inf, -inf or NaN. The row comes out non-finite and is
    # computed again in float64, where one key wins by far.
    query, key, value = arrays(shape, dtype)
    query, key = ((x.astype(np.float64) * magnitude).astype(x.dtype) for x in (query, key))
    want = reference.attention(*as_float64(query, key, value))
    assert_near(regard.attention(query, key, value), want, tolerance(dtype, value))


def test_products_beyond_float32_under_a_small_scale(backend):
    query, key, value = arrays(SHAPES[1])
    query, key = query * np.float32(2e19), key * np.float32(2e19)
    options = dict(scale=2e-37)
    want = reference.attention(*as_float64(query, key, value), **options)
    # Scores reach 3,000: a rounding of them is as many epsilon in the weights.
    out = regard.attention(query, key, value, **options)
    assert_near(out, want, 3000 * 2 * 2.0**-23 * np.abs(value).max())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_values_near_the_largest(backend, shape, dtype, sign):
    # Sums of unnormalised weights times values overflow although their mean does not.
    query, key, value = arrays(shape, dtype)
    largest = {"float32": 3.3e38, "bfloat16": 3.3e38, "float16": 65000.0}[dtype]
    value = (sign * largest * (1 - 0.01 * np.abs(as_float64(value)[0]) / 6)).astype(value.dtype)
    want = reference.attention(*as_float64(query, key, value))
    assert_near(regard.attention(query, key, value), want, tolerance(dtype, value))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_tiny_values_are_right_to_an_absolute_1e_30(backend, dtype):
    # The promise for matrix tiles, which flush subnormals.
    query, key, value = arrays(SHAPES[1], dtype)
    value = (as_float64(value)[0] * 1e-38).astype(value.dtype)
    want = reference.attention(*as_float64(query, key, value))
    assert_near(regard.attention(query, key, value), want, 1e-30)


def test_float16_subnormals(backend):
    # float16 is stored, float32 computes: its subnormals are numbers like others.
    query, key, value = arrays(SHAPES[1], "float16")
    value = (as_float64(value)[0] * 1e-6).astype(np.float16)
    want = reference.attention(*as_float64(query, key, value))
    assert_near(regard.attention(query, key, value), want, 2.0**-24 + tolerance("float16", value))


def test_negative_zero_and_identical_rows(backend):
    query, key, value = arrays((1, 1, 33, 40, 16))
    query[...], value[...] = 0.0, -0.0
    assert (regard.attention(query, key, value) == 0).all()
    key[...] = 5.0
    value[...] = normal(9, 40, 16)
    want = np.broadcast_to(value.astype(np.float64).mean(2, keepdims=True), (2, 1, 33, 16))
    assert_near(regard.attention(query, key, value), want, tolerance("float32", value))


def test_the_processor_state_is_left_alone(backend):
    # A kernel that leaves flush-to-zero on would turn other people's subnormals into zeros.
    query, key, value = arrays(SHAPES[1])
    regard.attention(query, key, value)
    tiny = np.float32(1e-40)
    assert tiny * np.float32(0.5) != 0
