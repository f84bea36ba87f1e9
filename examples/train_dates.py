"""Train the model of translate_dates.py with PyTorch, and store its weights beside this file.

    python examples/train_dates.py [--steps 1200] [--batch 64]

Not needed to run the example: its weights, dates.safetensors, are in the repository. Needs torch and safetensors.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path
from typing import Any

import dates
import torch
from safetensors.torch import save_file
from torch import nn

WEIGHTS = Path(__file__).parent / "dates.safetensors"


class Attention(nn.Module):
    """regard.nn.AdditiveAttention's weights."""

    def __init__(self, dim_query: int, dim_key: int, dim: int) -> None:
        super().__init__()
        self.w_query = nn.Parameter(torch.empty(dim, dim_query).uniform_(-(dim_query**-0.5), dim_query**-0.5))
        self.w_key = nn.Parameter(torch.empty(dim, dim_key).uniform_(-(dim_key**-0.5), dim_key**-0.5))
        self.v = nn.Parameter(torch.empty(dim).uniform_(-(dim**-0.5), dim**-0.5))
        self.bias = nn.Parameter(torch.zeros(dim))


class RNNSearch(nn.Module):
    """regard.nn.RNNSearch under the same names, with teacher forcing."""

    def __init__(
        self,
        source_vocabulary: int,
        target_vocabulary: int,
        dim_embedding: int,
        dim_hidden: int,
        **_: Any,
    ) -> None:
        super().__init__()
        wide = 2 * dim_hidden
        self.source_embedding = nn.Embedding(source_vocabulary, dim_embedding)
        self.encoder = nn.GRU(dim_embedding, dim_hidden, batch_first=True, bidirectional=True)
        self.bridge = nn.Linear(dim_hidden, dim_hidden)
        self.attention = Attention(dim_hidden, wide, dim_hidden)
        self.target_embedding = nn.Embedding(target_vocabulary, dim_embedding)
        self.decoder = nn.GRU(dim_embedding + wide, dim_hidden, batch_first=True)
        self.readout = nn.Linear(dim_hidden + dim_embedding + wide, wide)
        self.output = nn.Linear(dim_hidden, target_vocabulary)

    def forward(self, source: torch.Tensor, lengths: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        embedded = nn.utils.rnn.pack_padded_sequence(
            self.source_embedding(source), lengths, batch_first=True, enforce_sorted=False
        )
        annotations, last = self.encoder(embedded)
        annotations, _ = nn.utils.rnn.pad_packed_sequence(annotations, batch_first=True)
        keys = annotations @ self.attention.w_key.T + self.attention.bias
        hidden = (torch.arange(source.shape[1]) >= lengths[:, None]).float() * -1e9
        state = torch.tanh(self.bridge(last[1]))
        previous = self.target_embedding(target)
        states, contexts = [], []
        for i in range(target.shape[1]):
            query = (state @ self.attention.w_query.T)[:, None]
            weights = torch.softmax(torch.tanh(query + keys) @ self.attention.v + hidden, -1)
            context = (weights[:, None] @ annotations)[:, 0]
            states.append(state)
            contexts.append(context)
            step = torch.cat((previous[:, i], context), -1)[:, None]
            state = self.decoder(step, state[None])[1][0]
        features = torch.cat((torch.stack(states, 1), previous, torch.stack(contexts, 1)), -1)
        return self.output(self.readout(features).unflatten(-1, (-1, 2)).amax(-1))


def batch(rng: random.Random, size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    pairs = [dates.pair(rng, held_out=False) for _ in range(size)]
    sources = [torch.tensor(dates.to_source(text)) for text, _ in pairs]
    targets = [torch.tensor([dates.BEGIN, *dates.to_target(iso), dates.END]) for _, iso in pairs]
    lengths = torch.tensor([len(s) for s in sources])
    return nn.utils.rnn.pad_sequence(sources, batch_first=True), lengths, torch.stack(targets)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rate", type=float, default=4e-3)
    options = parser.parse_args()

    torch.manual_seed(0)
    rng = random.Random(0)
    model = RNNSearch(**dates.SIZES)
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.rate, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, options.rate, total_steps=options.steps, pct_start=0.1)
    for step in range(options.steps):
        source, lengths, target = batch(rng, options.batch)
        logits = model(source, lengths, target[:, :-1])
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), target[:, 1:].flatten(), label_smoothing=0.01)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 99:
            right = (logits.argmax(-1) == target[:, 1:]).all(-1).float().mean()
            print(f"step {step + 1}: loss {loss.item():.4f}, exact {right.item():.1%}", flush=True)
        if step % 500 == 499 or step == options.steps - 1:
            save_file({name: x.detach().contiguous() for name, x in model.state_dict().items()}, WEIGHTS)
    print(f"wrote {WEIGHTS}")


if __name__ == "__main__":
    main()
