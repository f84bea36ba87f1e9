"""regard.attention against PyTorch, ONNX Runtime and OpenVINO, whichever are installed, on a CPU.

    python bench/bench_attention.py [--threads 2] [--seconds 3] [--dtype float32 ...] [--only BERT ...] [--dry]

Writes bench/results/attention-cpu.md and .png. Every peer's result is compared with regard's before it is
timed, and every peer gets its arguments in the layout that its fastest kernel wants.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator
from typing import Any

import harness
import numpy as np
import regard
import shapes

#: Ratios, not GFLOP/s: the fastest rounds of two contenders may have had different neighbours.
UNIT = "times faster than the peer"

#: How far results may lie apart, for values up to about 4: peers may round in between.
_APART = {"float32": 1e-4, "float16": 5e-2, "bfloat16": 1e-1}


def main() -> None:
    parser = harness.parser(__doc__, threads=2, seconds=3.0)
    parser.add_argument("--dtype", nargs="+", default=list(_APART), choices=list(_APART))
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
    query, key, value = arrays(shape, dtype)
    alignment = "lower_right" if shape.causal and shape.len_q != shape.len_kv else None

    def ours() -> Any:
        return regard.attention(query, key, value, causal=shape.causal, alignment=alignment)

    calls: dict[str, Callable[[], Any]] = {"regard": ours}
    for name, make in PEERS.items():
        if importlib.util.find_spec(name) is None:
            continue
        prepared = make(shape, dtype, query, key, value, threads)
        if prepared is not None:
            call, as_numpy = prepared
            _must_agree(name, as_numpy(call()), ours(), dtype)
            calls[name] = call
    harness.set_threads(threads)
    return harness.compare(calls, seconds=seconds, least_rounds=3)


def _must_agree(peer: str, theirs: np.ndarray, ours: np.ndarray, dtype: str) -> None:
    apart = np.abs(np.asarray(theirs, np.float32) - ours.astype(np.float32)).max()
    if not apart <= _APART[dtype]:
        raise AssertionError(f"{peer} computes something else: {apart:.1e} apart")


def _row(shape: shapes.Attention, dtype: str, times: dict[str, harness.Timing]) -> list[str]:
    best = times["regard"].minimum
    itemsize = 4 if dtype == "float32" else 2
    speeds = (f"{shape.flops / best / 1e9:.0f}", f"{shape.bytes(itemsize) / best / 1e9:.1f}")
    ratios = [f"{times['regard'].speedup_over(times[p]):.2f}" if p in times else "-" for p in PEERS]
    return [shape.name, shape.label, dtype, f"{best * 1e3:.4g}", *speeds, *ratios]


def arrays(shape: shapes.Attention, dtype: str) -> Iterator[np.ndarray]:
    rng = np.random.default_rng(0)
    keys = (shape.batch, shape.heads_kv, shape.len_kv)
    sizes = (
        (shape.batch, shape.heads, shape.len_q, shape.dim_qk),
        (*keys, shape.dim_qk),
        (*keys, shape.dim_v),
    )
    if dtype == "bfloat16":
        import ml_dtypes

        kind: Any = ml_dtypes.bfloat16
    else:
        kind = np.dtype(dtype)
    return (rng.standard_normal(s, np.float32).astype(kind) for s in sizes)


# The peers: each answers (call, result -> NumPy array in bhsd), or None where it has no kernel for the case.

Prepared = tuple[Callable[[], Any], Callable[[Any], np.ndarray]] | None


def _torch(shape: shapes.Attention, dtype: str, q: Any, k: Any, v: Any, threads: int) -> Prepared:
    import torch
    from regard._cli.peers import to_torch

    torch.set_num_threads(threads)
    query, key, value = (to_torch(x) for x in (q, k, v))
    grouped = shape.heads != shape.heads_kv
    causal = shape.causal and shape.len_q == shape.len_kv
    if shape.causal and not causal:
        return None
    guard = torch.inference_mode()

    def call() -> Any:
        with guard:
            return torch.nn.functional.scaled_dot_product_attention(
                query, key, value, is_causal=causal, enable_gqa=grouped
            )

    return call, lambda out: out.float().numpy()


def _onnxruntime(shape: shapes.Attention, dtype: str, q: Any, k: Any, v: Any, threads: int) -> Prepared:
    if dtype != "float32" or (shape.causal and shape.len_q != shape.len_kv):
        return None
    from onnx import TensorProto, helper

    grouped = shape.heads != shape.heads_kv
    names = ["query", "key", "value"]
    if grouped:
        # The standard's operator (opset 23), which knows groups.
        node = helper.make_node("Attention", names, ["out"], is_causal=int(shape.causal))
        feeds = dict(zip(names, (q, k, v), strict=True))
    else:
        # ONNX Runtime's own fused operator, on (batch, len, heads * dim).
        node = helper.make_node(
            "MultiHeadAttention",
            names,
            ["out"],
            domain="com.microsoft",
            num_heads=shape.heads,
            unidirectional=int(shape.causal),
        )
        packed = (np.ascontiguousarray(x.swapaxes(1, 2)).reshape(shape.batch, x.shape[2], -1) for x in (q, k, v))
        feeds = dict(zip(names, packed, strict=True))
    inputs = [helper.make_tensor_value_info(n, TensorProto.FLOAT, x.shape) for n, x in feeds.items()]
    outputs = [helper.make_tensor_value_info("out", TensorProto.FLOAT, None)]
    graph = helper.make_graph([node], "attention", inputs, outputs)
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    session = harness.onnxruntime_session(model.SerializeToString(), threads)

    def to_bhsd(result: Any) -> np.ndarray:
        (out,) = result
        if grouped:
            return out
        return out.reshape(shape.batch, shape.len_q, shape.heads, shape.dim_v).swapaxes(1, 2)

    return (lambda: session.run(None, feeds)), to_bhsd


def _openvino(shape: shapes.Attention, dtype: str, q: Any, k: Any, v: Any, threads: int) -> Prepared:
    if shape.heads != shape.heads_kv or (shape.causal and shape.len_q != shape.len_kv):
        return None
    import openvino as ov
    from openvino import opset13

    kind = {"float32": ov.Type.f32, "float16": ov.Type.f16, "bfloat16": ov.Type.bf16}[dtype]
    parameters = [opset13.parameter(x.shape, kind) for x in (q, k, v)]
    result = opset13.scaled_dot_product_attention(*parameters, causal=shape.causal)
    model = ov.Model([result], parameters, "attention")
    short = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}[dtype]
    request = harness.openvino_compile(model, threads, short)
    for i, x in enumerate((q, k, v)):
        words = x if dtype != "bfloat16" else x.view(np.uint16)
        tensor = ov.Tensor(words, shared_memory=True) if dtype != "bfloat16" else ov.Tensor(words, x.shape, kind)
        request.set_input_tensor(i, tensor)

    def to_numpy(_: Any) -> np.ndarray:
        out = request.get_output_tensor(0)
        if out.element_type == ov.Type.bf16:
            words = np.frombuffer(bytes(out.data), np.uint16).astype(np.uint32) << 16
            return words.view(np.float32).reshape(out.shape)
        return np.array(out.data, np.float32)

    return request.infer, to_numpy


PEERS: dict[str, Callable[..., Prepared]] = {
    "torch": _torch,
    "onnxruntime": _onnxruntime,
    "openvino": _openvino,
}

if __name__ == "__main__":
    main()
