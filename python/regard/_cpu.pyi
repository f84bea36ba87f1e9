# Written by tools/stubs.py from the compiled _cpu_<instruction set>; do not edit.
from __future__ import annotations
import numpy
import typing
import typing_extensions
__all__: list[str] = ['attention', 'bfloat16_capsule', 'get_num_threads', 'global_pool', 'linear', 'norm', 'pack_linear', 'set_num_threads', 'squeeze_excitation']

def attention(query: typing.Any, key: typing.Any, value: typing.Any, mask: typing.Any, bias: typing.Any, alibi_slopes: typing.Any, sinks: typing.Any, query_lengths: typing.Any, key_lengths: typing.Any, out: typing.Any, window_left: int, window_right: int, alignment: int, scale: float, softcap: float, sequence_first: bool, return_lse: bool) -> typing.Any:
    ...

def bfloat16_capsule(words: numpy.ndarray) -> typing_extensions.CapsuleType:
    ...

def get_num_threads() -> int:
    ...

def global_pool(x: typing.Any, channels_last: bool, maximum: bool) -> typing.Any:
    ...

def linear(x: typing.Any, weight: typing.Any, bias: typing.Any, out: typing.Any, packed_out_features: int, activation: int) -> typing.Any:
    ...

def norm(x: typing.Any, residual: typing.Any, weight: typing.Any, bias: typing.Any, out: typing.Any, eps: float, rms: bool) -> typing.Any:
    ...

def pack_linear(weight: typing.Any, bias: typing.Any) -> typing.Any:
    ...

def set_num_threads(n: int) -> None:
    ...

def squeeze_excitation(x: typing.Any, w_reduce: typing.Any, b_reduce: typing.Any, w_expand: typing.Any, b_expand: typing.Any, out: typing.Any, activation: int, gate: int, gate_alpha: float, gate_beta: float, channels_last: bool) -> typing.Any:
    ...
