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
from regard.nn.position import PositionalEncoding, RotaryEmbedding
from regard.nn.recurrent import GRU, LSTM
from regard.nn.rnn_search import RNNSearch, Translation
from regard.nn.transformer import (
    FeedForward,
    Transformer,
    TransformerDecoder,
    TransformerDecoderLayer,
    TransformerEncoder,
    TransformerEncoderLayer,
)
from regard.nn.vision import PatchEmbedding, VisionTransformer, VisionTransformerLayer
from regard.nn.weights import Safetensors, load

__all__ = [
    "CBAM",
    "GRU",
    "LSTM",
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
    "PatchEmbedding",
    "PositionalEncoding",
    "RMSNorm",
    "RNNSearch",
    "Recomputing",
    "RotaryEmbedding",
    "Safetensors",
    "SqueezeExcitation",
    "Transformer",
    "TransformerDecoder",
    "TransformerDecoderLayer",
    "TransformerEncoder",
    "TransformerEncoderLayer",
    "Translation",
    "VisionTransformer",
    "VisionTransformerLayer",
    "beam_search",
    "generate",
    "load",
    "stream",
]
