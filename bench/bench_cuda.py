"""Attention on a GPU against PyTorch's flash and cuDNN kernels, and against what the card itself reaches; steps of
decoding, squeeze-and-excitation and linear layers of int8 weights against PyTorch's operations.

    python bench/bench_cuda.py            writes results/cuda-<card>.md; some three minutes

Needs an NVIDIA GPU, a build with CUDA kernels, CuPy, and PyTorch with CUDA. Times are medians of runs between CUDA
events, peers interleaved; the ceilings are a copy of device memory and a bfloat16 matrix product, measured in the same
run. Inputs and outputs are PyTorch's tensors for all.
"""

from __future__ import annotations

import functools
import re
import statistics
import sys
from collections.abc import Callable
from typing import Any

import harness
import regard
from regard import _backend
from regard.dense import pack_linear

#: (label, batch, heads, heads_kv, len_q, len_kv, dim_qk, dim_v, causal)
SHAPES = [
    ("D64 4k", 4, 32, 32, 4096, 4096, 64, 64, False),
    ("D64 16k", 1, 32, 32, 16384, 16384, 64, 64, False),
    ("D64 16k causal", 1, 32, 32, 16384, 16384, 64, 64, True),
    ("D128 2k", 8, 16, 16, 2048, 2048, 128, 128, False),
    ("D128 16k", 1, 16, 16, 16384, 16384, 128, 128, False),
    ("D128 16k causal", 1, 16, 16, 16384, 16384, 128, 128, True),
    ("D128 GQA 32/8 8k causal", 1, 32, 8, 8192, 8192, 128, 128, True),
    ("D256 8k", 1, 8, 8, 8192, 8192, 256, 256, False),
    ("D192/128 8k causal", 1, 32, 32, 8192, 8192, 192, 128, True),
]
#: (label, batch, heads, heads_kv, len_kv, dim): one query of each sequence
DECODING = [
    ("GQA 32/8 32k", 1, 32, 8, 32768, 128),
    ("GQA 64/8 32k", 1, 64, 8, 32768, 128),
    ("GQA 32/8 4k, batch 32", 32, 32, 8, 4096, 128),
    ("32 heads 1k, batch 16", 16, 32, 32, 1024, 128),
]
#: (batch, channels, height, width, reduced)
MAPS = [(64, 256, 56, 56, 16), (64, 2048, 7, 7, 128)]
#: (rows, in_features, out_features)
LAYERS = [(rows, 4096, 4096) for rows in (1, 8, 64, 512, 4096)] + [(1, 4096, 14336), (4096, 14336, 4096)]
ROUNDS = 20


def milliseconds(torch: Any, calls: dict[str, Callable[[], Any]]) -> dict[str, float]:
    """The median time of each, interleaved; what fails is left out, with a word on why.

    Before each call the device fills a GiB: no weights are left in its L2 cache, and the call's own work in Python,
    which that fill outlasts, is not part of its time.
    """
    fill = torch.empty(2**30, device="cuda", dtype=torch.uint8)
    times: dict[str, list[float]] = {name: [] for name in calls}
    for round_ in range(ROUNDS + 3):
        for name in list(times):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            try:
                fill.zero_()
                begin.record()
                calls[name]()
                end.record()
                end.synchronize()
            except Exception as reason:
                print(f"{name} failed: {reason}", file=sys.stderr)
                del times[name]
                continue
            if round_ >= 3:
                times[name].append(begin.elapsed_time(end))
    return {name: statistics.median(t) for name, t in times.items()}


def ceilings(torch: Any) -> dict[str, float]:
    """Copy bandwidth in GB/s and bfloat16 products in TFLOP/s."""
    n = 8192
    a, b = (torch.randn(n, n, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    x = torch.empty(2**30, device="cuda", dtype=torch.uint8)
    y = torch.empty_like(x)
    times = milliseconds(torch, {"copy": lambda: y.copy_(x), "product": lambda: a @ b})
    return {"copy": 2 * x.numel() / times["copy"] / 1e6, "product": 2 * n**3 / times["product"] / 1e9}


def peers(torch: Any, q: Any, k: Any, v: Any, causal: bool) -> dict[str, Callable[[], Any]]:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    calls: dict[str, Callable[[], Any]] = {"regard": lambda: regard.attention(q, k, v, causal=causal)}
    for name, kernel in (("flash", SDPBackend.FLASH_ATTENTION), ("cuDNN", SDPBackend.CUDNN_ATTENTION)):

        def call(kernel: Any = kernel) -> Any:
            with sdpa_kernel(kernel):
                return torch.nn.functional.scaled_dot_product_attention(
                    q, k, v, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1]
                )

        try:
            call()
        except RuntimeError:
            continue
        calls[name] = call
    return calls


def cells_of(times: dict[str, float], *names: str) -> list[str]:
    """Microseconds, or "-" where a call failed."""
    return [f"{1e3 * times[n]:.1f}" if n in times else "-" for n in names]


def decoding(torch: Any, copy: float) -> str:
    """A table of decoding's steps: the rate is that of reading keys and values, of bfloat16 and of an int8 cache."""
    rows = []
    for label, batch, heads, heads_kv, length, dim in DECODING:
        q = torch.randn(batch, heads, 1, dim, device="cuda", dtype=torch.bfloat16)
        k, v = (torch.randn(batch, heads_kv, length, dim, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        cache = regard.KVCache(batch, heads_kv, length, dim, dtype="int8", like=q)
        cache.append(k, v)
        times = milliseconds(torch, {**peers(torch, q, k, v, False), "int8": functools.partial(cache.attend, q)})
        read = {"regard": 2 * k.numel() * 2, "int8": 2 * k.numel() * (1 + 4 / dim)}
        cells = cells_of(times, "regard", "flash", "cuDNN", "int8")
        for name, size in read.items():
            rate = size / times[name] / 1e6 if name in times else None
            cells.append(f"{rate:.0f} ({100 * rate / copy:.0f} %)" if rate else "-")
        rows.append([label, *cells])
    rates = ("regard, GB/s (of a copy)", "int8, GB/s (of a copy)")
    header = ["one query, us", "regard", "torch flash", "torch cuDNN", "regard int8 cache", *rates]
    return harness.markdown_table(header, rows)


def maps(torch: Any, copy: float) -> str:
    """A table of squeeze-and-excitation: a map has to be read and written once."""
    rows = []
    for batch, channels, height, width, reduced in MAPS:
        shapes = ((reduced, channels), (reduced,), (channels, reduced), (channels,))
        for dtype in (torch.float32, torch.float16):
            nchw = torch.randn(batch, channels, height, width, device="cuda", dtype=dtype)
            weights = [torch.randn(*shape, device="cuda", dtype=dtype) / shape[-1] ** 0.5 for shape in shapes]

            def eager(x: Any = nchw, weights: Any = weights) -> Any:
                f = torch.nn.functional
                hidden = f.relu(f.linear(x.mean((2, 3)), weights[0], weights[1]))
                return x * f.linear(hidden, weights[2], weights[3]).sigmoid()[:, :, None, None]

            calls = {"torch": eager}
            for layout, x in (("nchw", nchw), ("nhwc", nchw.permute(0, 2, 3, 1).contiguous())):
                calls[layout] = functools.partial(regard.squeeze_excitation, x, *weights, layout=layout)
            times = milliseconds(torch, calls)
            least = 2 * nchw.numel() * nchw.element_size() / copy / 1e6
            share = [f"{times[n] / least:.2f}x" if n in times else "-" for n in ("nchw", "nhwc")]
            label = f"{batch}x{channels}x{height}x{width} {str(dtype).removeprefix('torch.')}"
            rows.append([label, *cells_of(times, "nchw", "nhwc", "torch"), *share])
    bytes_of = [f"regard {layout}, of reading and writing once" for layout in ("nchw", "nhwc")]
    header = ["squeeze-and-excitation, us", "regard nchw", "regard nhwc", "torch nchw", *bytes_of]
    return harness.markdown_table(header, rows)


def layers(torch: Any) -> str:
    """A table of linear layers of int8 weights, x quantised within the time."""
    rows = []
    for n, inner, outer in LAYERS:
        x = torch.randn(n, inner, device="cuda", dtype=torch.bfloat16)
        weight = torch.randn(outer, inner, device="cuda", dtype=torch.bfloat16)
        packed = pack_linear(weight, held="int8")
        calls = {
            "regard": functools.partial(regard.linear, x, packed),
            "torch": functools.partial(torch.nn.functional.linear, x, weight),
        }
        times = milliseconds(torch, calls)
        cells = cells_of(times, *calls)
        if "regard" in times:
            operations, read = 2 * n * inner * outer, inner * outer
            cells += [f"{operations / times['regard'] / 1e9:.1f}", f"{read / times['regard'] / 1e6:.0f}"]
        rows.append([f"{n} x {inner} x {outer}", *cells, *(4 - len(cells)) * ["-"]])
    header = ["rows x in x out", "regard int8, us", "torch bfloat16, us", "regard, TOP/s", "regard, GB/s of weights"]
    return harness.markdown_table(header, rows)


def main() -> int:
    try:
        import torch

        _backend.cuda("bench_cuda")
    except (ImportError, NotImplementedError) as reason:
        print(f"bench_cuda needs a GPU, CUDA kernels in regard, and PyTorch with CUDA: {reason}")
        return 1
    if not torch.cuda.is_available():
        print("bench_cuda needs PyTorch with CUDA, and a device")
        return 1
    card = torch.cuda.get_device_name()
    top = ceilings(torch)
    rows = []
    for label, batch, heads, heads_kv, len_q, len_kv, dim_qk, dim_v, causal in SHAPES:
        q = torch.randn(batch, heads, len_q, dim_qk, device="cuda", dtype=torch.bfloat16)
        k, v = (
            torch.randn(batch, heads_kv, len_kv, dim, device="cuda", dtype=torch.bfloat16) for dim in (dim_qk, dim_v)
        )
        times = milliseconds(torch, peers(torch, q, k, v, causal))
        flops = 2 * batch * heads * len_q * len_kv * (dim_qk + dim_v) / (2 if causal else 1)
        speed = {name: flops / t / 1e9 for name, t in times.items()}
        cells = [f"{speed[n]:.0f}" if n in speed else "-" for n in ("regard", "flash", "cuDNN")]
        cells.append(f"{100 * speed['regard'] / top['product']:.0f} %" if "regard" in speed else "-")
        rows.append([label, *cells])
        print(*rows[-1], flush=True)  # what is known, should a later row end the process
    table = harness.markdown_table(
        ["bfloat16, TFLOP/s", "regard", "torch flash", "torch cuDNN", "regard of a matrix product"], rows
    )
    facts = {"card": card, "copy": f"{top['copy']:.0f} GB/s", "matrix product": f"{top['product']:.0f} TFLOP/s"}
    facts |= {"CUDA of PyTorch": str(torch.version.cuda), **harness.hardware()}
    path = harness.RESULTS / f"cuda-{re.sub('[^a-z0-9]+', '-', card.lower())}.md"
    text = f"# Attention on {card}\n\n" + "".join(f"- {k}: {v}\n" for k, v in facts.items()) + f"\n{table}\n"
    path.write_text(text)
    for table_of in (lambda: decoding(torch, top["copy"]), lambda: maps(torch, top["copy"]), lambda: layers(torch)):
        text += f"\n{table_of()}\n"
        path.write_text(text)
    print(text + f"\nwritten to {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
