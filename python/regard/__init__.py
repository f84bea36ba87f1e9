"""Attention of every kind on plain arrays, forward only. See help(regard.attention) and `python -m regard info`."""

from __future__ import annotations

import importlib
import operator
from typing import Any

from regard import _backend
from regard._explain import Explanation, explain
from regard.additive import additive_attention, location_sensitive_attention, multiplicative_attention
from regard.block_mask import BlockMask
from regard.cache import KVCache
from regard.channel import (
    cbam,
    channel_attention,
    efficient_channel_attention,
    global_average_pool,
    global_max_pool,
    spatial_attention,
    squeeze_excitation,
)
from regard.dense import PackedLinear, layer_norm, linear, pack_linear, rms_norm
from regard.dot_product import attention, scaled_dot_product_attention
from regard.merge import merge_attention
from regard.paged import PagedKVCache
from regard.recurrent import gru, lstm
from regard.rotary import rotary_embedding, rotary_tables
from regard.sequences import attention_paged, attention_varlen

__all__ = [
    "BlockMask",
    "Explanation",
    "KVCache",
    "PackedLinear",
    "PagedKVCache",
    "additive_attention",
    "attention",
    "attention_paged",
    "attention_varlen",
    "cbam",
    "channel_attention",
    "efficient_channel_attention",
    "explain",
    "get_num_threads",
    "global_average_pool",
    "global_max_pool",
    "gru",
    "layer_norm",
    "linear",
    "location_sensitive_attention",
    "lstm",
    "merge_attention",
    "multiplicative_attention",
    "pack_linear",
    "rms_norm",
    "rotary_embedding",
    "rotary_tables",
    "scaled_dot_product_attention",
    "set_num_threads",
    "show_config",
    "spatial_attention",
    "squeeze_excitation",
]
__version__ = "0.1.0"

#: Imported when first used, so that `import regard` stays light.
_ON_DEMAND = ("nn", "reference", "onnx", "plot")


def __getattr__(name: str) -> Any:
    if name in _ON_DEMAND:
        return importlib.import_module(f"regard.{name}")
    raise AttributeError(f"module 'regard' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, *_ON_DEMAND, "__version__"])


def set_num_threads(n: int) -> None:
    """Set how many threads a call may use (n >= 1, may exceed the cores). Results never depend on it.

    Until then it is the smaller of the number that OpenMP is given (OMP_NUM_THREADS) and that of the cores that this
    process may use.
    """
    try:
        n = operator.index(n)
    except TypeError:
        raise TypeError(f"n: expected a number of threads from 1 to 4096, got {type(n).__name__} {n!r}") from None
    if not 1 <= n <= 4096:
        raise ValueError(f"n: expected a number of threads from 1 to 4096, got {n}")
    _backend.cpu.set_num_threads(n)


def get_num_threads() -> int:
    """How many threads a call may use."""
    return int(_backend.cpu.get_num_threads())


def show_config() -> None:
    """Print what this installation is and what it uses on this machine, as `python -m regard info` does."""
    from regard._cli import info

    info.show()
