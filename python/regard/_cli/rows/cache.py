"""What caches of keys and values need: rotary embedding, merging."""

from __future__ import annotations

from typing import Any

from regard._cli import peers
from regard._cli.operation import Case, Operation, Shape


def _rotary(label: str, x: Shape, pairs: int, table: int = 40, positions: bool = True, **options: Any) -> Case:
    """`table` is max_positions."""
    length = x[1] if options.get("layout") == "bshd" else x[2]
    angles = (table, pairs) if positions else (x[0], length, pairs)
    shapes = {"x": x, "cos": angles, "sin": angles}
    return Case(label, shapes | ({"positions": (x[0], length)} if positions else {}), options)


def _merge(label: str, out: Shape, parts: int, **options: Any) -> Case:
    lse = (out[0], out[2], out[1]) if options.get("layout") == "bshd" else out[:-1]
    return Case(label, {"outs": (parts, *out), "lses": (parts, *lse)}, options)


ROWS: tuple[Operation, ...] = (
    Operation(
        "rotary_embedding",
        lambda a: 2,
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
)
