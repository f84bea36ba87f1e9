"""The peers of regard.attention, each prepared in the layout and the formulation that are its fastest.

calls, notes = attention_peers.contenders(shape, dtype, arrays, threads, ours)
harness.compare(calls)
"""

from __future__ import annotations

import dataclasses
import importlib.util
import time
from collections.abc import Callable, Mapping
from typing import Any

import harness
import numpy as np
import shapes

Call = Callable[[], Any]

#: How far results may lie apart, for values up to about 4: peers may round in between.
_APART = {"float32": 1e-4, "float16": 5e-2, "bfloat16": 1e-1}

#: ONNX Runtime's formulations keep all scores in memory: larger ones are left out.
_MOST_SCORES = 2 << 30


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A peer's call, how its result becomes a NumPy array in bhsd, and which of its formulations it is."""

    call: Call
    as_numpy: Callable[[Any], np.ndarray]
    formulation: str = ""


def arrays(shape: shapes.Attention, dtype: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Query, key and value of normal values."""
    keys = (shape.batch, shape.heads_kv, shape.len_kv)
    query = harness.normal((shape.batch, shape.heads, shape.len_q, shape.dim_qk), dtype)
    return query, harness.normal((*keys, shape.dim_qk), dtype, 1), harness.normal((*keys, shape.dim_v), dtype, 2)


def contenders(
    shape: shapes.Attention,
    dtype: str,
    given: tuple[np.ndarray, np.ndarray, np.ndarray],
    threads: int,
    ours: Call,
    only: tuple[str, ...] = ("torch", "onnxruntime", "openvino"),
) -> tuple[dict[str, Call], dict[str, str]]:
    """{name: call}, regard first, of those that are installed and compute the case, and {name: formulation}."""
    calls, formulations = {"regard": ours}, {}
    wanted = ours().astype(np.float32)
    for name in only:
        if importlib.util.find_spec(name) is None:
            continue
        prepared = PEERS[name](shape, dtype, *given, threads)
        if prepared is not None:
            _must_agree(name, prepared.as_numpy(prepared.call()), wanted, dtype)
            calls[name] = prepared.call
            if prepared.formulation:
                formulations[name] = prepared.formulation
    return calls, formulations


def _must_agree(peer: str, theirs: np.ndarray, ours: np.ndarray, dtype: str) -> None:
    apart = np.abs(np.asarray(theirs, np.float32) - ours).max()
    if not apart <= _APART[dtype]:
        raise AssertionError(f"{peer} computes something else: {apart:.1e} apart")


# Each answers None where it has no kernel for the case.


def _torch(shape: shapes.Attention, dtype: str, q: Any, k: Any, v: Any, threads: int) -> Prepared | None:
    import torch
    from regard._cli.peers import to_torch

    causal = shape.causal and shape.len_q == shape.len_kv
    if shape.causal and not causal:
        return None
    torch.set_num_threads(threads)
    query, key, value = (to_torch(x) for x in (q, k, v))
    grouped = shape.heads != shape.heads_kv
    guard = torch.inference_mode()

    def call() -> Any:
        with guard:
            return torch.nn.functional.scaled_dot_product_attention(
                query, key, value, is_causal=causal, enable_gqa=grouped
            )

    return Prepared(call, lambda out: out.float().numpy())


def _onnxruntime(shape: shapes.Attention, dtype: str, q: Any, k: Any, v: Any, threads: int) -> Prepared | None:
    scores = shape.batch * shape.heads * shape.len_q * shape.len_kv * 4
    if dtype == "bfloat16" or (shape.causal and shape.len_q != shape.len_kv) or scores > _MOST_SCORES:
        return None
    from onnx import TensorProto, helper

    names = ["query", "key", "value"]
    given = dict(zip(names, (q, k, v), strict=True))
    kind = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16}[dtype]

    def prepared(formulation: str, feeds: Mapping[str, np.ndarray], *nodes: Any, packed: bool = False) -> Prepared:
        inputs = [helper.make_tensor_value_info(n, kind, x.shape) for n, x in feeds.items()]
        outputs = [helper.make_tensor_value_info("out", kind, None)]
        graph = helper.make_graph(nodes, "attention", inputs, outputs)
        opsets = [helper.make_opsetid("", 23), helper.make_opsetid("com.microsoft", 1)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
        session = harness.onnxruntime_session(model.SerializeToString(), threads)

        def to_bhsd(result: Any) -> np.ndarray:
            (out,) = result
            if not packed:
                return out
            return out.reshape(shape.batch, shape.len_q, shape.heads, shape.dim_v).swapaxes(1, 2)

        return Prepared(lambda: session.run(None, dict(feeds)), to_bhsd, formulation)

    # The standard's operator (opset 23), which alone knows groups.
    standard = helper.make_node("Attention", names, ["out"], is_causal=int(shape.causal))
    found = [prepared("Attention", given, standard)]
    if shape.heads == shape.heads_kv:
        # ONNX Runtime's own fused operator, on (batch, len, heads * dim).
        fused = helper.make_node(
            "MultiHeadAttention",
            names,
            ["out"],
            domain="com.microsoft",
            num_heads=shape.heads,
            unidirectional=int(shape.causal),
        )
        flat = {
            n: np.ascontiguousarray(x.swapaxes(1, 2)).reshape(shape.batch, x.shape[2], -1) for n, x in given.items()
        }
        found.append(prepared("MultiHeadAttention", flat, fused, packed=True))
        if not shape.causal:
            scale = helper.make_tensor("scale", kind, [], np.asarray([shape.dim_qk**-0.5], dtype).tobytes(), raw=True)
            products = (
                helper.make_node("Transpose", ["key"], ["key_t"], perm=[0, 1, 3, 2]),
                helper.make_node("MatMul", ["query", "key_t"], ["products"]),
                helper.make_node("Constant", [], ["scale"], value=scale),
                helper.make_node("Mul", ["products", "scale"], ["scores"]),
                helper.make_node("Softmax", ["scores"], ["weights"], axis=-1),
                helper.make_node("MatMul", ["weights", "value"], ["out"]),
            )
            found.append(prepared("MatMul, Softmax, MatMul", given, *products))
    return min(found, key=_trial)


def _trial(prepared: Prepared) -> float:
    """Seconds of the fastest of three calls: to choose among formulations."""
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        prepared.call()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def _openvino(shape: shapes.Attention, dtype: str, q: Any, k: Any, v: Any, threads: int) -> Prepared | None:
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

    return Prepared(request.infer, to_numpy)


PEERS: dict[str, Callable[..., Prepared | None]] = {
    "torch": _torch,
    "onnxruntime": _onnxruntime,
    "openvino": _openvino,
}
