"""Every operation of regard in plain NumPy: the specification.

The functions have the names and the arguments of the public ones, but for what is no mathematics (out,
threads, devices), and are written for reading beside the papers, one small named step after another;
nothing here is fast. Compiled kernels are right when they agree with it.

Precision. float64 and float32 inputs are computed in their own precision, so that the error of
plain float32 NumPy can be measured; float16 and bfloat16 are computed in float32 and rounded once,
at the end. For a result to compare against, convert the inputs to float64 first. Additive,
multiplicative and location-sensitive attention are computed in float64 whatever they are given, and
rounded to the query's dtype.

Dimensions: batch, heads, heads_kv, len_q, len_kv, dim_qk, dim_v.
"""

from __future__ import annotations

from regard.reference.additive import additive_attention, location_sensitive_attention, multiplicative_attention
from regard.reference.channel import (
    cbam,
    channel_attention,
    efficient_channel_attention,
    global_average_pool,
    global_max_pool,
    spatial_attention,
    squeeze_excitation,
)
from regard.reference.dense import layer_norm, linear, rms_norm
from regard.reference.dot_product import (
    attention,
    attention_paged,
    attention_varlen,
    scaled_dot_product_attention,
)
from regard.reference.merge import merge_attention
from regard.reference.recurrent import gru, lstm
from regard.reference.rotary import rotary_embedding

__all__ = [
    "additive_attention",
    "attention",
    "attention_paged",
    "attention_varlen",
    "cbam",
    "channel_attention",
    "efficient_channel_attention",
    "global_average_pool",
    "global_max_pool",
    "gru",
    "layer_norm",
    "linear",
    "location_sensitive_attention",
    "lstm",
    "merge_attention",
    "multiplicative_attention",
    "rms_norm",
    "rotary_embedding",
    "scaled_dot_product_attention",
    "spatial_attention",
    "squeeze_excitation",
]
