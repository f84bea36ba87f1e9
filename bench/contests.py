"""The runs of compare_peers.py: everything that has a target of speed on a CPU, and its peers."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterable
from typing import Any

import attention_peers
import bench_channel
import harness
import numpy as np
import regard
import shapes
import targets
from regard._cli import models
from regard._cli.peers import numpy_attention, to_torch
from shapes import Attention
from targets import Contest, Line, Run, Target

SHORT = {"float32": "f32", "float16": "f16", "bfloat16": "bf16", "int8": "int8"}
ITEM = {"float32": 4, "float16": 2, "bfloat16": 2, "int8": 1}

#: Rows of one head whose error is measured: enough for a maximum, and float64 takes them within a second.
_JUDGED_ROWS = 256

#: Roundings that are equally good err by some percent more or less.
_TAIL = 1.05

BERT, VIT, GPT, CONTEXT_4K, LLAMA, CONTEXT_8K, DECODE_1, DECODE_16, TINY = (
    next(s for s in shapes.ATTENTION if s.name == name)
    for name in (
        "BERT-base",
        "ViT-B/16",
        "GPT-2 medium",
        "4k context",
        "Llama-7B prefill",
        "8k context",
        "Llama-3-8B decode",
        "Llama-7B decode, batch 16",
        "tiny",
    )
)


def runs() -> list[Run]:
    """Everything, in the order of the table."""
    return [
        *_on_tiles(),
        _high(CONTEXT_4K),
        *(_without_tiles(isa, shape) for isa in ("avx512", "avx2") for shape in (GPT, CONTEXT_4K, LLAMA)),
        *(_decode(shape) for shape in (DECODE_1, DECODE_16)),
        *(_masked(dtype) for dtype in ("float32", "bfloat16")),
        _tiny(),
        *(_linear(dtype) for dtype in ("bfloat16", "float32")),
        _multihead(),
        _encoder(models.ENCODERS[0], 8, 128, "float32", 1.5),
        *(
            _encoder(models.ENCODERS[1], *tokens, dtype, bound)
            for tokens in ((8, 256), (32, 128))
            for dtype, bound in (("float32", 1.5), ("bfloat16", 1.3))
        ),
        *(_excitation(size, layout) for size, layout in ((56, "nchw"), (56, "nhwc"), (7, "nchw"))),
        *(_growth(dtype) for dtype in ("float32", "bfloat16")),
        *(_threads(dtype) for dtype in ("float32", "bfloat16")),
    ]


# Attention over whole sequences.


def _on_tiles() -> Iterable[Run]:
    peer, share = targets.best_peer, targets.share
    for dtype, shape, wanted, needs in (
        ("bfloat16", CONTEXT_4K, (peer(2.5), share(0.33, "tiles")), ("AMX",)),
        ("bfloat16", LLAMA, (peer(2.5), share(0.40, "tiles")), ("AMX",)),
        ("bfloat16", CONTEXT_8K, (peer(2.5), share(0.40, "tiles")), ("AMX",)),
        ("bfloat16", BERT, (peer(3.0),), ("AMX",)),
        ("bfloat16", VIT, (peer(3.0),), ("AMX",)),
        ("float32", GPT, (peer(2.0),), ("AMX",)),
        ("float32", CONTEXT_4K, (peer(2.0),), ("AMX",)),
        ("float32", LLAMA, (peer(2.0),), ("AMX",)),
        ("float32", BERT, (peer(1.4),), ()),
        ("float16", CONTEXT_4K, (targets.faster_than("torch", 4.0),), ("AMX",)),
    ):
        # float32's products are several of bfloat16: what is to be beaten is the multiply-adds' own ceiling.
        ceiling = "tiles" if dtype == "bfloat16" else "fma"
        line = _line(shape, dtype, (*wanted, targets.accuracy(_gate_of(dtype))), ceiling=ceiling)
        yield Run((line,), functools.partial(_attention, shape, dtype), needs=needs)


def _line(shape: Attention, dtype: str, wanted: tuple[Target, ...], more: str = "", **options: Any) -> Line:
    label = f"{SHORT[dtype]} {shape.label}{more}"
    return Line(label, wanted, flops=shape.flops, bytes=shape.bytes(ITEM[dtype]), **options)


def _attention(shape: Attention, dtype: str, threads: int) -> Contest:
    given = attention_peers.arrays(shape, dtype)
    ours = functools.partial(regard.attention, *given, causal=shape.causal)
    calls, notes = attention_peers.contenders(shape, dtype, given, threads, ours)
    return Contest(calls, notes, {"regard": _error_and_gate(shape, dtype, given, ours())})


def _gate_of(dtype: str) -> str:
    return "of NumPy's error" if dtype == "float32" else "of 1.5 x rounding's error"


def _error_and_gate(
    shape: Attention, dtype: str, given: tuple[np.ndarray, ...], out: np.ndarray
) -> tuple[float, float]:
    """float32: the largest error, and NumPy's + 1e-7. 16 bits: RMSE, and 1.5 times that of float32's, rounded once."""
    exact = _judged_rows(shape, given, np.float64)
    error = out[:1, :1, -_JUDGED_ROWS:].astype(np.float64) - exact
    plain = _judged_rows(shape, given, out.dtype).astype(np.float64) - exact
    if dtype == "float32":
        return float(np.abs(error).max()), _TAIL * float(np.abs(plain).max()) + 1e-7
    return _rms(error), 1.5 * _rms(plain)


def _judged_rows(shape: Attention, given: tuple[np.ndarray, ...], dtype: Any) -> np.ndarray:
    """The last rows of the first head in NumPy, with inputs of `dtype`."""
    alignment = "lower_right" if shape.causal else None
    query, key, value = (x[:1, :1].astype(dtype) for x in given)
    head = (query[:, :, -_JUDGED_ROWS:], key, value)
    return np.asarray(regard.reference.attention(*head, causal=shape.causal, alignment=alignment))


def _rms(x: np.ndarray) -> float:
    return float(np.sqrt(np.square(x).mean()))


def _high(shape: Attention) -> Run:
    def prepare(_: int) -> Contest:
        given = attention_peers.arrays(shape, "float32")
        calls = {p: functools.partial(regard.attention, *given, precision=p) for p in ("highest", "high")}
        exact = _judged_rows(shape, given, np.float64)
        error = np.abs(calls["high"]()[:1, :1, -_JUDGED_ROWS:] - exact).max()
        return Contest(calls, errors={"high": (float(error), 1e-5)})

    wanted = (targets.faster_than("highest", 1.4, "highest"), targets.accuracy("of 1e-5"))
    line = _line(shape, "float32", wanted, ", precision high", contender="high", ceiling="fma")
    return Run((line,), prepare, needs=("AMX",))


def _without_tiles(isa: str, shape: Attention) -> Run:
    """float32 against its multiply-adds, and bfloat16 against float32, on an instruction set without tiles."""

    def prepare(threads: int) -> Contest:
        contest = _attention(shape, "float32", threads)
        half = functools.partial(regard.attention, *attention_peers.arrays(shape, "bfloat16"), causal=shape.causal)
        return Contest({**contest.calls, "bfloat16": half}, contest.notes, contest.errors)

    wanted = (targets.share(0.80, "FMA"), targets.accuracy(_gate_of("float32")))
    float32 = _line(shape, "float32", wanted, f", {isa}", ceiling="fma")
    never_slower = (targets.faster_than("regard", 1.0, "f32"),)
    bfloat16 = _line(shape, "bfloat16", never_slower, f", {isa}", contender="bfloat16", peers={}, ceiling="fma")
    return Run((float32, bfloat16), prepare, isa=isa)


def _masked(dtype: str) -> Run:
    """One mask or bias for all heads."""
    shape = GPT

    def prepare(_: int) -> Contest:
        given = attention_peers.arrays(shape, dtype)
        pairs = (shape.len_q, shape.len_kv)
        mask, bias = np.random.default_rng(3).random(pairs) < 0.9, harness.normal(pairs, dtype, 4)
        ours = functools.partial(regard.attention, *given)
        calls = {"plain": ours, "mask": functools.partial(ours, mask=mask), "bias": functools.partial(ours, bias=bias)}
        if harness.installed("torch"):
            calls["torch, mask"] = _torch_attention(*given, attn_mask=mask)
            calls["torch, bias"] = _torch_attention(*given, attn_mask=bias)
        return Contest(calls)

    lines = (
        _line(
            shape,
            dtype,
            (targets.cost_over("plain", 1.10, "plain call"),),
            f", {option}",
            contender=option,
            peers={"torch": f"torch, {option}"},
            ceiling="tiles" if dtype == "bfloat16" else "fma",
        )
        for option in ("mask", "bias")
    )
    return Run(tuple(lines), prepare)


def _tiny() -> Run:
    def prepare(threads: int) -> Contest:
        contest = _attention(TINY, "float32", threads)
        by_hand = functools.partial(numpy_attention, *attention_peers.arrays(TINY, "float32"))
        return Contest({**contest.calls, "NumPy": by_hand}, contest.notes)

    return Run((_line(TINY, "float32", (targets.microseconds(2.5),)),), prepare)


def _torch_attention(*arrays: np.ndarray, **options: Any) -> targets.Call:
    import torch

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")  # nothing writes to it
        tensors = [to_torch(x) for x in arrays]
        options = {name: to_torch(x) for name, x in options.items()}
    return _inference(functools.partial(torch.nn.functional.scaled_dot_product_attention, *tensors, **options))


def _inference(call: targets.Call) -> targets.Call:
    import torch

    return torch.inference_mode()(call)


# Attention of one query row over a cache: bound by reading it.

CACHES = ("float32", "float16", "bfloat16", "int8")


def _decode(shape: Attention) -> Run:
    """Queries have the cache's dtype; bfloat16 over int8."""

    def prepare(_: int) -> Contest:
        calls: dict[str, targets.Call] = {}
        for stored in CACHES:
            given = "bfloat16" if stored == "int8" else stored
            query, key, value = attention_peers.arrays(shape, given)
            cache = regard.KVCache(shape.batch, shape.heads_kv, shape.len_kv, shape.dim_qk, dtype=stored)
            cache.append(key, value)
            calls[stored] = functools.partial(cache.attend, query)
            if stored != "int8" and harness.installed("torch"):
                # Over the very memory of the cache, which is full.
                grouped = shape.heads != shape.heads_kv
                calls[f"torch, {stored}"] = _torch_attention(query, cache.key, cache.value, enable_gqa=grouped)
        return Contest(calls)

    lines = []
    for stored in CACHES:
        wanted = [targets.share(0.85, "read")]
        if stored == "int8":
            wanted.append(targets.faster_than("bfloat16", 1.7, "bf16"))
        scales = 8 * shape.batch * shape.heads_kv * shape.len_kv if stored == "int8" else 0
        lines.append(
            Line(
                f"decode {shape.label}, {SHORT[stored]} cache",
                tuple(wanted),
                stored,
                {"torch": f"torch, {stored}"},
                shape.flops,
                shape.bytes(ITEM[stored]) + scales,
                "read",
            )
        )
    return Run(tuple(lines), prepare)


# Products, layers and models.


def _linear(dtype: str) -> Run:
    size = 2048

    def prepare(_: int) -> Contest:
        import torch

        x, weight = harness.normal((size, size), dtype), harness.normal((size, size), dtype, 1)
        calls = {
            "regard": functools.partial(regard.linear, x, weight),
            "torch": _inference(functools.partial(torch.nn.functional.linear, to_torch(x), to_torch(weight))),
        }
        if dtype == "float32":
            calls["NumPy"] = lambda: x @ weight.T
        exact = x[:_JUDGED_ROWS].astype(np.float64) @ weight.T.astype(np.float64)
        theirs = calls["torch"]()[:_JUDGED_ROWS].float().numpy().astype(np.float64)
        ours = calls["regard"]()[:_JUDGED_ROWS].astype(np.float64)
        return Contest(calls, errors={"regard": (_rms(ours - exact), _TAIL * _rms(theirs - exact))})

    wanted = (targets.faster_than("torch", 1.5 if dtype == "float32" else 1.0), targets.accuracy("of torch's error"))
    moved = 3.0 * ITEM[dtype] * size**2
    ceiling = "tiles" if dtype == "bfloat16" else "fma"
    line = Line(
        f"{SHORT[dtype]} linear {size}x{size}x{size}", wanted, flops=2.0 * size**3, bytes=moved, ceiling=ceiling
    )
    return Run((line,), prepare, needs=("torch",))


def _multihead() -> Run:
    batch, length, width, heads = 8, 128, 768, 12

    def prepare(_: int) -> Contest:
        calls = models.beside_torch(
            lambda nn: nn.MultiheadAttention(width, heads, batch_first=True),
            (batch, length, width),
            "float32",
            torch=True,
            call=lambda module, x: module(x, x, x, need_weights=False)[0],
        )
        return _two(calls, "float32")

    flops = 2.0 * batch * length * width * (4 * width + 2 * length)
    moved = 4.0 * (2 * batch * length * width + 4 * width**2)
    line = Line(
        f"f32 MHA {batch}x{length}x{width}, {heads} heads",
        (targets.faster_than("torch", 1.5),),
        flops=flops,
        bytes=moved,
        ceiling="fma",
    )
    return Run((line,), prepare, needs=("torch",))


def _encoder(encoder: models.Encoder, batch: int, length: int, dtype: str, bound: float) -> Run:
    def prepare(_: int) -> Contest:
        return _two(models.encoder_calls(encoder, batch, length, dtype, torch=True), dtype)

    weights = encoder.layers * encoder.width * (4 * encoder.width + 2 * encoder.inner)
    scores = encoder.layers * 2 * length * encoder.width
    line = Line(
        f"{SHORT[dtype]} {encoder.label} {batch}x{length}x{encoder.width}",
        (targets.faster_than("torch", bound),),
        flops=2.0 * batch * length * (weights + scores),
        bytes=float(ITEM[dtype] * (2 * batch * length * encoder.width + weights)),
        ceiling="tiles" if dtype == "bfloat16" else "fma",
    )
    return Run((line,), prepare, needs=("torch",))


def _two(calls: dict[str, targets.Call], held: str) -> Contest:
    """Of all ways to hold weights the one that PyTorch has too; results are compared."""
    ours, theirs = calls[held](), calls["torch"]().float().numpy()
    apart = float(np.abs(ours.astype(np.float32) - theirs).max())
    # Layers end in a normalisation or in sums of about 1: a few units in the last place of each dtype, by layers.
    if not apart <= (1e-3 if held == "float32" else 0.3):
        raise AssertionError(f"torch computes something else: {apart:.1e} apart")
    return Contest({"regard": calls[held], "torch": calls["torch"]})


def _excitation(size: int, layout: str) -> Run:
    case = ("SE", 8, 256, size, size, 16)

    def prepare(_: int) -> Contest:
        return Contest(bench_channel.calls(case, layout))

    elements = float(np.prod(case[1:5]))
    wanted = targets.microseconds(12.0) if size == 7 else targets.faster_than("torch", 1.3)
    label = f"f32 SE {'x'.join(map(str, case[1:5]))} {layout}"
    # Read once and written once; an addition and a product an element.
    line = Line(label, (wanted,), flops=2 * elements, bytes=8 * elements, ceiling="read")
    return Run((line,), prepare, needs=("torch",))


# How time grows with lengths and shrinks with threads.


def _growth(dtype: str) -> Run:
    near, far = CONTEXT_4K, Attention("64k context", 1, 1, 1, 65536, 65536, 64, 64)

    def prepare(_: int) -> Contest:
        shaped = {"near": near, "far": far}
        return Contest(
            {n: functools.partial(regard.attention, *attention_peers.arrays(s, dtype)) for n, s in shaped.items()}
        )

    def value(m: targets.Measured) -> float:
        return m.best / far.flops / (m.seconds["near"] / near.flops)

    wanted = Target(1.15, "time per flop at 4096", value, at_most=True)
    ceiling = "tiles" if dtype == "bfloat16" else "fma"
    line = _line(far, dtype, (wanted,), contender="far", peers={}, ceiling=ceiling)
    return Run((line,), prepare, least_rounds=2)


def _threads(dtype: str) -> Run:
    def prepare(_: int) -> Contest:
        attend = functools.partial(regard.attention, *attention_peers.arrays(CONTEXT_4K, dtype))

        def on(threads: int) -> Any:
            before = regard.get_num_threads()
            regard.set_num_threads(threads)
            try:
                return attend()
            finally:
                regard.set_num_threads(before)

        return Contest({f"{n} threads": functools.partial(on, n) for n in (1, 2)})

    wanted = (targets.faster_than("1 threads", 1.9, "one thread"),)
    ceiling = "tiles" if dtype == "bfloat16" else "fma"
    line = _line(CONTEXT_4K, dtype, wanted, ", 2 threads", contender="2 threads", peers={}, ceiling=ceiling)
    return Run((line,), prepare, needs=("2 cores",))
