"""The operations that `check` and `bench` run: a new one adds one row to OPERATIONS."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

import regard
from regard import reference
from regard._cli import peers
from regard._costs import COSTS

Arguments = dict[str, Any]
Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Case:
    """One call: shapes of the array arguments by name, the other arguments as they are."""

    label: str
    shapes: Mapping[str, Shape]
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def arguments(self, dtype: Any, seed: int = 0) -> Arguments:
        """Random arguments of `dtype`, the same for the same seed."""
        rng = np.random.default_rng(seed)
        arrays = {name: _fill(rng, name, shape, dtype) for name, shape in self.shapes.items()}
        return {**arrays, **self.options}


@dataclasses.dataclass(frozen=True)
class Operation:
    """What to call, what it must equal, and what it costs.

    Attributes
    ----------
    name : str
        Of the public function, and of its reference.
    terms : callable
        The length of the longest chain of sums, from the arguments: it sets the tolerance.
    flops : callable
        Floating-point operations, from the arguments.
    check, bench : tuples of Case
        Small calls that reach every branch; calls of real models.
    numpy, torch : callables, optional
        The same the plain way, with the same arguments.
    call, reference : callables
        By default what is called `name` in regard and in regard.reference.
    """

    name: str
    terms: Callable[[Arguments], int]
    flops: Callable[[Arguments], float]
    check: tuple[Case, ...]
    bench: tuple[Case, ...]
    numpy: Callable[..., Any] | None = None
    torch: Callable[..., Any] | None = None
    call: Callable[..., Any] | None = None
    reference: Callable[..., Any] | None = None

    def run(self, arguments: Arguments) -> Any:
        return (self.call or getattr(regard, self.name))(**arguments)

    def expected(self, arguments: Arguments) -> Any:
        """The reference in float64, on the values that the arguments have after rounding."""
        wide = {name: _widened(x) for name, x in arguments.items()}
        return (self.reference or getattr(reference, self.name))(**wide)


def moved_bytes(arguments: Arguments, result: Any) -> int:
    """What must move at least: each input read once, each output written once."""
    arrays = [*arguments.values(), *(result if isinstance(result, tuple) else (result,))]
    return sum(x.nbytes for x in arrays if isinstance(x, np.ndarray))


def dtypes() -> list[np.dtype]:
    """The dtypes that NumPy has here: bfloat16 comes with ml_dtypes."""
    found = [np.dtype(t) for t in (np.float32, np.float64, np.float16)]
    try:
        import ml_dtypes
    except ImportError:
        return found
    return [*found, np.dtype(ml_dtypes.bfloat16)]


def _fill(rng: np.random.Generator, name: str, shape: Shape, dtype: Any) -> Any:
    """Values as they come in practice, by the argument's name."""
    if name in ("mask", "attn_mask"):
        return rng.random(shape) < 0.7
    if name == "alibi_slopes":
        return (2.0 ** -rng.uniform(1, 8, shape)).astype(np.float32)
    if name in ("sinks", "cos", "sin", "lses"):
        return rng.standard_normal(shape).astype(np.float32)
    if name == "positions":
        return rng.integers(0, 40, shape)
    if name.endswith("_lengths"):
        return rng.integers(0, 40, shape)
    values = rng.standard_normal(shape, np.float32)
    if name in ("w_reduce", "w_expand") or (name == "weight" and len(shape) == 2):
        values /= math.sqrt(shape[-1])  # so that outputs are about 1, whatever the width
    return values.astype(dtype)


def _widened(x: Any) -> Any:
    return x.astype(np.float64) if isinstance(x, np.ndarray) and x.dtype.kind in "fV" else x


# Costs.


def _attention_terms(a: Arguments) -> int:
    return max(a["key"].shape[-2:]) + a["value"].shape[-1]


def _attention_flops(a: Arguments) -> float:
    return COSTS["attention"]({**a, "causal": a.get("causal") or a.get("is_causal")}).flops


def _sequence_terms(a: Arguments) -> int:
    """The longest sums run over keys and over dimensions, one after another."""
    return sum(a[name].shape[i] for name, i in (("key", -1), ("query", -1), ("key", 0 if "cu_seqlens_kv" in a else -2)))


def _linear_flops(a: Arguments) -> float:
    return COSTS["linear"](a).flops


def _norm_terms(a: Arguments) -> int:
    return int(a["x"].shape[-1])


def _image_terms(a: Arguments) -> int:
    return int(math.prod(a["x"].shape[1:]))


def _excitation_flops(a: Arguments) -> float:
    return COSTS["squeeze_excitation"](a).flops


# Shapes.


def _attention(
    label: str,
    query: Shape,
    keys: tuple[int, int],
    dim_v: int | None = None,
    more: Mapping[str, Shape] | None = None,
    **options: Any,
) -> Case:
    """`keys` is (heads_kv, len_kv)."""
    batch, _, _, dim = query
    shapes = {"query": query, "key": (batch, *keys, dim), "value": (batch, *keys, dim_v or dim)}
    return Case(label, {**shapes, **(more or {})}, options)


def _sequences(label: str, lengths: tuple[int, int], dims: tuple[int, int, int], **more: Shape) -> Case:
    """Of Bahdanau's and Luong's families: dims are those of query, key and value."""
    (len_q, len_kv), (dim_q, dim_k, dim_v) = lengths, dims
    shapes = {"query": (2, len_q, dim_q), "key": (2, len_kv, dim_k), "value": (2, len_kv, dim_v)}
    return Case(label, {**shapes, **more})


def _packed(label: str, lengths: Sequence[int], heads: tuple[int, int], dim: int, **options: Any) -> Case:
    ends = np.cumsum([0, *lengths])
    shapes = {"query": (ends[-1], heads[0], dim), "key": (ends[-1], heads[1], dim), "value": (ends[-1], heads[1], dim)}
    return Case(label, shapes, {"cu_seqlens_q": ends, "cu_seqlens_kv": ends, **options})


def _paged(label: str, lengths: Sequence[int], heads: tuple[int, int], dim: int, page: int, **options: Any) -> Case:
    """One query a sequence; pages are dealt out from the last to the first."""
    width = -(-max(lengths) // page)
    table = np.arange(len(lengths) * width)[::-1].reshape(-1, width)
    stored = (table.size, page, heads[1], dim)
    shapes = {"query": (len(lengths), heads[0], 1, dim), "key_pages": stored, "value_pages": stored}
    return Case(label, shapes, {"page_table": table, "key_lengths": np.array(lengths), **options})


def _spatial(label: str, x: Shape, kernel: int, reduced: int = 0, **options: Any) -> Case:
    """With the channels' own network too where `reduced` is not 0."""
    excited = _excitation(label, x, reduced, **options) if reduced else Case(label, {"x": x}, options)
    return Case(label, {**excited.shapes, "w_spatial": (1, 2, kernel, kernel), "b_spatial": (1,)}, options)


def _rotary(label: str, x: Shape, pairs: int, table: int = 40, positions: bool = True, **options: Any) -> Case:
    """`table` is max_positions."""
    length = x[1] if options.get("layout") == "bshd" else x[2]
    angles = (table, pairs) if positions else (x[0], length, pairs)
    shapes = {"x": x, "cos": angles, "sin": angles}
    return Case(label, shapes | ({"positions": (x[0], length)} if positions else {}), options)


def _merge(label: str, out: Shape, parts: int, **options: Any) -> Case:
    lse = (out[0], out[2], out[1]) if options.get("layout") == "bshd" else out[:-1]
    return Case(label, {"outs": (parts, *out), "lses": (parts, *lse)}, options)


def _excitation(label: str, x: Shape, reduced: int, **options: Any) -> Case:
    channels = x[3] if options.get("layout") == "nhwc" else x[1]
    shapes = {
        "x": x,
        "w_reduce": (reduced, channels),
        "b_reduce": (reduced,),
        "w_expand": (channels, reduced),
        "b_expand": (channels,),
    }
    return Case(label, shapes, options)


_LOWER = "lower_right"

OPERATIONS: tuple[Operation, ...] = (
    Operation(
        "attention",
        _attention_terms,
        _attention_flops,
        check=(
            _attention("plain", (2, 3, 37, 64), (3, 150), return_lse=True),
            _attention("causal, grouped", (1, 4, 50, 80), (2, 131), 48, causal=True, alignment=_LOWER),
            _attention("window", (1, 2, 130, 16), (1, 130), window=(20, 3), layout="bhsd"),
            _attention(
                "mask, bias, softcap",
                (2, 2, 33, 17),
                (2, 65),
                more={"mask": (2, 1, 33, 65), "bias": (2, 33, 65)},
                softcap=20.0,
            ),
            _attention(
                "slopes, sinks, lengths",
                (2, 4, 40, 32),
                (4, 40),
                more={"alibi_slopes": (4,), "sinks": (4,), "query_lengths": (2,), "key_lengths": (2,)},
            ),
            _attention("one query", (1, 8, 1, 128), (2, 700)),
            _attention("no keys", (1, 2, 3, 8), (2, 0), return_lse=True),
        ),
        bench=(
            _attention("BERT-base 8x12x128x64", (8, 12, 128, 64), (12, 128)),
            _attention("GPT-2 medium 1x16x1024x64", (1, 16, 1024, 64), (16, 1024)),
            _attention("Llama-7B causal 1x32x2048x128", (1, 32, 2048, 128), (32, 2048), causal=True),
            _attention("decode 1x32/8x1/8192x128", (1, 32, 1, 128), (8, 8192)),
            _attention("tiny 1x1x8x64", (1, 1, 8, 64), (1, 8)),
        ),
        numpy=peers.numpy_attention,
        torch=peers.torch_attention,
    ),
    Operation(
        "scaled_dot_product_attention",
        _attention_terms,
        _attention_flops,
        check=(
            _attention("plain", (2, 3, 37, 64), (3, 53)),
            _attention("causal", (1, 2, 70, 24), (2, 41), is_causal=True),
            _attention("mask, grouped", (1, 4, 9, 16), (2, 30), more={"attn_mask": (9, 30)}, enable_gqa=True),
        ),
        bench=(
            _attention("ViT-B/16 8x12x197x64", (8, 12, 197, 64), (12, 197)),
            _attention("one image 1x12x197x64", (1, 12, 197, 64), (12, 197)),
        ),
        numpy=peers.numpy_attention,
        torch=peers.torch_attention,
    ),
    Operation(
        "rotary_embedding",
        lambda a: 2,
        lambda a: 3.0 * a["x"].size,
        check=(
            _rotary("halves", (2, 3, 17, 64), 32),
            _rotary("neighbours, partial", (2, 3, 17, 50), 13, interleaved=True),
            _rotary("rows given", (2, 3, 5, 32), 16, positions=False),
            _rotary("bshd", (2, 9, 3, 20), 10, layout="bshd"),
        ),
        bench=(
            _rotary("Llama-7B 1x32x2048x128", (1, 32, 2048, 128), 64, positions=False),
            _rotary("decode 16x32x1x128", (16, 32, 1, 128), 64, positions=False),
        ),
        numpy=peers.numpy_rotary_embedding,
        torch=peers.torch_rotary_embedding,
    ),
    Operation(
        "merge_attention",
        lambda a: 4 * len(a["outs"]),
        lambda a: 2.0 * a["outs"].size,
        check=(
            _merge("two parts", (2, 3, 17, 64), 2),
            _merge("seven parts", (2, 3, 5, 33), 7),
            _merge("bshd", (2, 9, 3, 16), 3, layout="bshd"),
        ),
        bench=(
            _merge("two parts 1x32x2048x128", (1, 32, 2048, 128), 2),
            _merge("decode 16x32x1x128, 8 parts", (16, 32, 1, 128), 8),
        ),
        numpy=peers.numpy_merge_attention,
        torch=peers.torch_merge_attention,
    ),
    Operation(
        "linear",
        _norm_terms,
        _linear_flops,
        check=(
            Case("plain", {"x": (37, 70), "weight": (45, 70)}),
            Case("bias, relu", {"x": (3, 5, 129), "weight": (64, 129), "bias": (64,)}, {"activation": "relu"}),
            Case("gelu", {"x": (17, 64), "weight": (33, 64), "bias": (33,)}, {"activation": "gelu"}),
            Case("silu", {"x": (1, 300), "weight": (19, 300)}, {"activation": "silu"}),
            Case("no features", {"x": (4, 0), "weight": (5, 0), "bias": (5,)}),
        ),
        bench=(
            Case("BERT-base 1024x768 -> 3072", {"x": (1024, 768), "weight": (3072, 768), "bias": (3072,)}),
            Case("MiniLM 20x384 -> 1536", {"x": (20, 384), "weight": (1536, 384), "bias": (1536,)}),
            Case("decode 1x4096 -> 4096", {"x": (1, 4096), "weight": (4096, 4096), "bias": (4096,)}),
        ),
        numpy=peers.numpy_linear,
        torch=peers.torch_linear,
    ),
    Operation(
        "layer_norm",
        _norm_terms,
        lambda a: 8.0 * a["x"].size,
        check=(
            Case("plain", {"x": (5, 77)}),
            Case("weight, bias", {"x": (2, 9, 384), "weight": (384,), "bias": (384,)}),
        ),
        bench=(Case("BERT-base 1024x768", {"x": (1024, 768), "weight": (768,), "bias": (768,)}),),
        numpy=peers.numpy_layer_norm,
        torch=peers.torch_layer_norm,
    ),
    Operation(
        "rms_norm",
        _norm_terms,
        lambda a: 4.0 * a["x"].size,
        check=(Case("plain", {"x": (5, 77)}), Case("weight", {"x": (2, 9, 384), "weight": (384,)})),
        bench=(
            Case("Llama-7B 2048x4096", {"x": (2048, 4096), "weight": (4096,)}),
            Case("decode 1x4096", {"x": (1, 4096), "weight": (4096,)}),
        ),
        numpy=peers.numpy_rms_norm,
        torch=peers.torch_rms_norm,
    ),
    Operation(
        "global_average_pool",
        _image_terms,
        lambda a: float(a["x"].size),
        check=(Case("nchw", {"x": (2, 19, 7, 9)}), Case("nhwc", {"x": (2, 7, 9, 19)}, {"layout": "nhwc"})),
        bench=(
            Case("ResNet-50 8x2048x7x7", {"x": (8, 2048, 7, 7)}),
            Case("8x256x56x56", {"x": (8, 256, 56, 56)}),
        ),
        numpy=peers.numpy_global_average_pool,
        torch=peers.torch_global_average_pool,
    ),
    Operation(
        "attention_varlen",
        _sequence_terms,
        lambda a: COSTS["attention_varlen"](a).flops,
        check=(
            _packed("plain", (5, 0, 70, 1), (4, 2), 16, return_lse=True),
            _packed("causal", (33, 3), (2, 2), 40, causal=True),
        ),
        bench=(_packed("BERT-base, 8 of 16 to 128 tokens", (16, 32, 48, 64, 80, 96, 112, 128), (12, 12), 64),),
        numpy=peers.numpy_attention_varlen,
    ),
    Operation(
        "attention_paged",
        lambda a: int(a["key_lengths"].max()) + 2 * a["query"].shape[-1],
        lambda a: COSTS["attention_paged"](a).flops,
        check=(
            _paged("plain", (50, 1, 33), (4, 2), 32, 16, return_lse=True),
            _paged("window", (70, 9), (2, 1), 16, 8, window=(20, 0), alignment="lower_right"),
        ),
        bench=(_paged("decode 8x32/8x1 over 64 to 512 keys", range(64, 513, 64), (32, 8), 128, 16),),
        numpy=peers.numpy_attention_paged,
    ),
    Operation(
        "additive_attention",
        _sequence_terms,
        lambda a: COSTS["additive_attention"](a).flops,
        check=(
            _sequences("plain", (7, 33), (24, 24, 9), v=(24,)),
            _sequences(
                "projected, masked",
                (7, 33),
                (17, 40, 30),
                v=(24,),
                w_query=(24, 17),
                w_key=(24, 40),
                bias=(24,),
                mask=(2, 1, 33),
            ),
        ),
        bench=(_sequences("2x64x512x256", (64, 512), (256, 256, 256), v=(256,), w_query=(256, 256), w_key=(256, 256)),),
        numpy=peers.numpy_additive_attention,
    ),
    Operation(
        "multiplicative_attention",
        _sequence_terms,
        lambda a: COSTS["multiplicative_attention"](a).flops,
        check=(
            _sequences("dot", (7, 33), (8, 8, 30)),
            _sequences("general, masked", (7, 33), (6, 10, 30), w=(6, 10), mask=(7, 33)),
        ),
        bench=(_sequences("2x64x512x256", (64, 512), (256, 256, 256), w=(256, 256)),),
        numpy=peers.numpy_multiplicative_attention,
    ),
    Operation(
        "location_sensitive_attention",
        _sequence_terms,
        lambda a: COSTS["location_sensitive_attention"](a).flops,
        check=(
            _sequences(
                "one channel",
                (3, 33),
                (24, 24, 9),
                previous_weights=(2, 33),
                v=(24,),
                w_location=(24, 5),
                location_kernel=(5, 1, 7),
            ),
        ),
        bench=(
            _sequences(
                "Tacotron 2 step 2x1x512",
                (1, 512),
                (128, 128, 512),
                previous_weights=(2, 2, 512),
                v=(128,),
                w_location=(128, 32),
                location_kernel=(32, 2, 31),
            ),
        ),
        numpy=peers.numpy_location_sensitive_attention,
    ),
    Operation(
        "global_max_pool",
        lambda a: 1,
        lambda a: float(a["x"].size),
        check=(Case("nchw", {"x": (2, 19, 7, 9)}), Case("nhwc", {"x": (2, 7, 9, 19)}, {"layout": "nhwc"})),
        bench=(Case("ResNet-50 8x2048x7x7", {"x": (8, 2048, 7, 7)}),),
        numpy=peers.numpy_global_max_pool,
    ),
    Operation(
        "channel_attention",
        _image_terms,
        lambda a: COSTS["channel_attention"](a).flops,
        check=(
            _excitation("nchw", (2, 24, 7, 9), 6),
            _excitation("nhwc", (2, 7, 9, 24), 6, layout="nhwc"),
        ),
        bench=(_excitation("ResNet-50 8x256x56x56", (8, 256, 56, 56), 16),),
        numpy=peers.numpy_channel_attention,
    ),
    Operation(
        "spatial_attention",
        _image_terms,
        lambda a: COSTS["spatial_attention"](a).flops,
        check=(
            _spatial("nchw", (2, 24, 7, 9), 7),
            _spatial("nhwc", (2, 7, 9, 24), 3, layout="nhwc"),
        ),
        bench=(_spatial("ResNet-50 8x256x56x56", (8, 256, 56, 56), 7),),
        numpy=peers.numpy_spatial_attention,
    ),
    Operation(
        "cbam",
        _image_terms,
        lambda a: COSTS["cbam"](a).flops,
        check=(
            _spatial("nchw", (2, 24, 7, 9), 7, 6),
            _spatial("nhwc", (2, 7, 9, 24), 3, 6, layout="nhwc"),
        ),
        bench=(_spatial("ResNet-50 8x256x56x56", (8, 256, 56, 56), 7, 16),),
        numpy=peers.numpy_cbam,
    ),
    Operation(
        "efficient_channel_attention",
        _image_terms,
        lambda a: COSTS["efficient_channel_attention"](a).flops,
        check=(
            Case("nchw", {"x": (2, 24, 7, 9), "w": (3,)}),
            Case("nhwc", {"x": (2, 7, 9, 24), "w": (5,)}, {"layout": "nhwc"}),
        ),
        bench=(Case("ResNet-50 8x256x56x56", {"x": (8, 256, 56, 56), "w": (5,)}),),
        numpy=peers.numpy_efficient_channel_attention,
    ),
    Operation(
        "squeeze_excitation",
        _image_terms,
        _excitation_flops,
        check=(
            _excitation("nchw", (2, 24, 7, 9), 6),
            _excitation("nhwc", (2, 7, 9, 24), 6, layout="nhwc"),
            _excitation("silu, tanh", (1, 33, 5, 5), 4, activation="silu", gate="tanh"),
            _excitation("hard", (1, 16, 14, 14), 4, activation="hard_swish", gate="hard_sigmoid"),
            _excitation("gelu", (1, 8, 3, 2), 2, activation="gelu", gate=("hard_sigmoid", 0.2, 0.5)),
        ),
        bench=(
            _excitation("SE-ResNet-50 8x256x56x56", (8, 256, 56, 56), 16),
            _excitation("late 8x256x7x7", (8, 256, 7, 7), 16),
        ),
        numpy=peers.numpy_squeeze_excitation,
        torch=peers.torch_squeeze_excitation,
    ),
)
