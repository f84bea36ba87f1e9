"""regard.explain for arrays on a GPU, emulated: it names what the call then launches, and launches nothing itself."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import regard
from helpers import normal
from regard._cli.operations import OPERATIONS

ROOT = Path(__file__).resolve().parents[2]


def on_device(cupy: Any, x: Any) -> Any:
    if isinstance(x, (list, tuple)) and any(isinstance(y, np.ndarray) for y in x):
        return type(x)(on_device(cupy, y) for y in x)
    return cupy.asarray(x) if isinstance(x, np.ndarray) and x.dtype.kind in "fbV" else x


def launches_of(emulator: Any, function: Any, *args: Any, **options: Any) -> int:
    before = emulator.counters()[0]
    function(*args, **options)
    return emulator.counters()[0] - before


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda o: o.name)
def test_every_operation(cupy, emulator, operation):
    arguments = {name: on_device(cupy, x) for name, x in operation.check[0].arguments(np.float32).items()}
    function = getattr(regard, operation.name)
    try:
        launches = launches_of(emulator, function, **arguments)
    except NotImplementedError as refusal:
        with pytest.raises(NotImplementedError, match=re.escape(str(refusal))):
            regard.explain(operation.name, **arguments)
        return
    before = emulator.counters()[0]
    found = regard.explain(operation.name, **arguments)
    assert emulator.counters()[0] == before
    assert sum(stage.times for stage in found.stages) == launches
    assert found.instruction_set == "sm_90" and found.flops > 0 and found.bytes > 0 and found.memory >= 0
    for stage in found.stages:
        assert stage.blocks > 0 and stage.threads > 0 and stage.source.startswith("csrc/cuda/")
        assert not (ROOT / "csrc").is_dir() or (ROOT / stage.source).is_file()
    assert found.times == {} and found.bound == "" and found.seconds == 0 and found.left_out
    assert str(found).startswith(f"{operation.name}(") and f"left out: {found.left_out}" in str(found)


@pytest.mark.parametrize(
    ("kernel", "device", "dtype", "len_q", "options"),
    [
        ("warpgroups", 90, "float16", 20, {}),
        ("tensor cores", 80, "float16", 20, {}),
        ("tensor cores", 80, "bfloat16", 20, {"causal": True}),
        ("portable", 70, "float16", 20, {}),
        ("portable", 90, "float32", 20, {}),
        ("warpgroups", 90, "float16", 20, {"dropout_p": 0.5}),
        ("tensor cores", 80, "float16", 4, {"dropout_p": 0.5}),
        ("portable", 90, "float16", 4, {"return_weights": True}),
        ("split keys", 90, "float16", 8, {}),
        ("split keys", 80, "float64", 1, {}),
    ],
)
def test_the_kernel_is_the_one_that_runs(cupy, emulator, kernel, device, dtype, len_q, options):
    emulator.set_device(device, 166912)
    query, key = normal(0, 1, 2, len_q, 16, dtype=dtype), normal(1, 1, 2, 20, 16, dtype=dtype)
    arrays = [cupy.asarray(x) for x in (query, key, key)]
    call = {"alignment": "lower_right", **options}
    found = regard.explain("attention", *arrays, **call)
    assert found.kernel == kernel and kernel in str(found)
    before = emulator.counters()
    regard.attention(*arrays, **call)
    after = emulator.counters()
    assert after[0] - before[0] == sum(s.times for s in found.stages)
    (stage,) = (s for s in found.stages if s.kernel)
    assert stage.tensor == (after[1] > before[1] or after[4] > before[4])  # products of warps, of warpgroups
    assert found.tiles["keys"] > 0 and found.tiles["queries"] > 0
    on_cpu = regard.explain("attention", query, key, key, **call)
    assert (found.flops, found.exponentials, found.bytes) == (on_cpu.flops, on_cpu.exponentials, on_cpu.bytes)


def test_located_memory_is_that_of_some_queries(cupy):
    def memory(len_q: int) -> int:
        x = {name: cupy.asarray(normal(0, 1, n, 2)) for name, n in (("query", len_q), ("key", 9000), ("value", 9000))}
        location = {"w_location": (2, 1), "location_kernel": (1, 1, 3), "v": (2,)}
        x |= {name: cupy.asarray(normal(0, *shape)) for name, shape in location.items()}
        previous = cupy.asarray(normal(0, 1, 9000))
        return int(regard.explain("location_sensitive_attention", **x, previous_weights=previous).memory)

    assert memory(9) - memory(3) < 1000  # the projected queries; weights are outputs


def test_packed_sequences_may_take_two_kernels(cupy, emulator):
    rows = [cupy.asarray(normal(i, 30, 2, 16, dtype="float16")) for i in range(3)]
    starts = np.array([0, 3, 30])
    found = regard.explain("attention_varlen", *rows, starts, starts)
    assert found.kernel == "split keys and warpgroups"
    assert sum(s.times for s in found.stages) == launches_of(emulator, regard.attention_varlen, *rows, starts, starts)
    assert found.memory > 0
    with pytest.raises(NotImplementedError, match="explain: cu_seqlens_q on a GPU is not read"):
        regard.explain("attention_varlen", *rows, cupy.asarray(starts), cupy.asarray(starts))


def test_the_bound_is_of_the_devices_own_figures(gpu, emulator):
    emulator.set_clocks(2e9, 3e12)
    x = [gpu.asarray(normal(i, 1, 2, 300, 32, dtype="float16")) for i in range(3)]
    found = regard.explain("attention", *x)
    busy = 2  # multiprocessors of the emulated device
    assert found.ceilings == {"GFLOP/s": 2 * 2048 * busy * 2, "G exponentials/s": 16 * busy * 2, "GB/s": 3000}
    assert found.times["multiply-adds"] == pytest.approx(4 * 2 * 300 * 300 * 32 / (2 * 2048 * busy * 2e9))
    assert found.times["exponentials"] == pytest.approx(2 * 300 * 300 / (16 * busy * 2e9))
    assert found.times["bandwidth"] == pytest.approx(4 * x[0].nbytes / 3e12)
    assert found.bound == "exponentials" and found.seconds == found.times["exponentials"] and not found.left_out
    assert "bound by" in str(found)
    alone = regard.explain("attention", *(a[:, :1, :20] for a in x))  # one block: a multiprocessor idles
    assert alone.ceilings["GFLOP/s"] == found.ceilings["GFLOP/s"] / 2
    emulator.set_device(120, 101376)
    assert "compute capability 12.0" in regard.explain("attention", *x).left_out
    emulator.set_device(90, 232448)
    product = regard.explain("linear", x[0][0, 0], x[1][0, 0])
    assert "framework" in product.left_out and product.kernel == "the framework's product"


def test_nothing_is_written_and_refusals_are_the_call_s(cupy, emulator):
    x = [cupy.asarray(normal(i, 1, 2, 20, 16)) for i in range(3)]
    out = cupy.zeros((1, 2, 20, 16), np.float32)
    regard.explain("attention", *x, out=out)
    assert not cupy.asnumpy(out).any()
    for options in ({"window": (-1, 0)}, {"out": cupy.zeros((1, 2, 20, 17), np.float32)}, {"bias": np.zeros(3)}):
        with pytest.raises((TypeError, ValueError)) as called:
            regard.attention(*x, **options)
        with pytest.raises(type(called.value)) as explained:
            regard.explain("attention", *x, **options)
        assert str(called.value) == str(explained.value)
    regard.attention(*x, out=out)  # calls are meant again
    assert cupy.asnumpy(out).any()
