"""On a GPU, through CuPy: the cases of tests/cases.py, streams, concurrent use and NVIDIA's sanitizer.

The same kernels run without one in tests/cuda_emulation; those tests that ask nothing of the emulator run here too.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
from collections.abc import Iterator
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
from test_emulated_linear import (  # noqa: E402, F401
    test_extremes,
    test_int8_is_exactly_what_it_says,
    test_layers_that_hold_linear_ones,
    test_refusals,
    test_what_follows_the_product,
    test_what_is_held,
)
from test_emulated_linear import test_linear_modules as test_linear_modules_of_int8  # noqa: E402, F401
from test_emulated_nn import (  # noqa: E402, F401
    test_additive_modules,
    test_attention_modules,
    test_attention_modules_options,
    test_channel_modules,
    test_embeddings,
    test_errors_of_packed_weights,
    test_feed_forward_modules,
    test_generation,
    test_linear_modules,
    test_masks_of_modules,
    test_norm_modules,
    test_packed_weights,
    test_position_modules,
    test_recomputing,
    test_recurrent_modules,
    test_transformers,
    test_vision_transformers,
)
from test_emulated_onnx import test_attention as test_onnx_attention  # noqa: E402, F401
from test_emulated_onnx import test_rotary_embedding as test_onnx_rotary_embedding  # noqa: E402, F401
from test_emulated_onnx import test_scores as test_onnx_scores  # noqa: E402, F401
from test_emulated_recurrent import (  # noqa: E402, F401
    test_a_state_longer_than_shared_memory_holds_at_a_time,
    test_empty_sizes,
    test_every_edge,
    test_lengths_and_directions,
    test_more_steps_than_a_chunk,
    test_saturated_gates_and_non_finite_inputs,
    test_strides_change_no_bit,
)
from test_emulated_search import test_a_recurrent_translator  # noqa: E402, F401
from test_emulated_sequences import (  # noqa: E402, F401
    test_a_page_table_on_the_device_is_held_to_its_range,
    test_a_shorter_sequence_may_have_more_splits,
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


@pytest.fixture(name="gpu")
def _gpu() -> Any:
    return cupy


@pytest.fixture(name="dtype", params=["float32", "bfloat16"])
def _dtype(request: pytest.FixtureRequest) -> str:
    """A dtype of each kernel for many queries: of tests that leave the dtype to the emulator's GPU."""
    return str(request.param)


@pytest.fixture(name="tensor_cores")
def _tensor_cores() -> None:
    """The GPU is what it is."""


@pytest.fixture(autouse=True)
def _device_is_there_afterwards() -> Iterator[None]:
    """A fault of a kernel is its test's, not a later one's; a process that had one gets no further answer from CUDA."""
    yield
    try:
        cupy.cuda.Device().synchronize()
    except Exception as fault:
        if "PYTEST_XDIST_WORKER" in os.environ:  # pytest-xdist says which test it was, and starts another worker
            os._exit(1)
        pytest.exit(f"the device is lost to this process: {fault}", returncode=1)


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


def test_modules_with_torch_tensors() -> None:
    torch = pytest.importorskip("torch", reason="compares PyTorch's modules")
    if not torch.cuda.is_available():
        pytest.skip("this PyTorch has no CUDA")
    layer = torch.nn.TransformerEncoderLayer(64, 4, 128, batch_first=True).eval().cuda()
    ours = regard.nn.TransformerEncoderLayer(64, 4, 128, batch_first=True)
    ours.load_state_dict(layer.state_dict())
    x = torch.randn(2, 30, 64, device="cuda")
    with torch.no_grad(), torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda.current_stream().wait_stream(torch.cuda.default_stream())
        want, got = layer(x), ours(x)
        assert got.device == x.device and (got - want).abs().max().item() < 1e-4
        half = ours(x.bfloat16())
        assert half.dtype == torch.bfloat16 and (half.float() - want).abs().max().item() < 0.2
        torch.cuda.current_stream().synchronize()


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "int8", "float8_e4m3fn"])
def test_caches_beside_torch_tensors(dtype: str) -> None:
    """The bits that a cache beside CuPy's arrays gives."""
    torch = pytest.importorskip("torch", reason="compares PyTorch's tensors")
    if not torch.cuda.is_available():
        pytest.skip("this PyTorch has no CUDA")
    key, value, query = (normal(i, 2, 3, 40, 64) for i in range(3))
    found = []
    for on in (cupy.asarray, lambda x: torch.from_numpy(x).cuda()):
        cache = regard.KVCache(3, 3, 60, 64, dtype=dtype, like=on(key))
        cache.append(*(on(np.concatenate((x, x[:1]))) for x in (key, value)), np.array([40, 7, 3]))
        cache.reorder([1, 0])
        cache.truncate([5, 33])
        found.append(cache.attend(on(query), causal=True))
    assert_same_bits(found[1].cpu().numpy(), cupy.asnumpy(found[0]))


def test_explain_names_the_device() -> None:
    x = [cupy.asarray(normal(i, 1, 2, 100, 64, dtype="float16")) for i in range(3)]
    found = regard.explain("attention", *x)
    capability = cupy.cuda.Device().compute_capability
    assert found.instruction_set == f"sm_{capability}" and found.kernel
    assert found.left_out or found.bound in found.times


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
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(command, stdout=said, stderr=said, start_new_session=True)
        try:
            status = process.wait(timeout=100)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # what runs under the tool, too
        said.seek(0)
        words = said.read()
    if "Device not supported" in words:
        pytest.skip("compute-sanitizer does not support this device")
    assert status == 0, words[-5000:]
