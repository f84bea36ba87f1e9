"""Every pair of attention's options together in at least one case, on every instruction set, against the reference."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import regard
from cases import DTYPES, Array, Case, build
from helpers import as_float64, assert_near, lse_tolerance, output_tolerance
from pairwise import all_pairs, covering_rows, pairs_of
from regard import reference


def slopes(c: Case) -> Array:
    return np.float32(2.0) ** -np.arange(1, c.heads + 1, dtype=np.float32)


def slopes_by_batch(c: Case) -> Array:
    return slopes(c) * np.arange(1, c.batch + 1, dtype=np.float32)[:, None]


def lengths(most: int, c: Case) -> Array:
    """A full, a short and an empty sequence."""
    return np.array([most, most // 3, 0], np.int64)[: c.batch]


def blocks(batch: int, heads: int, c: Case) -> regard.BlockMask:
    """Two thirds of the blocks, and a block row that sees none."""
    len_kv = c.len_q if c.len_kv is None else c.len_kv
    seen = np.random.default_rng(1).random((batch, heads, -(-c.len_q // 16), -(-len_kv // 24))) < 0.67
    seen[:, :, -1:] &= c.len_q <= 16
    return regard.BlockMask.from_blocks(seen, len_q=c.len_q, len_kv=len_kv, block_size=(16, 24))


#: What can be combined: a factor a line, each value some fields of Case or arguments of regard.attention. Functions get
#: the case's sizes. A new option is a new line.
FACTORS: dict[str, tuple[Mapping[str, Any], ...]] = {
    "dtype": tuple({"dtype": d} for d in DTYPES),
    "len": tuple(dict(len_q=q, len_kv=k) for q, k in ((40, 40), (33, 130), (70, 21), (1, 150), (6, 0))),
    "heads": (dict(heads=2), dict(heads=4, heads_kv=2), dict(heads=3, heads_kv=1)),
    "dim": (dict(dim_qk=64), dict(dim_qk=24, dim_v=33), dict(dim_qk=7, dim_v=80)),
    "mask": ({}, *(dict(mask=axes) for axes in ("k", "bq", "bhqk", "full")), dict(mask="qk", hidden_rows=(0,))),
    "bias": ({}, dict(bias="hqk"), dict(bias="full"), dict(bias="bk", bias_dtype="query")),
    "causal": ({}, dict(causal=True)),
    "window": ({}, dict(window=(9, 2)), dict(window=(None, 5)), dict(window=(0, None))),
    "alignment": (dict(alignment="upper_left"), dict(alignment="lower_right")),
    "scale": ({}, dict(scale=0.3), dict(scale=-0.1)),
    "softcap": ({}, dict(softcap=2.5)),
    "alibi_slopes": ({}, dict(alibi_slopes=slopes), dict(alibi_slopes=slopes_by_batch)),
    "sinks": ({}, dict(sinks=lambda c: np.linspace(-1, 3, c.heads, dtype=np.float32))),
    "query_lengths": ({}, dict(query_lengths=lambda c: lengths(c.len_q, c)[::-1].astype(np.int32))),
    "key_lengths": ({}, dict(key_lengths=lambda c: lengths(c.len_kv or 0, c))),
    "layout": ({}, dict(layout="bshd")),
    "strides": tuple(
        dict(strides=s) for s in ("contiguous", "reversed", "every_other", "last_axis_slow", "misaligned")
    ),
    "repeated": ({}, dict(strides="one_batch_repeated")),
    "block_mask": (
        {},
        dict(block_mask=lambda c: blocks(1, 1, c)),
        dict(block_mask=lambda c: blocks(c.batch, c.heads, c)),
    ),
    "dropout": ({}, dict(dropout_p=0.3, seed=7)),
    "lse": ({}, dict(return_lse=True)),
    "weights": ({}, dict(return_weights=True)),
    "out": ({}, dict(out="strided")),
    "logits": ({}, dict(logits=30.0)),
}

ROWS = covering_rows(FACTORS)


def problem_of(index: int) -> tuple[str, Array, Array, Array, dict[str, Any]]:
    """(dtype, query, key, value, options) of a row."""
    words: dict[str, Any] = {"batch": 3}
    for factor, value in ROWS[index].items():
        words |= FACTORS[factor][value]
    dtype = words.pop("dtype")
    fields = {name: words.pop(name) for name in tuple(words) if name in Case.__dataclass_fields__}
    case = Case(f"pairwise {index}", **fields)
    options = {name: value(case) if callable(value) else value for name, value in words.items()}
    block_mask = options.pop("block_mask", None)
    query, key, value, arrays = build(Case(f"pairwise {index}", options=options, **fields), dtype)
    if block_mask is not None:
        # One of the two is `mask`: where both are drawn, blocks hide by it and single keys by the bias.
        hidden = arrays.pop("mask", None)
        if hidden is not None:
            added = np.where(hidden, np.float32(0), np.float32(-np.inf))
            arrays["bias"] = arrays["bias"] + added if "bias" in arrays else added
            arrays["bias"] = arrays["bias"].astype(np.float32)
        arrays["mask"] = block_mask
    return dtype, query, key, value, arrays


def strided_output(want: Array, dtype: str) -> Array:
    """Room for `want` with a gap behind every row and the heads' axis reversed."""
    wide = np.full((*want.shape[:-1], want.shape[-1] + 3), 7, DTYPES[dtype])
    return wide[:, ::-1, :, : want.shape[-1]]


def test_every_pair_occurs():
    covered = set().union(*map(pairs_of, ROWS))
    assert covered == all_pairs({name: len(values) for name, values in FACTORS.items()})


@pytest.mark.parametrize("index", range(len(ROWS)))
def test_pairwise(backend, index):
    dtype, query, key, value, options = problem_of(index)
    with_lse, with_weights = (options.pop(name, False) for name in ("return_lse", "return_weights"))
    strided = options.pop("out", None) is not None
    wide = as_float64(query, key, value)
    want, want_lse, want_weights = reference.attention(*wide, return_lse=True, return_weights=True, **options)
    out = strided_output(want, dtype) if strided else None
    more = {"return_lse": with_lse, "return_weights": with_weights, "out": out}
    result = regard.attention(query, key, value, **more, **options)
    actual, *extras = result if with_lse or with_weights else (result,)
    assert len(extras) == with_lse + with_weights
    assert actual is out if strided else actual.dtype == DTYPES[dtype]
    assert actual.shape == want.shape
    # What dropout keeps is scaled by 1 / (1 - p), and so are its errors.
    factor = 1 / (1 - options.get("dropout_p", 0.0))
    assert_near(actual, want, factor * output_tolerance(query, key, value, options, dtype), "out")
    if with_lse:
        lse = extras[0]
        assert lse.shape == want_lse.shape and lse.dtype == np.float32
        assert_near(lse, want_lse, lse_tolerance(query, key, want_lse, options, dtype), "lse")
    if with_weights:
        weights = extras[-1]
        assert weights.shape == want_weights.shape and weights.dtype == DTYPES[dtype]
        # Weights err as an output over values of magnitude 1 does.
        tolerance = factor * output_tolerance(query, key, np.ones_like(value), options, dtype)
        assert_near(weights, want_weights, tolerance, "weights")
