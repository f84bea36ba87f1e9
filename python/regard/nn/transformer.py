"""Transformer layers and stacks (Vaswani et al., 2017), under PyTorch's names and conventions."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from regard import _arrays
from regard._checks import Renamed, choice, count, describe
from regard.nn._workspace import scratch
from regard.nn.attention import MultiheadAttention, says_causal
from regard.nn.linear import Linear
from regard.nn.module import Module, ModuleList, check_floats
from regard.nn.norm import LayerNorm, RMSNorm
from regard.nn.position import RotaryEmbedding

#: What linear computes in its own pass: functions and classes by their names in lower case.
_FUSED = ("relu", "gelu", "silu", "gelu_tanh")

#: What the first of two layers goes through where the second multiplies it.
_GATED = {"swiglu": "silu", "geglu": "gelu", "geglu_tanh": "gelu_tanh", "reglu": "relu"}


def activation_of(activation: Any) -> str | Callable[[Any], Any]:
    """The name of an activation that linear fuses, or the function itself.

    `activation` is a name, or a function or module whose name or class is one (PyTorch's F.relu,
    nn.GELU(approximate="tanh"), functools.partial(F.gelu, approximate="tanh") and so on), or any function of NumPy
    arrays, on a GPU of CuPy's.
    """
    named, approximate = activation, getattr(activation, "approximate", "none")
    partial = isinstance(activation, functools.partial) and not activation.args
    if partial and set(activation.keywords) == {"approximate"}:
        named, approximate = activation.func, activation.keywords["approximate"]
    name = named if isinstance(named, str) else getattr(named, "__name__", type(named).__name__)
    if name.lower() == "gelu" and approximate != "none":
        if approximate != "tanh":
            raise NotImplementedError(f"activation: no kernel for gelu with approximate={approximate!r}")
        return "gelu_tanh"
    if name.lower() in _FUSED:
        return name.lower()
    if callable(activation):
        return activation
    expected = ", ".join(map(repr, _FUSED))
    raise ValueError(f"activation: expected {expected} or a function of arrays, got {activation!r}")


class _WithFeedForward(Module):
    """What FeedForward and the layers share: two linear layers, a third where the activation is gated."""

    linear1: Linear
    linear2: Linear
    linear3: Linear | None
    activation: Any

    def _add_feed_forward(
        self, d_model: int, dim_feedforward: int, activation: Any, bias: bool, device: Any, dtype: Any
    ) -> None:
        gated = isinstance(activation, str) and activation in _GATED
        self.activation = _GATED[activation] if gated else activation_of(activation)
        self.linear1 = Linear(d_model, dim_feedforward, bias, device, dtype)
        self.linear2 = Linear(dim_feedforward, d_model, bias, device, dtype)
        self.linear3 = Linear(d_model, dim_feedforward, bias, device, dtype) if gated else None

    def _feed_forward(self, x: Any, residual: Any = None, out: Any = None) -> Any:
        with scratch(x) as take:
            hidden = activated(self.linear1, x, self.activation, take)
            if self.linear3 is not None:
                hidden *= self.linear3.forward(x, out=take(hidden.shape, hidden.dtype))
            return self.linear2.forward(hidden, None, residual, out)


class FeedForward(_WithFeedForward):
    """``linear2(activation(linear1(x)))``, each position by itself.

    Parameters
    ----------
    d_model, dim_feedforward : int
        Width outside and inside.
    activation : str or callable
        As in TransformerEncoderLayer; or gated (Shazeer, 2020):
        ``linear2(activation(linear1(x)) * linear3(x))``, by "swiglu" with silu, by "geglu" with gelu, by "geglu_tanh"
        with gelu_tanh, by "reglu" with relu.
    bias : bool
        Whether the linear layers have biases.
    """

    def __init__(
        self,
        d_model: int,
        dim_feedforward: int = 2048,
        activation: Any = "relu",
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(device, dtype)
        self._add_feed_forward(d_model, dim_feedforward, activation, bias, device, dtype)

    def forward(self, x: Any) -> Any:
        """x (..., d_model) -> the same shape and dtype."""
        return self._feed_forward(x)


def activated(linear: Linear, x: Any, activation: Any, take: Callable[..., Any]) -> Any:
    """activation(linear(x)) in scratch memory, with an activation of activation_of's."""
    out = take((*x.shape[:-1], linear.out_features), x.dtype)
    if isinstance(activation, str):
        return linear.forward(x, activation, out=out)
    hidden = linear.forward(x, out=out)
    return _arrays.namespace(hidden).asarray(activation(hidden)).astype(hidden.dtype, copy=False)


class _Layer(_WithFeedForward):
    """What encoder and decoder layers share: how a block joins the residual stream, and feed-forward."""

    def __init__(
        self,
        d_model: int,
        nhead: int,
        dim_feedforward: int,
        dropout: float,
        activation: Any,
        layer_norm_eps: float,
        batch_first: bool,
        norm_first: bool,
        bias: bool,
        device: Any,
        dtype: Any,
        num_heads_kv: int | None,
        norm: str,
        self_attention: dict[str, Any],
        blocks: int,
    ) -> None:
        super().__init__(device, dtype)
        for name, expected in (("self_attn", ("qkv",)), ("multihead_attn", ("q", "kv")))[: blocks - 1]:
            attention = MultiheadAttention(
                d_model, nhead, dropout, bias, batch_first=batch_first, device=device, dtype=dtype,
                num_heads_kv=num_heads_kv, **(self_attention if name == "self_attn" else {}),
            )  # fmt: skip
            attention.expected = expected
            setattr(self, name, attention)
        self._add_feed_forward(d_model, dim_feedforward, activation, bias, device, dtype)
        made = {
            "layer": lambda: LayerNorm(d_model, layer_norm_eps, True, bias, device, dtype),
            "rms": lambda: RMSNorm(d_model, layer_norm_eps, True, device, dtype),
        }
        for i in range(blocks):
            setattr(self, f"norm{i + 1}", choice("norm", norm, made)())
        self.norm_first = norm_first

    def _joined(self, x: Any, norm: Any, block: Callable[[Any], Any]) -> Any:
        """x and a block of it, joined as norm_first says; for CachedDecoder's steps.

        Their arrays are too small for scratch memory: through _join a step of 4 rows takes 1.15 times as long.
        """
        if self.norm_first:
            y = block(norm.forward(x))
            y += x
            return y
        return norm.of_sum(block(x), x)

    def _join(self, x: Any, norm: Any, block: Callable[[Any, Any, Any], Any], out: Any) -> Any:
        """The same for a block(x, residual, out) that adds the residual in its last product."""
        with scratch(x) as take:
            y = take(x.shape, x.dtype)
            if self.norm_first:
                return block(norm.forward(x, out=y), x, out)
            return norm.of_sum(block(x, None, y), x, out)


# Errors of a layer's parts, in the words of what the layer was given.
_OF_SRC = Renamed(input="src", query="src", key_padding_mask="src_key_padding_mask", attn_mask="src_mask")
_OF_TGT = Renamed(input="tgt", query="tgt", key_padding_mask="tgt_key_padding_mask", attn_mask="tgt_mask")
_OF_MEMORY = Renamed(
    query="tgt", key="memory", value="memory", key_padding_mask="memory_key_padding_mask", attn_mask="memory_mask"
)


class TransformerEncoderLayer(_Layer):
    """Self-attention and a feed-forward block, each with a residual and a LayerNorm.

    Parameters
    ----------
    d_model, nhead : int
        Width, and number of heads.
    dim_feedforward : int
        Width inside the feed-forward block.
    dropout : float
        PyTorch's word; without effect, because modules are always in evaluation mode.
    activation : str or callable
        "relu", "gelu" (the erf one), "gelu_tanh" (its approximation) or "silu", PyTorch's functions and modules of
        these, or any function of NumPy arrays, on a GPU of CuPy's; or a gated one of FeedForward's, by name.
    layer_norm_eps : float
    batch_first : bool
        Arrays are (batch, len, d_model) instead of (len, batch, d_model).
    norm_first : bool
        Norms before the blocks, not after the residuals.
    bias : bool
        Whether linear layers and norms have biases.
    rotary : RotaryEmbedding, optional
        Turns the queries and keys of self-attention; tokens are at positions 0, 1, ...
    num_heads_kv, window, softcap
        As in MultiheadAttention; the last two are self-attention's.
    norm : "layer" or "rms"
        Whether norms are LayerNorms or RMSNorms.

    Notes
    -----
    A Llama's layer is ``TransformerEncoderLayer(d, heads, inner, activation="swiglu", norm_first=True, bias=False,
    rotary=RotaryEmbedding(d // heads), num_heads_kv=heads_kv, norm="rms")``, called with is_causal=True or through
    a CachedDecoder; its gate_proj, down_proj and up_proj are linear1, linear2 and linear3.
    """

    def __init__(
        self,
        d_model: int,
        nhead: int,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: Any = "relu",
        layer_norm_eps: float = 1e-5,
        batch_first: bool = False,
        norm_first: bool = False,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        rotary: RotaryEmbedding | None = None,
        num_heads_kv: int | None = None,
        window: tuple[int | None, int | None] | None = None,
        softcap: float | None = None,
        norm: str = "layer",
    ) -> None:
        super().__init__(
            d_model, nhead, dim_feedforward, dropout, activation, layer_norm_eps, batch_first, norm_first,
            bias, device, dtype, num_heads_kv, norm, {"rotary": rotary, "window": window, "softcap": softcap}, blocks=2,
        )  # fmt: skip

    def forward(
        self,
        src: Any,
        src_mask: Any = None,
        src_key_padding_mask: Any = None,
        is_causal: bool = False,
        *,
        out: Any = None,
    ) -> Any:
        """src (len, batch, d_model), with batch_first (batch, len, d_model), or (len, d_model) -> the same.

        Masks and is_causal are those of MultiheadAttention: in bool ones True means ignore. At
        padded positions the result has no meaning (PyTorch makes it 0, or not, as its path may be).
        out, an array like src, is written and returned where given.
        """

        def attend(x: Any, residual: Any, out: Any) -> Any:
            return self.self_attn.forward(
                x, x, x, src_key_padding_mask, False, src_mask, is_causal=is_causal, residual=residual, out=out
            )[0]

        check_floats("src", src)
        with _OF_SRC, scratch(src) as take:
            x = self._join(src, self.norm1, attend, take(src.shape, src.dtype))
            return self._join(x, self.norm2, self._feed_forward, out)


class TransformerDecoderLayer(_Layer):
    """Self-attention, attention to an encoder's output, and a feed-forward block.

    Parameters are those of TransformerEncoderLayer.
    """

    def __init__(
        self,
        d_model: int,
        nhead: int,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: Any = "relu",
        layer_norm_eps: float = 1e-5,
        batch_first: bool = False,
        norm_first: bool = False,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        rotary: RotaryEmbedding | None = None,
        num_heads_kv: int | None = None,
        window: tuple[int | None, int | None] | None = None,
        softcap: float | None = None,
        norm: str = "layer",
    ) -> None:
        super().__init__(
            d_model, nhead, dim_feedforward, dropout, activation, layer_norm_eps, batch_first, norm_first,
            bias, device, dtype, num_heads_kv, norm, {"rotary": rotary, "window": window, "softcap": softcap}, blocks=3,
        )  # fmt: skip

    def forward(
        self,
        tgt: Any,
        memory: Any,
        tgt_mask: Any = None,
        memory_mask: Any = None,
        tgt_key_padding_mask: Any = None,
        memory_key_padding_mask: Any = None,
        tgt_is_causal: bool = False,
        memory_is_causal: bool = False,
        *,
        out: Any = None,
    ) -> Any:
        """tgt (len_q, batch, d_model), memory (len_kv, batch, d_model) -> tgt's shape; or batch first.

        out, an array like tgt, is written and returned where given.
        """

        def attend(x: Any, residual: Any, out: Any) -> Any:
            return self.self_attn.forward(
                x, x, x, tgt_key_padding_mask, False, tgt_mask, is_causal=tgt_is_causal, residual=residual, out=out
            )[0]

        def attend_memory(x: Any, residual: Any, out: Any) -> Any:
            with _OF_MEMORY:
                return self.multihead_attn.forward(
                    x, memory, memory, memory_key_padding_mask, False, memory_mask, is_causal=memory_is_causal,
                    residual=residual, out=out,
                )[0]  # fmt: skip

        check_floats("tgt", tgt)
        with _OF_TGT, scratch(tgt) as take:
            x = self._join(tgt, self.norm1, attend, take(tgt.shape, tgt.dtype))
            x = self._join(x, self.norm2, attend_memory, take(tgt.shape, tgt.dtype))
            return self._join(x, self.norm3, self._feed_forward, out)


def _checked_norm(norm: Any) -> Any:
    if norm is not None and not isinstance(norm, (LayerNorm, RMSNorm)):
        raise TypeError(f"norm: expected None, regard.nn.LayerNorm or RMSNorm, got {describe(norm)}")
    return norm


def _once_for_all(mask: Any, is_causal: bool | None) -> tuple[bool, Any]:
    """Whether layers are causal, and the mask that they have besides: none where it says the same."""
    causal = says_causal(mask)
    return (causal if is_causal is None else is_causal), (None if causal and is_causal is not False else mask)


def _through(stack: Any, x: Any, kind: type[_Layer], call: Callable[..., Any]) -> Any:
    """x through a stack's layers and its norm; what is between two layers of ours lies in scratch memory."""
    layers = list(stack.layers)
    with scratch(x) as take:
        between = [take(x.shape, x.dtype) for _ in layers[:2]]
        for i, layer in enumerate(layers):
            last = i == len(layers) - 1 and stack.norm is None
            if type(layer) is kind and not last:
                x = call(layer, x, out=between[i % 2])
            else:
                x = call(layer, x)
        return x if stack.norm is None else stack.norm.forward(x)


class TransformerEncoder(Module):
    """A stack of encoder layers, each a copy of the one given, and a norm after them.

    Parameters
    ----------
    encoder_layer : TransformerEncoderLayer
    num_layers : int
    norm : LayerNorm or RMSNorm, optional
    enable_nested_tensor, mask_check : bool
        PyTorch's words; without effect.
    """

    def __init__(
        self,
        encoder_layer: TransformerEncoderLayer,
        num_layers: int,
        norm: Any = None,
        enable_nested_tensor: bool = True,
        mask_check: bool = True,
    ) -> None:
        super().__init__(dtype=encoder_layer.dtype)
        self.num_layers, self.norm = count("num_layers", num_layers), _checked_norm(norm)
        self.layers = ModuleList(copy.deepcopy(encoder_layer) for _ in range(self.num_layers))

    def forward(
        self, src: Any, mask: Any = None, src_key_padding_mask: Any = None, is_causal: bool | None = None
    ) -> Any:
        """src -> the same shape: see TransformerEncoderLayer. is_causal=None looks at the mask."""
        causal, mask = _once_for_all(mask, is_causal)
        check_floats("src", src)
        mask = _arrays.beside(src, mask)
        masks = (mask, src_key_padding_mask, causal)
        return _through(self, src, TransformerEncoderLayer, lambda layer, x, **out: layer.forward(x, *masks, **out))


class TransformerDecoder(Module):
    """A stack of decoder layers, each a copy of the one given, and a norm after them.

    Parameters
    ----------
    decoder_layer : TransformerDecoderLayer
    num_layers : int
    norm : LayerNorm or RMSNorm, optional
    """

    def __init__(self, decoder_layer: TransformerDecoderLayer, num_layers: int, norm: Any = None) -> None:
        super().__init__(dtype=decoder_layer.dtype)
        self.num_layers, self.norm = count("num_layers", num_layers), _checked_norm(norm)
        self.layers = ModuleList(copy.deepcopy(decoder_layer) for _ in range(self.num_layers))

    def forward(
        self,
        tgt: Any,
        memory: Any,
        tgt_mask: Any = None,
        memory_mask: Any = None,
        tgt_key_padding_mask: Any = None,
        memory_key_padding_mask: Any = None,
        tgt_is_causal: bool | None = None,
        memory_is_causal: bool = False,
    ) -> Any:
        """tgt, memory -> tgt's shape: see TransformerDecoderLayer. tgt_is_causal=None looks at the mask."""
        causal, tgt_mask = _once_for_all(tgt_mask, tgt_is_causal)
        memory_causal, memory_mask = _once_for_all(memory_mask, memory_is_causal)
        check_floats("tgt", tgt)
        tgt_mask, memory_mask = _arrays.beside(tgt, tgt_mask), _arrays.beside(tgt, memory_mask)
        masks = (tgt_mask, memory_mask, tgt_key_padding_mask, memory_key_padding_mask, causal, memory_causal)
        return _through(
            self, tgt, TransformerDecoderLayer, lambda layer, x, **out: layer.forward(x, memory, *masks, **out)
        )


class Transformer(Module):
    """The encoder-decoder of "Attention Is All You Need".

    Parameters
    ----------
    d_model, nhead : int
    num_encoder_layers, num_decoder_layers : int
    dim_feedforward, dropout, activation, layer_norm_eps, batch_first, norm_first, bias
        See TransformerEncoderLayer.
    custom_encoder, custom_decoder : Module, optional
        In place of the ones made here.
    """

    def __init__(
        self,
        d_model: int = 512,
        nhead: int = 8,
        num_encoder_layers: int = 6,
        num_decoder_layers: int = 6,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: Any = "relu",
        custom_encoder: Any = None,
        custom_decoder: Any = None,
        layer_norm_eps: float = 1e-5,
        batch_first: bool = False,
        norm_first: bool = False,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(device, dtype)
        layer = (
            d_model, nhead, dim_feedforward, dropout, activation, layer_norm_eps, batch_first, norm_first,
            bias, device, dtype,
        )  # fmt: skip

        def norm() -> LayerNorm:
            return LayerNorm(d_model, layer_norm_eps, True, bias, device, dtype)

        if custom_encoder is None:
            custom_encoder = TransformerEncoder(TransformerEncoderLayer(*layer), num_encoder_layers, norm())
        if custom_decoder is None:
            custom_decoder = TransformerDecoder(TransformerDecoderLayer(*layer), num_decoder_layers, norm())
        self.encoder, self.decoder = custom_encoder, custom_decoder
        self.d_model, self.nhead, self.batch_first = d_model, nhead, batch_first

    def forward(
        self,
        src: Any,
        tgt: Any,
        src_mask: Any = None,
        tgt_mask: Any = None,
        memory_mask: Any = None,
        src_key_padding_mask: Any = None,
        tgt_key_padding_mask: Any = None,
        memory_key_padding_mask: Any = None,
        src_is_causal: bool | None = None,
        tgt_is_causal: bool | None = None,
        memory_is_causal: bool = False,
    ) -> Any:
        """src (len_kv, batch, d_model), tgt (len_q, batch, d_model) -> tgt's shape; or batch first.

        The memory's padding is not taken from src_key_padding_mask: say it in memory_key_padding_mask.
        """
        memory = self.encoder.forward(src, src_mask, src_key_padding_mask, src_is_causal)
        return self.decoder.forward(
            tgt, memory, tgt_mask, memory_mask, tgt_key_padding_mask, memory_key_padding_mask, tgt_is_causal,
            memory_is_causal,
        )  # fmt: skip

    @staticmethod
    def generate_square_subsequent_mask(sz: int, device: Any = None, dtype: Any = np.float32) -> np.ndarray:
        """The causal mask as floats, (sz, sz): 0 up to the diagonal, -inf right of it."""
        return np.triu(np.full((sz, sz), -np.inf, dtype), 1)
