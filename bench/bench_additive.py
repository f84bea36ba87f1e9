"""Additive attention against PyTorch's broadcasted formulation, on a CPU.

    python bench/bench_additive.py [--threads 2] [--seconds 3] [--dry]

The peer is softmax(tanh(q[:, :, None] + k[:, None]) @ v) @ values, with keys and queries projected beforehand.
Writes bench/results/additive-cpu.md.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

import harness
import numpy as np
import regard

#: name: (batch, len_q, len_kv, dim)
SHAPES = {
    "translation": (8, 64, 512, 256),
    "short sentences": (32, 30, 30, 512),
    "decode, Bahdanau": (32, 1, 128, 512),
    "decode, speech": (8, 1, 1000, 128),
}


def calls(shape: tuple[int, int, int, int], dtype: str) -> dict[str, Callable[[], Any]]:
    """Both contenders, after a comparison of their results."""
    import torch

    batch, len_q, len_kv, dim = shape
    rng = np.random.default_rng(0)
    query, key = (rng.standard_normal((batch, n, dim)).astype(dtype) for n in (len_q, len_kv))
    v = (rng.standard_normal(dim) / dim**0.5).astype(dtype)
    q, k, w = (torch.from_numpy(x) for x in (query, key, v))

    def ours() -> Any:
        return regard.additive_attention(query, key, key, v=v)

    @torch.inference_mode()
    def theirs() -> Any:
        return torch.softmax(torch.tanh(q[:, :, None] + k[:, None]) @ w, -1) @ k

    np.testing.assert_allclose(ours(), theirs().numpy(), rtol=0, atol=1e-5)
    return {"regard": ours, "torch": theirs}


def main() -> None:
    options = harness.parser(__doc__, threads=2, seconds=3.0).parse_args()
    harness.set_threads(options.threads)

    rows = []
    for name, shape in SHAPES.items():
        for dtype in ("float32", "float64"):
            contenders = calls(shape, dtype)
            times = harness.compare(contenders, seconds=options.seconds)
            harness.set_threads(1)
            alone = harness.compare(contenders, seconds=options.seconds, clock=time.thread_time)
            harness.set_threads(options.threads)
            fastest, fastest_alone = times["regard"].minimum, alone["regard"].minimum
            rows.append(
                [
                    name,
                    "x".join(map(str, shape)),
                    dtype,
                    f"{fastest * 1e3:.3f}",
                    f"{np.prod(shape) / fastest / 1e9:.1f}",
                    f"{times['regard'].speedup_over(times['torch']):.1f}",
                    f"{fastest_alone * 1e3:.3f}",
                    f"{np.prod(shape) / fastest_alone / 1e9:.1f}",
                    f"{alone['regard'].speedup_over(alone['torch']):.1f}",
                ]
            )
            print(" ".join(rows[-1]), file=sys.stderr, flush=True)
    columns = ["ms", "G tanh/s", "vs torch"]
    header = ["case", "shape", "dtype", *columns, f"1 thread: {columns[0]}", *columns[1:]]
    if options.dry:
        print(harness.markdown_table(header, rows))
        return
    about = (
        "`regard.additive_attention` and how many times faster it is than PyTorch's `softmax(tanh(q[:, :, None] + "
        "k[:, None]) @ v) @ values`, queries and keys projected beforehand. Shapes are batch x len_q x len_kv x dim. "
        "`ms` is the fastest round; a ratio is the median of the ratios within rounds of one interleaved run. First "
        "come all threads, by the clock on the wall; then one thread, by the processor time that it took, which other "
        "programs on the machine change little."
    )
    print(
        "wrote",
        harness.write_results(
            "additive-cpu", "Additive attention on a CPU", about, header, rows, threads=options.threads
        ),
    )


if __name__ == "__main__":
    main()
