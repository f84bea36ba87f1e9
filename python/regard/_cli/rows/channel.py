"""Pooling, channel and spatial attention."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from regard._cli import peers
from regard._cli.operation import Arguments, Case, Operation, Shape


def _image_terms(a: Arguments) -> int:
    return int(math.prod(a["x"].shape[1:]))


def _spatial_terms(a: Arguments) -> int:
    return int(max(a["x"].shape[1], a["x"].shape[3]) + a["w_spatial"].size)


def _excitation(label: str, x: Shape, reduced: int, more: Mapping[str, Shape] | None = None, **options: Any) -> Case:
    channels = x[3] if options.get("layout") == "nhwc" else x[1]
    shapes: Mapping[str, Shape] = {
        "x": x,
        "w_reduce": (reduced, channels),
        "b_reduce": (reduced,),
        "w_expand": (channels, reduced),
        "b_expand": (channels,),
        **(more or {}),
    }
    return Case(label, shapes, options)


ROWS: tuple[Operation, ...] = (
    Operation(
        "global_average_pool",
        _image_terms,
        check=(Case("nchw", {"x": (2, 19, 7, 9)}), Case("nhwc", {"x": (2, 7, 9, 19)}, {"layout": "nhwc"})),
        bench=(
            Case("ResNet-50 8x2048x7x7", {"x": (8, 2048, 7, 7)}),
            Case("8x256x56x56", {"x": (8, 256, 56, 56)}),
        ),
        numpy=peers.numpy_global_average_pool,
        torch=peers.torch_global_average_pool,
    ),
    Operation(
        "global_max_pool",
        lambda _: 1,
        check=(
            Case("nchw", {"x": (2, 19, 7, 9)}),
            Case("nhwc", {"x": (2, 7, 9, 19)}, {"layout": "nhwc"}),
            Case("large", {"x": (1, 3, 60, 61)}),
        ),
        bench=(Case("8x256x56x56", {"x": (8, 256, 56, 56)}),),
        numpy=peers.numpy_global_max_pool,
        torch=peers.torch_global_max_pool,
    ),
    Operation(
        "squeeze_excitation",
        _image_terms,
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
    Operation(
        "channel_attention",
        _image_terms,
        check=(
            _excitation("nchw", (2, 24, 7, 9), 6),
            _excitation("nhwc", (2, 7, 9, 24), 6, layout="nhwc"),
            _excitation("silu, hard", (1, 33, 20, 15), 4, activation="silu", gate="hard_sigmoid"),
        ),
        bench=(_excitation("CBAM-ResNet-50 8x256x56x56", (8, 256, 56, 56), 16),),
        numpy=peers.numpy_channel_attention,
        torch=peers.torch_channel_attention,
    ),
    Operation(
        "spatial_attention",
        _spatial_terms,
        check=(
            Case("nchw", {"x": (2, 24, 7, 9), "w_spatial": (1, 2, 7, 7)}),
            Case("nhwc, bias", {"x": (2, 7, 9, 24), "w_spatial": (1, 2, 3, 3), "b_spatial": (1,)}, {"layout": "nhwc"}),
            Case("wide, tanh", {"x": (1, 5, 3, 70), "w_spatial": (1, 2, 5, 5)}, {"gate": "tanh"}),
        ),
        bench=(Case("CBAM-ResNet-50 8x256x56x56", {"x": (8, 256, 56, 56), "w_spatial": (1, 2, 7, 7)}),),
        numpy=peers.numpy_spatial_attention,
        torch=peers.torch_spatial_attention,
    ),
    Operation(
        "cbam",
        lambda a: _image_terms(a) + _spatial_terms(a),
        check=(
            _excitation("nchw", (2, 24, 7, 9), 6, {"w_spatial": (1, 2, 7, 7)}),
            _excitation("nhwc", (2, 7, 9, 24), 6, {"w_spatial": (1, 2, 3, 3), "b_spatial": (1,)}, layout="nhwc"),
            _excitation(
                "gelu, hard", (1, 16, 30, 21), 4, {"w_spatial": (1, 2, 7, 7)}, activation="gelu", gate="hard_sigmoid"
            ),
        ),
        bench=(
            _excitation("CBAM-ResNet-50 8x256x56x56", (8, 256, 56, 56), 16, {"w_spatial": (1, 2, 7, 7)}),
            _excitation("late 8x2048x7x7", (8, 2048, 7, 7), 128, {"w_spatial": (1, 2, 7, 7)}),
        ),
        numpy=peers.numpy_cbam,
        torch=peers.torch_cbam,
    ),
    Operation(
        "efficient_channel_attention",
        _image_terms,
        check=(
            Case("nchw", {"x": (2, 24, 7, 9), "w": (3,)}),
            Case("nhwc", {"x": (2, 7, 9, 40), "w": (5,)}, {"layout": "nhwc", "gate": "hard_sigmoid"}),
            Case("few channels", {"x": (1, 2, 30, 31), "w": (7,)}),
        ),
        bench=(Case("ECA-ResNet-50 8x256x56x56", {"x": (8, 256, 56, 56), "w": (5,)}),),
        numpy=peers.numpy_efficient_channel_attention,
        torch=peers.torch_efficient_channel_attention,
    ),
)
