"""Accuracy gates: tests of meaning never show a wrong exponential.

float32 must not err more than plain NumPy float32 does, plus 1e-7. float16 and bfloat16 must stay
within 1.5 times the error that remains when everything is computed in float32 and rounded once.
"""

from __future__ import annotations

import functools
import math

import numpy as np
import pytest
import regard
from cases import CASES, DTYPES, Array, build, case
from helpers import as_float64
from regard import reference

GATES = [
    CASES[name]
    for name in (
        "minilm", "bert", "llama_prefill", "llama_decode", "gemma_256_softcap", "t5_no_scale",
        "mla_576_512", "deepseek_192_128", "mask_and_bias_and_causal", "scale_zero", "dim_1",
        "dim_3", "dim_40", "dim_96", "logits_1e4", "logits_1e5", "logits_tiny",
        "values_of_wide_range", "values_far_from_zero", "long_rows", "long_rows_wide",
        "long_decode", "long_causal",
    )
] + [
    case("gate_1024_64", heads=1, len_q=1024, dim_qk=64),
    case("gate_decode_logits_30", heads=4, heads_kv=1, len_q=1, len_kv=4000, dim_qk=128, logits=30),
    case("gate_logits_10", heads=2, len_q=200, dim_qk=64, logits=10),
    case("gate_logits_1e3", heads=2, len_q=200, dim_qk=64, logits=1e3),
]  # fmt: skip

BY_NAME = {gate.name: gate for gate in GATES}


def gold(query: Array, key: Array, value: Array, options: dict) -> Array:
    return reference.attention(*as_float64(query, key, value), **options)


def max_error(x: Array, want: Array) -> float:
    return float(np.abs(x.astype(np.float64) - want).max())


def rms_error(x: Array, want: Array) -> float:
    return math.sqrt(np.square(x.astype(np.float64) - want).mean())


#: A largest error is a draw from a distribution's tail, ours and NumPy's alike: rounding patterns
#: that are equally good differ by some percent of it.
TAIL = 1.05

#: Without a fused multiply-add every step of a product rounds twice; NumPy's BLAS has the fused one
#: wherever the machine does.
UNFUSED = {"baseline": 2}


@functools.cache
def float32_gate(gate_name: str) -> float:
    """Plain NumPy float32's largest error, the worst of a few orders of the head dimension.

    The order of a sum is no property of the problem.
    """
    query, key, value, options = build(BY_NAME[gate_name], "float32")
    want = gold(query, key, value, options)
    rng = np.random.default_rng(0)
    dim = query.shape[-1]
    orders = [np.arange(dim), *(rng.permutation(dim) for _ in range(15))]
    return max(max_error(reference.attention(query[..., o], key[..., o], value, **options), want) for o in orders)


@pytest.mark.parametrize("gate", GATES, ids=lambda c: c.name)
def test_float32(backend, gate):
    query, key, value, options = build(gate, "float32")
    want = gold(query, key, value, options)
    error = max_error(regard.attention(query, key, value, **options), want)
    assert error <= UNFUSED.get(backend, 1) * TAIL * float32_gate(gate.name) + 1e-7


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("gate", GATES, ids=lambda c: c.name)
def test_two_byte_dtypes(backend, gate, dtype):
    query, key, value, options = build(gate, dtype)
    want = gold(query, key, value, options)
    floor = rms_error(reference.attention(query, key, value, **options), want)
    error = rms_error(regard.attention(query, key, value, **options), want)
    assert error <= 1.5 * floor + 1e-9


@pytest.mark.parametrize("gate", GATES, ids=lambda c: c.name)
def test_float64(backend, gate):
    # float64 has no arithmetic above it to compare with: NumPy's own is one rounding pattern among
    # many, so the two may differ by both their errors. float32's largest error, scaled by the
    # ratio of the epsilons, is that measure; 4 is for two of them, doubled.
    query, key, value, options = build(gate, "float64")
    want = gold(query, key, value, options)
    error = max_error(regard.attention(query, key, value, **options), want)
    assert error <= 4 * (float32_gate(gate.name) + 1e-7) * 2.0**-29


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("dim", [1, 64])
def test_the_exponential_over_its_whole_range(backend, dtype, dim):
    """Two keys, one at score 0 and one at -t: out is exp(-t) / (1 + exp(-t)), read off directly."""
    t = np.concatenate([np.linspace(0, 20, 2001), np.linspace(20, 110, 901)]).astype(np.float32)
    query = np.zeros((1, 1, t.size, dim), np.float32)
    query[..., 0] = 1
    bias = np.zeros((1, 1, t.size, 2), np.float32)
    bias[..., 1] = -t
    key = np.zeros((1, 1, 2, dim), np.float32)
    value = np.zeros((1, 1, 2, dim), np.float32)
    value[0, 0, 1] = 1
    query, key, value = (x.astype(DTYPES[dtype]) for x in (query, key, value))
    out = regard.attention(query, key, value, bias=bias)[0, 0].astype(np.float64)
    want = np.exp(-t.astype(np.float64))[:, None]
    want = want / (1 + want)
    # exp's relative error: its argument in base 2 rounds at magnitude t log2(e), which is t
    # epsilon, and the polynomial errs by a few. Two-byte outputs may take a shorter polynomial
    # and rounded weights: two of their own epsilon. Absolute: float16's subnormals are 2^-24
    # apart, and below 2^-126 exp is 0.
    epsilon = 2.0**-23
    relative = epsilon * (8 + 2 * t[:, None])
    absolute = 2.0**-126
    if dtype == "float16":
        relative, absolute = relative + 2 * 2.0**-10, 2.0**-24
    elif dtype == "bfloat16":
        relative = relative + 2 * 2.0**-7
    assert (np.abs(out - want) <= relative * want + absolute).all()
    assert (out[t > 104] == 0).all()  # exp(-104) is below the smallest float32
