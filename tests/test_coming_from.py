"""The calls that docs/coming_from.md maps, run: what they say on the right is what the other library computes."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import regard
from helpers import EPSILON

PAGE = Path(__file__).resolve().parent.parent / "docs" / "coming_from.md"
Array = np.ndarray[Any, Any]
ROW = re.compile(r"^\| `([^`]+)` \| `([^`]+)` \|$")


def rows() -> list[tuple[str, str, str]]:
    """(library, its call, ours), in the page's order."""
    found = []
    library = ""
    for line in PAGE.read_text().splitlines() if PAGE.exists() else ():
        if line.startswith("## "):
            library = line[3:]
        elif match := ROW.match(line):
            found.append((library, match[1], match[2]))
    return found


# ---- The arrays of the page ----------------------------------------------------------------------

LEN_Q, LEN_KV, HEADS, DIM = 13, 21, 4, 16


def draw(name: str, *shape: int) -> Array:
    return np.random.default_rng(sum(map(ord, name))).standard_normal(shape).astype(np.float32)


def arrays() -> dict[str, Array]:
    """As (batch, heads, length, dim); most libraries exchange the middle two."""
    return {
        "q": 4 * draw("q", 2, HEADS, LEN_Q, DIM),
        "k": draw("k", 2, HEADS, LEN_KV, DIM),
        "v": draw("v", 2, HEADS, LEN_KV, DIM),
        "k2": draw("k2", 2, 2, LEN_KV, DIM),
        "v2": draw("v2", 2, 2, LEN_KV, DIM),
        "mask": draw("mask", 2, 1, LEN_Q, LEN_KV) < 0.7,
        "bias": draw("bias", 1, HEADS, LEN_Q, LEN_KV),
        "slopes": np.float32([0.5, 0.25, 0.125, 0.0625]),
        "lengths": np.int32([LEN_KV, 15]),
        "x": draw("x", 5, DIM),
        "w": draw("w", 7, DIM),
        "b": draw("b", 7),
        "g": draw("g", DIM),
        "c": draw("c", DIM),
        "image": draw("image", 2, 3, 5, 5),
        "query": draw("query", 2, LEN_Q, DIM),
        "key": draw("key", 2, LEN_KV, DIM),
        "value": draw("value", 2, LEN_KV, DIM),
        "scale_weight": draw("scale_weight", DIM),
        "tq": draw("tq", 14, HEADS, DIM),
        "tk": draw("tk", 25, HEADS, DIM),
        "tv": draw("tv", 25, HEADS, DIM),
        "cu_q": np.int32([0, 5, 14]),
        "cu_k": np.int32([0, 8, 25]),
        "table": np.int32([[3, 0, 6], [5, 2, 1]]),
        "kp": draw("kp", 7, 7, 2, DIM),
        "vp": draw("vp", 7, 7, 2, DIM),
        "cos": draw("cos", 30, DIM // 2),
        "sin": draw("sin", 30, DIM // 2),
        "positions": np.arange(2 * LEN_Q).reshape(2, LEN_Q),
        "chequered": (np.arange(4)[:, None] + np.arange(3)) % 2 == 0,
    }


def in_layout_of(library: str) -> dict[str, Array]:
    found = arrays()
    if library in ("flash-attn", "JAX", "xFormers", "Keras"):
        for name in ("q", "k", "v", "k2", "v2"):
            found[name] = np.ascontiguousarray(found[name].swapaxes(1, 2))
    return found


# ---- The other libraries' words, in float64 ------------------------------------------------------

QUERY_AT, KEY_AT = np.arange(LEN_Q)[:, None], np.arange(LEN_KV)[None, :]
LOWER = KEY_AT - (LEN_KV - LEN_Q)  # a key's place relative to the last query's
A = {name: x.astype(np.float64) if x.dtype == np.float32 else x for name, x in arrays().items()}


def plain(
    keys: str = "",
    scale: float = DIM**-0.5,
    cap: float | None = None,
    bias: Array | float = 0.0,
    visible: Array | bool = True,
    give: str = "out",
) -> Any:
    """softmax(cap(scale q k^T) + bias, where visible) v, spelt out, (batch, heads, length, dim)."""
    k, v = (gathered(f"{name}p") if keys == "pages" else A[name + keys] for name in "kv")
    k, v = (np.repeat(x, HEADS // x.shape[1], axis=1) for x in (k, v))
    s = A["q"] @ k.swapaxes(-1, -2) * scale
    if cap is not None:
        s = cap * np.tanh(s / cap)
    if give == "scores":
        return s
    s = np.where(visible, s + bias, -np.inf)
    p = np.exp(s - np.maximum(s.max(axis=-1, keepdims=True), -1e300))
    total = p.sum(axis=-1, keepdims=True)
    out = p @ v / np.where(total == 0, 1, total)
    return (out, (s.max(axis=-1, keepdims=True) + np.log(total))[..., 0]) if give == "lse" else out


def rotated(*, neighbours: bool) -> Array:
    """Pairs turned as complex numbers."""
    pairs = (slice(0, None, 2), slice(1, None, 2)) if neighbours else (slice(DIM // 2), slice(DIM // 2, None))
    angle = (A["cos"] + 1j * A["sin"])[A["positions"]][:, None]
    turned = (A["q"][..., pairs[0]] + 1j * A["q"][..., pairs[1]]) * angle
    out = np.empty_like(A["q"])
    out[..., pairs[0]], out[..., pairs[1]] = turned.real, turned.imag
    return out


def gathered(name: str) -> Array:
    """Pages of each sequence one after another, (batch, heads, length, dim)."""
    pages = A[name][A["table"]]
    return pages.reshape(2, -1, *pages.shape[3:]).swapaxes(1, 2)


def packed(*, causal: bool) -> Array:
    """Each sequence by itself; causal from its last query and key backwards."""
    out = np.zeros_like(A["tq"])
    for b in range(2):
        rows, keys = (slice(A[name][b], A[name][b + 1]) for name in ("cu_q", "cu_k"))
        q, k, v = (x.swapaxes(0, 1) for x in (A["tq"][rows], A["tk"][keys], A["tv"][keys]))
        s = q @ k.swapaxes(1, 2) / DIM**0.5
        if causal:
            s[:, ~np.tri(*s.shape[1:], s.shape[2] - s.shape[1], dtype=bool)] = -np.inf
        out[rows] = (softmax(s) @ v).swapaxes(0, 1)
    return out


def softmax(s: Array) -> Array:
    p = np.exp(s - s.max(axis=-1, keepdims=True))
    return p / p.sum(axis=-1, keepdims=True)


def in_order(lengths: Array) -> Array:
    """Causal between each sequence's own ends."""
    return KEY_AT - (lengths[:, None, None, None] - LEN_Q) <= QUERY_AT


UPPER_CAUSAL, LOWER_CAUSAL = KEY_AT <= QUERY_AT, LOWER <= QUERY_AT
ALIBI_UPPER, ALIBI_LOWER = (-A["slopes"][:, None, None] * np.abs(QUERY_AT - j) for j in (KEY_AT, LOWER))
PREFIX = (np.arange(LEN_KV) < A["lengths"][:, None])[:, None, None, :]

#: By part of the other library's call: what it means. The first that occurs in the call is taken.
MEANINGS: dict[str, dict[str, Callable[[], Any]]] = {
    "PyTorch": {},
    "flash-attn": {
        "block_table=table": lambda: plain("pages", visible=PREFIX & in_order(A["lengths"])),
        "cache_seqlens=lengths": lambda: plain(visible=PREFIX & in_order(A["lengths"])),
        "flash_attn_varlen_func": lambda: packed(causal=True),
        "causal=True, window_size=(8, -1)": lambda: plain(visible=LOWER_CAUSAL & (LOWER >= QUERY_AT - 8)),
        "window_size=(8, 2)": lambda: plain(visible=(LOWER >= QUERY_AT - 8) & (LOWER <= QUERY_AT + 2)),
        "causal=True": lambda: plain(visible=LOWER_CAUSAL),
        "softmax_scale=0.1": lambda: plain(scale=0.1),
        "softcap=20.0": lambda: plain(cap=20.0),
        "alibi_slopes": lambda: plain(bias=ALIBI_LOWER),
        "(q, k2, v2)": lambda: plain("2"),
        "return_attn_probs=True": lambda: plain(give="lse"),
        "(q, k, v)": plain,
    },
    "JAX": {
        "scale=0.1": lambda: plain(scale=0.1),
        "v, bias)": lambda: plain(bias=A["bias"]),
        "mask=mask": lambda: plain(visible=A["mask"]),
        "is_causal=True": lambda: plain(visible=UPPER_CAUSAL),
        "local_window_size=8": lambda: plain(visible=np.abs(QUERY_AT - KEY_AT) <= 8),
        "local_window_size=(8, 2)": lambda: plain(visible=(KEY_AT >= QUERY_AT - 8) & (KEY_AT <= QUERY_AT + 2)),
        "key_value_seq_lengths": lambda: plain(visible=PREFIX),
        "(q, k2, v2)": lambda: plain("2"),
        "(q, k, v)": plain,
    },
    "xFormers": {
        "BlockDiagonalMask": lambda: packed(causal=False),
        "scale=0.1": lambda: plain(scale=0.1),
        "attn_bias=bias": lambda: plain(bias=A["bias"]),
        "LowerTriangularMask": lambda: plain(visible=UPPER_CAUSAL),
        "LowerTriangularFromBottomRightMask": lambda: plain(visible=LOWER_CAUSAL),
        "LocalAttentionFromBottomRightMask(8, 2)": lambda: plain(
            visible=(LOWER >= QUERY_AT - 8) & (LOWER <= QUERY_AT + 2)
        ),
        "(q, k, v)": plain,
    },
    "Keras": {
        "bias=bias, scale=0.1": lambda: plain(bias=A["bias"], scale=0.1),
        "mask=mask": lambda: plain(visible=A["mask"]),
        "is_causal=True": lambda: plain(visible=UPPER_CAUSAL),
        "(q, k, v)": plain,
        "AdditiveAttention()": lambda: (
            softmax((A["scale_weight"] * np.tanh(A["query"][:, :, None] + A["key"][:, None])).sum(axis=-1)) @ A["value"]
        ),
        "Attention()": lambda: softmax(A["query"] @ A["key"].swapaxes(1, 2)) @ A["value"],
    },
    "ONNX": {
        "interleaved=1": lambda: rotated(neighbours=True),
        "RotaryEmbedding": lambda: rotated(neighbours=False),
        "qk_matmul_output_mode=0": lambda: plain("2", give="scores"),
        "v, mask)": lambda: plain(visible=A["mask"]),
        "bias, is_causal=1": lambda: plain(bias=A["bias"], visible=UPPER_CAUSAL),
        "softcap=20.0, scale=0.1": lambda: plain(cap=20.0, scale=0.1),
        "left_window_size=8": lambda: plain(visible=(KEY_AT >= QUERY_AT - 8) & (KEY_AT <= QUERY_AT + 2)),
        "lengths, is_causal=1": lambda: plain(visible=PREFIX & in_order(A["lengths"])),
        "(q, k, v)": plain,
    },
}


def torch_says(call: str) -> Any:
    """PyTorch's own result, in float64."""
    torch = pytest.importorskip("torch", reason="PyTorch's calls are compared with PyTorch")
    from torch.nn.attention import bias, flex_attention

    names = {name: torch.from_numpy(x) for name, x in A.items()}
    names |= {
        "F": torch.nn.functional,
        "torch": torch,
        "causal_lower_right": bias.causal_lower_right,
        "create_block_mask": flex_attention.create_block_mask,
        "flex_attention": flex_attention.flex_attention,
        "len_q": LEN_Q,
        "len_kv": LEN_KV,
        "dim": DIM,
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # flex_attention recommends torch.compile
        return eval(call, names)


def meant(library: str, call: str) -> tuple[Array, ...]:
    if library == "PyTorch":
        found = torch_says(call)
        return tuple(x.numpy() for x in (found if isinstance(found, tuple) else (found,)))
    meaning = next(m for part, m in MEANINGS[library].items() if part in call)
    found = meaning()
    outputs = found if isinstance(found, tuple) else (found,)
    first = outputs[0].swapaxes(1, 2) if "bshd" in ours_of(library, call) else outputs[0]
    return (first, *outputs[1:])


def ours_of(library: str, call: str) -> str:
    return next(ours for name, theirs, ours in rows() if (name, theirs) == (library, call))


@pytest.mark.parametrize(("library", "theirs", "ours"), rows())
def test_mapping(backend, library, theirs, ours):
    want = meant(library, theirs)
    found = eval(ours, {"regard": regard, "np": np, "len_q": LEN_Q, "len_kv": LEN_KV, **in_layout_of(library)})
    outputs = found if isinstance(found, tuple) else (found,)
    assert len(outputs) == len(want)
    for actual, wanted in zip(outputs, want, strict=True):
        assert actual.dtype == np.float32 and actual.shape == wanted.shape
        # Scores and linear's sums are below 30, values below 5; exp makes an error of a score a relative one.
        np.testing.assert_allclose(actual, wanted, rtol=0, atol=200 * EPSILON["float32"])


def test_every_library_and_meaning_is_on_the_page():
    if not PAGE.exists():
        pytest.skip("needs the repository")
    assert {library for library, _, _ in rows()} == set(MEANINGS)
    for library, meanings in MEANINGS.items():
        calls = [theirs for name, theirs, _ in rows() if name == library]
        unused = [part for part in meanings if not any(part in call for call in calls)]
        assert not unused, f"{library}: {unused}"
