"""Modules with weights, under PyTorch's names: load a state dict and call. Always in evaluation mode."""

from __future__ import annotations

from regard.nn.additive import AdditiveAttention
from regard.nn.attention import MultiheadAttention
from regard.nn.channel import CBAM, EfficientChannelAttention, SqueezeExcitation
from regard.nn.decoding import CachedDecoder
from regard.nn.generate import Decoder, Generation, Recomputing, beam_search, generate, stream
from regard.nn.linear import Embedding, Linear
from regard.nn.module import Module, ModuleList
from regard.nn.norm import LayerNorm, RMSNorm
from regard.nn.position import PositionalEncoding
from regard.nn.transformer import (
    FeedForward,
    Transformer,
    TransformerDecoder,
    TransformerDecoderLayer,
    TransformerEncoder,
    TransformerEncoderLayer,
)

__all__ = [
    "CBAM",
    "AdditiveAttention",
    "CachedDecoder",
    "Decoder",
    "EfficientChannelAttention",
    "Embedding",
    "FeedForward",
    "Generation",
    "LayerNorm",
    "Linear",
    "Module",
    "ModuleList",
    "MultiheadAttention",
    "PositionalEncoding",
    "RMSNorm",
    "Recomputing",
    "SqueezeExcitation",
    "Transformer",
    "TransformerDecoder",
    "TransformerDecoderLayer",
    "TransformerEncoder",
    "TransformerEncoderLayer",
    "beam_search",
    "generate",
    "stream",
]
