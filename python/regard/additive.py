"""Additive (Bahdanau), multiplicative (Luong) and location-sensitive (Chorowski) attention."""

from __future__ import annotations

from typing import Any

from regard import _arrays, _backend, _checks


def _call(operation: str, arrays: dict[str, Any], *options: Any) -> Any:
    """The outputs of one kernel; raises where its problem's check refused."""
    result = _arrays.call(operation, getattr(_backend.cpu, operation), tuple(arrays.values()), options)
    if type(result) is tuple:
        raise _checks.error(operation, result, arrays)
    return result


def additive_attention(
    query: Any,
    key: Any,
    value: Any,
    *,
    v: Any,
    w_query: Any = None,
    w_key: Any = None,
    bias: Any = None,
    mask: Any = None,
    key_lengths: Any = None,
    return_weights: bool = False,
) -> Any:
    """Additive attention, without the len_q x len_kv x dim tensor.

    For each query i: ``out_i = sum_j softmax_j(score_ij) value_j`` with
    ``score_ij = v . tanh(w_query query_i + w_key key_j + bias)``.

    Parameters
    ----------
    query : array, (batch, len_q, dim_q)
        float32, float64, float16 or bfloat16; any strides.
    key : array, (batch, len_kv, dim_k)
        Of the query's dtype.
    value : array, (batch, len_kv, dim_v)
        Of the query's dtype.
    v : array, (dim,)
        Of the query's dtype. Ones, or Keras's ``scale``, give Keras's AdditiveAttention.
    w_query : array, (dim, dim_q), optional
        In the layout of PyTorch's linear. Without it the query is added as it is, and dim_q must be dim.
    w_key : array, (dim, dim_k), optional
        Likewise. Leave it out for keys that were projected beforehand, such as those of a decoder.
    bias : array, (dim,), optional
        Added inside the tanh.
    mask : bool array, optional
        True = attend. Broadcasts to (batch, len_q, len_kv).
    key_lengths : int32 or int64 array, (batch,), optional
        Valid prefixes of key and value; nothing beyond them is used.
    return_weights : bool
        Also return the weights.

    Returns
    -------
    out : array, (batch, len_q, dim_v)
        Of the query's kind and dtype. A query that sees no key gives 0.
    weights : array, (batch, len_q, len_kv)
        Only with return_weights: what each query gives to each key, 0 where masked.

    Raises
    ------
    TypeError, ValueError
        Naming the argument, what was expected and what came.

    Notes
    -----
    tanh is taken as 1 - 2 / (1 + exp(2 q) exp(2 k)), exponentials once a row; a pair of rows that both hold more
    than float32 carries that way (33 and 43 in magnitude; float64: 333 and 353) takes tanh of the sums. The error
    of a score is below 4 epsilon times sum |v|, beside the rounding of the projections.

    References
    ----------
    Bahdanau, Cho, Bengio, "Neural Machine Translation by Jointly Learning to Align and Translate", 2014.
    """
    arrays = {
        "query": query, "key": key, "value": value, "v": v, "w_query": w_query, "w_key": w_key, "bias": bias,
        "mask": mask, "key_lengths": key_lengths,
    }  # fmt: skip
    result = _call("additive_attention", arrays, bool(return_weights))
    return tuple(result) if return_weights else result[0]


def multiplicative_attention(
    query: Any,
    key: Any,
    value: Any,
    *,
    w: Any = None,
    mask: Any = None,
    key_lengths: Any = None,
    return_weights: bool = False,
) -> Any:
    """Multiplicative attention: Luong's "general" score, or "dot" without w.

    For each query i: ``out_i = sum_j softmax_j(score_ij) value_j`` with ``score_ij = query_i . w key_j``. Scores are
    not scaled.

    Parameters
    ----------
    query : array, (batch, len_q, dim_q)
        float32, float64, float16 or bfloat16; any strides.
    key : array, (batch, len_kv, dim_k)
        Of the query's dtype. Without w, dim_k must be dim_q.
    value : array, (batch, len_kv, dim_v)
        Of the query's dtype.
    w : array, (dim_q, dim_k), optional
        Of the query's dtype, as PyTorch's linear from keys to queries has it.
    mask : bool array, optional
        True = attend. Broadcasts to (batch, len_q, len_kv).
    key_lengths : int32 or int64 array, (batch,), optional
        Valid prefixes of key and value; nothing beyond them is used.
    return_weights : bool
        Also return the weights, at the cost of a second pass over the keys.

    Returns
    -------
    out : array, (batch, len_q, dim_v)
        Of the query's kind and dtype. A query that sees no key gives 0.
    weights : array, (batch, len_q, len_kv)
        Only with return_weights: what each query gives to each key, 0 where masked.

    Raises
    ------
    TypeError, ValueError
        Naming the argument, what was expected and what came.

    References
    ----------
    Luong, Pham, Manning, "Effective Approaches to Attention-based Neural Machine Translation", 2015.
    """
    arrays = {"query": query, "key": key, "value": value, "w": w, "mask": mask, "key_lengths": key_lengths}
    result = _call("multiplicative_attention", arrays, bool(return_weights))
    return tuple(result) if return_weights else result[0]


def location_sensitive_attention(
    query: Any,
    key: Any,
    value: Any,
    previous_weights: Any,
    *,
    v: Any,
    w_query: Any = None,
    w_key: Any = None,
    w_location: Any,
    location_kernel: Any,
    location_bias: Any = None,
    bias: Any = None,
    mask: Any = None,
) -> tuple[Any, Any]:
    """Additive attention that also looks at where the previous step attended.

    ``score_ij = v . tanh(w_query query_i + w_key key_j + w_location f_ij + bias)``, where ``f_i`` (len_kv, filters) is
    the 1-D convolution of query i's previous weights with location_kernel, plus location_bias. As in PyTorch's conv1d
    with padding="same" the kernel is not flipped, and zeros surround the keys: (width - 1) // 2 of them before.

    Parameters
    ----------
    query : array, (batch, len_q, dim_q)
        float32, float64, float16 or bfloat16; any strides. A decoder's step has len_q = 1.
    key : array, (batch, len_kv, dim_k)
        Of the query's dtype.
    value : array, (batch, len_kv, dim_v)
        Of the query's dtype.
    previous_weights : array of the query's dtype
        (batch, len_q, len_kv): the weights that the previous step returned; or (batch, len_kv) for all queries. With
        several channels, such as Tacotron 2's previous and cumulative weights: (batch, channels, len_kv) for all
        queries, or (batch, len_q, channels, len_kv).
    v : array, (dim,)
        Of the query's dtype, like all that follow except mask.
    w_query : array, (dim, dim_q), optional
        In the layout of PyTorch's linear. Without it dim_q must be dim.
    w_key : array, (dim, dim_k), optional
        Likewise. Leave it out for keys that were projected beforehand.
    w_location : array, (dim, filters)
        Projects the convolution's features.
    location_kernel : array, (filters, channels, width) or, for one channel, (filters, width)
        In the layout of PyTorch's conv1d.
    location_bias : array, (filters,), optional
        The convolution's bias.
    bias : array, (dim,), optional
        Added inside the tanh.
    mask : bool array, optional
        True = attend. Broadcasts to (batch, len_q, len_kv).

    Returns
    -------
    out : array, (batch, len_q, dim_v)
        Of the query's kind and dtype. A query that sees no key gives 0.
    weights : array, (batch, len_q, len_kv)
        What each query gives to each key, 0 where masked: the next step's previous_weights.

    Raises
    ------
    TypeError, ValueError
        Naming the argument, what was expected and what came.

    References
    ----------
    Chorowski, Bahdanau, Serdyuk, Cho, Bengio, "Attention-Based Models for Speech Recognition", 2015.
    Shen et al., "Natural TTS Synthesis by Conditioning WaveNet on Mel Spectrogram Predictions" (Tacotron 2), 2018.
    """
    arrays = {
        "query": query, "key": key, "value": value, "previous_weights": previous_weights, "v": v, "w_query": w_query,
        "w_key": w_key, "w_location": w_location, "location_kernel": location_kernel, "location_bias": location_bias,
        "bias": bias, "mask": mask,
    }  # fmt: skip
    out, weights = _call("location_sensitive_attention", arrays)
    return out, weights
