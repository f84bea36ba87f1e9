"""On a GPU, through CuPy: the cases of tests/cases.py, streams, concurrent use and NVIDIA's sanitizer.

The same kernels run without one in tests/cuda_emulation; those tests that ask nothing of the emulator run here too.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import textwrap
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import regard
from cases import CASES, DTYPES
from helpers import assert_case, assert_same_bits, normal, problem
from regard import _backend

pytestmark = pytest.mark.gpu


def why_not() -> str | None:
    try:
        import cupy  # noqa: F401

        _backend.cuda("tests")
    except (ImportError, NotImplementedError) as reason:
        return str(reason)
    return None


REASON = why_not()
if REASON is not None:
    pytest.skip(f"needs an NVIDIA GPU and CuPy: {REASON}", allow_module_level=True)

import cupy  # noqa: E402

sys.path.insert(0, str(Path(__file__).parent / "cuda_emulation"))
from test_emulated_additive import (  # noqa: E402, F401
    test_additive,
    test_additive_without_projections_and_with_nothing_seen,
    test_linear,
    test_location_sensitive,
    test_location_sensitive_with_fewer_arguments,
    test_more_queries_than_are_located_at_a_time,
    test_multiplicative,
)
from test_emulated_caches import (  # noqa: E402, F401
    test_a_cache_attends,
    test_a_paged_cache,
    test_append_stores_what_the_cpu_stores,
    test_merge,
    test_positions_on_the_device_are_held_to_their_range,
    test_rotary,
)
from test_emulated_recurrent import (  # noqa: E402, F401
    test_a_state_longer_than_shared_memory_holds_at_a_time,
    test_empty_sizes,
    test_every_edge,
    test_lengths_and_directions,
    test_more_steps_than_a_chunk,
    test_saturated_gates_and_non_finite_inputs,
    test_strides_change_no_bit,
)
from test_emulated_sequences import (  # noqa: E402, F401
    test_a_page_table_on_the_device_is_held_to_its_range,
    test_block_masks,
    test_paged_is_the_reference,
    test_pages_of_any_type,
    test_starts_on_the_device_are_held_to_their_range,
    test_varlen_has_each_sequence_s_own_bits,
    test_varlen_is_the_reference,
    test_weights,
    test_weights_of_packed_and_paged_sequences,
)


@pytest.fixture(name="cupy")
def _cupy() -> Any:
    return cupy


def on_device(options: dict[str, Any]) -> dict[str, Any]:
    return {k: cupy.asarray(x) if isinstance(x, np.ndarray) else x for k, x in options.items()}


def device_array(x: np.ndarray) -> Any:
    """`x` in a GPU's memory, with strides like its own."""
    low = sum(min(0, (n - 1) * s) for n, s in zip(x.shape, x.strides, strict=True))
    high = sum(max(0, (n - 1) * s) for n, s in zip(x.shape, x.strides, strict=True))
    if x.size == 0:
        return cupy.empty(x.shape, x.dtype)
    memory = cupy.cuda.alloc(high - low + x.itemsize)
    view = cupy.ndarray(x.shape, x.dtype, memory + -low, x.strides)
    if 0 in (s for n, s in zip(x.shape, x.strides, strict=True) if n > 1):
        return cupy.broadcast_to(
            cupy.asarray(x[tuple(slice(0, 1) if s == 0 else slice(None) for s in x.strides)]), x.shape
        )
    view[...] = cupy.asarray(np.ascontiguousarray(x))
    return view


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_cases(name: str, dtype: str) -> None:
    query, key, value, options = problem(name, dtype)
    if any(x.ctypes.data % x.itemsize for x in (query, key, value)):
        pytest.skip("device arrays are aligned to their elements")
    arrays = [device_array(x) for x in (query, key, value)]
    out, lse = regard.attention(*arrays, return_lse=True, **on_device(options))
    assert_case(name, dtype, cupy.asnumpy(out), cupy.asnumpy(lse))


@pytest.mark.parametrize("dtype", DTYPES)
def test_runs_and_batches_agree_to_the_bit(dtype: str) -> None:
    arrays = [cupy.asarray(normal(i, 3, 4, 500, 64, dtype=dtype)) for i in range(3)]
    want = cupy.asnumpy(regard.attention(*arrays, causal=True))
    for _ in range(3):
        assert_same_bits(cupy.asnumpy(regard.attention(*arrays, causal=True)), want)
    part = regard.attention(*(x[1:2, 2:3] for x in arrays), causal=True)
    assert_same_bits(cupy.asnumpy(part), want[1:2, 2:3])


def test_streams_and_threads() -> None:
    arrays = [cupy.asarray(normal(i, 2, 4, 400, 64, dtype="float16")) for i in range(3)]
    want = cupy.asnumpy(regard.attention(*arrays))
    wrong: list[int] = []

    def work(seed: int) -> None:
        with cupy.cuda.Stream(non_blocking=True) as stream:
            for _ in range(20):
                out = regard.attention(*arrays)
                stream.synchronize()
                if cupy.asnumpy(out).tobytes() != want.tobytes():
                    wrong.append(seed)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong


def test_torch_tensors() -> None:
    torch = pytest.importorskip("torch", reason="compares PyTorch's tensors")
    if not torch.cuda.is_available():
        pytest.skip("this PyTorch has no CUDA")
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        q, k, v = (torch.randn(2, 3, 70, 64, device="cuda", dtype=dtype) for _ in range(3))
        out = regard.attention(q, k, v, causal=True)
        assert out.device == q.device and out.dtype == dtype
        want = torch.nn.functional.scaled_dot_product_attention(*(x.double() for x in (q, k, v)), is_causal=True)
        near = {torch.float32: 1e-5, torch.float16: 2e-2, torch.bfloat16: 1e-1}[dtype]
        assert (out.double() - want).abs().max().item() < near


@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "synccheck", "initcheck"])
def test_compute_sanitizer(tool: str) -> None:
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        pytest.skip("compute-sanitizer is not installed")
    code = textwrap.dedent(
        """
        import cupy, numpy, regard
        for dtype in ("float32", "float16"):
            for dim in (20, 64, 128):
                x = [cupy.asarray(numpy.random.rand(1, 2, 70, dim).astype(dtype)) for _ in range(3)]
                regard.attention(*x, causal=True, return_lse=True)
                cache = regard.KVCache(1, 2, 80, dim, dtype="int8", like=x[0])
                cache.append(*x[1:])
                cache.attend(x[0], causal=True), cache.attend(x[0][:, :, :3], causal=True)
                rows = [a[0].swapaxes(0, 1) for a in x]
                regard.attention_varlen(*rows, numpy.array([0, 3, 70]), numpy.array([0, 40, 70]))
        cupy.cuda.Device().synchronize()
        """
    )
    command = [sanitizer, "--tool", tool, "--error-exitcode", "9", sys.executable, "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=dict(os.environ))
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-1000:]
