"""The Vision Transformer (Dosovitskiy et al., 2021), under torchvision's names; timm's load as well."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from regard import _arrays, dense
from regard._checks import describe
from regard.nn._workspace import scratch
from regard.nn.attention import MultiheadAttention
from regard.nn.linear import Linear
from regard.nn.module import IncompatibleKeys, Memory, Module, Renamed, constant, fan_in_uniform, normal
from regard.nn.norm import LayerNorm
from regard.nn.transformer import activated, activation_of


class _Named(Module):
    """Modules under any names: torchvision numbers some."""

    def __init__(self, modules: Mapping[str, Module]) -> None:
        super().__init__()
        self._children.update(modules)

    def __getitem__(self, name: str) -> Any:
        return self._children[name]


class PatchEmbedding(Module):
    """A convolution whose step is its kernel's size: each patch of an image becomes a vector.

    Parameters
    ----------
    patch_size : int
    embed_dim : int
    in_channels : int
        weight is (embed_dim, in_channels, patch_size, patch_size), bias (embed_dim,).
    """

    _float32_serves_16_bit = ("cpu",)

    def __init__(
        self, patch_size: int, embed_dim: int, in_channels: int = 3, device: Any = None, dtype: Any = None
    ) -> None:
        super().__init__(device, dtype)
        self.patch_size, self.embed_dim, self.in_channels = patch_size, embed_dim, in_channels
        fan_in = in_channels * patch_size * patch_size
        shape = (embed_dim, in_channels, patch_size, patch_size)
        self.add_parameter("weight", shape, fan_in_uniform(fan_in, *shape))
        self.add_parameter("bias", (embed_dim,), fan_in_uniform(fan_in, embed_dim))

    def _pack(self, dtype: Any, memory: Memory) -> Any:
        packed = super()._pack(dtype, memory)
        return dense.pack_linear(packed["weight"].reshape(self.embed_dim, -1), packed["bias"])

    def forward(self, x: Any, residual: Any = None, out: Any = None) -> Any:
        """x (batch, in_channels, height, width), whole patches -> (batch, patches, embed_dim), row by row.

        residual, of the result's shape, is added in the same pass; out is written and returned where given.
        """
        weight = self._weights_for("x", x)
        p = self.patch_size
        if x.ndim != 4 or x.shape[1] != self.in_channels or x.shape[2] % p or x.shape[3] % p:
            raise ValueError(
                f"x: expected shape (batch, {self.in_channels}, height, width) with multiples of "
                f"patch_size = {p}, got {describe(x)}"
            )
        batch, channels, rows, columns = x.shape[0], x.shape[1], x.shape[2] // p, x.shape[3] // p
        with scratch(x) as take:
            patches = take((batch, rows, columns, channels, p, p), x.dtype)
            patches[...] = x.reshape(batch, channels, rows, p, columns, p).transpose(0, 2, 4, 1, 3, 5)
            flat = patches.reshape(batch, rows * columns, channels * p * p)
            return dense.linear(flat, weight, out=out, residual=residual)


class VisionTransformerLayer(Module):
    """A pre-norm encoder layer under torchvision's names: ln_1, self_attention, ln_2, mlp.0, mlp.3."""

    def __init__(
        self,
        num_heads: int,
        hidden_dim: int,
        mlp_dim: int,
        activation: Any = "gelu",
        eps: float = 1e-6,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(device, dtype)
        self.activation = activation_of(activation)
        self.ln_1 = LayerNorm(hidden_dim, eps, device=device, dtype=dtype)
        self.self_attention = MultiheadAttention(hidden_dim, num_heads, batch_first=True, device=device, dtype=dtype)
        self.self_attention.expected = ("qkv",)
        self.ln_2 = LayerNorm(hidden_dim, eps, device=device, dtype=dtype)
        self.mlp = _Named(
            {
                "0": Linear(hidden_dim, mlp_dim, device=device, dtype=dtype),
                "3": Linear(mlp_dim, hidden_dim, device=device, dtype=dtype),
            }
        )

    def forward(self, x: Any, out: Any = None) -> Any:
        """x (batch, len, hidden_dim) -> the same shape; out is written and returned where given."""
        with scratch(x) as take:
            normed, between = take(x.shape, x.dtype), take(x.shape, x.dtype)
            y = self.ln_1.forward(x, out=normed)
            x = self.self_attention.forward(y, y, y, need_weights=False, residual=x, out=between)[0]
            y = self.ln_2.forward(x, out=normed)
            hidden = activated(self.mlp["0"], y, self.activation, take)
            return self.mlp["3"].forward(hidden, None, x, out)


class _Encoder(Module):
    def __init__(self, tokens: int, num_layers: int, hidden_dim: int, eps: float, layer: Any, **factory: Any) -> None:
        super().__init__(**factory)
        self.add_parameter("pos_embedding", (1, tokens, hidden_dim), normal(0.02, 1, tokens, hidden_dim))
        self.layers = _Named({f"encoder_layer_{i}": layer() for i in range(num_layers)})
        self.ln = LayerNorm(hidden_dim, eps, **factory)

    def forward(self, x: Any) -> Any:
        with scratch(x) as take:
            between = [take(x.shape, x.dtype) for _ in range(2)]
            for i, layer in enumerate(self.layers._children.values()):
                x = layer.forward(x, out=between[i % 2])
            return self.ln.forward(x)


#: timm's names, as patterns, and torchvision's.
_TIMM = (
    (r"cls_token", r"class_token"),
    (r"pos_embed", r"encoder.pos_embedding"),
    (r"patch_embed\.proj\.(\w+)", r"conv_proj.\1"),
    (r"blocks\.(\d+)\.norm(\d)\.(\w+)", r"encoder.layers.encoder_layer_\1.ln_\2.\3"),
    (r"blocks\.(\d+)\.attn\.qkv\.(\w+)", r"encoder.layers.encoder_layer_\1.self_attention.in_proj_\2"),
    (r"blocks\.(\d+)\.attn\.proj\.(\w+)", r"encoder.layers.encoder_layer_\1.self_attention.out_proj.\2"),
    (r"blocks\.(\d+)\.mlp\.fc1\.(\w+)", r"encoder.layers.encoder_layer_\1.mlp.0.\2"),
    (r"blocks\.(\d+)\.mlp\.fc2\.(\w+)", r"encoder.layers.encoder_layer_\1.mlp.3.\2"),
    (r"norm\.(\w+)", r"encoder.ln.\1"),
    (r"head\.(\w+)", r"heads.head.\1"),
    # torchvision's own before 0.12
    (r"(.*)\.mlp\.linear_1\.(\w+)", r"\1.mlp.0.\2"),
    (r"(.*)\.mlp\.linear_2\.(\w+)", r"\1.mlp.3.\2"),
)


def _torchvision_name(name: str) -> str:
    for pattern, new in _TIMM:
        if match := re.fullmatch(pattern, name):
            return match.expand(new)
    return name


class VisionTransformer(Module):
    """Images cut into patches, a class token before them, positions added, a Transformer's encoder, a linear head.

    Parameters
    ----------
    image_size, patch_size : int
        Images are image_size x image_size, a multiple of patch_size.
    num_layers, num_heads, hidden_dim, mlp_dim : int
    dropout, attention_dropout : float
        torchvision's words; without effect, because modules are always in evaluation mode.
    num_classes : int
    representation_size : int, optional
        One more linear layer with tanh before the head (heads.pre_logits).
    in_channels : int
    activation : str or callable
        As in TransformerEncoderLayer.
    eps : float
        Of the norms.

    Notes
    -----
    Parameters have torchvision's names. State dicts under timm's names load as they are (those of its
    plain vision transformers: a class token, learned positions, no layer scale).

    References
    ----------
    Dosovitskiy et al., "An image is worth 16x16 words", 2021.
    """

    def __init__(
        self,
        image_size: int,
        patch_size: int,
        num_layers: int,
        num_heads: int,
        hidden_dim: int,
        mlp_dim: int,
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
        num_classes: int = 1000,
        representation_size: int | None = None,
        in_channels: int = 3,
        activation: Any = "gelu",
        eps: float = 1e-6,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(device, dtype)
        if patch_size <= 0 or image_size <= 0 or image_size % patch_size:
            raise ValueError(f"image_size: expected a positive multiple of patch_size = {patch_size}, got {image_size}")
        factory = {"device": device, "dtype": dtype}
        self.image_size, self.patch_size, self.hidden_dim = image_size, patch_size, hidden_dim
        self.num_classes, self.representation_size = num_classes, representation_size
        self.add_parameter("class_token", (1, 1, hidden_dim), constant(0.0, 1, 1, hidden_dim))
        self.conv_proj = PatchEmbedding(patch_size, hidden_dim, in_channels, device, dtype)

        def layer() -> VisionTransformerLayer:
            return VisionTransformerLayer(num_heads, hidden_dim, mlp_dim, activation, eps, device, dtype)

        tokens = (image_size // patch_size) ** 2 + 1
        self.encoder = _Encoder(tokens, num_layers, hidden_dim, eps, layer, **factory)
        if representation_size is None:
            heads = {"head": Linear(hidden_dim, num_classes, **factory)}
        else:
            heads = {
                "pre_logits": Linear(hidden_dim, representation_size, **factory),
                "head": Linear(representation_size, num_classes, **factory),
            }
        self.heads = _Named(heads)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True) -> IncompatibleKeys:
        """As :meth:`Module.load_state_dict`, for names of torchvision or of timm."""
        renamed = Renamed({_torchvision_name(name): (state_dict, name) for name in state_dict})
        return super().load_state_dict(renamed, strict)

    def features(self, x: Any) -> Any:
        """x (batch, in_channels, image_size, image_size) -> (batch, 1 + patches, hidden_dim), the class token first."""
        expected = (self.conv_proj.in_channels, self.image_size, self.image_size)
        token = self._weights_for("x", x)["class_token"]
        positions = self.encoder._weights_for("x", x)["pos_embedding"]
        if x.ndim != 4 or x.shape[1:] != expected:
            raise ValueError(f"x: expected shape (batch, {', '.join(map(str, expected))}), got {describe(x)}")
        with scratch(x) as take:
            tokens = take((len(x), positions.shape[1], self.hidden_dim), x.dtype)
            tokens[:, :1] = token + positions[:, :1]
            places = _arrays.namespace(x).broadcast_to(positions[:, 1:], tokens[:, 1:].shape)
            self.conv_proj.forward(x, places, tokens[:, 1:])
            return self.encoder.forward(tokens)

    def forward(self, x: Any) -> Any:
        """x (batch, in_channels, image_size, image_size) -> (batch, num_classes)."""
        xp = _arrays.namespace(x)
        y = xp.ascontiguousarray(self.features(x)[:, 0])
        if self.representation_size is not None:
            y = xp.tanh(self.heads["pre_logits"].forward(y))
        return self.heads["head"].forward(y)
