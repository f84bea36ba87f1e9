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
    "lse": ({}, dict(return_lse=True)),
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
    query, key, value, arrays = build(Case(f"pairwise {index}", options=options, **fields), dtype)
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
    returned = options.pop("return_lse", False)
    strided = options.pop("out", None) is not None
    want, want_lse = reference.attention(*as_float64(query, key, value), return_lse=True, **options)
    out = strided_output(want, dtype) if strided else None
    result = regard.attention(query, key, value, return_lse=returned, out=out, **options)
    actual = result[0] if returned else result
    assert actual is out if strided else actual.dtype == DTYPES[dtype]
    assert actual.shape == want.shape
    assert_near(actual, want, output_tolerance(query, key, value, options, dtype), "out")
    if returned:
        assert result[1].shape == want_lse.shape and result[1].dtype == np.float32
        assert_near(result[1], want_lse, lse_tolerance(query, key, want_lse, options, dtype), "lse")
