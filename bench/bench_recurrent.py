"""Recurrent layers against PyTorch's, on a CPU.

    python bench/bench_recurrent.py [--threads 2] [--seconds 3] [--dtypes float32 ...] [--only NAME ...] [--dry]

Both have the same weights and inputs, and the results are compared before they are timed. Writes
bench/results/recurrent-cpu.md.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import harness
import numpy as np
from regard import nn


class Shape(NamedTuple):
    cell: str
    batch: int
    length: int
    features: int
    hidden: int
    layers: int = 1
    directions: int = 1

    def gflop(self) -> float:
        gates = 3 if self.cell == "GRU" else 4
        widths = [self.features] + [self.directions * self.hidden] * (self.layers - 1)
        per_step = sum(2 * gates * self.hidden * (w + self.hidden) for w in widths) * self.directions
        return self.batch * self.length * per_step / 1e9


SHAPES = {
    "RNNSearch's encoder": Shape("GRU", 32, 30, 620, 1000, directions=2),
    "RNNSearch's decoder, a step": Shape("GRU", 32, 1, 2620, 1000),
    "sentences": Shape("GRU", 32, 50, 256, 256, directions=2),
    "one sentence": Shape("GRU", 1, 50, 256, 256, directions=2),
    "dates": Shape("GRU", 64, 30, 32, 64, directions=2),
    "one date": Shape("GRU", 1, 30, 32, 64, directions=2),
    "language model": Shape("LSTM", 32, 35, 650, 650, layers=2),
    "long series": Shape("LSTM", 64, 500, 16, 128),
    "one long series": Shape("LSTM", 1, 1000, 64, 512),
    "tagger": Shape("LSTM", 16, 40, 300, 200, layers=2, directions=2),
}


def calls(shape: Shape, dtype: str) -> tuple[dict[str, Callable[[], Any]], float]:
    """Both contenders, and how far their results lie apart."""
    import torch

    options = dict(num_layers=shape.layers, batch_first=True, bidirectional=shape.directions == 2)
    torch.manual_seed(0)
    kind = getattr(torch, dtype)
    theirs = getattr(torch.nn, shape.cell)(shape.features, shape.hidden, **options).eval().to(kind)
    ours = getattr(nn, shape.cell)(shape.features, shape.hidden, **options, dtype=dtype)
    ours.load_state_dict(theirs.state_dict())
    rng = np.random.default_rng(0)
    x = torch.from_numpy(rng.standard_normal((shape.batch, shape.length, shape.features), np.float32)).to(kind)
    given: Any = x if dtype == "bfloat16" else x.numpy()

    @torch.inference_mode()
    def torch_s() -> Any:
        return theirs(x)[0]

    wanted, got = torch_s().float(), torch.as_tensor(ours(given)[0]).float()
    apart = float((wanted - got).abs().max())
    if not apart < (5e-2 if dtype == "bfloat16" else 1e-5):
        raise AssertionError(f"PyTorch computes something else: {apart:.1e} apart")
    return {"regard": lambda: ours(given)[0], "torch": torch_s}, apart


def main() -> None:
    parser = harness.parser(__doc__, threads=2, seconds=3.0)
    parser.add_argument("--dtypes", nargs="+", default=["float32"])
    parser.add_argument("--only", nargs="+", default=list(SHAPES), metavar="NAME")
    options = parser.parse_args()
    harness.set_threads(options.threads)

    rows = []
    for name in options.only:
        shape = SHAPES[name]
        for dtype in options.dtypes:
            contenders, apart = calls(shape, dtype)
            times = harness.compare(contenders, seconds=options.seconds)
            harness.set_threads(1)
            alone = harness.compare(contenders, seconds=options.seconds, clock=time.thread_time)
            harness.set_threads(options.threads)
            words = f"{shape.batch}x{shape.length}x{shape.features} -> {shape.directions}x{shape.hidden}"
            words += f", {shape.layers} layers" if shape.layers > 1 else ""
            figures = []
            for t in (times, alone):
                figures += [f"{t['regard'].minimum * 1e3:.3f}", f"{t['regard'].speedup_over(t['torch']):.1f}"]
            speed = f"{shape.gflop() / alone['regard'].minimum:.0f}"
            rows.append([name, shape.cell, words, dtype, *figures, speed, f"{apart:.0e}"])
            print(" ".join(rows[-1]), file=sys.stderr, flush=True)
    header = ["case", "cell", "batch x len x features -> hidden", "dtype", "ms", "vs torch", "1 thread: ms", "vs torch"]
    header += ["GFLOP/s", "apart"]
    if options.dry:
        print(harness.markdown_table(header, rows))
        return
    about = (
        "`regard.nn.GRU` and `LSTM`, and how many times faster they are than PyTorch's with the same weights. 2x "
        "stands for both directions. `ms` is the fastest round; a ratio is the median of the ratios within rounds of "
        "one interleaved run. First come all threads, by the clock on the wall; then one thread, by processor time "
        "that it took, which other programs on the machine change little, and its GFLOP/s of products. `apart` is the "
        "largest difference of two outputs. Written by `python bench/bench_recurrent.py`."
    )
    path = harness.write_results(
        "recurrent-cpu", "Recurrent layers on a CPU", about, header, rows, threads=options.threads
    )
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
