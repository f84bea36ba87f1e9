"""What several test files need: expected results, tolerances, subprocesses."""

from __future__ import annotations

import functools
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cases import CASES, DTYPES, Array, build
from regard import reference

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"

EPSILON = {
    "float64": 2.0**-52,
    "float32": 2.0**-23,
    "float16": 2.0**-10,
    "bfloat16": 2.0**-7,
}


def as_float64(*arrays: Array) -> list[Array]:
    return [np.asarray(x).astype(np.float64) for x in arrays]


@functools.lru_cache(maxsize=512)
def problem(name: str, dtype: str) -> tuple[Array, Array, Array, dict[str, Any]]:
    return build(CASES[name], dtype)


@functools.lru_cache(maxsize=512)
def expected(name: str, dtype: str) -> tuple[Array, Array]:
    """(out, lse) of a named case in float64, from the inputs as that dtype rounded them."""
    query, key, value, options = problem(name, dtype)
    out, lse = reference.attention(*as_float64(query, key, value), return_lse=True, **options)
    return out, lse


def score_error(query: Array, key: Array, options: dict[str, Any], dtype: str) -> float:
    """A bound on the error of one score, in absolute terms: a multiple of epsilon.

    A dot product summed in any order errs by a small multiple of epsilon times the sum of its
    terms' magnitudes. Bias, ALiBi and exp's argument each round once more at their own magnitude.
    """
    q, k = (np.abs(x) for x in as_float64(query, key))
    if options.get("layout") == "bshd":
        q, k = q.swapaxes(1, 2), k.swapaxes(1, 2)
    terms = (q @ reference.dot_product.repeat_heads(k, q.shape[1]).swapaxes(-1, -2)).max(initial=0.0)
    scale = options.get("scale")
    magnitude = terms * abs(1 / math.sqrt(q.shape[-1]) if scale is None else scale)
    if options.get("bias") is not None:
        bias = as_float64(options["bias"])[0]
        magnitude += np.abs(bias[np.isfinite(bias)]).max(initial=0.0)
    if options.get("alibi_slopes") is not None:
        magnitude += np.abs(options["alibi_slopes"]).max() * (q.shape[2] + k.shape[2])
    return 4 * compute_epsilon(dtype) * (1 + magnitude)


def compute_epsilon(dtype: str) -> float:
    """Scores, sums and outputs accumulate in float32, or in float64 for float64."""
    return EPSILON["float64" if dtype == "float64" else "float32"]


def output_tolerance(query: Array, key: Array, value: Array, options: dict[str, Any], dtype: str) -> float:
    """How far an output may lie from float64's.

    Relative errors of the weights are errors of the scores; an average moves by at most that times
    the values' magnitude, doubled because numerator and denominator both err. exp adds a few
    epsilon, and sums over n keys about sqrt(n). Two-byte dtypes round the output once and may
    round the weights once: two of their own epsilon. Accuracy proper has its gates in
    test_attention_accuracy.py.
    """
    magnitude = np.abs(as_float64(value)[0]).max(initial=0.0)
    keys = value.shape[1 if options.get("layout") == "bshd" else 2]
    relative = 2 * score_error(query, key, options, dtype)
    relative += compute_epsilon(dtype) * (8 + 2 * math.sqrt(keys))
    if dtype in ("float16", "bfloat16"):
        relative += 2 * EPSILON[dtype]
    return float(relative * magnitude)


def lse_tolerance(query: Array, key: Array, lse: Array, options: dict[str, Any], dtype: str) -> float:
    """The score's error, sqrt(n) epsilon for the sum of n terms, and float32's own rounding."""
    finite = np.abs(lse[np.isfinite(lse)]).max(initial=0.0)
    keys = key.shape[1 if options.get("layout") == "bshd" else 2]
    return float(
        score_error(query, key, options, dtype)
        + EPSILON["float32"] * (4 + finite)
        + compute_epsilon(dtype) * (4 + 2 * math.sqrt(keys))
    )


def assert_near(actual: Array, wanted: Array, tolerance: float, what: str = "") -> None:
    """NaN and infinities must be the same; all else within an absolute tolerance."""
    np.testing.assert_allclose(np.asarray(actual).astype(np.float64), wanted, rtol=0, atol=tolerance, err_msg=what)


def assert_same_bits(actual: Array, wanted: Array, what: str = "") -> None:
    assert actual.dtype == wanted.dtype and actual.shape == wanted.shape, what
    if actual.tobytes() != wanted.tobytes():
        with np.errstate(all="ignore"):
            a, w = as_float64(actual, wanted)
            pytest.fail(f"{what}: bits differ, by up to {np.nanmax(np.abs(a - w))}")


def assert_case(name: str, dtype: str, out: Array, lse: Array) -> None:
    """That `out` and `lse` are a named case's, within what its dtype allows."""
    query, key, value, options = problem(name, dtype)
    want, want_lse = expected(name, dtype)
    assert out.dtype == DTYPES[dtype] and out.shape == want.shape
    assert lse.dtype == np.float32 and lse.shape == want_lse.shape
    assert_near(out, want, output_tolerance(query, key, value, options, dtype), "out")
    assert_near(lse, want_lse, lse_tolerance(query, key, want_lse, options, dtype), "lse")


def normal(seed: int, *shape: int, dtype: str = "float32") -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(DTYPES[dtype])


def run_python(code: str, isa: str | None = None, timeout: float = 120) -> subprocess.CompletedProcess[str]:
    """A fresh interpreter, for what could crash, fork or measure this one."""
    environment = dict(os.environ)
    if isa is not None:
        environment["REGARD_ISA"] = isa
    return subprocess.run(
        [sys.executable, "-c", code],
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def run_example(program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """One of the examples, as a reader would run it."""
    return subprocess.run(
        [sys.executable, str(EXAMPLES / program), *arguments],
        env={**os.environ, "PYTHONIOENCODING": "utf-8"},
        capture_output=True,
        encoding="utf-8",
        timeout=300,
        check=False,
    )
