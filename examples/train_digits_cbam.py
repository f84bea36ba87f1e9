"""Train the two networks of digits_cbam.py with PyTorch, and store their weights beside it.

    pip install scikit-learn torch
    python examples/train_digits_cbam.py [--epochs 40] [--seeds 3] [--save data/digits_cbam.npz]

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
    def __init__(self, with_cbam: bool) -> None:
        super().__init__()
        for i, (inputs, outputs) in enumerate(zip((1, *CHANNELS), CHANNELS, strict=False)):
            self.add_module(f"conv{i}", nn.Conv2d(inputs, outputs, 3, padding=1))
            self.add_module(f"cbam{i}", TorchCBAM(outputs) if with_cbam else nn.Identity())
        self.head = nn.Linear(CHANNELS[-1], 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for i in range(len(CHANNELS)):
            x = nn.functional.max_pool2d(x, 2) if i else x
            x = self.get_submodule(f"cbam{i}")(torch.relu(self.get_submodule(f"conv{i}")(x)))
        return self.head(x.mean((2, 3)))


def train(network: TorchNetwork, seed: int, epochs: int, batch: int = 60) -> None:
    images, answers = (x[:TRAINED] for x in digits())
    labels = torch.from_numpy(answers)
    rng = np.random.default_rng(1000 + seed)  # never the test set's
    steps = epochs * (TRAINED // batch)
    optimiser = torch.optim.AdamW(network.parameters(), weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, max_lr=1e-2, total_steps=steps)
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
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--save", type=Path, default=WEIGHTS, metavar="NPZ")
    options = parser.parse_args()
    torch.set_num_threads(1)  # small batches: more threads wait for each other
    canvas, answers = test_set()
    stored: dict[str, np.ndarray] = {}
    for seed in range(options.seeds):
        for name in NETWORKS:
            torch.manual_seed(seed)
            network = TorchNetwork(name == "cbam")
            train(network, seed, options.epochs)
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
