"""What a call with arrays on a GPU will run, and what bounds it by the device's own figures: nothing is measured."""

from __future__ import annotations

import dataclasses
import inspect
import itertools
from collections.abc import Callable
from typing import Any

from regard import _arrays, _backend
from regard._costs import COSTS
from regard._explain import Explanation, arrays_in, call_words, moved, with_unit

#: Multiply-adds a clock of one multiprocessor, by compute capability: float32 and float64 as the CUDA Programming Guide
#: has them ("Arithmetic Instructions"), "tensor" of 16-bit products summed in float32, "int8 tensor" of bytes. Where
#: makers of cards halve the former or not under one capability (8.6, 8.9), they are missing.
_MULTIPLY_ADDS: dict[int, dict[str, int]] = {
    80: {"float32": 64, "float64": 32, "tensor": 1024, "int8 tensor": 2048},
    86: {"float32": 128, "float64": 2},
    89: {"float32": 128, "float64": 2},
    90: {"float32": 128, "float64": 64, "tensor": 2048, "int8 tensor": 4096},
}

#: Exponentials of float32 a clock of one multiprocessor, of all of these.
_EXPONENTIALS = 16

#: Index arrays that flops hang on.
_LENGTHS = ("cu_seqlens_q", "cu_seqlens_kv", "query_lengths", "key_lengths")


@dataclasses.dataclass(frozen=True)
class Launch:
    """One kernel's launch, or several of the same size one after another.

    Attributes
    ----------
    source : str
        The file that launches it.
    kernel : str
        Which of an operation's kernels it is ("split keys", "warpgroups", "tensor cores", "portable", "int8 rows",
        "int8 tensor cores"), or "".
    queries, keys : int
        The tile of that kernel: what a block takes at a time; for a linear layer, rows and outputs.
    tensor : bool
        Whether its products are tensor cores'.
    blocks, threads, shared : int
        Blocks, threads of a block, and a block's bytes of shared memory.
    times : int
        How often it is launched.
    """

    source: str
    kernel: str
    queries: int
    keys: int
    tensor: bool
    blocks: int
    threads: int
    shared: int
    times: int

    def __str__(self) -> str:
        shared = f", {with_unit(self.shared, 'B')} of shared memory each" if self.shared else ""
        words = f"{self.source} ({self.kernel})" if self.kernel else self.source
        often = f"{self.times} times " if self.times > 1 else ""
        return f"{often}{self.blocks} block{'s' * (self.blocks != 1)} of {self.threads} threads{shared}: {words}"


@dataclasses.dataclass(frozen=True)
class GpuExplanation(Explanation):
    """As Explanation, of a call on a GPU.

    Attributes
    ----------
    instruction_set, reason : str
        The compute capability ("sm_90") and how many multiprocessors the device has.
    stages : tuple of Launch
    ceilings, times : dict
        From the device's clocks and NVIDIA's figures for its compute capability, not measured; without the overhead of
        launches. Empty where one of them is not known: `left_out` says which.
    """

    @property
    def seconds(self) -> float:
        """The least time: products, exponentials and memory each have units of their own. 0 where it is left out."""
        return max(self.times.values(), default=0.0)


def explained(
    operation: str, function: Callable[..., Any], args: tuple[Any, ...], options: dict[str, Any]
) -> GpuExplanation:
    """As explain(), for a call whose first array is on a GPU."""
    module = _backend.cuda(operation)
    module.start_rehearsal()
    try:
        result = function(*args, **options)
    finally:
        launched, scratch = module.end_rehearsal()
    launches = tuple(Launch(*(*launch, len(list(same)))) for launch, same in itertools.groupby(launched))
    arguments = inspect.signature(function).bind(*args, **options)
    call = call_words(operation, arguments.arguments)
    arguments.apply_defaults()
    named = arguments.arguments
    for name in _LENGTHS:
        if _arrays.on_gpu(named.get(name)):
            raise NotImplementedError(f"explain: {name} on a GPU is not read; give it as a NumPy array")
    cost = COSTS[operation](named)
    data = moved(named, cost, result)
    chosen = [launch for launch in launches if launch.kernel]
    main = max(chosen or launches, key=lambda launch: launch.blocks * launch.threads * launch.times, default=None)
    first = next(arrays_in(named.values()))
    capability, processors, clock, bandwidth = module.speeds(_arrays.device_of(first))
    dtype = _arrays.name_of_dtype(first.dtype)
    products = "float64" if dtype == "float64" else "float32"
    if main is not None and main.kernel.startswith("int8"):
        products = "int8 tensor" if main.tensor else "int8 dot"
    elif main is not None and main.tensor:
        products = "tensor"
    multiply_adds = _MULTIPLY_ADDS.get(capability, {}).get(products)
    tile = ("rows", "outputs") if operation == "linear" else ("queries", "keys")
    left_out = ""
    if operation == "linear" and not chosen:
        left_out = "the product is its framework's"
    elif not clock or not bandwidth:
        left_out = "the driver does not say the clocks of this device"
    elif multiply_adds is None:
        left_out = f"how many {products} products compute capability {capability / 10} has a clock is not known here"
    rates: dict[str, float] = {}
    times: dict[str, float] = {}
    if not left_out and multiply_adds is not None:
        # Fewer blocks than multiprocessors leave some idle.
        busy = min(main.blocks, processors) if main is not None else processors
        rates["GFLOP/s"] = 2 * multiply_adds * busy * clock / 1e9
        times["multiply-adds"] = cost.flops / rates["GFLOP/s"] / 1e9
        if dtype != "float64":  # whose exponentials are multiply-adds, and no unit's
            rates["G exponentials/s"] = _EXPONENTIALS * busy * clock / 1e9
            times["exponentials"] = cost.exponentials / rates["G exponentials/s"] / 1e9
        rates["GB/s"] = bandwidth / 1e9
        times["bandwidth"] = data / bandwidth
    return GpuExplanation(
        operation=operation,
        call=call,
        kernel=_kernel_words(operation, cost.flops, chosen, main),
        instruction_set=f"sm_{capability}",
        reason=f"{processors} multiprocessors",
        tiles=dict(zip(tile, (main.queries, main.keys), strict=True)) if main is not None and main.kernel else {},
        stages=launches,
        flops=cost.flops,
        exponentials=cost.exponentials,
        bytes=data,
        memory=scratch,
        ceilings=rates,
        times=times,
        left_out=left_out,
    )


def _kernel_words(operation: str, flops: float, chosen: list[Launch], main: Launch | None) -> str:
    """Names where an operation has several kernels (packed sequences may take two), else the file."""
    if operation == "linear" and not chosen:  # beside which its own launch is small, or none
        return "the framework's product" if flops else ""
    if chosen:
        return " and ".join(dict.fromkeys(launch.kernel for launch in chosen))
    return main.source if main is not None else ""
