"""A small convolutional network with and without CBAM, on regard: where does it look?

    pip install scikit-learn matplotlib
    python examples/digits_cbam.py [--plot maps.png] [--check]

A digit of scikit-learn's lies somewhere on a canvas, among scraps of other digits. Two networks, alike but for CBAM
after each of their three convolutions, say which it is; their weights (data/digits_cbam.npz) were trained with
PyTorch by train_digits_cbam.py. --plot draws the weights that the first CBAM gives to positions over the images;
--check compares with PyTorch, if it is installed.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import regard
from regard import nn

Array = np.ndarray

WEIGHTS = Path(__file__).parent / "data" / "digits_cbam.npz"

#: Of the canvas, in pixels; digits have 8.
SIDE = 24
SCRAPS, SCRAP_SIDE = 6, 4
#: Digits that the networks were trained on; the rest, written by others, is for testing.
TRAINED = 1200

#: Channels after each convolution; CBAM's hidden units and kernel.
CHANNELS, SQUEEZED, KERNEL = (16, 32, 32), 8, 7
NETWORKS = ("cbam", "plain")

# What the networks see.


def digits() -> tuple[Array, Array]:
    """scikit-learn's digits, (1797, 8, 8) from 0 to 1, and which they are."""
    from sklearn.datasets import load_digits

    found = load_digits()
    return (found.images / 16).astype(np.float32), found.target


def canvases(images: Array, rng: np.random.Generator) -> Array:
    """Each image somewhere on a canvas of its own, over scraps of the others: (count, 1, SIDE, SIDE)."""
    count, side, _ = images.shape
    canvas = np.zeros((count, 1, SIDE, SIDE), np.float32)
    for i in range(count):
        for other in rng.integers(count, size=SCRAPS):
            top, left = rng.integers(side - SCRAP_SIDE + 1, size=2)
            y, x = rng.integers(SIDE - SCRAP_SIDE + 1, size=2)
            scrap = images[other, top : top + SCRAP_SIDE, left : left + SCRAP_SIDE]
            canvas[i, 0, y : y + SCRAP_SIDE, x : x + SCRAP_SIDE] = scrap
        y, x = rng.integers(SIDE - side + 1, size=2)
        canvas[i, 0, y : y + side, x : x + side] = images[i]
    return canvas


def test_set() -> tuple[Array, Array]:
    """Canvases with digits that the networks have not seen, always the same ones, and the answers."""
    images, answers = digits()
    return canvases(images[TRAINED:], np.random.default_rng(0)), answers[TRAINED:]


# The networks. Maps are (batch, height, width, channels): that is how `linear` leaves them.


def convolution(x: Array, weight: Array, bias: Array | None = None, activation: str | None = None) -> Array:
    """PyTorch's conv2d with zeros around x, as one product of a matrix with all windows."""
    reach = weight.shape[-1] // 2
    padded = np.pad(x, ((0, 0), (reach, reach), (reach, reach), (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, weight.shape[2:], axis=(1, 2))
    rows = windows.reshape(*x.shape[:3], -1)  # channels, then rows and columns of the window, as in weight
    return regard.linear(rows, weight.reshape(len(weight), -1), bias, activation=activation)


def halved(x: Array) -> Array:
    """The largest of each 2 x 2 positions."""
    batch, height, width, channels = x.shape
    return x.reshape(batch, height // 2, 2, width // 2, 2, channels).max(axis=(2, 4))


class Network:
    """conv, relu, (CBAM,) three times, with a maximum pool between; the mean over positions; linear."""

    def __init__(self, weights: Mapping[str, Array]) -> None:
        self.weights = dict(weights)
        self.attention: list[nn.CBAM] = []
        for i, channels in enumerate(CHANNELS):
            prefix = f"cbam{i}."
            mine = {k.removeprefix(prefix): w for k, w in weights.items() if k.startswith(prefix)}
            if mine:
                block = nn.CBAM(channels, SQUEEZED, KERNEL, layout="nhwc")
                block.load_state_dict(mine)
                self.attention.append(block)

    def features(self, x: Array, stage: int) -> Array:
        """What convolution `stage` makes of x (batch, height, width, channels), before CBAM."""
        return convolution(x, self.weights[f"conv{stage}.weight"], self.weights[f"conv{stage}.bias"], "relu")

    def __call__(self, canvas: Array) -> Array:
        """Scores of the ten digits, (batch, 10), from (batch, 1, SIDE, SIDE)."""
        x = np.moveaxis(canvas, 1, 3)
        for stage in range(len(CHANNELS)):
            x = self.features(halved(x) if stage else x, stage)
            if self.attention:
                x = self.attention[stage](x)
        pooled = regard.global_average_pool(x, layout="nhwc")
        return regard.linear(pooled, self.weights["head.weight"], self.weights["head.bias"])

    def position_weights(self, canvas: Array) -> Array:
        """What the first CBAM multiplies positions by: (batch, SIDE, SIDE)."""
        x, cbam = self.features(np.moveaxis(canvas, 1, 3), 0), self.attention[0]
        shared = [w for fc in (cbam.fc1, cbam.fc2) for w in (fc.weight[:, :, 0, 0], fc.bias)]
        x = regard.channel_attention(x, *shared, layout="nhwc")
        planes = np.stack([x.mean(axis=3), x.max(axis=3)], axis=3)
        return 1 / (1 + np.exp(-convolution(planes, cbam.conv.weight)[..., 0]))


def load(path: Path = WEIGHTS) -> dict[str, Network]:
    """{"cbam": the one with, "plain": the one without}."""
    with np.load(path) as stored:
        return {
            name: Network({k.removeprefix(f"{name}."): stored[k] for k in stored if k.startswith(f"{name}.")})
            for name in NETWORKS
        }


def accuracy(scores: Array, answers: Array) -> float:
    return float((scores.argmax(axis=1) == answers).mean())


def draw(path: str, canvas: Array, maps: Array, said: Array) -> None:
    """Canvases above, and below each the weights of its positions over it."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    count = len(canvas)
    figure, axes = pyplot.subplots(2, count, figsize=(1.4 * count, 3.2), layout="constrained", squeeze=False)
    for i in range(count):
        for ax in axes[:, i]:
            ax.imshow(canvas[i, 0], cmap="gray", vmin=0, vmax=1)
            ax.set_axis_off()
        shown = axes[1, i].imshow(maps[i], cmap="inferno", alpha=0.75, vmin=maps.min(), vmax=maps.max())
        axes[0, i].set_title(f"says {said[i]}", fontsize=9)
    figure.colorbar(shown, ax=axes[1, :], label="weight")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--plot", metavar="PNG", help="draw the weights of positions there")
    parser.add_argument("--check", action="store_true", help="compare with PyTorch")
    options = parser.parse_args()
    networks = load()
    canvas, answers = test_set()
    failed = False
    for name, network in networks.items():
        start = time.perf_counter()
        scores = network(canvas)
        seconds = time.perf_counter() - start
        size = sum(w.size for w in network.weights.values())
        what = "with CBAM" if name == "cbam" else "without"
        print(
            f"{what:9}  {size:6,} weights  {accuracy(scores, answers):6.1%} of {len(answers)} digits right  "
            f"{seconds * 1e3:.0f} ms"
        )
        if options.check:
            error = difference_from_torch(network, canvas, scores)
            failed = failed or not error <= 1e-5
            print(
                f"           PyTorch: {'agrees' if error <= 1e-5 else 'DIFFERS'}, by {error:.1e} of the largest score"
            )
    if options.plot:
        chosen = slice(0, 10)
        maps = networks["cbam"].position_weights(canvas[chosen])
        draw(options.plot, canvas[chosen], maps, networks["cbam"](canvas[chosen]).argmax(axis=1))
        print(f"drawn: {options.plot}")
    return 1 if failed else 0


def difference_from_torch(network: Network, canvas: Array, scores: Array) -> float:
    """Largest difference of the scores from PyTorch's, relative to the largest of those."""
    import torch
    from train_digits_cbam import TorchNetwork

    theirs: Any = TorchNetwork(with_cbam=bool(network.attention))
    theirs.load_state_dict({k: torch.from_numpy(w) for k, w in network.weights.items()})
    with torch.inference_mode():
        expected = theirs(torch.from_numpy(canvas)).numpy()
    return float(np.abs(scores - expected).max() / np.abs(expected).max())


if __name__ == "__main__":
    sys.exit(main())
