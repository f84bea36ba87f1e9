"""No kernel of caches, rotary embedding or merging touches memory beyond its arrays.

Every array lies against a page that may not be touched, behind its last byte or before its first. Runs in a fresh
interpreter a group, because what this looks for kills it.
"""

from __future__ import annotations

import sys

import pytest
from helpers import run_python
from regard import _backend

CODE = """
import ctypes, mmap
import ml_dtypes
import numpy as np
import regard

libc = ctypes.CDLL(None, use_errno=True)
libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
PAGE = mmap.PAGESIZE
kept = []

def guarded(x, end=True):
    "A copy of x whose memory ends (or begins) at a page that must not be touched."
    x = np.ascontiguousarray(x)
    body = -(-max(x.nbytes, 1) // PAGE) * PAGE
    memory = mmap.mmap(-1, body + 2 * PAGE)
    base = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for guard in (base, base + PAGE + body):
        assert libc.mprotect(guard, PAGE, 0) == 0
    kept.append(memory)
    start = PAGE + (body - x.nbytes if end else 0)
    y = np.frombuffer(memory, np.uint8, x.nbytes, start).view(x.dtype).reshape(x.shape)
    y[...] = x
    return y

rng = np.random.default_rng(0)
def normal(*shape):
    return rng.standard_normal(shape).astype(np.float32)

DTYPES = [np.float32, np.float64, np.float16, ml_dtypes.bfloat16]
def rotary(end):
    for dtype in DTYPES:
        for dim, pairs in ((2, 1), (34, 17), (64, 32), (65, 13), (7, 0)):
            x = guarded(normal(2, 3, 5, dim).astype(dtype), end)
            cos, sin = (guarded(t, end) for t in regard.rotary_tables(2 * pairs, 9))
            for interleaved in (False, True):
                for given in ((), (guarded(np.array([8, 0, 3, 1, 8]), end),)):
                    regard.rotary_embedding(x, cos, sin, *given, interleaved=interleaved)

def merge(end):
    for dtype in DTYPES:
        for dim in (1, 7, 16, 33, 64, 129):
            outs = [guarded(normal(3, 11, dim).astype(dtype), end) for _ in range(3)]
            lses = [guarded(normal(3, 11), end) for _ in range(3)]
            regard.merge_attention(outs, lses)

def replace(store, end):
    for name in ("key", "value", "key_scales", "value_scales"):
        x = getattr(store, name)
        if x is not None:
            setattr(store, name, guarded(x, end))

def append(end):
    for storage in ("float32", "float64", "float16", "bfloat16", "int8", "float8_e4m3fn"):
        for dtype in DTYPES:
            for dim_qk, dim_v in ((1, 3), (16, 64), (33, 17)):
                cache = regard.KVCache(2, 3, 9, dim_qk, dim_v, storage)
                paged = regard.PagedKVCache(6, 3, 3, dim_qk, dim_v, storage)
                replace(cache._store, end), replace(paged._store, end)
                numbers = [paged.new_sequence(), paged.new_sequence()]
                for n in (1, 8):
                    key, value = (guarded(normal(2, 3, n, d).astype(dtype), end) for d in (dim_qk, dim_v))
                    cos, sin = (guarded(t, end) for t in regard.rotary_tables(dim_qk // 2 * 2, 9))
                    cache.append(key, value, cos=cos, sin=sin)
                    paged.append(numbers, key, value, cos=cos, sin=sin)
                assert cache.lengths.tolist() == [9, 9] and paged.free_pages == 0
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs mprotect")
@pytest.mark.parametrize("isa", _backend.possible())
@pytest.mark.parametrize("function", ["rotary", "merge", "append"])
def test_against_guard_pages(function, isa):
    done = run_python(f"{CODE}\n{function}(True)\n{function}(False)\nprint('whole')", isa=isa)
    assert done.returncode == 0 and done.stdout.strip() == "whole", done.stderr
