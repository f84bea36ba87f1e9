"""Dot-product attention over sequences stored otherwise than padded: packed one after another, or in pages."""

from __future__ import annotations

from typing import Any

from regard import _checks, _options

# The inputs that are arrays, in the bindings' order.
_OPTIONAL = ("mask", "bias", "alibi_slopes", "sinks", "query_lengths", "key_lengths")
_PACKED = ("query", "key", "value", "cu_seqlens_q", "cu_seqlens_kv", *_OPTIONAL)
_PAGED = ("query", "key_pages", "value_pages", "page_table", "key_scales", "value_scales", *_OPTIONAL)


def attention_varlen(
    query: Any,
    key: Any,
    value: Any,
    cu_seqlens_q: Any,
    cu_seqlens_kv: Any,
    *,
    mask: Any = None,
    bias: Any = None,
    causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    alignment: str | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    alibi_slopes: Any = None,
    sinks: Any = None,
    query_lengths: Any = None,
    key_lengths: Any = None,
    dropout_p: float = 0.0,
    seed: int | None = None,
    precision: str = "highest",
    return_lse: bool = False,
    return_weights: bool = False,
    out: Any = None,
) -> Any:
    """Scaled dot-product attention of sequences packed one after another, without padding.

    Parameters
    ----------
    query : array, (total_q, heads, dim_qk)
        float32, float64, float16 or bfloat16; any strides.
    key : array, (total_kv, heads_kv, dim_qk)
        Of the query's dtype.
    value : array, (total_kv, heads_kv, dim_v)
        Of the query's dtype.
    cu_seqlens_q, cu_seqlens_kv : int32 or int64 array, (batch + 1,)
        Sequence b has the rows from entry b to entry b + 1. They begin with 0 and never fall. Rows of
        the query beyond the last entry belong to no sequence: their output is 0. On a GPU index arrays may lie on
        the host, checked, or on the device, where kernels hold each entry to its range instead (docs/cuda.md).
    mask, bias, alibi_slopes, sinks, causal, window, scale, softcap, dropout_p, seed, precision
        As in :func:`regard.attention`. len_q and len_kv are those of the longest sequences; positions
        count from each sequence's first row.
    alignment : "upper_left" or "lower_right", optional
        Each sequence's own. Needed by causal, window and ALiBi unless each has as many queries as keys.
    query_lengths, key_lengths : int32 or int64 array, (batch,), optional
        Valid prefixes of each sequence's rows.
    return_lse, return_weights : bool
        Also return them.
    out : array, (total_q, heads, dim_v), optional
        Written and returned; may overlap any input.

    Returns
    -------
    out : array, (total_q, heads, dim_v)
    lse : float32 array, (heads, total_q)
        Only with return_lse.
    weights : array, (batch, heads, len_q, len_kv)
        Only with return_weights; each sequence padded with zeros.

    Raises
    ------
    TypeError, ValueError
        Naming the argument, what was expected and what came.
    """
    dense, options = _options.parsed(query, mask, causal, window, alignment, scale, softcap, dropout_p, seed, precision)
    inputs = (
        query,
        key,
        value,
        cu_seqlens_q,
        cu_seqlens_kv,
        dense,
        bias,
        alibi_slopes,
        sinks,
        query_lengths,
        key_lengths,
    )
    numbers = (*options, return_lse, return_weights)
    return _options.attend("attention_varlen", _PACKED, inputs, out, numbers, (mask, scale, softcap))


def attention_paged(
    query: Any,
    key_pages: Any,
    value_pages: Any,
    page_table: Any,
    key_lengths: Any,
    *,
    key_scales: Any = None,
    value_scales: Any = None,
    mask: Any = None,
    bias: Any = None,
    causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    alignment: str | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    alibi_slopes: Any = None,
    sinks: Any = None,
    query_lengths: Any = None,
    dropout_p: float = 0.0,
    seed: int | None = None,
    layout: str = "bhsd",
    precision: str = "highest",
    return_lse: bool = False,
    return_weights: bool = False,
    out: Any = None,
) -> Any:
    """Scaled dot-product attention over keys and values kept in pages (Kwon et al., "PagedAttention", 2023).

    Key j of sequence b is row ``j % page_size`` of page ``page_table[b, j // page_size]``. Nothing is
    gathered: pages are read where they lie.

    Parameters
    ----------
    query : array, (batch, heads, len_q, dim_qk)
        float32, float64, float16 or bfloat16; any strides.
    key_pages : array, (pages, page_size, heads_kv, dim_qk)
        Any of these dtypes, or int8 or float8_e4m3fn with scales.
    value_pages : array, (pages, page_size, heads_kv, dim_v)
        Of the dtype of key_pages.
    page_table : int32 or int64 array, (batch, pages_per_sequence)
        Entries past a sequence's last page are not read and may hold anything. On a GPU index arrays may lie on the
        host, checked, or on the device, where kernels hold each entry to its range instead (docs/cuda.md).
    key_lengths : int32 or int64 array, (batch,)
        Keys of each sequence.
    key_scales, value_scales : float32 array, (pages, page_size, heads_kv)
        What 1 in an int8 or float8 row is worth.
    mask, bias, causal, window, scale, softcap, alibi_slopes, sinks, query_lengths, dropout_p, seed, layout, precision
        As in :func:`regard.attention`; len_kv is the largest of key_lengths; layout is that of query and out.
    alignment : "upper_left" or "lower_right", optional
        Each sequence's own. Needed by causal, window and ALiBi unless each has as many queries as keys.
    return_lse, return_weights : bool
        Also return them.
    out : array, (batch, heads, len_q, dim_v), optional
        Written and returned; may overlap any input.

    Returns
    -------
    out : array, (batch, heads, len_q, dim_v)
        Of the query's kind and dtype.
    lse : float32 array, (batch, heads, len_q)
        Only with return_lse.
    weights : array, (batch, heads, len_q, len_kv)
        Only with return_weights.

    Raises
    ------
    TypeError, ValueError
        Naming the argument, what was expected and what came.
    """
    sequence_first = _checks.choice("layout", layout, _checks.LAYOUTS)
    dense, options = _options.parsed(query, mask, causal, window, alignment, scale, softcap, dropout_p, seed, precision)
    inputs = (
        query,
        key_pages,
        value_pages,
        page_table,
        key_scales,
        value_scales,
        dense,
        bias,
        alibi_slopes,
        sinks,
        query_lengths,
        key_lengths,
    )
    numbers = (*options, sequence_first, return_lse, return_weights)
    return _options.attend("attention_paged", _PAGED, inputs, out, numbers, (mask, scale, softcap), layout)
