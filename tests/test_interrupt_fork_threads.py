"""Ctrl-C, fork, and threads. Times are generous: they tell working from hanging."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time

import numpy as np
import pytest
import regard
from helpers import assert_same_bits, normal, run_python
from regard import _backend

# Many seconds of work out of little memory: inputs repeat by zero strides, and outputs are narrow.
LONG_CALLS = {
    "attention": """
x = np.broadcast_to(one, (64, 16, 16384, 64))
regard.attention(x, x, x[..., :1])
""",
    "decode": """
x = np.broadcast_to(one, (1 << 18, 1, 1 << 16, 64))
regard.attention(x[:, :, :1], x, x[..., :1])
""",
    "linear": """
x = np.broadcast_to(one[0, 0, :, :1], (1 << 16, 1 << 14))
regard.linear(x, x[: 1 << 10])
""",
    # Threads share each of a great many short steps.
    "recurrent": """
w = np.ones((900, 300), np.float32)
regard.gru(np.broadcast_to(one[0, :, :, :4], (1, 1 << 18, 4)), w[:, :4], w)
""",
}


@pytest.mark.skipif(os.name != "posix", reason="sends SIGINT")
@pytest.mark.parametrize("isa", _backend.possible())
@pytest.mark.parametrize("call", LONG_CALLS)
def test_ctrl_c(isa, call):
    code = f"""
import resource, signal
import numpy as np, regard
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job started in the background inherits "ignore"
resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))  # what takes more than this is a bug
one = np.ones((1, 1, 1, 64), np.float32)
print("started", flush=True)
try:
{textwrap.indent(LONG_CALLS[call], "    ")}
    print("finished")
except KeyboardInterrupt:
    print("interrupted", flush=True)
# The next call works, on the threads that were stopped.
x = np.ones((1, 2, 300, 64), np.float32)
assert np.allclose(regard.attention(x, x, x), 1)
print("usable", flush=True)
"""
    child = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"REGARD_ISA": isa},
    )
    assert child.stdout is not None and child.stderr is not None
    hung = threading.Timer(60, child.kill)
    hung.start()
    try:
        assert child.stdout.readline() == "started\n"
        time.sleep(0.5)  # into the call
        begin = time.monotonic()
        child.send_signal(signal.SIGINT)
        said = child.stdout.readline()
        elapsed = time.monotonic() - begin
        # Not communicate(): it would pass over what readline() has buffered already.
        rest, errors = child.stdout.read(), child.stderr.read()
        child.wait()
    finally:
        hung.cancel()
        child.kill()
        child.wait()
        child.stdout.close()
        child.stderr.close()
    assert said == "interrupted\n", errors
    assert (rest, child.returncode) == ("usable\n", 0), errors
    # The promise is 0.2 s on a free machine.
    assert elapsed < 5


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("isa", _backend.possible())
def test_fork_after_use(isa):
    # Threads do not survive a fork, and a pool that waits for them would hang: hence the alarm.
    done = run_python(
        """
import os, signal, sys, warnings
import numpy as np, regard
warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 on forking beside threads
regard.set_num_threads(4)
rng = np.random.default_rng(0)
q, k, v = (rng.standard_normal((2, 4, 200, 64)).astype(np.float32) for _ in range(3))
x, w = q.reshape(-1, 64), k[0, 0]
wants = regard.attention(q, k, v), regard.linear(x, w)
children = []
for _ in range(3):
    child = os.fork()
    if child == 0:
        signal.alarm(60)
        gots = regard.attention(q, k, v), regard.linear(x, w)
        same = all((g == w).all() for g, w in zip(gots, wants))
        os._exit(0 if same and regard.get_num_threads() >= 1 else 3)
    children.append(child)
statuses = [os.waitpid(child, 0)[1] for child in children]
same = (regard.attention(q, k, v) == wants[0]).all()  # and the parent still works
print(statuses, same)
""",
        isa,
    )
    assert done.stdout == "[0, 0, 0] True\n", done.stderr


def test_threads_at_once(backend):
    """Many Python threads, each with its own problem and some with other thread counts set."""
    problems = [tuple(normal(10 * i + j, 1, 2, 60 + i, 32) for j in range(3)) for i in range(8)]
    wants = [regard.attention(*p) for p in problems]
    layer = normal(1, 40, 32), normal(2, 50, 32)
    want_layer = regard.linear(*layer)
    failures: list[BaseException] = []
    barrier = threading.Barrier(len(problems))

    def work(i: int) -> None:
        try:
            barrier.wait()
            for _ in range(20):
                assert_same_bits(regard.attention(*problems[i]), wants[i])
                assert_same_bits(regard.linear(*layer), want_layer)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(problems))]
    before = regard.get_num_threads()
    for t in threads:
        t.start()
    for n in (1, 2, 3, 2):  # while they run
        regard.set_num_threads(n)
        time.sleep(0.01)
    for t in threads:
        t.join(120)
    regard.set_num_threads(before)
    assert not any(t.is_alive() for t in threads)
    assert not failures, failures


def test_the_gil_is_released(backend):
    """While one thread computes, another runs Python."""
    x = normal(0, 1, 4, 1500, 64)
    done = threading.Event()

    def work() -> None:
        try:
            # As often as it takes for a fast machine to be busy for a while.
            begin = time.monotonic()
            while time.monotonic() - begin < 0.5:
                regard.attention(x, x, x)
        finally:
            done.set()

    thread = threading.Thread(target=work)
    regard.attention(x, x, x)
    begin = time.perf_counter()
    regard.attention(x, x, x)
    one_call = time.perf_counter() - begin
    thread.start()
    gaps, last = [], time.perf_counter()
    while not done.is_set():
        time.sleep(0.0005)
        now = time.perf_counter()
        gaps.append(now - last)
        last = now
    thread.join()
    # Were the GIL held, every turn of this loop would wait for a call to end: the typical gap
    # would be one call long. Released, it is the sleep.
    assert np.median(gaps) < max(0.5 * one_call, 0.005)


@pytest.mark.parametrize("isa", _backend.possible())
def test_more_threads_than_cores(isa):
    done = run_python(
        """
import numpy as np, regard
regard.set_num_threads(64)
assert regard.get_num_threads() == 64
x = np.random.default_rng(0).standard_normal((2, 8, 100, 64)).astype(np.float32)
want = regard.attention(x, x, x)
regard.set_num_threads(1)
print((regard.attention(x, x, x) == want).all())
""",
        isa,
    )
    assert done.stdout == "True\n", done.stderr


def test_importing_leaves_the_processor_state_alone():
    # Flush-to-zero set by a library's initialisers is a classic: subnormals would vanish.
    done = run_python(
        """
import numpy as np
tiny = np.float32(1e-40)
import regard
assert tiny * np.float32(0.5) != 0
print("kept")
"""
    )
    assert done.stdout == "kept\n", done.stderr
