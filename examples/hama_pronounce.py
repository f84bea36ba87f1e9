"""Pronounce words with the weights of the package `hama`: recurrent layers and location-sensitive attention on regard.

    python examples/hama_pronounce.py                        # some English and Korean words
    python examples/hama_pronounce.py --check though 학교     # these, and compare with the package's own engine

hama 1.7 (pip install hama) turns letters into phonemes: two bidirectional GRU layers encode, two GRU layers decode what
location-sensitive additive attention shows them. Its weights are two files in a flat format of its own, read here.
"""

from __future__ import annotations

import argparse
import json
import struct
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import regard
from installed import package_folder
from regard import nn

WORDS = (
    "attention",
    "recurrent",
    "though",
    "through",
    "knight",
    "psychology",
    "queue",
    "colonel",
    "학교",
    "안녕하세요",
)
LONGEST = 32

#: What a key loses for each place between it and where the step before looked: in the engine's code, not its weights.
DISTANCE = 0.1


def assets() -> Path:
    """Where hama keeps its weights, found without importing it."""
    folder = package_folder("hama")
    if folder is None:
        raise ImportError("the weights come with the package hama: pip install hama")
    return folder / "assets"


def read(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a .hama file, in float32.

    8 bytes and a count; for each array the length of its name, the name, a dtype (0 float32, 1 float16), the number
    of axes, their lengths, offset and size in bytes; then the data, from the next multiple of 16 on.
    """
    data = path.read_bytes()
    if data[:6] != b"HAMAPK":
        raise ValueError(f"{path}: not a .hama file")
    (count,), place = struct.unpack_from("<I", data, 8), 12
    records = []
    for _ in range(count):
        (length,) = struct.unpack_from("<H", data, place)
        name = data[place + 2 : place + 2 + length].decode()
        place += 2 + length
        dtype, axes = data[place : place + 2]
        shape = struct.unpack_from(f"<{axes}I", data, place + 2)
        place += 2 + 4 * axes
        offset, size = struct.unpack_from("<QQ", data, place)
        place += 16
        records.append((name, ("<f4", "<f2")[dtype], shape, offset, size))
    start = -(-place // 16) * 16
    return {
        name: np.frombuffer(data[start + offset : start + offset + size], dtype).reshape(shape).astype(np.float32)
        for name, dtype, shape, offset, size in records
    }


def gru(layers: list[tuple[np.ndarray, np.ndarray, np.ndarray]]) -> nn.GRU:
    """Layers with ONNX's weights (input, hidden, both biases), whose gates stand in the order z, r, n."""

    def reordered(gates: np.ndarray) -> np.ndarray:
        z, r, n = np.split(gates, 3)
        return np.concatenate((r, z, n))

    state = {}
    for k, (w_input, w_hidden, bias) in enumerate(layers):
        for d, suffix in enumerate(("", "_reverse")[: len(w_input)]):
            b_input, b_hidden = np.split(bias[d], 2)
            weights = {"weight_ih": w_input[d], "weight_hh": w_hidden[d], "bias_ih": b_input, "bias_hh": b_hidden}
            state |= {f"{name}_l{k}{suffix}": reordered(w) for name, w in weights.items()}
    directions, rows, width = layers[0][0].shape
    module = nn.GRU(width, rows // 3, len(layers), batch_first=True, bidirectional=directions == 2)
    module.load_state_dict(state)
    return module


class Encoded(NamedTuple):
    annotations: np.ndarray  # (1, len, 192), the values
    keys: np.ndarray  # (1, len, 96), projected
    state: np.ndarray  # (2, 1, 96), of both decoder layers


class Step(NamedTuple):
    token: int
    state: np.ndarray  # (2, 1, 96)
    weights: np.ndarray  # (1, len)


class Pronouncer:
    """hama's encoder and decoder on regard."""

    def __init__(self, encoder: dict[str, np.ndarray], decoder: dict[str, np.ndarray]) -> None:
        self.e = {name.removeprefix("model."): x for name, x in encoder.items()}
        self.d = {name.removeprefix("model."): x for name, x in decoder.items()}
        self.encoder = gru([self._layer(self.e, 484, 485, 483), self._layer(self.e, 527, 528, 526)])
        self.decoder = gru([self._layer(self.d, 279, 280, 281), self._layer(self.d, 299, 300, 301)])

    @staticmethod
    def _layer(weights: dict[str, np.ndarray], *numbers: int) -> Any:
        return tuple(weights[f"onnx::GRU_{n}"] for n in numbers)

    def encode(self, letters: np.ndarray) -> Encoded:
        """Numbers of letters, (len,), of one word."""
        e = self.e
        x = e["encoder_embedding.weight"][letters]
        kernel = e["frontend.depthwise.weight"][:, 0]
        padded = np.pad(x, ((kernel.shape[1] // 2,) * 2, (0, 0)))
        near = np.einsum(
            "tcw,cw->tc", np.lib.stride_tricks.sliding_window_view(padded, kernel.shape[1], axis=0), kernel
        )
        x = x + regard.linear(near, e["frontend.pointwise.weight"][:, :, 0])
        x = regard.layer_norm(x, e["frontend.norm.weight"], e["frontend.norm.bias"])
        out, last = self.encoder(x[None])
        out = out[0] + regard.linear(x, e["onnx::MatMul_532"].T)
        out = regard.layer_norm(out, e["encoder_out_norm.weight"], e["encoder_out_norm.bias"])
        ends = last.reshape(2, 1, -1)  # of each layer, both directions'
        state = np.tanh(regard.linear(ends, e["bridge.weight"], e["bridge.bias"]))
        return Encoded(out[None], regard.linear(out, e["onnx::MatMul_539"].T)[None], state)

    def attend(
        self, query: np.ndarray, encoded: Encoded, previous: np.ndarray, positions: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """The context (96 wide queries, (1, 1, 96)) and the weights, (1, len), from the previous step's weights."""
        d = self.d
        context, weights = regard.location_sensitive_attention(
            query, encoded.keys, encoded.annotations, previous, v=d["onnx::MatMul_305"][:, 0],
            w_query=d["onnx::MatMul_303"].T, w_location=d["onnx::MatMul_304"].T,
            location_kernel=d["attention.location_conv.weight"],
        )  # fmt: skip
        away = np.abs(positions - (previous * positions).sum())
        if away.any():  # a number added to a score is a factor of its weight
            weights = weights * np.exp(-DISTANCE * away).astype(np.float32)
            weights /= weights.sum()
            context = weights @ encoded.annotations
        return context, weights[:, 0]

    def step(
        self, token: int, state: np.ndarray, encoded: Encoded, previous: np.ndarray, positions: np.ndarray
    ) -> Step:
        """The phoneme after `token`."""
        d = self.d
        embedded = d["decoder_embedding.weight"][[[token]]]
        out, state = self.decoder(embedded, state)
        query = out + regard.linear(embedded, d["onnx::MatMul_302"].T)
        query = regard.layer_norm(query, d["decoder_state_norm.weight"], d["decoder_state_norm.bias"])
        context, weights = self.attend(query, encoded, previous, positions)
        context = regard.layer_norm(context, d["context_norm.weight"], d["context_norm.bias"])
        both = np.concatenate((query, context), axis=-1)
        fused = np.tanh(regard.linear(both, d["context_proj.weight"], d["context_proj.bias"]))
        fused = regard.layer_norm(fused, d["fusion_norm.weight"], d["fusion_norm.bias"])
        logits = regard.linear(
            regard.linear(fused, d["output_in_proj.weight"], d["output_in_proj.bias"]), d["onnx::MatMul_306"].T
        )
        return Step(int(logits.argmax()), state, weights)

    def __call__(self, letters: np.ndarray, begin: int, end: int) -> tuple[list[int], np.ndarray]:
        """Numbers of phonemes, and the weights of each step, (phonemes, len)."""
        encoded = self.encode(letters)
        weights = np.full((1, len(letters)), 1 / len(letters), np.float32)
        positions = np.arange(len(letters), dtype=np.float32)
        token, state = begin, encoded.state
        found, rows = [], []
        while len(found) < LONGEST:
            token, state, weights = self.step(token, state, encoded, weights, positions)
            if token == end:
                break
            found.append(token)
            rows.append(weights[0])
        return found, np.array(rows)


def load() -> Pronouncer:
    return Pronouncer(read(assets() / "encoder.hama"), read(assets() / "decoder_step.hama"))


def engine_s(letters: np.ndarray, begin: int, end: int) -> tuple[list[int], np.ndarray]:
    """The same by the package's own engine."""
    from hama import _engine

    encoder = _engine.EncoderSession((assets() / "encoder.hama").read_bytes())
    decoder = _engine.DecoderSession((assets() / "decoder_step.hama").read_bytes())
    names = ["encoder_outputs", "projected_keys", "hidden", "encoder_mask", "prev_attn"]
    feeds = {"input_ids": letters[None], "input_lengths": np.array([len(letters)])}
    feeds = dict(zip(names, encoder.run(names, feeds), strict=True))
    feeds["positions"] = np.arange(len(letters), dtype=np.float32)
    token, found, rows = begin, [], []
    while len(found) < LONGEST:
        names = ["next_token_ids", "hidden_out", "prev_attn_out"]
        result = decoder.run(names, feeds | {"decoder_input_ids": np.array([token])})
        token, feeds["hidden"], feeds["prev_attn"] = int(result[0][0]), *result[1:]
        if token == end:
            break
        found.append(token)
        rows.append(feeds["prev_attn"][0])
    return found, np.array(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("words", nargs="*", default=WORDS)
    parser.add_argument("--check", action="store_true", help="compare with the package's own engine")
    options = parser.parse_args()

    from hama.tokenizer import TextTokenizer
    from hama.vocab import Vocabulary

    vocabulary = Vocabulary.load(None)
    tokenizer = TextTokenizer(vocabulary, max_input_len=128)
    phonemes = json.loads((assets() / "g2p_vocab.json").read_text())["decoder"]
    pronounce = load()
    for word in options.words:
        encoding = tokenizer.encode(word)
        letters = encoding.ids[: encoding.length]
        ids, weights = pronounce(letters, vocabulary.sos_id, vocabulary.eos_id)
        line = f"{word:>16}  {''.join(phonemes[i] for i in ids)}"
        if options.check:
            theirs, their_weights = engine_s(letters, vocabulary.sos_id, vocabulary.eos_id)
            if theirs != ids:
                raise SystemExit(f"{line}: the engine says {''.join(phonemes[i] for i in theirs)}")
            apart = np.abs(weights - their_weights).max(initial=0)
            line += f"   (the engine's, attention weights {apart:.0e} apart)"
        print(line)


if __name__ == "__main__":
    main()
