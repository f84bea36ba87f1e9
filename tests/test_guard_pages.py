"""Arrays that end at a page nobody may touch, and arrays that begin after one: an access outside kills the process.

In subprocesses, one an instruction set; what is computed there must have the bits of ordinary arrays.
"""

from __future__ import annotations

import sys

import pytest
from helpers import run_python
from regard import _backend

PROGRAM = '''
import ctypes, mmap
import ml_dtypes
import numpy as np
import regard

libc = ctypes.CDLL(None, use_errno=True)
PAGE = mmap.PAGESIZE
kept = []

def fenced(x, where):
    """A copy of x whose last byte lies before, or whose first lies after, a page without access."""
    x = np.ascontiguousarray(x)
    size = -(-max(x.nbytes, 1) // PAGE) * PAGE
    memory = mmap.mmap(-1, size + 2 * PAGE)
    kept.append(memory)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for page in (start, start + PAGE + size):
        assert libc.mprotect(ctypes.c_void_p(page), PAGE, 0) == 0
    offset = PAGE + (size - x.nbytes if where == "end" else 0)
    y = np.frombuffer(memory, np.uint8, x.nbytes, offset).view(x.dtype).reshape(x.shape)
    y[...] = x
    return y

rng = np.random.default_rng(0)
def normal(*shape, dtype=np.float32):
    return rng.standard_normal(shape, np.float32).astype(dtype)

def calls():
    for dtype in (np.float32, np.float64, np.float16, ml_dtypes.bfloat16):
        for len_q, len_kv, dim, dim_v in ((1, 1, 1, 1), (1, 67, 64, 64), (3, 130, 17, 33), (5, 97, 40, 7), (50, 131, 64, 48), (49, 49, 3, 130)):
            q, k, v = normal(2, 4, len_q, dim, dtype=dtype), normal(2, 2, len_kv, dim, dtype=dtype), normal(2, 2, len_kv, dim_v, dtype=dtype)
            yield regard.attention, (q, k, v), {}
            yield regard.attention, (q, k, v), dict(return_weights=True, return_lse=True)
            if dtype in (np.float32, ml_dtypes.bfloat16):
                yield regard.attention, (q, k, v), dict(
                    mask=rng.random((2, 1, len_q, len_kv)) < 0.8, bias=normal(4, len_q, len_kv, dtype=dtype), softcap=9.0,
                    sinks=normal(4), alibi_slopes=abs(normal(4)), alignment="lower_right", window=(40, 1),
                    key_lengths=np.array([len_kv, 1]), query_lengths=np.array([1, len_q]))
                yield regard.attention, (q, k, v), dict(bias=normal(1, 1, 1, len_kv), mask=rng.random((len_kv,)) < 0.9)
                yield regard.attention, (q[..., ::-1], k[:, :, ::-1], v), dict(dropout_p=0.2, seed=1)
    q, k, v = normal(57, 4, 40), normal(140, 2, 40), normal(140, 2, 24)
    yield regard.attention_varlen, (q, k, v, np.array([0, 3, 3, 57]), np.array([0, 70, 71, 140], np.int32)), {}
    table, lengths = np.array([[1, 4], [0, 2]], np.int32), np.array([14, 9])
    for n in (1, 30):
        pages = normal(5, 7, 2, 40), normal(5, 7, 2, 24)
        yield regard.attention_paged, (normal(2, 4, n, 40), *pages, table, lengths), dict(causal=True, alignment="lower_right")
        for dtype in (np.int8, ml_dtypes.float8_e4m3fn):
            eight = [(x * 20).astype(dtype) for x in pages]
            yield regard.attention_paged, (normal(2, 4, n, 40), *eight, table, lengths), dict(
                key_scales=abs(normal(5, 7, 2)), value_scales=abs(normal(5, 7, 2)))

count = 0
for function, arrays, options in calls():
    threads = regard.get_num_threads()
    want = function(*arrays, **options)
    for where in ("end", "start"):
        inputs = [fenced(x, where) for x in arrays]
        fenced_options = {n: fenced(x, where) if isinstance(x, np.ndarray) else x for n, x in options.items()}
        first = want[0] if isinstance(want, tuple) else want
        out = fenced(np.zeros_like(first), where)
        got = function(*inputs, **fenced_options, out=out)
        for a, b in zip(got if isinstance(got, tuple) else (got,), want if isinstance(want, tuple) else (want,), strict=True):
            assert a.tobytes() == b.tobytes(), (function, [x.shape for x in arrays], list(options), where)
        count += 1
print(count, "calls stayed inside")
'''  # noqa: E501


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="guard pages are made with Linux's mprotect")
@pytest.mark.parametrize("isa", _backend.possible())
def test_nothing_outside_an_array_is_touched(isa: str) -> None:
    done = run_python(PROGRAM, isa)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "calls stayed inside" in done.stdout


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="guard pages are made with Linux's mprotect")
def test_the_guard_pages_guard() -> None:
    code = PROGRAM.partition("def calls")[0] + (
        "x = fenced(normal(4), 'end')\nctypes.string_at(x.ctypes.data, x.nbytes)\nprint('inside', flush=True)\n"
        "ctypes.string_at(x.ctypes.data, x.nbytes + 1)\nprint('outside')\n"
    )
    done = run_python(code)
    assert "inside" in done.stdout and "outside" not in done.stdout and done.returncode < 0
