"""Squeeze-and-excitation, CBAM and ECA against PyTorch's formulations, on a CPU.

    python bench/bench_channel.py [--threads 1 2] [--seconds 2] [--only CBAM ...] [--dry]

PyTorch gets channels_last tensors for NHWC. Both contenders allocate their results.
Writes bench/results/channel-cpu.md and .png.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from typing import Any

import harness
import numpy as np
import regard

#: (operation, batch, channels, height, width, reduced)
CASES = [
    ("SE", 8, 256, 56, 56, 16),
    ("SE", 8, 256, 7, 7, 16),
    ("SE", 32, 64, 112, 112, 4),
    ("CBAM", 8, 256, 56, 56, 16),
    ("CBAM", 8, 256, 7, 7, 16),
    ("ECA", 8, 256, 56, 56, 0),
    ("ECA", 8, 256, 7, 7, 0),
]


#: Seconds that no scheduler gives a program in one piece on a shared machine.
LONG = 0.01


def shared(threads: int) -> bool:
    """Whether more programs want cores than the benchmark's threads."""
    return os.getloadavg()[0] > 1.5 * threads


def calls(case: tuple[str, int, int, int, int, int], layout: str) -> dict[str, Callable[[], Any]]:
    """Both contenders, after a comparison of their results."""
    import torch

    name, batch, channels, height, width, reduced = case
    rng = np.random.default_rng(0)
    x = rng.standard_normal((batch, channels, height, width)).astype(np.float32)
    w = {
        "w_reduce": rng.standard_normal((reduced, channels)) / channels**0.5,
        "b_reduce": rng.standard_normal(reduced),
        "w_expand": rng.standard_normal((channels, reduced)) / max(reduced, 1) ** 0.5,
        "b_expand": rng.standard_normal(channels),
        "w_spatial": rng.standard_normal((1, 2, 7, 7)) / 7,
    }
    w = {k: a.astype(np.float32) for k, a in w.items()}
    taps = rng.standard_normal(5).astype(np.float32)
    t = torch.from_numpy(x)
    if layout == "nhwc":
        x = np.ascontiguousarray(x.transpose(0, 2, 3, 1))
        t = t.contiguous(memory_format=torch.channels_last)
    mlp = {k: torch.from_numpy(a) for k, a in w.items()}
    for k in ("w_reduce", "w_expand"):
        mlp[k] = mlp[k][:, :, None, None]
    conv_taps = torch.from_numpy(taps)[None, None]
    f = torch.nn.functional

    def network(pooled: Any) -> Any:
        hidden = f.relu(f.conv2d(pooled, mlp["w_reduce"], mlp["b_reduce"]))
        return f.conv2d(hidden, mlp["w_expand"], mlp["b_expand"])

    @torch.inference_mode()
    def theirs() -> Any:
        mean = f.adaptive_avg_pool2d(t, 1)
        if name == "SE":
            return t * torch.sigmoid(network(mean))
        if name == "ECA":
            return (
                t
                * torch.sigmoid(f.conv1d(mean[:, :, 0].transpose(1, 2), conv_taps, padding=2)).transpose(1, 2)[
                    ..., None
                ]
            )
        y = t * torch.sigmoid(network(mean) + network(f.adaptive_max_pool2d(t, 1)))
        planes = torch.cat([y.mean(1, keepdim=True), y.amax(1, keepdim=True)], 1)
        return y * torch.sigmoid(f.conv2d(planes, mlp["w_spatial"], padding=3))

    def ours() -> Any:
        if name == "SE":
            return regard.squeeze_excitation(
                x, w["w_reduce"], w["b_reduce"], w["w_expand"], w["b_expand"], layout=layout
            )
        if name == "ECA":
            return regard.efficient_channel_attention(x, taps, layout=layout)
        return regard.cbam(x, **w, layout=layout)

    order = (0, 3, 1, 2) if layout == "nhwc" else (0, 1, 2, 3)
    np.testing.assert_allclose(ours().transpose(order), theirs().numpy(), rtol=0, atol=1e-4)
    return {"regard": ours, "torch": theirs}


def main() -> None:
    parser = harness.parser(__doc__, threads=(1, 2), seconds=2.0)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="operations: SE, CBAM, ECA")
    options = parser.parse_args()
    importlib.import_module("torch")  # so that its threads are set too

    rows = []
    panels: dict[str, dict[str, dict[str, float]]] = {}
    for threads in options.threads:
        harness.set_threads(threads)
        for case in CASES:
            if options.only and case[0] not in options.only:
                continue
            for layout in ("nchw", "nhwc"):
                times = harness.compare(calls(case, layout), seconds=options.seconds)
                ours, theirs = times["regard"], times["torch"]
                moved = 2 * 4 * float(np.prod(case[1:5]))  # read once, written once
                rows.append(
                    [
                        case[0],
                        "x".join(map(str, case[1:5])),
                        layout,
                        str(threads),
                        f"{ours.minimum * 1e6:.1f}",
                        f"{theirs.minimum * 1e6:.1f}",
                        f"{moved / ours.minimum / 1e9:.1f}",
                        f"{theirs.minimum / ours.minimum:.2f}",
                        f"{ours.speedup_over(theirs):.2f}",
                    ]
                )
                # A shared machine has no certain figures of long calls: they stay out of the plot.
                certain = not shared(threads) or max(ours.minimum, theirs.minimum) < LONG
                if threads == options.threads[0] and certain:
                    heading = f"{layout}, {threads} thread" + ("s" if threads > 1 else "")
                    bars = panels.setdefault(heading, {})
                    bars[f"{rows[-1][0]} {rows[-1][1]}"] = {"fastest rounds": theirs.minimum / ours.minimum}
                print(" ".join(rows[-1]), file=sys.stderr, flush=True)
    header = ["operation", "shape", "layout", "threads", "us", "torch us", "GB/s", "faster", "median"]
    if options.dry:
        print(harness.markdown_table(header, rows))
        return
    about = (
        "`regard.squeeze_excitation`, `cbam` and `efficient_channel_attention` in float32 against PyTorch's pooling, "
        "convolutions and products. Shapes are batch x channels x height x width. `us` is the fastest round of one "
        "interleaved run, `faster` PyTorch's fastest over it; `median` is the median over rounds of PyTorch's time "
        "over regard's in the same round. GB/s counts x and the result once each. Written by "
        "`python bench/bench_channel.py`."
    )
    if shared(max(options.threads)):
        about += (
            f"\n\nOther programs ran beside it: the load average was {os.getloadavg()[0]:.1f} at the end. A round in "
            "which another program had a core is longer by milliseconds: medians, and the fastest rounds of calls of "
            "10 ms or more say little; those are not in the plot."
        )
    title = "Channel and spatial attention on a CPU"
    plot = harness.bar_plot("channel-cpu", title, "times faster than PyTorch", panels, mark=1)
    threads = max(options.threads)
    print(f"wrote {harness.write_results('channel-cpu', title, about, header, rows, threads=threads, plot=plot)}")


if __name__ == "__main__":
    main()
