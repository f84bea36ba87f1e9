"""Train the two networks of digits_cbam.py with PyTorch, and store their weights beside it.

    pip install scikit-learn torch
    python examples/train_digits_cbam.py [--epochs 100] [--seeds 3] [--save data/digits_cbam.npz]

Every epoch puts the digits on new canvases. Both networks see the same ones in the same order. Each seed's accuracy
is printed, on the test set of digits_cbam.py, which takes no part in training; the first seed's weights are stored.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from digits_cbam import CHANNELS, KERNEL, NETWORKS, SQUEEZED, TRAINED, WEIGHTS, accuracy, canvases, digits, test_set
from torch import nn


class TorchCBAM(nn.Module):
    """Woo et al. (2018): channels, then positions."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(channels, SQUEEZED, 1)
        self.fc2 = nn.Conv2d(SQUEEZED, channels, 1)
        self.conv = nn.Conv2d(2, 1, KERNEL, padding="same", bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        pooled = x.mean((2, 3), keepdim=True), x.amax((2, 3), keepdim=True)
        x = x * torch.sigmoid(sum(self.fc2(torch.relu(self.fc1(p))) for p in pooled))
        planes = torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], 1)
        return x * torch.sigmoid(self.conv(planes))


class TorchNetwork(nn.Module):
    """The network of digits_cbam.py; while it trains, with batch normalisation after each convolution."""

    def __init__(self, with_cbam: bool, training: bool = False) -> None:
        super().__init__()
        for i, (inputs, outputs) in enumerate(zip((1, *CHANNELS), CHANNELS, strict=False)):
            self.add_module(f"conv{i}", nn.Conv2d(inputs, outputs, 3, padding=1))
            self.add_module(f"norm{i}", nn.BatchNorm2d(outputs) if training else nn.Identity())
            self.add_module(f"cbam{i}", TorchCBAM(outputs) if with_cbam else nn.Identity())
        self.head = nn.Linear(CHANNELS[-1], 10)
        self.train(training)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for i in range(len(CHANNELS)):
            conv, norm, cbam = (self.get_submodule(f"{name}{i}") for name in ("conv", "norm", "cbam"))
            x = nn.functional.max_pool2d(x, 2) if i else x
            x = cbam(torch.relu(norm(conv(x))))
        return self.head(x.mean((2, 3)))

    def weights(self) -> dict[str, torch.Tensor]:
        """Of the same network without normalisation: it multiplies and adds, as the convolution before it does."""
        found = {k: w for k, w in self.state_dict().items() if not k.startswith("norm")}
        for i in range(len(CHANNELS)):
            norm = self.get_submodule(f"norm{i}")
            factor = norm.weight.detach() / torch.sqrt(norm.running_var + norm.eps)
            found[f"conv{i}.weight"] = found[f"conv{i}.weight"] * factor[:, None, None, None]
            found[f"conv{i}.bias"] = (found[f"conv{i}.bias"] - norm.running_mean) * factor + norm.bias.detach()
        return found


def train(network: TorchNetwork, seed: int, epochs: int, batch: int = 60) -> None:
    images, answers = (x[:TRAINED] for x in digits())
    labels = torch.from_numpy(answers)
    rng = np.random.default_rng(1000 + seed)  # never the test set's
    steps = epochs * (TRAINED // batch)
    optimiser = torch.optim.AdamW(network.parameters(), weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, max_lr=5e-3, total_steps=steps)
    for _ in range(epochs):
        seen = torch.from_numpy(canvases(images, rng))
        for chosen in torch.from_numpy(rng.permutation(TRAINED)).split(batch):
            loss = nn.functional.cross_entropy(network(seen[chosen]), labels[chosen])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--save", type=Path, default=WEIGHTS, metavar="NPZ")
    options = parser.parse_args()
    torch.set_num_threads(1)  # small batches: more threads wait for each other
    canvas, answers = test_set()
    stored: dict[str, np.ndarray] = {}
    for seed in range(options.seeds):
        for name in NETWORKS:
            torch.manual_seed(seed)
            trained = TorchNetwork(name == "cbam", training=True)
            train(trained, seed, options.epochs)
            network = TorchNetwork(name == "cbam")
            network.load_state_dict(trained.weights())
            with torch.inference_mode():
                right = accuracy(network(torch.from_numpy(canvas)).numpy(), answers)
            print(f"seed {seed}  {name:5}  {right:.1%}", flush=True)
            if seed == 0:
                stored.update({f"{name}.{k}": w.numpy() for k, w in network.state_dict().items()})
        if seed == 0:
            np.savez_compressed(options.save, **stored)
            print(f"wrote {options.save}", flush=True)


if __name__ == "__main__":
    main()
