# Written by tools/stubs.py from the compiled _cpu_<instruction set>; do not edit.
from __future__ import annotations
import numpy
import typing
import typing_extensions
__all__: list[str] = ['additive_attention', 'attention', 'bfloat16_capsule', 'bfloat16_words', 'cbam', 'channel_attention', 'efficient_channel_attention', 'get_num_threads', 'global_pool', 'linear', 'location_sensitive_attention', 'measure_fma', 'measure_read', 'multiplicative_attention', 'norm', 'openmp', 'pack_linear', 'pack_recurrent', 'recurrent', 'set_num_threads', 'spatial_attention', 'squeeze_excitation']

def additive_attention(query: typing.Any, key: typing.Any, value: typing.Any, v: typing.Any, w_query: typing.Any, w_key: typing.Any, bias: typing.Any, mask: typing.Any, key_lengths: typing.Any, return_weights: bool) -> typing.Any:
    ...

def attention(query: typing.Any, key: typing.Any, value: typing.Any, mask: typing.Any, bias: typing.Any, alibi_slopes: typing.Any, sinks: typing.Any, query_lengths: typing.Any, key_lengths: typing.Any, out: typing.Any, window_left: int, window_right: int, alignment: int, scale: float, softcap: float, sequence_first: bool, return_lse: bool) -> typing.Any:
    ...

def bfloat16_capsule(words: numpy.ndarray) -> typing_extensions.CapsuleType:
    ...

def bfloat16_words(capsule: typing_extensions.CapsuleType) -> numpy.ndarray:
    ...

def cbam(x: typing.Any, w_reduce: typing.Any, b_reduce: typing.Any, w_expand: typing.Any, b_expand: typing.Any, w_spatial: typing.Any, b_spatial: typing.Any, out: typing.Any, activation: int, gate: int, gate_alpha: float, gate_beta: float, channels_last: bool) -> typing.Any:
    ...

def channel_attention(x: typing.Any, w_reduce: typing.Any, b_reduce: typing.Any, w_expand: typing.Any, b_expand: typing.Any, out: typing.Any, activation: int, gate: int, gate_alpha: float, gate_beta: float, channels_last: bool) -> typing.Any:
    ...

def efficient_channel_attention(x: typing.Any, w: typing.Any, out: typing.Any, gate: int, gate_alpha: float, gate_beta: float, channels_last: bool) -> typing.Any:
    ...

def get_num_threads() -> int:
    ...

def global_pool(x: typing.Any, channels_last: bool, maximum: bool) -> typing.Any:
    ...

def linear(x: typing.Any, weight: typing.Any, bias: typing.Any, out: typing.Any, packed_out_features: int, activation: int) -> typing.Any:
    ...

def location_sensitive_attention(query: typing.Any, key: typing.Any, value: typing.Any, previous_weights: typing.Any, v: typing.Any, w_query: typing.Any, w_key: typing.Any, w_location: typing.Any, location_kernel: typing.Any, location_bias: typing.Any, bias: typing.Any, mask: typing.Any) -> typing.Any:
    ...

def measure_fma(seconds: float) -> float:
    ...

def measure_read(bytes: int, seconds: float) -> float:
    ...

def multiplicative_attention(query: typing.Any, key: typing.Any, value: typing.Any, w: typing.Any, mask: typing.Any, key_lengths: typing.Any, return_weights: bool) -> typing.Any:
    ...

def norm(x: typing.Any, residual: typing.Any, weight: typing.Any, bias: typing.Any, out: typing.Any, eps: float, rms: bool) -> typing.Any:
    ...

def pack_linear(weight: typing.Any, bias: typing.Any) -> typing.Any:
    ...

def pack_recurrent(w_hidden: typing.Any, b_hidden: typing.Any, lstm: bool) -> typing.Any:
    ...

def recurrent(x: typing.Any, h0: typing.Any, c0: typing.Any, lengths: typing.Any, w_input: typing.Any, w_hidden: typing.Any, b_input: typing.Any, b_hidden: typing.Any, w_input_reverse: typing.Any, w_hidden_reverse: typing.Any, lstm: bool, reverse: bool, time_major: bool, packed_hidden: int) -> typing.Any:
    ...

def set_num_threads(n: int) -> None:
    ...

def spatial_attention(x: typing.Any, w_spatial: typing.Any, b_spatial: typing.Any, out: typing.Any, gate: int, gate_alpha: float, gate_beta: float, channels_last: bool) -> typing.Any:
    ...

def squeeze_excitation(x: typing.Any, w_reduce: typing.Any, b_reduce: typing.Any, w_expand: typing.Any, b_expand: typing.Any, out: typing.Any, activation: int, gate: int, gate_alpha: float, gate_beta: float, channels_last: bool) -> typing.Any:
    ...
openmp: int
