"""Extra memory does not grow with len_q x len_kv."""

from __future__ import annotations

import sys

import pytest
from helpers import run_python
from regard import _backend

MEASURE = """
import resource
import numpy as np, regard

# A call that does make the whole matrix should fail at once, and not fill the machine.
resource.setrlimit(resource.RLIMIT_AS, (3 << 30, 3 << 30))

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # MiB; Linux counts in KiB

length, options = {length}, {options}
q, k, v = (np.random.default_rng(i).standard_normal((1, 1, length, 64), np.float32)
           for i in range(3))
small = [x[:, :, :300].copy() for x in (q, k, v)]
regard.attention(*small, **options)  # what loads once, loads here
before = peak()
out = regard.attention(q, k, v, return_lse=True, **options)[0]
print(peak() - before)
# A sanity check that costs little: outputs are averages.
assert np.isfinite(out).all() and np.abs(out).max() <= np.abs(v).max() * 1.001
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss counts differently elsewhere")
# On the best instruction set only: seconds there may be half a minute on the slowest, which the
# next test covers.
@pytest.mark.parametrize("isa", _backend.possible()[-1:])
def test_len_32768_adds_less_than_64_MiB(isa):
    done = run_python(MEASURE.format(length=32768, options={}), isa, timeout=300)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 64


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss counts differently elsewhere")
@pytest.mark.parametrize("isa", _backend.possible())
def test_len_8192_causal_adds_less_than_32_MiB(isa):
    # The score matrix alone would be 256 MiB.
    done = run_python(MEASURE.format(length=8192, options={"causal": True}), isa, timeout=300)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 32


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss counts differently elsewhere")
def test_calls_leak_nothing():
    done = run_python(
        """
import resource
import numpy as np, regard
x = np.ones((1, 2, 256, 64), np.float32)
mask = np.ones((256, 256), bool)
def work(n):
    for _ in range(n):
        regard.attention(x, x, x, mask=mask, return_lse=True)
        regard.linear(x, x[0, 0])
        try:
            regard.attention(x, x[..., :3], x)
        except ValueError:
            pass
work(100)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
work(600)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 16  # 600 calls that kept an output each would be 75 MiB
