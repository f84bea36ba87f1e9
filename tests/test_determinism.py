"""The bits of a result depend on one head's values and options, and on nothing else.

Not on threads, runs, strides, or what else is in the batch. Every comparison here is of bits.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import regard
from cases import DTYPES, STRIDES, build, case
from helpers import assert_same_bits, normal, problem

NAMES = [
    "bert", "llama_prefill", "llama_decode", "long_decode", "long_causal", "mla_576_512",
    "mask_and_bias_and_causal", "logits_1e5",
]  # fmt: skip


@pytest.fixture(autouse=True)
def _threads_restored() -> Iterator[None]:
    before = regard.get_num_threads()
    yield
    regard.set_num_threads(before)


def dtypes_for(names):
    """Every case in float32; the first three in the other dtypes too."""
    return [(n, "float32") for n in names] + [(n, d) for n in names[:3] for d in DTYPES if d != "float32"]


@pytest.mark.parametrize(("name", "dtype"), dtypes_for(NAMES))
def test_threads_and_runs(backend, name, dtype):
    query, key, value, options = problem(name, dtype)
    regard.set_num_threads(1)
    want, want_lse = regard.attention(query, key, value, return_lse=True, **options)
    for threads in (2, 3, 8, 8):
        regard.set_num_threads(threads)
        assert regard.get_num_threads() == threads
        out, lse = regard.attention(query, key, value, return_lse=True, **options)
        assert_same_bits(out, want, f"{threads} threads")
        assert_same_bits(lse, want_lse, f"lse, {threads} threads")


SLICED = [
    case("prefill", batch=3, heads=4, heads_kv=2, len_q=70, len_kv=130, dim_qk=64, mask="bhqk"),
    case("square", batch=3, heads=4, heads_kv=4, len_q=100, dim_qk=40, causal=True),
    case("decode", batch=3, heads=8, heads_kv=2, len_q=1, len_kv=700, dim_qk=128),
    case("three_rows", batch=3, heads=8, heads_kv=1, len_q=3, len_kv=300, dim_qk=64, bias="bhqk"),
]


def sliced(options, where):
    """The options of a part of batch and heads."""
    return {k: v[where] if k in ("mask", "bias") else v for k, v in options.items()}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("whole", SLICED, ids=lambda c: c.name)
def test_batch_slices(backend, whole, dtype):
    query, key, value, options = build(whole, dtype)
    want = regard.attention(query, key, value, **options)
    for b in (slice(0, 1), slice(2, 3), slice(1, 3)):
        out = regard.attention(query[b], key[b], value[b], **sliced(options, b))
        assert_same_bits(out, want[b].copy(), f"batch {b}")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("whole", SLICED, ids=lambda c: c.name)
def test_head_slices(backend, whole, dtype):
    query, key, value, options = build(whole, dtype)
    want = regard.attention(query, key, value, **options)
    group = query.shape[1] // key.shape[1]
    for h in range(query.shape[1]):  # single query heads: the group's size must not show either
        q, kv = slice(h, h + 1), slice(h // group, h // group + 1)
        one = (slice(None), q)
        out = regard.attention(query[:, q], key[:, kv], value[:, kv], **sliced(options, one))
        assert_same_bits(out, want[:, q].copy(), f"head {h}")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
@pytest.mark.parametrize("len_q", [1, 40])
def test_strides_and_layouts(backend, dtype, layout, len_q):
    arrays = [normal(i, 2, 3, n, 24, dtype=dtype) for i, n in enumerate((len_q, 90, 90))]
    want = regard.attention(*arrays)
    back = (0, 2, 1, 3) if layout == "bshd" else (0, 1, 2, 3)
    for name in ("reversed", "every_other", "last_axis_slow", "padded_rows", "misaligned"):
        moved = [STRIDES[name](np.ascontiguousarray(x.transpose(back))) for x in arrays]
        out = regard.attention(*moved, layout=layout)
        assert_same_bits(np.ascontiguousarray(out.transpose(back)), want, name)


def test_a_mask_that_hides_nothing_and_its_strides(backend):
    query, key, value = (normal(i, 2, 2, 50, 32) for i in range(3))
    mask = np.random.default_rng(3).random((2, 2, 50, 50)) > 0.3
    want = regard.attention(query, key, value, mask=mask)
    for name in ("reversed", "every_other", "last_axis_slow"):
        out = regard.attention(query, key, value, mask=STRIDES[name](mask.view(np.uint8)).view(bool))
        assert_same_bits(out, want, name)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", [None, "gelu"])
def test_rows_of_linear_do_not_depend_on_their_number(backend, dtype, activation):
    x, weight = normal(0, 200, 96, dtype=dtype), normal(1, 70, 96, dtype=dtype)
    bias = normal(2, 70, dtype=dtype)
    want = regard.linear(x, weight, bias, activation)
    for first, count in ((0, 1), (3, 1), (5, 2), (1, 7), (8, 8), (9, 16), (2, 17), (100, 65)):
        rows = slice(first, first + count)
        assert_same_bits(regard.linear(x[rows], weight, bias, activation), want[rows].copy())
    for threads in (1, 2, 3, 8):
        regard.set_num_threads(threads)
        assert_same_bits(regard.linear(x, weight, bias, activation), want, f"{threads} threads")


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_channel_operations(backend, layout):
    x = normal(0, 4, 40, 23, 19) if layout == "nchw" else normal(0, 4, 23, 19, 40)
    w = (normal(1, 10, 40), normal(2, 10), normal(3, 40, 10), normal(4, 40))
    regard.set_num_threads(1)
    pooled = regard.global_average_pool(x, layout=layout)
    excited = regard.squeeze_excitation(x, *w, layout=layout)
    for threads in (2, 3, 8):
        regard.set_num_threads(threads)
        assert_same_bits(regard.global_average_pool(x, layout=layout), pooled)
        assert_same_bits(regard.squeeze_excitation(x, *w, layout=layout), excited)
    for b in (slice(0, 1), slice(2, 4)):
        assert_same_bits(regard.global_average_pool(x[b], layout=layout), pooled[b])
        assert_same_bits(regard.squeeze_excitation(x[b], *w, layout=layout), excited[b].copy())


def test_norms(backend):
    x, weight, bias = normal(0, 50, 100), normal(1, 100), normal(2, 100)
    regard.set_num_threads(1)
    wants = regard.layer_norm(x, weight, bias), regard.rms_norm(x, weight)
    for threads in (2, 3, 8):
        regard.set_num_threads(threads)
        assert_same_bits(regard.layer_norm(x, weight, bias), wants[0])
        assert_same_bits(regard.rms_norm(x, weight), wants[1])
    assert_same_bits(regard.layer_norm(x[7:8], weight, bias), wants[0][7:8].copy())
    assert_same_bits(regard.rms_norm(x[7:8], weight), wants[1][7:8].copy())
