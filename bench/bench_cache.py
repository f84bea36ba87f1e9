"""Rotary embedding, merging and the steps of a cache against PyTorch's formulations, on a CPU.

    python bench/bench_cache.py [--threads 1] [--seconds 2] [--dry]

The peers are what models are written with: x * cos + rotate_half(x) * sin; logsumexp and a weighted sum; slices of a
preallocated tensor for appending (for int8: amax, division, rounding), and scaled_dot_product_attention over them.
Writes bench/results/cache-cpu.md.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import harness
import numpy as np
import regard
from harness import normal
from regard._cli import operations, peers

Calls = dict[str, Callable[[], Any]]

ROTARY = {"prompt": (1, 32, 1024, 128), "step of 16": (16, 32, 1, 128)}
MERGE = {"prompt": (2, 1, 32, 1024, 128), "step of 16, 8 parts": (8, 16, 32, 1, 128)}
#: (batch, heads_kv, new tokens, dim, held tokens)
APPEND = {"prompt": (1, 8, 1024, 128, 0), "step of 16": (16, 8, 1, 128, 1024)}
#: Tokens that are appended until a cache is cut back to those it held.
STEPS = 64
#: (batch, heads, heads_kv, held tokens, dim)
STEP = {"step of 1": (1, 32, 8, 8192, 128), "step of 16": (16, 32, 8, 1024, 128)}


def rotary(shape: tuple[int, ...], dtype: Any) -> Calls:
    import torch

    x, (cos, sin) = normal(shape, dtype), regard.rotary_tables(shape[-1], shape[-2])
    t, half = peers.to_torch(x), shape[-1] // 2
    c, s = (torch.from_numpy(np.tile(a, 2)).to(t.dtype) for a in (cos, sin))

    @torch.inference_mode()
    def theirs() -> Any:
        return t * c + torch.cat([-t[..., half:], t[..., :half]], -1) * s

    return {"regard": lambda: regard.rotary_embedding(x, cos, sin), "torch": theirs}


def merge(shape: tuple[int, ...], dtype: Any) -> Calls:
    import torch

    outs, lses = normal(shape, dtype), normal(shape[:-1], np.float32)
    t, u = peers.to_torch(outs), torch.from_numpy(lses)
    theirs = torch.inference_mode()(lambda: peers.torch_merge_attention(t, u))
    return {"regard": lambda: regard.merge_attention(outs, lses), "torch": theirs}


def append(shape: tuple[int, ...], given: Any, stored: str) -> Calls:
    import torch

    *tokens, held = shape
    key, value = normal(tuple(tokens), given), normal(tuple(tokens), given, 1)
    batch, heads, new, dim = tokens
    capacity = held + max(STEPS, new)
    cache = regard.KVCache(batch, heads, capacity, dim, dtype=stored)
    for _ in range(held // new):
        cache.append(key, value)
    kept = [torch.zeros(batch, heads, capacity, dim, dtype=getattr(torch, stored)) for _ in range(2)]
    scales = [torch.zeros(batch, heads, capacity) for _ in range(2)]
    arrays = [peers.to_torch(x) for x in (key, value)]

    filled = dict.fromkeys(("ours", "theirs"), held)

    def next_place(whose: str) -> int:
        start = filled[whose] if filled[whose] + new <= capacity else held
        filled[whose] = start + new
        return start

    def ours() -> None:
        if next_place("ours") == held:
            cache.truncate(held)
        cache.append(key, value)

    @torch.inference_mode()
    def theirs() -> None:
        start = next_place("theirs")
        places = slice(start, start + new)
        for x, to, scale in zip(arrays, kept, scales, strict=True):
            if stored == "int8":
                wide = x.float()
                scale[:, :, places] = wide.abs().amax(-1) / 127
                to[:, :, places] = torch.round(wide / scale[:, :, places, None]).to(torch.int8)
            else:
                to[:, :, places] = x

    return {"regard": ours, "torch": theirs}


def step(shape: tuple[int, ...], given: Any, stored: str) -> Calls:
    """Append a token and attend; the peer's int8 cache is widened first, as there is no kernel for it."""
    import torch

    batch, heads, heads_kv, held, dim = shape
    appended = append((batch, heads_kv, 1, dim, held), given, "float32" if stored == "int8" else stored)
    cache = regard.KVCache(batch, heads_kv, held + 1, dim, dtype=stored)
    whole = normal((batch, heads_kv, held, dim), given)
    cache.append(whole, whole)
    token, query = normal((batch, heads_kv, 1, dim), given), normal((batch, heads, 1, dim), given)
    kept, q = peers.to_torch(whole), peers.to_torch(query)

    def ours() -> Any:
        cache.append(token, token)
        out = cache.attend(query)
        cache.truncate(held)
        return out

    @torch.inference_mode()
    def theirs() -> Any:
        appended["torch"]()
        return torch.nn.functional.scaled_dot_product_attention(q, kept, kept, enable_gqa=True)

    return {"regard": ours, "torch": theirs}


def main() -> None:
    options = harness.parser(__doc__, threads=1, seconds=2.0).parse_args()
    harness.set_threads(options.threads)
    half = operations.dtypes()[-1]  # bfloat16 where ml_dtypes is installed

    rows = []

    def measure(what: str, case: str, shape: tuple[int, ...], kind: str, calls: Calls) -> None:
        times = harness.compare(calls, seconds=options.seconds)
        ratio = times["regard"].speedup_over(times["torch"])
        fastest = [f"{times[name].minimum * 1e6:.1f}" for name in ("regard", "torch")]
        rows.append([what, case, "x".join(map(str, shape)), kind, *fastest, f"{ratio:.2f}"])
        print(" ".join(rows[-1]), file=sys.stderr, flush=True)

    for dtype in (np.dtype(np.float32), half):
        for case, shape in ROTARY.items():
            measure("rotary_embedding", case, shape, dtype.name, rotary(shape, dtype))
        for case, shape in MERGE.items():
            measure("merge_attention", case, shape, dtype.name, merge(shape, dtype))
    kinds = ((np.dtype(np.float32), "float32"), (half, half.name), (np.dtype(np.float32), "int8"))
    for given, stored in kinds:
        for case, shape in APPEND.items():
            measure("append", case, shape, f"{given} to {stored}", append(shape, given, stored))
        for case, shape in STEP.items():
            measure("append and attend", case, shape, f"{given} over {stored}", step(shape, given, stored))
    header = ["call", "case", "shape", "dtype", "us", "torch us", "vs torch"]
    if options.dry:
        print(harness.markdown_table(header, rows))
        return
    about = (
        "Rotary embedding, merging and a cache's steps, and how many times faster they are than PyTorch's formulation "
        "(bench/bench_cache.py says which). Shapes: batch x heads x len x dim; for merging parts first; for append, "
        "tokens held last; for append and attend, batch x heads x heads_kv x held x dim. PyTorch gets a float32 "
        "cache for int8, having no kernel for that. Times are the fastest round; a ratio is the median within rounds "
        "of one interleaved run."
    )
    title = "Caches and rotary embedding on a CPU"
    print("wrote", harness.write_results("cache-cpu", title, about, header, rows, threads=options.threads))


if __name__ == "__main__":
    main()
