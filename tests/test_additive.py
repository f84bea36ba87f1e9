"""Additive, multiplicative and location-sensitive attention against their specification."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pytest
import regard
from cases import DTYPES, STRIDES
from helpers import EPSILON, assert_near, assert_same_bits, compute_epsilon, normal, run_python
from hypothesis import given
from hypothesis import strategies as st
from regard import reference

Array = Any

#: Sizes around vectors (2 to 16 lanes), groups of 4 dimensions, register tiles (4, 8) and blocks of keys (96).
SIZES = [  # batch, len_q, len_kv, dim_q, dim_k, dim_v, dim
    (1, 1, 1, 1, 1, 1, 1),
    (2, 3, 5, 7, 6, 5, 3),
    (2, 9, 17, 5, 33, 16, 4),
    (1, 8, 96, 16, 16, 48, 16),
    (2, 4, 97, 20, 9, 15, 31),
    (1, 65, 191, 12, 40, 65, 66),
    (3, 1, 200, 64, 64, 130, 128),
]


def arguments(sizes: tuple[int, ...], dtype: str = "float32", seed: int = 0, large: float = 1.0) -> dict[str, Array]:
    """Everything that additive_attention takes, by name."""
    batch, len_q, len_kv, dim_q, dim_k, dim_v, dim = sizes
    rng = np.random.default_rng(seed)

    def draw(*shape: int) -> Array:
        return rng.standard_normal(shape).astype(DTYPES[dtype])

    return {
        "query": draw(batch, len_q, dim_q),
        "key": draw(batch, len_kv, dim_k),
        "value": draw(batch, len_kv, dim_v),
        "v": draw(dim),
        "w_query": (draw(dim, dim_q).astype(float) * large / dim_q**0.5).astype(DTYPES[dtype]),
        "w_key": (draw(dim, dim_k).astype(float) * large / dim_k**0.5).astype(DTYPES[dtype]),
        "bias": draw(dim),
    }


def split(a: dict[str, Array]) -> tuple[list[Array], dict[str, Array]]:
    return [a[n] for n in ("query", "key", "value")], {n: x for n, x in a.items() if n not in ("query", "key", "value")}


def tolerance(v: Array, len_kv: int, dtype: str, projected: float = 1.0) -> tuple[float, float]:
    """(out, weights): values are normal numbers, and a score errs by epsilon times the sum of |v| times a constant.

    4 of it comes from tanh, and the projections' rounding, at their size of a few units, brings about as much again.
    """
    eps = compute_epsilon(dtype)
    score = 8 * eps * (1 + projected) * float(np.abs(v.astype(float)).sum())
    relative = 2 * score + eps * (8 + 2 * len_kv**0.5)
    own = EPSILON[dtype] if dtype in ("float16", "bfloat16") else 0.0
    return 5 * (relative + own), relative + own


def visible(rng: Any, sizes: tuple[int, ...]) -> dict[str, Array]:
    batch, len_q, len_kv = sizes[:3]
    return {
        "mask": rng.random((batch, len_q, len_kv)) < 0.7,
        "key_lengths": rng.integers(0, len_kv + 1, batch),
    }


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_additive(backend, sizes, dtype):
    a = arguments(sizes, dtype)
    inputs, options = split(a)
    options |= visible(np.random.default_rng(1), sizes)
    out, weights = regard.additive_attention(*inputs, **options, return_weights=True)
    want, want_weights = reference.additive_attention(
        *[x.astype(float) for x in inputs], **as_float(options), return_weights=True
    )
    near, near_weights = tolerance(a["v"], sizes[2], dtype)
    assert out.dtype == weights.dtype == DTYPES[dtype]
    assert_near(out, want, near)
    assert_near(weights, want_weights, near_weights)
    assert_same_bits(regard.additive_attention(*inputs, **options), out, "without weights")


def as_float(options: dict[str, Array]) -> dict[str, Array]:
    keep = ("mask", "key_lengths")
    return {n: x if n in keep or x is None else x.astype(float) for n, x in options.items()}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("general", [True, False])
def test_multiplicative(backend, sizes, dtype, general):
    batch, len_q, len_kv, dim_q, dim_k, dim_v, _ = sizes
    dim_k = dim_k if general else dim_q
    query, key, value = (
        normal(i, batch, *s, dtype=dtype) for i, s in enumerate(((len_q, dim_q), (len_kv, dim_k), (len_kv, dim_v)))
    )
    w = (normal(4, dim_q, dim_k).astype(float) / (dim_q * dim_k) ** 0.5).astype(DTYPES[dtype]) if general else None
    options = visible(np.random.default_rng(1), sizes) | {"w": w}
    out, weights = regard.multiplicative_attention(query, key, value, **options, return_weights=True)
    want, want_weights = reference.multiplicative_attention(
        *[x.astype(float) for x in (query, key, value)], **as_float(options), return_weights=True
    )
    projected = np.abs(query.astype(float)) if w is None else np.abs(query.astype(float)) @ np.abs(w.astype(float))
    magnitude = (projected @ np.abs(key.astype(float)).swapaxes(1, 2)).max(initial=0.0)
    eps = compute_epsilon(dtype)
    relative = (
        8 * eps * (1 + magnitude)
        + eps * (8 + 2 * len_kv**0.5)
        + (EPSILON[dtype] if dtype in ("float16", "bfloat16") else 0)
    )
    assert_near(out, want, 5 * relative)
    assert_near(weights, want_weights, relative)
    assert_same_bits(regard.multiplicative_attention(query, key, value, **options), out, "without weights")


def location(sizes: tuple[int, ...], filters: int, channels: int, width: int, dtype: str) -> dict[str, Array]:
    batch, len_q, len_kv, *_, dim = sizes
    rng = np.random.default_rng(9)

    def draw(*shape: int) -> Array:
        return rng.standard_normal(shape).astype(DTYPES[dtype])

    return {
        "previous_weights": rng.random((batch, len_q, channels, len_kv)).astype(DTYPES[dtype]),
        "w_location": draw(dim, filters),
        "location_kernel": (draw(filters, channels, width).astype(float) / (channels * width) ** 0.5).astype(
            DTYPES[dtype]
        ),
        "location_bias": draw(filters),
    }


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", SIZES[1:], ids=str)
@pytest.mark.parametrize(("filters", "channels", "width"), [(1, 1, 1), (10, 1, 31), (5, 2, 8), (3, 3, 250)])
def test_location_sensitive(backend, sizes, dtype, filters, channels, width):
    a = arguments(sizes, dtype) | location(sizes, filters, channels, width, dtype)
    previous = a.pop("previous_weights")
    inputs, options = split(a)
    options["mask"] = visible(np.random.default_rng(1), sizes)["mask"]
    out, weights = regard.location_sensitive_attention(*inputs, previous, **options)
    want, want_weights = reference.location_sensitive_attention(
        *[x.astype(float) for x in (*inputs, previous)], **as_float(options)
    )
    near, near_weights = tolerance(a["v"], sizes[2], dtype, projected=1 + 2 * filters**0.5)
    assert_near(out, want, near)
    assert_near(weights, want_weights, near_weights)


def test_shapes_of_previous_weights(backend):
    sizes = (2, 3, 20, 6, 6, 6, 8)
    a = arguments(sizes) | location(sizes, 4, 1, 5, "float32")
    previous = a.pop("previous_weights")
    inputs, options = split(a)
    want = regard.location_sensitive_attention(*inputs, previous, **options)
    for x, y in zip(want, regard.location_sensitive_attention(*inputs, previous[:, :, 0], **options), strict=True):
        assert_same_bits(y, x)
    flat = options | {"location_kernel": options["location_kernel"][:, 0]}
    assert_same_bits(regard.location_sensitive_attention(*inputs, previous, **flat)[0], want[0])
    shared = np.repeat(previous[:, :1, 0], 3, axis=1)
    want = regard.location_sensitive_attention(*inputs, shared, **options)
    assert_same_bits(regard.location_sensitive_attention(*inputs, previous[:, 0, 0], **options)[0], want[0])

    two = location(sizes, 4, 2, 5, "float32")
    channels = two.pop("previous_weights")[:, 0]
    options |= two
    want = regard.location_sensitive_attention(*inputs, np.repeat(channels[:, None], 3, axis=1), **options)
    assert_same_bits(regard.location_sensitive_attention(*inputs, channels, **options)[0], want[0])


def test_a_decoder_loop_of_location_sensitive_steps(backend):
    """What a step returns as weights is the next step's previous_weights."""
    sizes = (2, 1, 30, 6, 6, 6, 8)
    a = arguments(sizes) | location(sizes, 4, 1, 7, "float32")
    inputs, options = split(a)
    options.pop("previous_weights")
    weights = want = np.zeros((2, 1, 30), np.float32)
    for _ in range(4):
        _, weights = regard.location_sensitive_attention(*inputs, weights, **options)
        _, want = reference.location_sensitive_attention(*inputs, want, **options)
        assert_near(weights, want, tolerance(a["v"], 30, "float32", 4)[1])
        assert_near(weights.sum(-1), np.ones((2, 1)), 1e-6)


def test_keras_documented_example(backend):
    """Keras's layer is this with no projections: v is its scale, or ones."""
    query = np.array([[[1.0, 0.0], [0.0, 1.0]]], np.float32)
    key = np.array([[[0.0, 1.0], [1.0, 0.0]]], np.float32)
    value = np.array([[[1.0, 2.0], [3.0, 4.0]]], np.float32)
    out, weights = regard.additive_attention(query, key, value, v=np.ones(2, np.float32), return_weights=True)
    np.testing.assert_allclose(weights, [[[0.636, 0.363], [0.363, 0.636]]], atol=1e-3)
    np.testing.assert_allclose(out, [[[1.727, 2.727], [2.272, 3.272]]], atol=1e-3)


# ---- Errors of the three ways, over all that the dtype holds ----


def pair_weights(q: Array, k: Array, v: Array) -> tuple[Array, Array]:
    """The weight that each (q, k), rows of dim, gets beside a key of zeros; and the same in float64."""
    keys = np.stack([k, np.zeros_like(k)], axis=1)
    inputs = (q[:, None], keys, keys[..., :1])
    with np.errstate(over="ignore"):
        weights = regard.additive_attention(*inputs, v=v, return_weights=True)[1]
        want = reference.additive_attention(*[x.astype(float) for x in inputs], v=v.astype(float), return_weights=True)[
            1
        ]
    return weights[:, 0, 0], want[:, 0, 0]


def all_magnitudes(dtype: str, per_exponent: int, rng: Any) -> Array:
    """Both signs of every binary exponent, subnormals and 0 included; the largest half as large, so that sums hold."""
    info = np.finfo(dtype)
    exponents = np.arange(info.minexp - info.nmant, info.maxexp - 1)
    x = np.ldexp(1 + rng.random((per_exponent, len(exponents))), exponents).ravel().astype(dtype)
    return np.concatenate([x, -x, np.zeros(per_exponent, dtype)])


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("partner", ["any", "opposite", "near_opposite", "same"])
def test_error_over_all_exponents(backend, dtype, partner):
    """A score errs by 4 epsilon times sum |v| at most: a weight of two by a quarter of two scores' errors.

    Then exp, the sum and the division round at most 2 epsilon more.
    """
    rng = np.random.default_rng(3)
    q = all_magnitudes(dtype, 2, rng)
    k = {
        "any": rng.permutation(q),
        "opposite": -q,
        "near_opposite": (-q / (1 + 10.0 ** rng.uniform(-7, 0.5, len(q)))).astype(dtype),
        "same": q,
    }[partner]
    weights, want = pair_weights(q[:, None], k[:, None], np.ones(1, dtype))
    assert_near(weights, want, (4 * 2 / 4 + 2) * EPSILON[dtype])


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_error_where_the_ways_meet(backend, dtype):
    """Sums of opposite signs around the largest magnitude that each way carries, beside dimensions of any size."""
    limits = (10.5, 33, 43, 80) if dtype == "float32" else (86, 333, 353, 700)
    rng = np.random.default_rng(4)
    signs = rng.choice([-1, 1], (2000, 1))
    large = signs * rng.choice(limits, (2000, 1)) * rng.uniform(0.95, 1.05, (2000, 1))
    q = np.concatenate([large, rng.standard_normal((2000, 6)) * 3], axis=1).astype(dtype)
    k = np.concatenate([-large + rng.uniform(-2, 2, (2000, 1)), rng.standard_normal((2000, 6)) * 3], axis=1).astype(
        dtype
    )
    order = rng.permutation(7)
    v = rng.uniform(-1, 1, 7).astype(dtype)
    weights, want = pair_weights(q[:, order], k[:, order], v)
    assert_near(weights, want, (2 * np.abs(v).sum() + 4) * EPSILON[dtype])


@pytest.mark.parametrize("magnitude", [1e-30, 1e-3, 1e3, 1e8])
def test_magnitude_of_v_does_not_matter(backend, magnitude):
    """Scores come out relative to sum |v|, from the smallest to where softmax is one key's."""
    q, k = normal(0, 300, 5), normal(1, 300, 5)
    v = (normal(2, 5) * magnitude).astype(np.float32)
    weights, want = pair_weights(q, k, v)
    assert_near(weights, want, 4 * EPSILON["float32"] * (1 + np.abs(v).sum()))


# ---- Promises ----


def test_fully_masked_rows_and_no_keys_give_zero(backend):
    a = arguments((2, 5, 20, 4, 4, 6, 8))
    inputs, options = split(a)
    mask = np.ones((2, 5, 20), bool)
    mask[0, 2] = False
    for function, words in ((regard.additive_attention, options), (regard.multiplicative_attention, {})):
        out, weights = function(*inputs, **words, mask=mask, key_lengths=np.array([20, 0]), return_weights=True)
        assert not out[0, 2].any() and not out[1].any() and not weights[0, 2].any() and not weights[1].any()
        assert out[0, 3].any() and np.isfinite(out).all()
        none = function(inputs[0], inputs[1][:, :0], inputs[2][:, :0], **words)
        assert none.shape == (2, 5, 6) and not none.any()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("projected", [True, False])
def test_nothing_behind_a_mask_or_a_length_leaks(backend, bad, projected):
    a = arguments((2, 6, 130, 8, 8, 9, 8))
    if not projected:
        a["w_query"] = a["w_key"] = None
    inputs, options = split(a)
    mask = np.ones((2, 1, 130), bool)
    mask[:, :, [3, 50, 99]] = False
    lengths = np.array([130, 101], np.int32)
    hostile = [x.copy() for x in inputs]
    for x in hostile[1:]:
        x[:, [3, 50, 99]] = bad
        x[1, 101:] = bad
    location_options = options | {
        k: x for k, x in location((2, 6, 130, 8, 8, 9, 8), 2, 1, 3, "float32").items() if k != "previous_weights"
    }
    previous = normal(5, 2, 130)
    calls = [
        lambda *x: regard.additive_attention(*x, **options, mask=mask, key_lengths=lengths, return_weights=True),
        lambda *x: regard.multiplicative_attention(*x, mask=mask, key_lengths=lengths, return_weights=True),
        lambda *x: regard.location_sensitive_attention(
            *x, previous, **location_options, mask=mask & (np.arange(130) < lengths[:, None, None])
        ),
    ]
    for call in calls:
        for clean, dirty in zip(call(*inputs), call(*hostile), strict=True):
            # The plain path, float64 throughout, may take over: near, not the same bits.
            assert_near(dirty, clean.astype(float), 2e-5)


def test_visible_nan_is_seen_by_its_row_only(backend):
    a = arguments((1, 4, 40, 8, 8, 8, 8))
    inputs, options = split(a)
    want = regard.additive_attention(*inputs, **options)
    inputs[0][0, 2, 1] = np.nan
    out = regard.additive_attention(*inputs, **options)
    assert np.isnan(out[0, 2]).all()
    assert_same_bits(np.delete(out, 2, 1), np.delete(want, 2, 1))


def test_infinite_sums_saturate(backend):
    query = np.array([[[np.inf, -1.0], [-np.inf, 1.0]]], np.float32)
    key, value = normal(0, 1, 7, 2), normal(1, 1, 7, 3)
    with np.errstate(invalid="ignore"):
        want = reference.additive_attention(query, key, value, v=np.ones(2, np.float32))
    assert_near(regard.additive_attention(query, key, value, v=np.ones(2, np.float32)), want, 1e-6)


def test_projections_beyond_float32_saturate(backend):
    """The sum of products that each leave float32's range, of opposite signs: the plain path takes it in float64."""
    a = arguments((1, 2, 5, 2, 2, 3, 4))
    inputs, options = split(a)
    inputs[1][0, 3] = [2e38, 2e38]
    options["w_key"] = np.array([[4.0, -4.0]] * 4, np.float32)
    want = reference.additive_attention(*[x.astype(float) for x in inputs], **as_float(options))
    assert_near(regard.additive_attention(*inputs, **options), want, 1e-5)


@pytest.fixture
def threads():
    before = regard.get_num_threads()
    yield
    regard.set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_depend_on_a_row_alone(backend, threads, dtype):
    sizes = (3, 70, 130, 20, 24, 33, 40)
    a = arguments(sizes, dtype, large=6)
    inputs, options = split(a)
    more = location(sizes, 4, 1, 9, dtype)
    previous = more.pop("previous_weights")[:, :, 0]
    w = normal(8, 20, 24, dtype=dtype)

    def calls(q: Array, k: Array, x: Array, p: Array) -> list[Array]:
        return [
            *regard.additive_attention(q, k, x, **options, return_weights=True),
            *regard.location_sensitive_attention(q, k, x, p, **options, **more),
            *regard.multiplicative_attention(q, k, x, w=w, return_weights=True),
        ]

    regard.set_num_threads(1)
    want = calls(*inputs, previous)
    for n in (2, 5):
        regard.set_num_threads(n)
        for x, y in zip(calls(*inputs, previous), want, strict=True):
            assert_same_bits(x, y, f"{n} threads")
    for b in (slice(0, 1), slice(1, 3)):
        for x, y in zip(calls(*[x[b] for x in inputs], previous[b]), want, strict=True):
            assert_same_bits(x, y[b].copy(), f"batch {b}")
    for rows in (slice(0, 1), slice(7, 12), slice(3, 20)):
        for x, y in zip(calls(inputs[0][:, rows], *inputs[1:], previous[:, rows])[:4], want[:4], strict=True):
            assert_same_bits(x, y[:, rows].copy(), f"rows {rows}")
    for name, arrange in STRIDES.items():
        moved = [arrange(x) for x in (*inputs, previous)]
        same = calls(*[np.ascontiguousarray(x) for x in moved]) if name.startswith("one_") else want
        for x, y in zip(calls(*moved), same, strict=True):
            assert_same_bits(x, y, name)


def test_strides_of_weights_and_masks(backend):
    sizes = (2, 5, 40, 7, 9, 6, 11)
    a = arguments(sizes) | location(sizes, 4, 2, 5, "float32")
    previous = a.pop("previous_weights")
    inputs, options = split(a)
    options["mask"] = visible(np.random.default_rng(1), sizes)["mask"]
    want = regard.location_sensitive_attention(*inputs, previous, **options)
    for name in ("reversed", "every_other", "last_axis_slow"):
        arrange = STRIDES[name]
        moved = {n: arrange(x.view(np.uint8)).view(bool) if n == "mask" else arrange(x) for n, x in options.items()}
        for x, y in zip(regard.location_sensitive_attention(*inputs, previous, **moved), want, strict=True):
            assert_same_bits(x, y, name)


@given(
    sizes=st.tuples(
        st.integers(0, 3),
        st.integers(0, 20),
        st.integers(0, 130),
        *[st.integers(1, 40)] * 2,
        st.integers(0, 50),
        st.integers(1, 70),
    ),
    dtype=st.sampled_from(["float32", "float64"]),
    seed=st.integers(0, 2**32 - 1),
    large=st.sampled_from([0.1, 1.0, 10.0, 40.0]),
)
def test_any_shape(sizes, dtype, seed, large):
    a = arguments(sizes, dtype, seed, large)
    inputs, options = split(a)
    options |= visible(np.random.default_rng(seed), sizes)
    out, weights = regard.additive_attention(*inputs, **options, return_weights=True)
    want, want_weights = reference.additive_attention(
        *[x.astype(float) for x in inputs], **as_float(options), return_weights=True
    )
    near, near_weights = tolerance(a["v"], sizes[2], dtype, projected=4 * large)
    assert_near(out, want, near)
    assert_near(weights, want_weights, near_weights)


@pytest.mark.parametrize("scale", [1.0, 0.3, 1 / 16])
def test_float32_is_as_accurate_as_numpy(backend, scale):
    """RMS error at most 1.2 times that of the same formula in NumPy's float32; without FMA, 2 times."""
    ours, plain = [], []
    for seed in range(3):
        rng = np.random.default_rng(seed)
        q, k, value = (rng.standard_normal((2, n, 256), np.float32) for n in (16, 300, 300))
        v = (scale * rng.standard_normal(256)).astype(np.float32)
        want = reference.additive_attention(*[x.astype(float) for x in (q, k, value)], v=v.astype(float))
        scores = np.tanh(q[:, :, None] + k[:, None]) @ v
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        plain.append((weights / weights.sum(-1, keepdims=True)) @ value - want)
        ours.append(regard.additive_attention(q, k, value, v=v) - want)
    factor = 2.0 if backend == "baseline" else 1.2
    assert np.sqrt(np.mean(np.square(ours))) <= factor * np.sqrt(np.mean(np.square(plain)))


# ---- Errors ----

WRONG = [
    ("additive_attention", "key", lambda x: x[:1], "batch = 2"),
    ("additive_attention", "w_key", lambda x: x[:, :3], "dim_k = 9"),
    ("additive_attention", "w_query", lambda x: x[:, :3], "dim_q = 7"),
    ("additive_attention", "v", lambda x: x[:, None], "dim"),
    ("additive_attention", "bias", lambda x: x[:3], "dim = 11"),
    ("additive_attention", "v", lambda x: None, "v: expected an array"),
    ("additive_attention", "mask", lambda x: x.astype(np.int8), "bool"),
    ("additive_attention", "mask", lambda x: x[:, :3], "broadcasts"),
    ("additive_attention", "value", lambda x: x.astype(np.float64), "dtype of query"),
    ("additive_attention", "key_lengths", lambda x: x + 100, "len_kv = 40"),
    ("additive_attention", "query", lambda x: x[0], "batch"),
    ("location_sensitive_attention", "previous_weights", lambda x: x[..., :-1], "len_kv = 40"),
    ("location_sensitive_attention", "previous_weights", lambda x: x[:, :, :1], "channels"),
    ("location_sensitive_attention", "w_location", lambda x: x.T, "filters = 4"),
    ("location_sensitive_attention", "location_kernel", lambda x: x[0, 0], "filters"),
    ("location_sensitive_attention", "location_bias", lambda x: x[:1], "filters = 4"),
]


@pytest.mark.parametrize(
    ("operation", "argument", "spoil", "words"), WRONG, ids=lambda x: x if isinstance(x, str) else ""
)
def test_errors_name_the_argument(operation, argument, spoil, words):
    sizes = (2, 5, 40, 7, 9, 6, 11)
    a = arguments(sizes) | {"mask": np.ones((2, 5, 40), bool)}
    if operation == "location_sensitive_attention":
        a |= location(sizes, 4, 2, 5, "float32")
    else:
        a["key_lengths"] = np.array([3, 4])
    a[argument] = spoil(a[argument])
    with pytest.raises((TypeError, ValueError), match=words) as caught:
        getattr(regard, operation)(**a)
    assert str(caught.value).startswith(f"{argument}: ")


def test_without_projections_dimensions_must_agree():
    q, k = normal(0, 1, 2, 5), normal(1, 1, 3, 6)
    with pytest.raises(ValueError, match=r"query: .*unless w_query is given"):
        regard.additive_attention(q, k, k, v=normal(2, 6))
    with pytest.raises(ValueError, match=r"key: .*unless w_key is given"):
        regard.additive_attention(q, k, k, v=normal(2, 5))
    with pytest.raises(ValueError, match=r"key: .*unless w is given"):
        regard.multiplicative_attention(q, k, k)


# ---- Other frameworks, memory, interruption ----


def test_torch_arrays_and_torch_results():
    torch = pytest.importorskip("torch")
    a = {n: torch.from_numpy(x) for n, x in arguments((2, 5, 40, 7, 9, 6, 11)).items()}
    inputs, options = split(a)
    out, weights = regard.additive_attention(*inputs, **options, return_weights=True)
    q, k = inputs[0] @ a["w_query"].T, inputs[1] @ a["w_key"].T
    want = torch.softmax(torch.tanh(q[:, :, None] + k[:, None] + a["bias"]) @ a["v"], -1)
    assert isinstance(out, torch.Tensor)
    torch.testing.assert_close(weights, want, rtol=0, atol=2e-6)
    torch.testing.assert_close(out, want @ inputs[2], rtol=0, atol=1e-5)
    low = [x.bfloat16() for x in inputs]
    out = regard.additive_attention(*low, **{n: x.bfloat16() for n, x in options.items()})
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), want @ inputs[2], rtol=0, atol=0.1)


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss counts differently elsewhere")
@pytest.mark.parametrize("projected", [True, False])
def test_memory_beyond_the_output(projected):
    """The len_q x len_kv x dim tensor would be 256 MiB, and the target is 8 beside the output's half."""
    done = run_python(f"""
import resource
import numpy as np, regard
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
q, k = (np.random.default_rng(i).standard_normal((8, n, 256), np.float32) for i, n in enumerate((64, 512)))
v, w = q[0, 0].copy(), q[0, :1].repeat(256, 0)
words = dict(v=v, w_query=w, w_key=w) if {projected} else dict(v=v)
regard.set_num_threads(2)
regard.additive_attention(q[:1, :1], k[:1, :2], k[:1, :2], **words)
before = peak()
out = regard.additive_attention(q, k, k, **words)
print(peak() - before - out.nbytes / 2**20)
""")
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 8


def test_a_long_call_is_interrupted():
    done = run_python("""
import signal, threading, time
import numpy as np, regard
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job started in the background inherits "ignore"
q = np.ones((4, 20000, 256), np.float32)
threading.Timer(0.3, lambda: signal.raise_signal(signal.SIGINT)).start()
started = time.monotonic()
try:
    regard.additive_attention(q, q, q, v=q[0, 0])
except KeyboardInterrupt:
    print("interrupted")
""")
    assert done.stdout.split() == ["interrupted"], done.stderr
