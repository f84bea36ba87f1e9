"""What each option of regard.attention costs over the plain call, on a CPU.

    python bench/bench_options.py [--threads 2] [--seconds 4] [--only mask ...] [--dry]

1x16x2048x64, self-attention, float32 and bfloat16, every option against the plain call in one interleaved run.
Writes bench/results/options-cpu.md.
"""

from __future__ import annotations

import functools
import sys
from typing import Any

import harness
import numpy as np
import regard

HEADS, LENGTH, DIM = 16, 2048, 64
WINDOW = 256
BLOCK = 128


def cases(dtype: np.dtype[Any]) -> dict[str, tuple[dict[str, Any], float]]:
    """{name: (options, the share of all pairs that is seen)}."""
    rng = np.random.default_rng(0)
    pairs = (LENGTH, LENGTH)
    rows = LENGTH // BLOCK
    blocks = rng.random((HEADS, rows, rows)) < 0.25
    mask = regard.BlockMask.from_blocks(blocks, len_q=LENGTH, len_kv=LENGTH, block_size=(BLOCK, BLOCK))
    seen = (LENGTH - (WINDOW - 1) / 2) * WINDOW / LENGTH**2
    return {
        "mask": (dict(mask=rng.random(pairs) < 0.9), 1.0),
        "mask of keys": (dict(mask=rng.random((1, 1, 1, LENGTH)) < 0.9), 1.0),
        "bias": (dict(bias=rng.standard_normal((1, HEADS, *pairs), np.float32).astype(dtype)), 1.0),
        "alibi": (dict(alibi_slopes=2.0 ** -np.linspace(1, 8, HEADS, dtype=np.float32)), 1.0),
        "softcap": (dict(softcap=30.0), 1.0),
        "sinks": (dict(sinks=np.zeros(HEADS, np.float32)), 1.0),
        "lse": (dict(return_lse=True), 1.0),
        "causal": (dict(causal=True), (LENGTH + 1) / 2 / LENGTH),
        f"window of {WINDOW}": (dict(window=(WINDOW - 1, 0)), seen),
        f"block mask, density {mask.density:.2f}": (dict(mask=mask), mask.density),
        "dropout": (dict(dropout_p=0.1, seed=1), 1.0),
        "returned weights": (dict(return_weights=True), 1.0),
    }


def main() -> None:
    parser = harness.parser(__doc__, threads=2, seconds=4.0)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="options whose name contains one of these")
    options = parser.parse_args()
    harness.set_threads(options.threads)

    rows = []
    for name in ("float32", "bfloat16"):
        dtype = regard._arrays.numpy_dtype(name)
        rng = np.random.default_rng(1)
        q, k, v = (rng.standard_normal((1, HEADS, LENGTH, DIM), np.float32).astype(dtype) for _ in range(3))
        for label, (given, share) in cases(dtype).items():
            if options.only and not any(o in label for o in options.only):
                continue
            plain = functools.partial(regard.attention, q, k, v)
            contenders = {"plain": plain, "option": functools.partial(plain, **given)}
            times = harness.compare(contenders, seconds=options.seconds)
            cost = 1 / times["option"].speedup_over(times["plain"])
            rows.append(
                [
                    label,
                    name,
                    f"{times['option'].minimum * 1e3:.1f}",
                    f"{cost:.2f}",
                    f"{share:.3f}",
                    f"{cost / share:.2f}",
                ]
            )
            print(" ".join(rows[-1]), file=sys.stderr, flush=True)
    header = ["option", "dtype", "ms", "time / plain", "share of pairs seen", "time / share"]
    if options.dry:
        print(harness.markdown_table(header, rows))
        return
    about = (
        f"`regard.attention` at 1x{HEADS}x{LENGTH}x{DIM} with one option, and its time over the plain call's: the "
        "median of the ratios within rounds of one interleaved run. `time / share` is what a seen pair costs "
        "over one of the plain call. Written by `python bench/bench_options.py`."
    )
    path = harness.write_results("options-cpu", "What options cost", about, header, rows, threads=options.threads)
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
