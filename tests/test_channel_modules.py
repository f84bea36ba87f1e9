"""SqueezeExcitation, CBAM and EfficientChannelAttention against PyTorch's layers, by state dict."""

from __future__ import annotations

import numpy as np
import pytest
import regard
from helpers import assert_near, assert_same_bits, normal

torch = pytest.importorskip("torch")
nn = pytest.importorskip("regard.nn.channel")

X = normal(0, 2, 16, 9, 7)
#: Two networks of a few dozen terms, and gates below 1.
TOLERANCE = 1e-5


class TorchCBAM(torch.nn.Module):
    def __init__(self, channels, reduced, kernel):
        super().__init__()
        self.fc1 = torch.nn.Conv2d(channels, reduced, 1)
        self.fc2 = torch.nn.Conv2d(reduced, channels, 1)
        self.conv = torch.nn.Conv2d(2, 1, kernel, padding="same", bias=False)

    def forward(self, x):
        pooled = (x.mean((2, 3), keepdim=True), x.amax((2, 3), keepdim=True))
        x = x * torch.sigmoid(sum(self.fc2(torch.relu(self.fc1(p))) for p in pooled))
        planes = torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], 1)
        return x * torch.sigmoid(self.conv(planes))


class TorchSE(torch.nn.Module):
    """torchvision.ops.SqueezeExcitation's weights and arithmetic."""

    def __init__(self, channels, reduced):
        super().__init__()
        self.fc1 = torch.nn.Conv2d(channels, reduced, 1)
        self.fc2 = torch.nn.Conv2d(reduced, channels, 1)

    def forward(self, x):
        return x * torch.sigmoid(self.fc2(torch.relu(self.fc1(x.mean((2, 3), keepdim=True)))))


class TorchECA(torch.nn.Module):
    def __init__(self, kernel):
        super().__init__()
        self.conv = torch.nn.Conv1d(1, 1, kernel, padding=kernel // 2, bias=False)

    def forward(self, x):
        return x * torch.sigmoid(self.conv(x.mean((2, 3))[:, None]))[:, 0, :, None, None]


PAIRS = {
    "squeeze_excitation": (lambda **w: nn.SqueezeExcitation(16, 4, **w), lambda: TorchSE(16, 4)),
    "cbam": (lambda **w: nn.CBAM(16, 4, **w), lambda: TorchCBAM(16, 4, 7)),
    "efficient": (lambda **w: nn.EfficientChannelAttention(kernel_size=5, **w), lambda: TorchECA(5)),
}


@pytest.mark.parametrize("name", PAIRS)
def test_state_dicts_load_as_they_are(name):
    ours, theirs = PAIRS[name][0](), PAIRS[name][1]()
    ours.load_state_dict(theirs.state_dict())
    with torch.no_grad():
        want = theirs(torch.from_numpy(X)).numpy()
    assert_near(ours(X), want.astype(np.float64), TOLERANCE)
    last = PAIRS[name][0](layout="nhwc")
    last.load_state_dict(theirs.state_dict())
    nhwc = last(np.ascontiguousarray(X.transpose(0, 2, 3, 1)))
    assert_same_bits(np.ascontiguousarray(nhwc.transpose(0, 3, 1, 2)), ours(X))


@pytest.mark.parametrize("name", PAIRS)
def test_tensors_and_other_dtypes(name):
    module = PAIRS[name][0]()
    want = module(X)
    out = module(torch.from_numpy(X))
    assert isinstance(out, torch.Tensor)
    assert_same_bits(out.numpy(), want)
    assert module(X.astype(np.float16)).dtype == np.float16
    assert_near(module(X.astype(np.float64)), want.astype(np.float64), TOLERANCE)


def test_modules_without_biases():
    module = nn.CBAM(16, 4, kernel_size=3, bias=False, spatial_bias=True)
    assert list(module.state_dict()) == ["fc1.weight", "fc2.weight", "conv.weight", "conv.bias"]
    assert module(X).shape == X.shape


@pytest.mark.parametrize(("channels", "kernel"), [(16, 3), (64, 3), (256, 5), (2048, 7)])
def test_the_kernel_of_eca_grows_with_channels(channels, kernel):
    assert nn.EfficientChannelAttention(channels).conv.weight.shape == (1, 1, kernel)


def test_errors_name_the_argument():
    with pytest.raises(ValueError, match=r"^kernel_size: .*odd.*4"):
        nn.CBAM(16, 4, kernel_size=4)
    with pytest.raises(ValueError, match=r"^squeeze_channels: .*0"):
        nn.SqueezeExcitation(16, 0)
    with pytest.raises(ValueError, match=r"^w_reduce: "):
        nn.SqueezeExcitation(8, 4)(X)
    assert regard.squeeze_excitation.__doc__
