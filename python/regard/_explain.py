"""What a call will run, and what holds its speed, without running it."""

from __future__ import annotations

import dataclasses
import inspect
import os
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import regard
from regard import _arrays, _backend
from regard._ceilings import Ceilings
from regard._costs import COSTS, Cost, size
from regard._options import PRECISIONS

#: Seconds a ceiling is measured for, three times.
_CEILING_SECONDS = 0.03

#: Runs of which the fastest tells the overhead of a call.
_OVERHEAD_RUNS = 15

_MEASURED: dict[tuple[str, int], Ceilings] = {}


@dataclasses.dataclass(frozen=True)
class Stage:
    """One parallel loop of a call.

    Attributes
    ----------
    source : str
        The file of the kernel.
    item : str
        The file of what runs for an item, where that is another one.
    items : int
        Pieces that the work is cut into, the same whatever the number of threads.
    threads : int
        That share them; small work stays on the calling thread.
    work : float
        The kernel's rough count of its operations, which decides on threads.
    scratch : int
        Bytes that an item takes for itself, kept by its thread for the next one.
    """

    source: str
    item: str
    items: int
    threads: int
    work: float
    scratch: int

    def __str__(self) -> str:
        threads = "1 thread" if self.threads == 1 else f"{self.threads} threads"
        scratch = f", {with_unit(self.scratch, 'B')} of scratch each" if self.scratch else ""
        return f"{self.items} item{'s' * (self.items != 1)} on {threads}{scratch}: {_kernel_words(self)}"


@dataclasses.dataclass(frozen=True)
class Explanation:
    """What a call runs and what bounds it; str() is a table of it.

    Attributes
    ----------
    operation, call : str
        The public name, and the call in words.
    kernel : str
        Source file of the stage with most work, and of its items; "" where there is nothing to compute.
    instruction_set, reason : str
        The compiled module in use, and why it is that one.
    tiles : dict
        Sizes that the kernel was compiled with.
    stages : tuple of Stage
        On a GPU, of launches of kernels.
    flops, exponentials : float
        Arithmetic that the result needs.
    bytes : float
        Each input read once and each output written once.
    memory : int
        Bytes taken beside inputs and outputs, by all threads together.
    ceilings : dict
        Measured here: GFLOP/s of multiply-adds (those of matrix tiles shared out among the products that each
        takes there), 1e9 exponentials and GB/s, each of the threads in use.
    times : dict
        Seconds that "multiply-adds", "exponentials", "bandwidth" and "call overhead" take at these ceilings.
    left_out : str
        Why there are no times, and no bound; "" where there are.
    """

    operation: str
    call: str
    kernel: str
    instruction_set: str
    reason: str
    tiles: dict[str, int]
    stages: tuple[Any, ...]
    flops: float
    exponentials: float
    bytes: float
    memory: int
    ceilings: dict[str, float]
    times: dict[str, float]
    left_out: str = ""

    @property
    def intensity(self) -> float:
        """Flops a byte."""
        return self.flops / self.bytes if self.bytes else 0.0

    @property
    def bound(self) -> str:
        """The key of `times` that takes longest; "" where there are none."""
        return max(self.times, key=lambda name: self.times[name], default="")

    @property
    def seconds(self) -> float:
        """The least time: no kernel is faster, and good ones come near.

        Arithmetic shares its ports, so products and exponentials add up; data moves meanwhile.
        """
        t = self.times
        return t["call overhead"] + max(t["multiply-adds"] + t["exponentials"], t["bandwidth"])

    def __str__(self) -> str:
        rows = [
            ("kernel", self.kernel or "none: nothing to compute"),
            ("instruction set", f"{self.instruction_set}: {self.reason}"),
            ("tiles", ", ".join(f"{name.replace('_', ' ')} {n}" for name, n in self.tiles.items()) or "none"),
            *(("stage", str(stage)) for stage in self.stages),
            ("arithmetic", with_unit(self.flops, "flop") + self._exponentials()),
            ("traffic", f"{with_unit(self.bytes, 'B')} at least, {self.intensity:.3g} flop a byte"),
            ("extra memory", with_unit(self.memory, "B")),
        ]
        if self.left_out:
            rows.append(("bound", f"left out: {self.left_out}"))
        else:
            rows += [
                ("ceilings", ", ".join(f"{value:.3g} {unit}" for unit, value in self.ceilings.items())),
                ("at these", ", ".join(f"{name} {with_unit(t, 's')}" for name, t in self.times.items())),
                ("bound by", self.bound),
                ("least time", with_unit(self.seconds, "s")),
            ]
        width = max(len(name) for name, _ in rows)
        return "\n".join([self.call, *(f"  {name:{width}}  {words}" for name, words in rows)])

    def _exponentials(self) -> str:
        return f", {with_unit(self.exponentials, ' exponentials')}" if self.exponentials else ""


def explain(operation: str, /, *args: Any, **options: Any) -> Explanation:
    """What ``regard.<operation>(*args, **options)`` will run, and what bounds its speed.

    The call is rehearsed: it checks, allocates and cuts its work as the call does, and starts none of it. No input is
    read and no output written. The first explanation on an instruction set and a number of threads takes some half a
    second, in which the machine's ceilings are measured. With arrays on a GPU the kernels are those that would be
    launched there, and ceilings are the device's own figures.

    Parameters
    ----------
    operation : str
        The name of a public function: "attention", "linear", "cbam", ...
    *args, **options
        Its arguments.

    Returns
    -------
    Explanation
        Its str() is a table.

    Raises
    ------
    TypeError, ValueError
        What the call itself would raise; ValueError for an unknown operation.

    Examples
    --------
    >>> import numpy as np, regard
    >>> q = np.zeros((1, 16, 1024, 64), np.float32)
    >>> regard.explain("attention", q, q, q, causal=True).bound
    'multiply-adds'
    """
    if operation not in COSTS:
        raise ValueError(f"operation: expected one of {', '.join(sorted(COSTS))}, got {operation!r}")
    function = getattr(regard, operation)
    if any(map(_arrays.on_gpu, arrays_in((*args, *options.values())))):
        from regard import _explain_gpu

        return _explain_gpu.explained(operation, function, args, options)
    result, stages, shared = _rehearsed(function, args, options)
    arguments = inspect.signature(function).bind(*args, **options)
    call = call_words(operation, arguments.arguments)
    arguments.apply_defaults()
    cost = COSTS[operation](arguments.arguments)
    main = max(stages, key=lambda s: s.work, default=None)
    data = moved(arguments.arguments, cost, result)
    first = next(arrays_in(arguments.arguments.values()))
    ceilings = _ceilings()
    dtype = str(first.dtype).rpartition(".")[2]
    share = _share(main) * (0.5 if dtype == "float64" else 1.0)
    tiles = dict(_backend.cpu.tile_sizes(_arrays.native(operation, first)))
    if main is not None and main.source.endswith("attention_forward.cpp"):
        tiles |= _attention_sizes(operation, arguments.arguments)
    elif main is not None and main.source.endswith("linear_tiles.cpp"):
        tiles["matrix_products"] = 1
    products = tiles.get("matrix_products", 0)
    on_tiles = ceilings.gtiles() if products and main is not None and main.item == main.source else None
    rates = {
        "GFLOP/s": (on_tiles / products if on_tiles else ceilings.gflops) * share,
        "G exponentials/s": ceilings.gexp() * share,
        "GB/s": ceilings.gbytes(int(data)),
    }
    times = {
        "multiply-adds": cost.flops / rates["GFLOP/s"] / 1e9,
        "exponentials": cost.exponentials / rates["G exponentials/s"] / 1e9,
        "bandwidth": data / rates["GB/s"] / 1e9,
        "call overhead": _overhead(function, args, options),
    }
    return Explanation(
        operation=operation,
        call=call,
        kernel=_kernel_words(main) if main and main.items else "",
        instruction_set=_backend.isa,
        reason=_reason(),
        tiles=tiles,
        stages=stages,
        flops=cost.flops,
        exponentials=cost.exponentials,
        bytes=data,
        memory=shared + max((s.scratch * min(s.threads, s.items) for s in stages), default=0),
        ceilings=rates,
        times=times,
    )


def _attention_sizes(operation: str, arguments: dict[str, Any]) -> dict[str, int]:
    """Those of dot-product attention, of these arguments."""
    kinds = ("query", "key", "value")
    arrays = [next(x for name, x in arguments.items() if name.startswith(kind)) for kind in kinds]
    precision = PRECISIONS[arguments.get("precision", "highest")]
    return dict(_backend.cpu.attention_sizes(*(_arrays.native(operation, x) for x in arrays), precision))


def _rehearsed(
    function: Callable[..., Any], args: tuple[Any, ...], options: dict[str, Any]
) -> tuple[Any, tuple[Stage, ...], int]:
    backend = _backend.cpu
    backend.start_rehearsal()
    try:
        result = function(*args, **options)
    finally:
        stages, shared = backend.end_rehearsal()
    merged: dict[tuple[str, str], Stage] = {}
    for stage in (Stage(*s) for s in stages):
        # The same loop over one group of sequences after another is one stage to the reader.
        key = stage.source, stage.item
        if key in merged:
            before = merged[key]
            stage = dataclasses.replace(
                stage,
                items=before.items + stage.items,
                threads=max(before.threads, stage.threads),
                work=before.work + stage.work,
                scratch=max(before.scratch, stage.scratch),
            )
        merged[key] = stage
    return result, tuple(merged.values()), shared


def _overhead(function: Callable[..., Any], args: tuple[Any, ...], options: dict[str, Any]) -> float:
    """Seconds of everything but the items: checks, allocation, cutting the work."""
    backend = _backend.cpu
    fastest = float("inf")
    for _ in range(_OVERHEAD_RUNS):
        backend.start_rehearsal()
        try:
            start = time.perf_counter()
            function(*args, **options)
            fastest = min(fastest, time.perf_counter() - start)
        finally:
            backend.end_rehearsal()
    return fastest


def moved(arguments: dict[str, Any], cost: Cost, result: Any) -> float:
    inputs = sum(
        size(x) * (cost.read if name.startswith(("key", "value")) and name != "key_lengths" else 1.0)
        for name, x in arguments.items()
        if name != "out"
    )
    return inputs + size(result)


def _share(stage: Stage | None) -> float:
    """Of all threads' rate: those that work, and less for a last round of items that leaves some idle."""
    if stage is None or not stage.items:
        return 1.0
    rounds = -(-stage.items // stage.threads)
    return stage.items / (rounds * regard.get_num_threads())


def _ceilings() -> Ceilings:
    key = _backend.isa, regard.get_num_threads()
    if key not in _MEASURED:
        _MEASURED[key] = Ceilings(_CEILING_SECONDS)
    return _MEASURED[key]


def _reason() -> str:
    possible = _backend.possible()
    if os.environ.get("REGARD_ISA") == _backend.isa:
        words = "REGARD_ISA names it"
    elif _backend.isa == possible[-1]:
        words = f"the best of {', '.join(possible)}"
    else:
        words = f"selected in this process, of {', '.join(possible)}"
    refused = [f"not {n}: {why}" for n, why in _backend.INSTRUCTION_SETS.items() if why and n in _backend.built()]
    return "; ".join([words, *refused])


def arrays_in(arguments: Iterable[Any]) -> Iterator[Any]:
    for x in arguments:
        if isinstance(x, (list, tuple)):
            yield from arrays_in(x)
        elif hasattr(x, "dtype"):
            yield x


# Words.


def call_words(operation: str, arguments: dict[str, Any]) -> str:
    return f"{operation}({', '.join(f'{name}={_words(x)}' for name, x in arguments.items())})"


def _words(x: Any) -> str:
    if hasattr(x, "dtype") and hasattr(x, "shape"):
        return f"{str(x.dtype).rpartition('.')[2]}{list(x.shape)}"
    if isinstance(x, (list, tuple)) and any(hasattr(y, "dtype") for y in x):
        return f"[{', '.join(map(_words, x))}]"
    return repr(x)[:60]


def _kernel_words(stage: Stage) -> str:
    return stage.source if stage.item == stage.source else f"{stage.source} ({stage.item.rpartition('/')[2]})"


def with_unit(n: float, unit: str) -> str:
    """Three digits, and a prefix to the unit."""
    if n == 0:
        return f"0 {unit.strip()}"
    prefixes = (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3), ("", 1.0), ("m", 1e-3), ("u", 1e-6), ("n", 1e-9))
    prefix, factor = next((p for p in prefixes if abs(n) >= 0.9995 * p[1]), prefixes[-1])
    return f"{n / factor:.3g} {prefix}{unit}".replace("  ", " ")
