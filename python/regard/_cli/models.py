"""`bench models`: layers and models of regard.nn, with weights held in several ways, against PyTorch's in one run.

Weights are drawn, not trained: no time depends on them. PyTorch's modules are in evaluation mode and take
their fast path; decoding is written out on its functions, with a cache, as its modules have none.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import numpy as np

import regard
from regard import _arrays, _backend
from regard._cli import operations, table
from regard._cli.info import processor
from regard._cli.peers import to_torch
from regard._cli.timing import compare


@dataclasses.dataclass(frozen=True)
class Encoder:
    """An encoder of so many layers, called with (batch, length, width)."""

    label: str
    layers: int
    width: int
    heads: int
    inner: int
    shapes: tuple[tuple[int, int], ...]

    def stack(self, nn: Any, **options: Any) -> Any:
        layer = nn.TransformerEncoderLayer(
            self.width, self.heads, self.inner, activation="gelu", batch_first=True, **options
        )
        return nn.TransformerEncoder(layer, self.layers, enable_nested_tensor=False)


ENCODERS = (
    Encoder("encoder layer", 1, 768, 12, 3072, ((8, 128),)),
    Encoder("MiniLM encoder", 6, 384, 12, 1536, ((32, 128), (8, 256))),
)


@dataclasses.dataclass(frozen=True)
class Decoder:
    """A decoder of so many layers with self-attention and cross-attention, a token a step."""

    label: str
    layers: int
    width: int
    heads: int
    inner: int
    memory: int
    tokens: int


DECODER = Decoder("decode, a token", 6, 512, 8, 2048, memory=32, tokens=32)

#: How weights are held, for each dtype of inputs.
HELD = {"float32": ("float32", "bfloat16", "int8"), "bfloat16": ("bfloat16", "int8")}


def run(options: argparse.Namespace, torch: bool) -> None:
    """Measure all and print the table."""
    seconds, rounds = (0.0, 2) if options.quick else (options.seconds, None)
    cases: list[tuple[str, Callable[[str], dict[str, Callable[[], Any]]]]] = [
        (
            f"{encoder.label} {batch}x{length}x{encoder.width}",
            functools.partial(encoder_calls, encoder, batch, length, torch=torch),
        )
        for encoder in (ENCODERS[1:] if options.quick else ENCODERS)
        for batch, length in (((2, 16),) if options.quick else encoder.shapes)
    ]
    cases.append((f"{DECODER.label} 1x1x{DECODER.width}", functools.partial(_decoder_calls, DECODER, torch=torch)))
    rows = []
    dtypes = [d.name for d in operations.dtypes() if d.name in HELD]
    with table.progress(len(cases) * len(dtypes), options.plain) as step:
        for label, calls_of in cases:
            for dtype in dtypes:
                step(f"{label} {dtype}")
                times = compare(calls_of(dtype), seconds=seconds, rounds=rounds)
                for name, time in times.items():
                    if name == "torch":
                        continue
                    against = f"{time.speedup_over(times['torch']):.2f}x" if torch else "-"
                    theirs = f"{times['torch'].minimum * 1e3:.4g}" if torch else "-"
                    rows.append([label, dtype, name, f"{time.minimum * 1e3:.4g}", theirs, against])
    title = f"{processor()}, {_backend.isa}, {regard.get_num_threads()} threads"
    table.show(title, ["model", "inputs", "weights", "ms", "torch ms", "faster"], rows, left=3, plain=options.plain)
    print(
        "\nms: fastest round, a token for decoding. faster: median over interleaved rounds of PyTorch's time, with"
        "\nweights of the inputs' dtype, over regard's."
    )


def _random_state(module: Any, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        name: (rng.standard_normal(value.shape) / max(value.shape[-1], 1) ** 0.5).astype(np.float32)
        for name, value in module.state_dict().items()
    }


def _in_torch(state: dict[str, np.ndarray], dtype: str) -> dict[str, Any]:
    import torch

    return {name: torch.from_numpy(value).to(getattr(torch, dtype)) for name, value in state.items()}


def beside_torch(
    make: Callable[[Any], Any],
    shape: tuple[int, ...],
    dtype: str,
    torch: bool,
    call: Callable[[Any, Any], Any] = lambda module, x: module(x),
) -> dict[str, Callable[[], Any]]:
    """{how weights are held, and "torch": call(module, x)} of make(regard.nn) and make(torch.nn), the same weights."""
    x = np.random.default_rng(1).standard_normal(shape).astype(_arrays.numpy_dtype(dtype))
    made: dict[str, Callable[[], Any]] = {}
    state: dict[str, np.ndarray] = {}
    for held in HELD[dtype]:
        module = make(regard.nn).to(weights=held)
        state = state or _random_state(module)
        module.load_state_dict(state)
        made[held] = functools.partial(call, module, x)
    if torch:
        import torch as framework

        theirs = make(framework.nn).eval().to(getattr(framework, dtype))
        theirs.load_state_dict(_in_torch(state, dtype))
        made["torch"] = framework.inference_mode()(functools.partial(call, theirs, to_torch(x)))
    return made


def encoder_calls(encoder: Encoder, batch: int, length: int, dtype: str, torch: bool) -> dict[str, Callable[[], Any]]:
    """The calls of beside_torch, of an encoder."""
    return beside_torch(encoder.stack, (batch, length, encoder.width), dtype, torch)


def _decoder_calls(decoder: Decoder, dtype: str, torch: bool) -> dict[str, Callable[[], Any]]:
    nn = regard.nn
    rng = np.random.default_rng(1)
    kind = _arrays.numpy_dtype(dtype)
    memory = rng.standard_normal((1, decoder.memory, decoder.width)).astype(kind)
    rows = rng.standard_normal((decoder.tokens, decoder.width)).astype(kind)
    tokens = np.zeros((1, 1), np.int64)
    made: dict[str, Callable[[], Any]] = {}
    state: dict[str, np.ndarray] = {}
    for held in HELD[dtype]:
        layer = nn.TransformerDecoderLayer(decoder.width, decoder.heads, decoder.inner, batch_first=True)
        stack = nn.TransformerDecoder(layer, decoder.layers).to(weights=held)
        state = state or _random_state(stack)
        stack.load_state_dict(state)
        made[held] = _Steps(
            functools.partial(
                nn.CachedDecoder,
                stack,
                memory,
                embed=lambda _, at: rows[at],
                project=lambda y: y,
                max_len=decoder.tokens,
            ),
            lambda cached: cached.step(tokens),
            decoder.tokens,
        )
    if torch:
        made["torch"] = _Steps(
            lambda: _TorchDecoder(decoder, _in_torch(state, dtype), to_torch(memory), to_torch(rows)),
            lambda cached: cached.step(),
            decoder.tokens,
        )
    return made


class _Steps:
    """A step of decoding a call; after the last one, it begins anew."""

    def __init__(self, begin: Callable[[], Any], step: Callable[[Any], Any], tokens: int) -> None:
        self._begin, self._step, self._tokens = begin, step, tokens
        self._cached, self._done = begin(), 0

    def __call__(self) -> Any:
        if self._done == self._tokens:
            self._cached, self._done = self._begin(), 0
        self._done += 1
        return self._step(self._cached)


class _TorchDecoder:
    """Greedy decoding's step on PyTorch's functions: keys and values kept, those of the memory projected once."""

    def __init__(self, decoder: Decoder, state: dict[str, Any], memory: Any, rows: Any) -> None:
        import torch

        self._decoder, self._state, self._rows, self._at = decoder, state, rows, 0
        self._inference = torch.inference_mode
        shape = (1, decoder.heads, decoder.tokens, decoder.width // decoder.heads)
        self._kv = [(rows.new_empty(shape), rows.new_empty(shape)) for _ in range(decoder.layers)]
        with torch.inference_mode():
            self._memory = []
            for i in range(decoder.layers):
                weight = state[f"layers.{i}.multihead_attn.in_proj_weight"][decoder.width :]
                bias = state[f"layers.{i}.multihead_attn.in_proj_bias"][decoder.width :]
                kv = torch.nn.functional.linear(memory, weight, bias).chunk(2, -1)
                self._memory.append(tuple(self._heads(x).contiguous() for x in kv))

    def _heads(self, x: Any) -> Any:
        return x.view(1, -1, self._decoder.heads, self._decoder.width // self._decoder.heads).transpose(1, 2)

    def step(self) -> Any:
        from torch.nn import functional as f

        w, width, at = self._state, self._decoder.width, self._at
        self._at += 1

        def linear(x: Any, name: str) -> Any:
            return f.linear(x, w[f"{name}.weight"], w[f"{name}.bias"])

        def norm(x: Any, name: str) -> Any:
            return f.layer_norm(x, (width,), w[f"{name}.weight"], w[f"{name}.bias"])

        def attend(q: Any, k: Any, v: Any) -> Any:
            return f.scaled_dot_product_attention(self._heads(q), k, v).transpose(1, 2).reshape(1, 1, width)

        with self._inference():
            x = self._rows[at].view(1, 1, width)
            for i, (keys, values) in enumerate(self._kv):
                layer = f"layers.{i}"
                own, cross = f"{layer}.self_attn", f"{layer}.multihead_attn"
                q, k, v = f.linear(x, w[f"{own}.in_proj_weight"], w[f"{own}.in_proj_bias"]).chunk(3, -1)
                keys[:, :, at : at + 1], values[:, :, at : at + 1] = self._heads(k), self._heads(v)
                y = attend(q, keys[:, :, : at + 1], values[:, :, : at + 1])
                x = norm(x + linear(y, f"{own}.out_proj"), f"{layer}.norm1")
                q = f.linear(x, w[f"{cross}.in_proj_weight"][:width], w[f"{cross}.in_proj_bias"][:width])
                x = norm(x + linear(attend(q, *self._memory[i]), f"{cross}.out_proj"), f"{layer}.norm2")
                x = norm(x + linear(f.relu(linear(x, f"{layer}.linear1")), f"{layer}.linear2"), f"{layer}.norm3")
        return x
