"""Attention problems as data: real models' shapes cut small, irregular ones, and corners.

`CASES` names them; `build(case, dtype)` turns one into arrays, the same ones every time. Tests
that loop over shapes take them from here, so that a new mask rule, dtype or tile size needs a row
here and no new test.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import ml_dtypes
import numpy as np

Array = np.ndarray[Any, Any]
Arrays = tuple[Array, Array, Array]

DTYPES = {
    "float32": np.dtype(np.float32),
    "float64": np.dtype(np.float64),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}

# Lengths just below, at and above the widths of vectors (8, 16) and tiles (32 to 192).
EDGE_LENGTHS = (1, 2, 7, 8, 15, 16, 17, 31, 32, 33, 47, 48, 49, 63, 64, 65)
LONG_EDGE_LENGTHS = (95, 96, 97, 127, 128, 129, 191, 192, 193, 257)


@dataclass(frozen=True)
class Case:
    """One attention problem; what is left out is small and ordinary."""

    name: str
    batch: int = 1
    heads: int = 2
    heads_kv: int | None = None  # None: heads
    len_q: int = 16
    len_kv: int | None = None  # None: len_q
    dim_qk: int = 64
    dim_v: int | None = None  # None: dim_qk
    # Which of the axes b, h, q, k a mask or bias really has; the others are 1 and broadcast.
    # "full" has them all, but as a view with stride 0 on b and h.
    mask: str | None = None
    bias: str | None = None
    bias_dtype: str = "float32"  # or "query"
    hidden: float = 0.3  # the share of keys a mask hides
    hidden_rows: tuple[int, ...] = ()  # query rows that see no key at all
    logits: float = 1.0  # the scale of the scores' spread
    value_spread: float = 0.0  # decades the values' magnitudes cover
    value_mean: float = 0.0
    strides: str = "contiguous"  # a name in STRIDES
    options: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    # Subsets other than "every case in float32": "dtypes" runs in all of them.
    tags: frozenset[str] = frozenset()


def case(name: str, *tags: str, **words: Any) -> Case:
    fields = {k: words.pop(k) for k in tuple(words) if k in Case.__dataclass_fields__}
    return Case(name, options=MappingProxyType(words), tags=frozenset(tags), **fields)


# ---- The arrays of a case ----------------------------------------------------------------------


def build(case: Case, dtype: str) -> tuple[Array, Array, Array, dict[str, Any]]:
    """(query, key, value, options): options are `attention`'s keywords."""
    rng = np.random.default_rng(zlib.crc32(case.name.encode()))
    heads_kv = case.heads if case.heads_kv is None else case.heads_kv
    len_kv = case.len_q if case.len_kv is None else case.len_kv
    dim_v = case.dim_qk if case.dim_v is None else case.dim_v
    draw = rng.standard_normal
    # Large logits come from both sides: float16 would overflow if one carried them all.
    query = draw((case.batch, case.heads, case.len_q, case.dim_qk)) * np.sqrt(case.logits)
    key = draw((case.batch, heads_kv, len_kv, case.dim_qk)) * np.sqrt(case.logits)
    value = draw((case.batch, heads_kv, len_kv, dim_v))
    value = case.value_mean + value * 10.0 ** (case.value_spread * (rng.random(value.shape) - 0.5))

    options = dict(case.options)
    full = dict(b=case.batch, h=case.heads, q=case.len_q, k=len_kv)
    if case.mask is not None:
        mask = rng.random(axes_shape(case.mask, full)) >= case.hidden
        if case.hidden_rows:
            mask[:, :, list(case.hidden_rows)] = False
        options["mask"] = as_full_view(mask, case.mask, full)
    if case.bias is not None:
        bias = 2 * draw(axes_shape(case.bias, full))
        bias = bias.astype(DTYPES[dtype if case.bias_dtype == "query" else case.bias_dtype])
        options["bias"] = as_full_view(bias, case.bias, full)
    if options.get("layout") == "bshd":
        query, key, value = (np.ascontiguousarray(x.swapaxes(1, 2)) for x in (query, key, value))
    arrange = STRIDES[case.strides]
    query, key, value = (arrange(x.astype(DTYPES[dtype])) for x in (query, key, value))
    return query, key, value, options


def axes_shape(axes: str, full: Mapping[str, int]) -> tuple[int, ...]:
    kept = "qk" if axes == "full" else axes
    return tuple(full[a] if a in kept else 1 for a in "bhqk")


def as_full_view(x: Array, axes: str, full: Mapping[str, int]) -> Array:
    return np.broadcast_to(x, tuple(full.values())) if axes == "full" else x


def reversed_view(x: Array) -> Array:
    """The same values, every stride negative."""
    back = (slice(None, None, -1),) * x.ndim
    return np.ascontiguousarray(x[back])[back]


def every_other(x: Array) -> Array:
    """The same values with a gap, of values that must not be read, behind each along every axis."""
    wide = np.full([2 * n for n in x.shape], 1e4, x.dtype)
    view = wide[(slice(None, None, 2),) * x.ndim]
    view[...] = x
    return view


def last_axis_slow(x: Array) -> Array:
    """The same values with the head dimension outermost in memory."""
    return np.moveaxis(np.ascontiguousarray(np.moveaxis(x, -1, 0)), 0, -1)


def padded_rows(x: Array) -> Array:
    """Rows contiguous, but at a pitch that is no multiple of a vector."""
    wide = np.full((*x.shape[:-1], x.shape[-1] + 3), 1e4, x.dtype)
    view = wide[..., : x.shape[-1]]
    view[...] = x
    return view


def misaligned(x: Array) -> Array:
    """The same values at an address that is not a multiple of their size."""
    raw = np.zeros(x.nbytes + 1, np.uint8)
    view = raw[1:].view(x.dtype).reshape(x.shape)
    view[...] = x
    return view


def one_row_repeated(x: Array) -> Array:
    """Stride 0 along the length: every row is the first."""
    return np.broadcast_to(x[:, :, :1], x.shape)


def one_batch_repeated(x: Array) -> Array:
    """Stride 0 along batch and heads."""
    return np.broadcast_to(x[:1, :1], x.shape)


STRIDES = {
    "contiguous": np.ascontiguousarray,
    "reversed": reversed_view,
    "every_other": every_other,
    "last_axis_slow": last_axis_slow,
    "padded_rows": padded_rows,
    "misaligned": misaligned,
    "one_row_repeated": one_row_repeated,
    "one_batch_repeated": one_batch_repeated,
}


# ---- The cases ---------------------------------------------------------------------------------

LOWER = dict(causal=True, alignment="lower_right")
UPPER = dict(causal=True, alignment="upper_left")

# Heads and lengths cut, head dimensions and ratios kept.
REAL = [
    case("minilm", "dtypes", batch=2, heads=3, len_q=40, dim_qk=32, mask="bk"),
    case("bert", "dtypes", batch=2, heads=3, len_q=128, dim_qk=64),
    case("vit_196_and_class_token", heads=2, len_q=197, dim_qk=64),
    case("sam_global", heads=1, len_q=192, dim_qk=80, bias="hqk"),
    case("swin_window", batch=4, heads=3, len_q=49, dim_qk=32, bias="hqk", mask="bqk"),
    case("llama_prefill", "dtypes", heads=4, heads_kv=1, len_q=160, dim_qk=128, causal=True),
    case("llama_decode", "dtypes", batch=2, heads=8, heads_kv=2, len_q=1, len_kv=600, dim_qk=128),
    case("speculative_decode", heads=4, heads_kv=2, len_q=5, len_kv=300, dim_qk=128, **LOWER),
    case("falcon_mqa", heads=7, heads_kv=1, len_q=70, dim_qk=64, causal=True),
    case("gemma_256_softcap", heads=2, heads_kv=1, len_q=66, dim_qk=256, softcap=50.0, causal=True),
    case("grok_softcap", "dtypes", len_q=50, dim_qk=128, logits=20.0, softcap=30.0, causal=True),
    case("stable_diffusion_cross", batch=2, heads=2, len_q=96, len_kv=77, dim_qk=40),
    case("stable_diffusion_160", heads=1, len_q=64, dim_qk=160),
    case("whisper_decoder_cross", heads=2, len_q=3, len_kv=375, dim_qk=64),
    case("t5_no_scale", "dtypes", heads=2, len_q=45, dim_qk=64, logits=0.2, scale=1.0, bias="hqk"),
    case("mla_576_512", "dtypes", heads=4, heads_kv=1, len_q=2, len_kv=90, dim_qk=576, dim_v=512),
    case("deepseek_192_128", heads=2, len_q=70, dim_qk=192, dim_v=128, causal=True),
    case("mistral_window", heads=2, len_q=130, dim_qk=64, causal=True, window=(32, None)),
    case("longformer_window", heads=2, len_q=130, dim_qk=64, window=(20, 20)),
    case("bloom_alibi", heads=4, len_q=65, dim_qk=64, causal=True,
         alibi_slopes=np.float32([0.5, 0.25, 0.125, 0.0625])),
    case("gpt_oss_sinks", heads=4, heads_kv=2, len_q=65, dim_qk=64, causal=True,
         sinks=np.float32([0.3, -1.0, 2.0, 5.0])),
    case("padded_batch_lengths", batch=3, len_q=33, len_kv=50, dim_qk=64,
         query_lengths=np.int32([33, 0, 7]), key_lengths=np.int32([50, 20, 0])),
    case("padded_batch_lower_right", batch=3, len_q=33, len_kv=50, dim_qk=64,
         query_lengths=np.int64([33, 2, 7]), key_lengths=np.int64([50, 20, 3]), **LOWER),
    case("alibi_by_batch_lower_right", batch=2, len_q=9, len_kv=21, dim_qk=16,
         alignment="lower_right", alibi_slopes=np.float32([[0.5, 0.25], [0.1, 0.2]])),
]  # fmt: skip

EDGES = [
    *(case(f"len_{n}", len_q=n, dim_qk=24) for n in EDGE_LENGTHS),
    *(case(f"len_{n}_causal", len_q=n, dim_qk=24, causal=True) for n in EDGE_LENGTHS),
    *(case(f"len_{n}", heads=1, len_q=n, dim_qk=64) for n in LONG_EDGE_LENGTHS),
    *(case(f"len_{n}_causal", heads=1, len_q=n, dim_qk=64, causal=True) for n in LONG_EDGE_LENGTHS),
    # One query row takes another path (decode) and so has edges of its own along the keys.
    *(case(f"decode_{n}", heads=4, heads_kv=2, len_q=1, len_kv=n, dim_qk=40)
      for n in (*EDGE_LENGTHS, *LONG_EDGE_LENGTHS)),
    *(case(f"dim_{d}", "dtypes", len_q=35, len_kv=50, dim_qk=d)
      for d in (1, 3, 8, 40, 64, 80, 96, 128, 192, 256)),
    *(case(f"dim_{d}", len_q=17, len_kv=33, dim_qk=d)
      for d in (2, 7, 15, 16, 17, 31, 33, 48, 63, 65, 100, 129, 257, 512)),
    *(case(f"dim_{a}_{b}", len_q=20, len_kv=37, dim_qk=a, dim_v=b)
      for a, b in ((1, 64), (64, 1), (64, 80), (96, 33), (33, 96), (128, 7), (7, 256))),
    *(case(f"causal_{q}_{k}_{name}", heads=1, len_q=q, len_kv=k, dim_qk=16, **how)
      for q, k in ((5, 9), (9, 5), (1, 70), (70, 1), (64, 100), (100, 64), (33, 200), (200, 33))
      for name, how in (("upper", UPPER), ("lower", LOWER))),
    *(case(f"window_{left}_{right}", heads=1, len_q=70, dim_qk=16, window=(left, right))
      for left, right in ((0, 0), (0, None), (None, 0), (3, 17), (100, 100), (None, None))),
    case("window_far_right_of_keys", heads=1, len_q=80, len_kv=8, dim_qk=16,
         window=(2, 2), alignment="upper_left"),
]  # fmt: skip

GROUPS = [
    case(f"gqa_{h}_{kv}_len_{n}", batch=2, heads=h, heads_kv=kv, len_q=n, len_kv=40, dim_qk=16,
         **LOWER)
    for h, kv in ((6, 3), (6, 2), (5, 1), (12, 4))
    for n in (1, 3, 40)
]  # fmt: skip

MASKS = [
    *(case(f"mask_{axes or 'scalar'}", *(("dtypes",) if axes == "bhqk" else ()), batch=2, heads=3,
           len_q=19, len_kv=37, dim_qk=16, mask=axes, hidden=0.0 if axes == "" else 0.3)
      for axes in ("", "b", "h", "q", "k", "bk", "qk", "hq", "bhqk", "full")),
    *(case(f"bias_{axes or 'scalar'}", *(("dtypes",) if axes == "bhqk" else ()), batch=2, heads=3,
           len_q=19, len_kv=37, dim_qk=16, bias=axes)
      for axes in ("", "b", "h", "q", "k", "bk", "qk", "hq", "bhqk", "full")),
    case("bias_of_query_dtype", "dtypes", batch=2, len_q=19, len_kv=37, dim_qk=16, bias="hqk",
         bias_dtype="query"),
    case("mask_and_bias_and_causal", "dtypes", batch=2, heads=4, heads_kv=2, len_q=70, len_kv=90,
         dim_qk=32, mask="bqk", bias="hqk", softcap=5.0, scale=0.4, **LOWER),
    case("rows_fully_masked", "dtypes", batch=2, len_q=37, len_kv=70, dim_qk=16, mask="bhqk",
         hidden_rows=(0, 5, 31, 32, 36)),
    case("all_masked", batch=2, len_q=20, len_kv=35, dim_qk=16, mask="qk", hidden=2.0),
    case("one_key_seen", heads=1, len_q=130, len_kv=130, dim_qk=16, window=(0, 0), mask="bq",
         hidden=0.5),
    case("nearly_all_masked", heads=2, len_q=70, len_kv=300, dim_qk=32, mask="bhqk", hidden=0.99),
    # Causal with more rows than keys, lower right: the first rows see nothing.
    case("causal_rows_see_nothing", len_q=90, len_kv=20, dim_qk=64, **LOWER),
    case("mask_one_row_decode", heads=4, heads_kv=2, len_q=1, len_kv=200, dim_qk=64, mask="bhqk"),
]  # fmt: skip

EMPTY = [
    case("empty_batch", "dtypes", batch=0),
    case("empty_heads", heads=0),
    case("empty_heads_gqa", heads=0, heads_kv=2),
    case("empty_len_q", len_q=0, len_kv=9),
    case("empty_len_kv", "dtypes", len_q=9, len_kv=0),
    case("empty_len_kv_causal", len_q=9, len_kv=0, **LOWER),
    case("empty_len_kv_decode", len_q=1, len_kv=0),
    case("empty_both_lengths", len_q=0, len_kv=0, causal=True),
    case("empty_batch_masked", batch=0, mask="bhqk", bias="bhqk"),
    case("empty_len_kv_masked", len_q=5, len_kv=0, mask="qk"),
]

NUMBERS = [
    case("scale_negative", len_q=33, dim_qk=32, scale=-0.3),
    case("scale_zero", "dtypes", len_q=33, dim_qk=32, scale=0.0),
    case("scale_large", len_q=33, dim_qk=32, scale=50.0),
    case("scale_tiny", len_q=33, dim_qk=32, scale=1e-30),
    case("softcap_small", len_q=33, dim_qk=32, softcap=0.5),
    case("softcap_saturated", len_q=33, dim_qk=32, logits=1e4, softcap=20.0),
    case("softcap_huge", len_q=33, dim_qk=32, softcap=1e6),
    case("logits_1e4", "dtypes", len_q=65, len_kv=130, dim_qk=64, logits=1e4),
    case("logits_1e5", "dtypes", len_q=65, len_kv=130, dim_qk=64, logits=1e5),
    case("logits_1e4_causal_decode", heads=4, heads_kv=1, len_q=2, len_kv=200, dim_qk=64,
         logits=1e4, **LOWER),
    case("logits_tiny", "dtypes", len_q=33, dim_qk=32, logits=1e-4),
    case("values_of_wide_range", "dtypes", len_q=65, len_kv=130, dim_qk=64, value_spread=6.0),
    case("values_far_from_zero", "dtypes", len_q=65, len_kv=130, dim_qk=64, value_mean=100.0),
    case("long_rows", "dtypes", heads=1, len_q=9, len_kv=5000, dim_qk=16),
    case("long_rows_wide", heads=1, len_q=40, len_kv=3001, dim_qk=64, logits=6.0),
    case("long_decode", heads=2, heads_kv=1, len_q=1, len_kv=9000, dim_qk=32),
    case("long_causal", heads=1, len_q=1100, dim_qk=16, causal=True),
]  # fmt: skip

LAYOUTS = [
    *(case(f"strides_{name}", *(("dtypes",) if name == "misaligned" else ()), batch=2, heads=4,
           heads_kv=2, len_q=21, len_kv=35, dim_qk=20, mask="qk", strides=name)
      for name in STRIDES),
    *(case(f"strides_{name}_bshd", batch=2, len_q=21, dim_qk=16, causal=True, strides=name,
           layout="bshd") for name in STRIDES if not name.startswith("one_")),
    *(case(f"strides_{name}_decode", heads=4, heads_kv=2, len_q=1, len_kv=70, dim_qk=64,
           strides=name) for name in ("reversed", "every_other", "misaligned", "last_axis_slow")),
    case("bshd", "dtypes", batch=2, heads=4, heads_kv=2, len_q=21, len_kv=40, dim_qk=24,
         dim_v=16, layout="bshd"),
    case("bshd_masked_biased", batch=2, heads=4, heads_kv=2, len_q=21, len_kv=40, dim_qk=24,
         mask="bhqk", bias="hqk", layout="bshd", **LOWER),
    case("bshd_decode", batch=2, heads=4, heads_kv=2, len_q=1, len_kv=40, dim_qk=64, layout="bshd"),
    case("bshd_empty_len_kv", len_q=3, len_kv=0, layout="bshd"),
]  # fmt: skip

# Edges of matrix tiles: 16 rows, 32 steps of a depth, 32 queries, blocks of 96 keys.
TILES = [
    *(case(f"tile_queries_{n}", len_q=n, len_kv=40, dim_qk=64) for n in (5, 15, 16, 17, 33, 64, 65, 191, 193)),
    *(case(f"tile_keys_{n}", len_q=33, len_kv=n, dim_qk=64)
      for n in (1, 2, 15, 16, 17, 31, 32, 33, 95, 96, 97, 129, 193)),
    *(case(f"tile_dim_{a}_{b}", len_q=35, len_kv=50, dim_qk=a, dim_v=b)
      for a, b in ((4, 4), (8, 8), (16, 33), (31, 17), (32, 16), (33, 32), (64, 48), (96, 100), (129, 31))),
    *(case(f"tile_window_{left}_{right}", heads=1, len_q=150, dim_qk=32, window=(left, right))
      for left, right in ((0, 0), (3, 17), (40, 0), (0, 100))),
    case("tile_causal_lower", heads=1, len_q=70, len_kv=200, dim_qk=32, **LOWER),
    case("tile_everything", batch=2, heads=4, heads_kv=2, len_q=70, len_kv=130, dim_qk=64, mask="bqk", bias="hqk",
         softcap=5.0, alibi_slopes=np.float32([0.5, 0.25, 0.125, 0.0625]), sinks=np.float32([0.3, -1.0, 2.0, 5.0]),
         key_lengths=np.int32([130, 77]), **LOWER),
]  # fmt: skip

CASES: dict[str, Case] = {}
for _case in [*REAL, *EDGES, *TILES, *GROUPS, *MASKS, *EMPTY, *NUMBERS, *LAYOUTS]:
    assert _case.name not in CASES, _case.name
    CASES[_case.name] = _case
