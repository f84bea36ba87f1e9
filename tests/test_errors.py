"""Errors are TypeError or ValueError; they name the argument, what was expected, and what came."""

from __future__ import annotations

import re

import numpy as np
import pytest
import regard
from helpers import normal
from numpy.lib.stride_tricks import as_strided

Q, K, V = normal(0, 2, 6, 5, 8), normal(1, 2, 3, 9, 8), normal(2, 2, 3, 9, 7)
X, W = normal(3, 4, 5), normal(4, 3, 5)
ROWS, ENDS = normal(10, 6, 2, 4), np.array([0, 2, 6])
PACKED = regard.pack_linear(normal(11, 4, 4))
IMAGE = normal(5, 2, 8, 4, 4)
SE = (normal(6, 2, 8), normal(7, 2), normal(8, 8, 2), normal(9, 8))

# name -> (function, arguments, options, exception, patterns that the message must contain).
# Patterns are the argument's name, the dimension or dtype that was expected, and what came.
ATTENTION = {
    "rank": ((Q[0], K, V), {}, ValueError, ["query", "batch", "len_q", r"\(6, 5, 8\)|\b3\b"]),
    "batch": ((Q, K[:1], V), {}, ValueError, ["key", "batch", r"\b2\b", r"\b1\b"]),
    "batch_of_value": ((Q, K, V[:1]), {}, ValueError, ["value", "batch", r"\b2\b", r"\b1\b"]),
    "heads": ((Q[:, :4], K, V), {}, ValueError, ["key|query", "heads_kv", r"\b4\b", r"\b3\b"]),
    "heads_of_value": ((Q, K, V[:, :2]), {}, ValueError, ["value", "heads_kv", r"\b3\b", r"\b2\b"]),
    "dim_qk": ((Q, K[..., :6], V), {}, ValueError, ["key", "dim_qk", r"\b8\b", r"\b6\b"]),
    "len_kv": ((Q, K, V[:, :, :4]), {}, ValueError, ["value", "len_kv", r"\b9\b", r"\b4\b"]),
    "dtype": ((Q.astype(int), K, V), {}, TypeError, ["query", "float32", "int64"]),
    "dtypes_differ": ((Q, K.astype(np.float64), V), {}, TypeError, ["key", "float32", "float64"]),
    "value_dtype": ((Q, K, V.astype(np.float16)), {}, TypeError, ["value", "float32", "float16"]),
    "not_an_array": (("words", K, V), {}, TypeError, ["query", "str"]),
    "int_mask": ((Q, K, V), dict(mask=np.ones((5, 9), np.int32)), TypeError,
                 ["mask", "bool", "int32"]),
    "mask_shape": ((Q, K, V), dict(mask=np.ones((5, 8), bool)), ValueError,
                   ["mask", "len_kv", r"\b9\b", r"\(5, 8\)|\b8\b"]),
    "bias_shape": ((Q, K, V), dict(bias=np.ones((4, 1, 1), np.float32)), ValueError,
                   ["bias", "heads", r"\b6\b", r"\(4, 1, 1\)|\b4\b"]),
    "bias_dtype": ((Q, K, V), dict(bias=np.ones((5, 9), np.int64)), TypeError,
                   ["bias", "float32", "int64"]),
    "bias_float64": ((Q, K, V), dict(bias=np.ones((5, 9))), TypeError,
                     ["bias", "float32", "float64"]),
    "no_alignment": ((Q, K, V), dict(causal=True), ValueError,
                     ["alignment", "upper_left", "lower_right", "len_q", "len_kv", r"\b5\b",
                      r"\b9\b"]),
    "alignment": ((Q, K, V), dict(causal=True, alignment="left"), ValueError,
                  ["alignment", "upper_left", "lower_right", "left"]),
    "window_without_alignment": ((Q, K, V), dict(window=(1, 1)), ValueError,
                                 ["alignment", "upper_left", "lower_right"]),
    "window_negative": ((Q, K[:, :, :5], V[:, :, :5]), dict(window=(-1, 2)), ValueError,
                        ["window", "-1"]),
    "layout": ((Q, K, V), dict(layout="sbhd"), ValueError, ["layout", "bhsd", "bshd", "sbhd"]),
    "precision": ((Q, K, V), dict(precision="best"), ValueError,
                  ["precision", "highest", "high", "medium", "best"]),
    "scale": ((Q, K, V), dict(scale="1"), TypeError, ["scale", "str"]),
    "out_shape": ((Q, K, V), dict(out=np.zeros((2, 6, 5, 8), np.float32)), ValueError,
                  ["out", "dim_v", r"\b7\b", r"\b8\b"]),
    "out_dtype": ((Q, K, V), dict(out=np.zeros((2, 6, 5, 7))), TypeError,
                  ["out", "float32", "float64"]),
    "key_lengths": ((Q, K, V), dict(key_lengths=np.array([9, 10])), ValueError,
                    ["key_lengths", r"\b9\b", r"\b10\b"]),
    "key_lengths_dtype": ((Q, K, V), dict(key_lengths=np.array([9.0, 1.0])), TypeError,
                          ["key_lengths", "int32|int64", "float64"]),
    "unknown_option": ((Q, K, V), dict(is_causal=True), TypeError, ["is_causal"]),
}  # fmt: skip

OTHERS = {
    "linear_inner": ("linear", (X, W[:, :4]), {}, ValueError, ["weight", r"\b5\b", r"\b4\b"]),
    "linear_rank": ("linear", (X, W[0]), {}, ValueError, ["weight", r"\b2\b|out", r"\(5,\)|\b1\b"]),
    "linear_bias": ("linear", (X, W, X[0]), {}, ValueError, ["bias", r"\b3\b", r"\b5\b"]),
    "linear_dtype": ("linear", (X.astype(int), W), {}, TypeError, ["x", "float32", "int64"]),
    "linear_mixed": ("linear", (X, W.astype(float)), {}, TypeError,
                     ["weight", "float32", "float64"]),
    "linear_out_overlaps_itself": ("linear", (X, W), dict(out=as_strided(np.zeros(40, np.float32), (4, 3), (8, 4))),
                                   ValueError, ["out", "without repeated elements"]),
    "linear_out_repeats": ("linear", (X, W), dict(out=as_strided(np.zeros(3, np.float32), (4, 3), (0, 4))),
                           ValueError, ["out", "without repeated elements"]),
    "norm_out_repeats": ("layer_norm", (np.broadcast_to(X[:1, :1], (1 << 15, 1 << 15)),),
                         dict(out=as_strided(np.zeros(1 << 16, np.float32), (1 << 15, 1 << 15), (4, 4))),
                         ValueError, ["out", "without repeated elements"]),
    "norm_eps": ("layer_norm", (X,), dict(eps="a"), TypeError, ["eps", "a finite number >= 0", "'a'"]),
    "rms_norm_eps": ("rms_norm", (X,), dict(eps=None), TypeError, ["eps", "a finite number >= 0", "None"]),
    "rotary_table_too_short": ("rotary_embedding", (Q, X[:2, :3], X[:2, :3]), {}, ValueError,
                               ["cos", f"a table of at least len = {Q.shape[2]} positions", r"got .*\(2, 3\)"]),
    "rotary_positions_list": ("rotary_embedding", (Q, X[:, :3], X[:, :3], [0, 1]), {}, TypeError,
                              ["positions", r"\(batch = 2, len = 5\) or \(len = 5,\)", r"list \[0, 1\]"]),
    "rotary_positions_shape": ("rotary_embedding", (Q, X[:, :3], X[:, :3], np.arange(3)), {}, ValueError,
                               ["positions", r"\(batch = 2, len = 5\) or \(len = 5,\)", r"int64 array .*\(3,\)"]),
    "multiplicative_packed": ("multiplicative_attention", (ROWS, ROWS, ROWS), dict(w=PACKED), TypeError,
                              ["w: expected an array", r"got float32 PackedLinear of shape \(4, 4\)"]),
    "additive_packed": ("additive_attention", (ROWS, ROWS, ROWS), dict(v=X[:, 0], w_query=PACKED), TypeError,
                        ["w_query: expected an array", r"got float32 PackedLinear of shape \(4, 4\)"]),
    "gru_packed": ("gru", (ROWS, PACKED, W), {}, TypeError, ["w_input: expected an array", "got float32 PackedLinear"]),
    "additive_query": ("additive_attention", (Q[:, 0], K[:, 0], V[:, 0]), dict(v=X[0, :3]), ValueError,
                       ["query", "dim_q must be dim = 3"]),
    "varlen_slopes": ("attention_varlen", (ROWS, ROWS, ROWS, ENDS, ENDS), dict(alibi_slopes=X[:3, :2]), ValueError,
                      ["alibi_slopes", "batch = 2, heads = 2", r"\(3, 2\)"]),
    "varlen_lengths": ("attention_varlen", (ROWS, ROWS, ROWS, ENDS, ENDS), dict(key_lengths=np.array([1, 2, 3])),
                       ValueError, ["key_lengths", "batch = 2", r"\(3,\)"]),
    "varlen_mask": ("attention_varlen", (ROWS, ROWS, ROWS, ENDS, ENDS), dict(mask=np.ones((7, 7), bool)), ValueError,
                    ["mask", "len_q = 4, len_kv = 4"]),
    "linear_activation": ("linear", (X, W, None, "tanh"), {}, ValueError,
                          ["activation", "relu", "gelu", "silu", "tanh"]),
    "norm_weight": ("layer_norm", (X, X[0, :4]), {}, ValueError, ["weight", r"\b5\b", r"\b4\b"]),
    "norm_bias": ("layer_norm", (X, X[0], X[0, :4]), {}, ValueError, ["bias", r"\b5\b", r"\b4\b"]),
    "norm_dtype": ("rms_norm", (X.astype(int),), {}, TypeError, ["x", "float32", "int64"]),
    "pool_layout": ("global_average_pool", (IMAGE,), dict(layout="chwn"), ValueError,
                    ["layout", "nchw", "nhwc", "chwn"]),
    "pool_rank": ("global_average_pool", (X,), {}, ValueError,
                  ["x", "channels", r"\(4, 5\)|\b2\b"]),
    "se_reduce": ("squeeze_excitation", (IMAGE, SE[0][:, :7], *SE[1:]), {}, ValueError,
                  ["w_reduce", "channels", r"\b8\b", r"\b7\b"]),
    "se_expand": ("squeeze_excitation", (IMAGE, *SE[:2], SE[2][:, :1], SE[3]), {}, ValueError,
                  ["w_expand", "reduced", r"\b2\b", r"\b1\b"]),
    "se_bias": ("squeeze_excitation", (IMAGE, *SE[:3], SE[3][:7]), {}, ValueError,
                ["b_expand", "channels", r"\b8\b", r"\b7\b"]),
    "se_activation": ("squeeze_excitation", (IMAGE, *SE), dict(activation="relu6"), ValueError,
                      ["activation", "relu", "hard_swish", "relu6"]),
    "se_gate": ("squeeze_excitation", (IMAGE, *SE), dict(gate="relu"), ValueError,
                ["gate", "sigmoid", "hard_sigmoid", "relu"]),
}  # fmt: skip

ROWS = {f"attention_{n}": ("attention", *row) for n, row in ATTENTION.items()} | OTHERS


@pytest.mark.parametrize("name", ROWS)
def test_message(name):
    function, arguments, options, kind, patterns = ROWS[name]
    with pytest.raises(kind) as caught:
        getattr(regard, function)(*arguments, **options)
    message = str(caught.value)
    missing = [p for p in patterns if not re.search(p, message)]
    assert not missing, f"the message lacks {missing}: {message}"


OF_ARRAYS = {
    "attention": (Q, K, V),
    "scaled_dot_product_attention": (Q, Q, Q),
    "attention_varlen": (K[0], K[0], V[0], ENDS, ENDS),
    "attention_paged": (Q, K, V, ENDS, ENDS),
    "rotary_embedding": (Q, X, X),
    "linear": (X, W),
    "layer_norm": (X,),
    "rms_norm": (X,),
    "global_average_pool": (IMAGE,),
    "squeeze_excitation": (IMAGE, *SE),
    "multiplicative_attention": (K[0], K[0], V[0]),
    "gru": (K[0], X, X),
    "merge_attention": (X, X),
    "pack_linear": (W,),
}


@pytest.mark.parametrize("function", OF_ARRAYS)
@pytest.mark.parametrize("kind", [np.float32, np.ndarray, type(PACKED)])
def test_a_class_is_no_array(function, kind):
    """Of arrays, a class has the attributes, but as descriptors and methods."""
    arguments = OF_ARRAYS[function]
    for place in range(min(len(arguments), 2)):
        given = [*arguments[:place], kind, *arguments[place + 1 :]]
        with pytest.raises(TypeError, match=r"^\w+: expected .*array.*, got type <class"):
            getattr(regard, function)(*given)


@pytest.mark.parametrize("option", ["mask", "bias", "out", "key_lengths"])
def test_a_class_is_no_array_in_options_either(option):
    with pytest.raises(TypeError, match=rf"^{option}: expected an array.*, got type <class"):
        regard.attention(Q, K, V, **{option: np.ndarray})


def test_read_only_out():
    out = np.zeros((2, 6, 5, 7), np.float32)
    out.setflags(write=False)
    with pytest.raises(ValueError, match="out"):
        regard.attention(Q, K, V, out=out)


@pytest.mark.parametrize("bad", [0, -1, 2**40])
def test_thread_numbers(bad):
    before = regard.get_num_threads()
    with pytest.raises(ValueError, match=str(bad)):
        regard.set_num_threads(bad)
    with pytest.raises(TypeError):
        regard.set_num_threads("2")
    assert regard.get_num_threads() == before


def test_an_error_leaves_out_untouched():
    out = np.full((2, 6, 5, 7), 3, np.float32)
    with pytest.raises(ValueError):
        regard.attention(Q, K, V[:1], out=out)
    assert (out == 3).all()
