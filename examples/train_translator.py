"""Train the small Transformer of translate_transformer.py with PyTorch, and store its weights.

    python examples/train_translator.py                 # an hour on a busy core
    python examples/train_translator.py --steps 200     # to see that it runs

Needs PyTorch and safetensors. Nobody needs to run this: the weights are beside this file.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
import time
from pathlib import Path

import english_german as corpus
import numpy as np
import torch
from torch import nn
from translate_transformer import BOS, EOS, PAD, SHAPE, WEIGHTS, padded, vocabularies


class Translator(nn.Module):
    """Embeddings, sinusoids and torch.nn.Transformer; the target's embedding is also the output layer."""

    def __init__(self, source: int, target: int, longest: int = 128) -> None:
        super().__init__()
        width = SHAPE["d_model"]
        self.source_embedding = nn.Embedding(source, width)
        self.target_embedding = nn.Embedding(target, width)
        for table in (self.source_embedding, self.target_embedding):
            nn.init.normal_(table.weight, 0.0, width**-0.5)
        self.transformer = nn.Transformer(**SHAPE, dropout=0.05, batch_first=True)
        place = torch.arange(longest)[:, None] / 10000.0 ** (torch.arange(0, width, 2) / width)
        self.register_buffer("sinusoids", torch.stack((place.sin(), place.cos()), -1).reshape(longest, width), False)

    def placed(self, table: nn.Embedding, ids: torch.Tensor) -> torch.Tensor:
        return table(ids) * math.sqrt(table.embedding_dim) + self.sinusoids[: ids.shape[1]]

    def forward(self, source: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        padding = source == PAD
        hidden = self.transformer(
            self.placed(self.source_embedding, source),
            self.placed(self.target_embedding, target),
            tgt_mask=nn.Transformer.generate_square_subsequent_mask(target.shape[1]),
            src_key_padding_mask=padding,
            memory_key_padding_mask=padding,
            tgt_is_causal=True,
        )
        return hidden @ self.target_embedding.weight.T


def batches(seed: int, size: int, source: dict[str, int], target: dict[str, int]):
    """Endless batches of sentences of like length, drawn from a moving pool."""
    stream = corpus.pairs(seed, test=False)
    while True:
        pool = [
            ([source[w] for w in corpus.tokens(e)], [BOS, *(target[w] for w in corpus.tokens(g)), EOS])
            for e, g in itertools.islice(stream, 40 * size)
        ]
        pool.sort(key=lambda p: (len(p[1]), len(p[0])))
        parts = [pool[i : i + size] for i in range(0, len(pool), size)]
        for i in np.random.default_rng(seed).permutation(len(parts)):
            yield tuple(torch.from_numpy(padded(rows)) for rows in zip(*parts[i], strict=True))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--out", type=Path, default=WEIGHTS)
    given = parser.parse_args()
    if given.threads:
        torch.set_num_threads(given.threads)
    torch.manual_seed(1)
    english, german = vocabularies()
    source, target = ({w: i for i, w in enumerate(v)} for v in (english, german))
    model = Translator(len(english), len(german))
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, vocabularies {len(english)} and {len(german)}")
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.98), weight_decay=0.01)
    warm = min(400, given.steps // 4 + 1)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda s: min((s + 1) / warm, 0.5 * (1 + math.cos(math.pi * min(1, s / given.steps))) + 1e-3),
    )
    start, total = time.perf_counter(), 0.0
    for step, (src, tgt) in enumerate(itertools.islice(batches(7, given.batch, source, target), given.steps), 1):
        logits = model(src, tgt[:, :-1])
        loss = nn.functional.cross_entropy(
            logits.flatten(0, 1), tgt[:, 1:].flatten(), ignore_index=PAD, label_smoothing=0.05
        )
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        total += loss.item()
        if step % 100 == 0:
            print(f"step {step:5d}  loss {total / 100:.4f}  {time.perf_counter() - start:.0f} s", flush=True)
            total = 0.0
        if step % 1000 == 0 or step == given.steps:
            store(model, given.out, english, german)
    return 0


def store(model: Translator, path: Path, english: list[str], german: list[str]) -> None:
    from safetensors.torch import save_file

    state = {name: value.half().contiguous() for name, value in model.state_dict().items()}
    words = {"english": json.dumps(english, ensure_ascii=False), "german": json.dumps(german, ensure_ascii=False)}
    save_file(state, path, {"shape": json.dumps(SHAPE), **words})


if __name__ == "__main__":
    sys.exit(main())
