"""regard.attention against PyTorch, ONNX Runtime and OpenVINO, whichever are installed, on a CPU.

    python bench/bench_attention.py [--threads 2] [--seconds 3] [--dtype float32 ...] [--only BERT ...] [--dry]

Writes bench/results/attention-cpu.md and .png. Every peer's result is compared with regard's before it is
timed, and every peer gets its arguments in the layout that its fastest kernel wants.
"""

from __future__ import annotations

import functools
import sys

import attention_peers
import harness
import regard
import shapes
from attention_peers import PEERS

#: Ratios, not GFLOP/s: the fastest rounds of two contenders may have had different neighbours.
UNIT = "times faster than the peer"

DTYPES = ["float32", "float16", "bfloat16"]


def main() -> None:
    parser = harness.parser(__doc__, threads=2, seconds=3.0)
    parser.add_argument("--dtype", nargs="+", default=DTYPES, choices=DTYPES)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="shapes whose name contains one of these")
    options = parser.parse_args()

    found = [s for s in shapes.ATTENTION if not options.only or any(o in s.name for o in options.only)]
    rows: list[list[str]] = []
    panels: dict[str, dict[str, dict[str, float]]] = {}
    try:
        for dtype in options.dtype:
            for shape in found:
                times = _timed(shape, dtype, options.threads, options.seconds)
                rows.append(_row(shape, dtype, times))
                print(" ".join(rows[-1]), file=sys.stderr, flush=True)
                if shape.name != "tiny":
                    ratios = {p: times["regard"].speedup_over(times[p]) for p in PEERS if p in times}
                    panels.setdefault(dtype, {})[f"{shape.name}\n{shape.label}"] = ratios
    except KeyboardInterrupt:
        print("interrupted: the rows so far are written", file=sys.stderr)

    header = ["model", "shape", "dtype", "ms", "GFLOP/s", "GB/s", *(f"vs {p}" for p in PEERS)]
    if options.dry:
        print(harness.markdown_table(header, rows))
        return
    about = (
        "Times of `regard.attention`, and how many times faster it is than each peer (above 1: regard is "
        "faster; -: not installed, or no kernel for this case). Shapes are batch x heads(/heads_kv) x "
        "len(_q/_kv) x dim(_qk/_v). GFLOP/s counts 2 len_q len_kv (dim_qk + dim_v) a head, half if causal; "
        "GB/s counts each input and output once. `ms` is the fastest round; a ratio is the median of the "
        "ratios within rounds of one interleaved run. Written by `python bench/bench_attention.py`."
    )
    title = "Attention on a CPU"
    plot = harness.bar_plot("attention-cpu", title, UNIT, panels, mark=1) if panels else None
    path = harness.write_results("attention-cpu", title, about, header, rows, threads=options.threads, plot=plot)
    print(f"wrote {path}")


def _timed(shape: shapes.Attention, dtype: str, threads: int, seconds: float) -> dict[str, harness.Timing]:
    given = attention_peers.arrays(shape, dtype)
    alignment = "lower_right" if shape.causal and shape.len_q != shape.len_kv else None
    ours = functools.partial(regard.attention, *given, causal=shape.causal, alignment=alignment)
    harness.set_threads(threads)
    calls, _ = attention_peers.contenders(shape, dtype, given, threads, ours)
    return harness.compare(calls, seconds=seconds, least_rounds=3)


def _row(shape: shapes.Attention, dtype: str, times: dict[str, harness.Timing]) -> list[str]:
    best = times["regard"].minimum
    itemsize = 4 if dtype == "float32" else 2
    speeds = (f"{shape.flops / best / 1e9:.0f}", f"{shape.bytes(itemsize) / best / 1e9:.1f}")
    ratios = [f"{times['regard'].speedup_over(times[p]):.2f}" if p in times else "-" for p in PEERS]
    return [shape.name, shape.label, dtype, f"{best * 1e3:.4g}", *speeds, *ratios]


if __name__ == "__main__":
    main()
