"""What must hold of any attention, on drawn problems: no reference needed, save in one test."""

from __future__ import annotations

import dataclasses

import numpy as np
import regard
from cases import DTYPES, STRIDES, Case, build, case
from helpers import (
    as_float64,
    assert_near,
    compute_epsilon,
    lse_tolerance,
    output_tolerance,
    score_error,
)
from hypothesis import assume, given
from hypothesis import strategies as st
from regard import reference

lengths = st.one_of(st.integers(0, 20), st.integers(0, 140))
dims = st.one_of(st.integers(1, 20), st.sampled_from([32, 40, 64, 80, 128, 160]))
axes = st.one_of(st.none(), st.sampled_from(["", "k", "q", "qk", "bk", "hq", "bhqk", "full"]))
dtypes = st.sampled_from(list(DTYPES))


@st.composite
def problems(draw, **fixed) -> Case:
    heads_kv = draw(st.integers(1, 3))
    options = {}
    if draw(st.booleans()):
        options |= dict(causal=True, alignment=draw(st.sampled_from(["upper_left", "lower_right"])))
    if draw(st.integers(0, 3)) == 0:
        options["softcap"] = draw(st.sampled_from([1.0, 30.0]))
    if draw(st.booleans()):
        options["scale"] = draw(st.sampled_from([-0.5, 0.0, 0.125, 1.0]))
    if draw(st.booleans()):
        options["layout"] = draw(st.sampled_from(["bhsd", "bshd"]))
    drawn = case(
        f"drawn {draw(st.integers(0, 9999))}",  # the name seeds the values
        batch=draw(st.integers(0, 2)),
        heads=heads_kv * draw(st.integers(1, 4)),
        heads_kv=heads_kv,
        len_q=draw(lengths),
        len_kv=draw(lengths),
        dim_qk=draw(dims),
        dim_v=draw(st.one_of(st.none(), dims)),
        mask=draw(axes),
        bias=draw(axes),
        hidden=draw(st.sampled_from([0.1, 0.5, 0.95])),
        logits=draw(st.sampled_from([0.1, 1.0, 5.0, 100.0])),
        # Where rows or batches repeat, the values differ from the plain case's, by design.
        strides=draw(st.sampled_from(list(STRIDES))),
        **options,
    )
    return dataclasses.replace(drawn, **fixed)


@given(problem=problems(), dtype=dtypes)
def test_agrees_with_the_reference(backend, problem, dtype):
    query, key, value, options = build(problem, dtype)
    out, lse = regard.attention(query, key, value, return_lse=True, **options)
    want, want_lse = reference.attention(*as_float64(query, key, value), return_lse=True, **options)
    assert_near(out, want, output_tolerance(query, key, value, options, dtype))
    assert_near(lse, want_lse, lse_tolerance(query, key, want_lse, options, dtype))


@given(problem=problems(mask=None, bias=None), dtype=dtypes, seed=st.integers(0, 99))
def test_permuting_keys_changes_nothing(backend, problem, dtype, seed):
    query, key, value, options = build(problem, dtype)
    options = {k: v for k, v in options.items() if k not in ("causal", "alignment")}
    axis = 1 if options.get("layout") == "bshd" else 2
    order = np.random.default_rng(seed).permutation(key.shape[axis])
    there = regard.attention(query, key, value, **options)
    back = regard.attention(query, key.take(order, axis), value.take(order, axis), **options)
    # Both may err.
    tolerance = 2 * output_tolerance(query, key, value, options, dtype)
    assert_near(back, as_float64(there)[0], tolerance)


@given(problem=problems(bias=None), dtype=dtypes, shift=st.sampled_from([-40.0, -3.0, 8.0, 1000.0]))
def test_shifting_all_logits_changes_only_the_lse(backend, problem, dtype, shift):
    query, key, value, options = build(problem, dtype)
    bias = np.full((1, 1, 1, 1), shift, np.float32)
    plain, lse = regard.attention(query, key, value, return_lse=True, **options)
    options["bias"] = bias
    shifted, shifted_lse = regard.attention(query, key, value, return_lse=True, **options)
    tolerance = 2 * output_tolerance(query, key, value, options, dtype)
    assert_near(shifted, as_float64(plain)[0], tolerance)
    want_lse = as_float64(lse)[0] + shift
    assert_near(shifted_lse, want_lse, 2 * lse_tolerance(query, key, want_lse, options, dtype))


@given(problem=problems(mask=None, bias=None), dtype=dtypes, seed=st.integers(0, 99))
def test_masking_keys_is_leaving_them_out(backend, problem, dtype, seed):
    query, key, value, options = build(problem, dtype)
    options = {k: v for k, v in options.items() if k not in ("causal", "alignment")}
    axis = 1 if options.get("layout") == "bshd" else 2
    kept = np.random.default_rng(seed).random(key.shape[axis]) < 0.6
    masked = regard.attention(query, key, value, mask=kept, **options)
    sliced = regard.attention(query, key.compress(kept, axis), value.compress(kept, axis), **options)
    tolerance = 2 * output_tolerance(query, key, value, options, dtype)
    assert_near(masked, as_float64(sliced)[0], tolerance)


@given(problem=problems(), dtype=dtypes)
def test_grouped_heads_are_repeated_heads(backend, problem, dtype):
    query, key, value, options = build(problem, dtype)
    axis = 2 if options.get("layout") == "bshd" else 1
    group = query.shape[axis] // key.shape[axis]
    grouped = regard.attention(query, key, value, **options)
    repeated = regard.attention(query, key.repeat(group, axis), value.repeat(group, axis), **options)
    tolerance = 2 * output_tolerance(query, key, value, options, dtype)
    assert_near(repeated, as_float64(grouped)[0], tolerance)


@given(problem=problems(), dtype=dtypes)
def test_output_lies_within_the_values(backend, problem, dtype):
    query, key, value, options = build(problem, dtype)
    assume(value.size > 0)
    axis = 1 if options.get("layout") == "bshd" else 2
    out, lse = regard.attention(query, key, value, return_lse=True, **options)
    if options.get("layout") == "bshd":
        out, value = out.swapaxes(1, 2), value.swapaxes(1, 2)
        axis = 2
    values = reference.dot_product.repeat_heads(as_float64(value)[0], out.shape[1])
    low, high = values.min(axis, keepdims=True), values.max(axis, keepdims=True)
    sees = (lse != -np.inf)[..., None]
    # An average in exact arithmetic lies within; weights that sum to 1 within n roundings, and
    # the output's own rounding, may carry it over.
    slack = compute_epsilon(dtype) * (8 + values.shape[axis])
    slack += {"float16": 2.0**-10, "bfloat16": 2.0**-7}.get(dtype, 0.0)
    slack *= np.abs(values).max()
    o = as_float64(out)[0]
    assert (o >= np.where(sees, low, 0) - slack).all()
    assert (o <= np.where(sees, high, 0) + slack).all()


@given(problem=problems(), dtype=dtypes)
def test_values_of_one_give_one(backend, problem, dtype):
    query, key, value, options = build(problem, dtype)
    out, lse = regard.attention(query, key, np.ones_like(value), return_lse=True, **options)
    if options.get("layout") == "bshd":
        out = out.swapaxes(1, 2)
    want = np.broadcast_to((lse != -np.inf)[..., None].astype(np.float64), out.shape)
    # Numerator and denominator sum the same weights, perhaps in different orders, and a kernel
    # may round the weights to two bytes for the product only: independent roundings of n weights.
    slack = compute_epsilon(dtype) * (8 + value.shape[1 if "layout" in options else 2])
    slack += {"float16": 2.0**-10, "bfloat16": 2.0**-7}.get(dtype, 0.0)
    assert_near(out, want, slack)


@given(problem=problems(), dtype=st.sampled_from(["float32", "float64"]), share=st.floats(0, 1))
def test_whole_is_halves_merged_by_lse(backend, problem, dtype, share):
    query, key, value, options = build(problem, dtype)
    # A half of the keys moves the diagonal, so causal goes into the mask.
    shape = reference.attention(*as_float64(query, key, value), return_weights=True, **options)[1].shape
    mask = np.broadcast_to(options.pop("mask", np.True_), shape)
    bias = np.broadcast_to(options.pop("bias", np.float32(0)), shape)
    if options.pop("causal", False):
        right = reference.dot_product.distance_to_diagonal(*shape[2:], options.pop("alignment"))
        mask = mask & (right <= 0)
    axis = 1 if options.get("layout") == "bshd" else 2
    cut = round(share * key.shape[axis])

    def part(keys: slice) -> tuple[np.ndarray, np.ndarray]:
        where = (slice(None),) * axis + (keys,)
        out, lse = regard.attention(
            query,
            key[where],
            value[where],
            mask=mask[..., keys],
            bias=bias[..., keys],
            return_lse=True,
            **options,
        )
        return out.astype(np.float64), lse.astype(np.float64)

    whole, lse = part(slice(None))
    (a, lse_a), (b, lse_b) = part(slice(0, cut)), part(slice(cut, None))
    merged_lse = np.logaddexp(lse_a, lse_b)
    with np.errstate(invalid="ignore"):  # -inf - -inf, where neither half sees a key
        weight_a, weight_b = (np.nan_to_num(np.exp(x - merged_lse), nan=0.0)[..., None] for x in (lse_a, lse_b))
    if options.get("layout") == "bshd":
        weight_a, weight_b = (x.swapaxes(1, 2) for x in (weight_a, weight_b))
    all_options = dict(options, bias=bias)
    # The halves' weights carry their lse's errors; lse is float32 for every dtype.
    tolerance = lse_tolerance(query, key, lse, all_options, dtype)
    magnitude = np.abs(as_float64(value)[0]).max(initial=0.0)
    assert_near(merged_lse, lse, 2 * tolerance)
    assert_near(
        weight_a * a + weight_b * b,
        whole,
        2 * output_tolerance(query, key, value, all_options, dtype) + 4 * tolerance * magnitude,
    )


def test_the_score_error_bound_is_not_vacuous():
    # The tolerances above hang on it: ordinary problems must be held to about 1e-5.
    query, key, _, options = build(case("ordinary", len_q=64, dim_qk=64), "float32")
    assert score_error(query, key, options, "float32") < 1e-5
