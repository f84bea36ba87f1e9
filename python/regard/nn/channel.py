"""Attention modules of convolutional networks."""

from __future__ import annotations

import math
from typing import Any

from regard import channel
from regard._checks import Renamed
from regard.nn.module import INPUT, Memory, Module, fan_in_uniform

_OF_INPUT = Renamed(**INPUT)


class _Convolution(Module):
    """The weights of one of PyTorch's convolutions; the modules below run them inside their own kernels."""

    def __init__(self, inputs: int, outputs: int, kernel: tuple[int, ...], bias: bool, device: Any, dtype: Any) -> None:
        super().__init__(device, dtype)
        shape, fan_in = (outputs, inputs, *kernel), inputs * math.prod(kernel)
        self._matrix = math.prod(kernel) == 1
        self.add_parameter("weight", shape, fan_in_uniform(fan_in, *shape))
        if bias:
            self.add_parameter("bias", (outputs,), fan_in_uniform(fan_in, outputs))
        else:
            self.bias = None

    def _pack(self, dtype: Any, memory: Memory) -> Any:
        """(weight, bias), the weight of a 1 x 1 convolution as a matrix."""
        packed = super()._pack(dtype, memory)
        weight = packed["weight"]
        return weight.reshape(weight.shape[:2]) if self._matrix else weight, packed.get("bias")


def _positive(**numbers: Any) -> None:
    for name, n in numbers.items():
        if int(n) != n or n < 1:
            raise ValueError(f"{name}: expected a number >= 1, got {n!r}")


def _odd(name: str, n: Any) -> None:
    if int(n) != n or n < 1 or n % 2 == 0:
        raise ValueError(f"{name}: expected an odd number >= 1, got {n!r}")


class SqueezeExcitation(Module):
    """Squeeze-and-excitation, as torchvision.ops.SqueezeExcitation is. See :func:`regard.squeeze_excitation`.

    Parameters
    ----------
    input_channels, squeeze_channels : int
        fc1.weight is (squeeze_channels, input_channels, 1, 1), fc2.weight (input_channels, squeeze_channels, 1, 1).
    activation : "relu", "silu", "gelu", "gelu_tanh" or "hard_swish"
        Between fc1 and fc2.
    scale_activation : "sigmoid", "tanh", "hard_sigmoid" or ("hard_sigmoid", alpha, beta)
        What makes weights of fc2's results.
    layout : "nchw" or "nhwc"
        The order of the axes of inputs and results.

    References
    ----------
    Hu, Shen & Sun, "Squeeze-and-Excitation Networks", CVPR 2018.
    """

    def __init__(
        self,
        input_channels: int,
        squeeze_channels: int,
        activation: str = "relu",
        scale_activation: Any = "sigmoid",
        layout: str = "nchw",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(device, dtype)
        _positive(input_channels=input_channels, squeeze_channels=squeeze_channels)
        self.activation, self.scale_activation, self.layout = activation, scale_activation, layout
        self.fc1 = _Convolution(input_channels, squeeze_channels, (1, 1), True, device, dtype)
        self.fc2 = _Convolution(squeeze_channels, input_channels, (1, 1), True, device, dtype)

    def forward(self, input: Any) -> Any:
        """input (batch, input_channels, height, width), or as layout says -> the same shape."""
        with _OF_INPUT:
            w_reduce, b_reduce = self.fc1._weights_for("x", input)
            w_expand, b_expand = self.fc2._weights_for("x", input)
            return channel.squeeze_excitation(
                input,
                w_reduce,
                b_reduce,
                w_expand,
                b_expand,
                activation=self.activation,
                gate=self.scale_activation,
                layout=self.layout,
            )


class CBAM(Module):
    """The Convolutional Block Attention Module. See :func:`regard.cbam`.

    Weights have the names and shapes of this PyTorch module's, applied as the paper says::

        fc1 = nn.Conv2d(input_channels, squeeze_channels, 1, bias=bias)
        fc2 = nn.Conv2d(squeeze_channels, input_channels, 1, bias=bias)
        conv = nn.Conv2d(2, 1, kernel_size, padding="same", bias=spatial_bias)   # of [mean, maximum]

    Parameters
    ----------
    input_channels, squeeze_channels : int
        Of the shared network that weighs channels.
    kernel_size : int
        Odd: the reach of the convolution that weighs positions.
    bias, spatial_bias : bool
        Whether fc1 and fc2, and whether conv, have biases.
    activation : "relu", "silu", "gelu", "gelu_tanh" or "hard_swish"
        Between fc1 and fc2.
    scale_activation : "sigmoid", "tanh", "hard_sigmoid" or ("hard_sigmoid", alpha, beta)
        What makes weights, of channels and of positions.
    layout : "nchw" or "nhwc"
        The order of the axes of inputs and results.

    References
    ----------
    Woo, Park, Lee & Kweon, "CBAM: Convolutional Block Attention Module", ECCV 2018.
    """

    def __init__(
        self,
        input_channels: int,
        squeeze_channels: int,
        kernel_size: int = 7,
        bias: bool = True,
        spatial_bias: bool = False,
        activation: str = "relu",
        scale_activation: Any = "sigmoid",
        layout: str = "nchw",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(device, dtype)
        _positive(input_channels=input_channels, squeeze_channels=squeeze_channels)
        _odd("kernel_size", kernel_size)
        self.activation, self.scale_activation, self.layout = activation, scale_activation, layout
        self.fc1 = _Convolution(input_channels, squeeze_channels, (1, 1), bias, device, dtype)
        self.fc2 = _Convolution(squeeze_channels, input_channels, (1, 1), bias, device, dtype)
        self.conv = _Convolution(2, 1, (kernel_size, kernel_size), spatial_bias, device, dtype)

    def forward(self, x: Any) -> Any:
        """x (batch, input_channels, height, width), or as layout says -> the same shape."""
        w_reduce, b_reduce = self.fc1._weights_for("x", x)
        w_expand, b_expand = self.fc2._weights_for("x", x)
        w_spatial, b_spatial = self.conv._weights_for("x", x)
        return channel.cbam(
            x,
            w_reduce=w_reduce,
            b_reduce=b_reduce,
            w_expand=w_expand,
            b_expand=b_expand,
            w_spatial=w_spatial.reshape(1, 2, *self.conv.weight.shape[2:]),
            b_spatial=b_spatial,
            activation=self.activation,
            gate=self.scale_activation,
            layout=self.layout,
        )


class EfficientChannelAttention(Module):
    """ECA-Net's channel attention. See :func:`regard.efficient_channel_attention`.

    conv.weight is (1, 1, kernel_size), as that of ``nn.Conv1d(1, 1, kernel_size, bias=False)``.

    Parameters
    ----------
    channels : int, optional
        Gives the kernel's size by the paper's rule, ``|log2(channels) / gamma + beta / gamma|`` made odd.
    kernel_size : int
        Odd; used where channels is not given.
    gamma, beta : int
        Of the paper's rule.
    scale_activation : "sigmoid", "tanh", "hard_sigmoid" or ("hard_sigmoid", alpha, beta)
        What makes weights of the convolution's results.
    layout : "nchw" or "nhwc"
        The order of the axes of inputs and results.

    References
    ----------
    Wang et al., "ECA-Net: Efficient Channel Attention for Deep Convolutional Neural Networks", CVPR 2020.
    """

    def __init__(
        self,
        channels: int | None = None,
        kernel_size: int = 3,
        gamma: int = 2,
        beta: int = 1,
        scale_activation: Any = "sigmoid",
        layout: str = "nchw",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(device, dtype)
        if channels is not None:
            _positive(channels=channels)
            nearest = int(abs(math.log2(channels) + beta) / gamma)
            kernel_size = max(nearest if nearest % 2 else nearest + 1, 3)
        _odd("kernel_size", kernel_size)
        self.scale_activation, self.layout = scale_activation, layout
        self.conv = _Convolution(1, 1, (kernel_size,), False, device, dtype)

    def forward(self, x: Any) -> Any:
        """x (batch, channels, height, width), or as layout says -> the same shape."""
        weight, _ = self.conv._weights_for("x", x)
        return channel.efficient_channel_attention(
            x, weight.reshape(-1), gate=self.scale_activation, layout=self.layout
        )
