# Written by tools/stubs.py from the compiled _cpu_<instruction set>; do not edit.
from __future__ import annotations
import numpy
import typing
import typing_extensions
__all__: list[str] = ['attention', 'bfloat16_capsule', 'get_num_threads', 'set_num_threads']

def attention(query: typing.Any, key: typing.Any, value: typing.Any, mask: typing.Any, bias: typing.Any, alibi_slopes: typing.Any, sinks: typing.Any, query_lengths: typing.Any, key_lengths: typing.Any, out: typing.Any, window_left: int, window_right: int, alignment: int, scale: float, softcap: float, sequence_first: bool, return_lse: bool) -> typing.Any:
    ...

def bfloat16_capsule(words: numpy.ndarray) -> typing_extensions.CapsuleType:
    ...

def get_num_threads() -> int:
    ...

def set_num_threads(n: int) -> None:
    ...
