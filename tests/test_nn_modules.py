"""What every module of regard.nn does beside its function: outputs, pickling, refusals, names in errors."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
from helpers import assert_same_bits, normal
from regard import nn


@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm])
def test_norms_write_out_of_any_strides(norm):
    x = normal(0, 4, 3, 5)
    for axes in (5, (3, 5)):
        module, want = norm(axes), norm(axes)(x)
        for out in (
            np.empty_like(x),
            np.empty((4, 5, 3), np.float32).swapaxes(1, 2),
            np.empty((8, 3, 5), np.float32)[::2],
        ):
            assert module(x, out=out) is out
            assert_same_bits(np.ascontiguousarray(out), want)
        for wrong in (np.empty((4, 5), np.float32), np.empty((4, 3, 5))):
            with pytest.raises((TypeError, ValueError), match=r"^out: expected"):
                module(x, out=wrong)


MODULES = {
    "Linear": lambda: nn.Linear(4, 6),
    "Embedding": lambda: nn.Embedding(9, 4, padding_idx=2),
    "LayerNorm": lambda: nn.LayerNorm(4),
    "PositionalEncoding": lambda: nn.PositionalEncoding(6, 20, learned=True),
    "Transformer": lambda: nn.Transformer(8, 2, 1, 1, 8, activation="gelu"),
    "FeedForward": lambda: nn.FeedForward(4, 8, "swiglu"),
    "VisionTransformer": lambda: nn.VisionTransformer(8, 4, 1, 2, 8, 8),
    "AdditiveAttention": lambda: nn.AdditiveAttention(4, 5, 6),
    "GRU": lambda: nn.GRU(4, 5, bidirectional=True),
    "LSTM": lambda: nn.LSTM(4, 5),
    "CBAM": lambda: nn.CBAM(16, 4),
    "EfficientChannelAttention": lambda: nn.EfficientChannelAttention(16),
}


@pytest.mark.parametrize("name", MODULES)
def test_modules_are_pickled_with_their_weights(name):
    module = MODULES[name]()
    copy = pickle.loads(pickle.dumps(module))  # before its initial weights are drawn
    module.load_state_dict(module.state_dict())
    for one in (copy, pickle.loads(pickle.dumps(module))):
        assert one.state_dict().keys() == module.state_dict().keys()
        for key, value in module.state_dict().items():
            assert_same_bits(one.state_dict()[key], value)


def test_what_is_refused_changes_nothing():
    wide = nn.Linear(70000, 2)  # more in_features than int8 has sums for
    x = np.ones((1, 70000), np.float32)
    before, want = np.array(wide.weight), wide(x)
    with pytest.raises(ValueError, match="at most 65536 in_features"):
        wide.to(weights="int8").load_state_dict({"weight": np.ones((2, 70000)), "bias": np.ones(2)})
    assert_same_bits(wide.weight, before)
    wide.to(weights=None)
    assert_same_bits(wide(x), want)
    narrow = nn.Linear(2, 2, dtype="float64").to(weights="int8")
    narrow.load_state_dict({"weight": np.ones((2, 2)), "bias": np.ones(2)})
    assert_same_bits(narrow(np.ones((1, 2), np.float32)), np.full((1, 2), 3, np.float32))
    with pytest.raises(TypeError, match=r"input: expected dtype float32.*held as int8"):
        narrow(np.ones((1, 2)))


def test_arguments_have_pytorchs_words():
    x, narrow = normal(0, 2, 16, 3, 4), normal(0, 2, 16, 3, 5)
    for module, refused in (
        (nn.Linear(4, 6), narrow),
        (nn.LayerNorm(4), narrow),
        (nn.LayerNorm((3, 4)), narrow),
        (nn.SqueezeExcitation(16, 4), normal(0, 2, 15, 3, 4)),
        (nn.SqueezeExcitation(16, 4), x.astype(np.int64)),
    ):
        assert_same_bits(module(input=x), module(x))
        with pytest.raises((TypeError, ValueError), match=r"^(input|w_reduce): expected"):
            module(input=refused)
    with pytest.raises(TypeError, match=r"^input: expected"):
        nn.Linear(4, 6)([1.0])


def test_layers_name_what_they_were_given():
    encoder = nn.TransformerEncoderLayer(8, 2, 8, batch_first=True)
    decoder = nn.TransformerDecoderLayer(8, 2, 8, batch_first=True, norm_first=True)
    x, narrow, mask = normal(0, 2, 3, 8), normal(0, 2, 3, 7), np.ones((2, 4), bool)
    for call, name in (
        (lambda: encoder(narrow), "src"),
        (lambda: encoder(x, mask), "src_mask"),
        (lambda: encoder(x, None, mask), "src_key_padding_mask"),
        (lambda: decoder(narrow, x), "tgt"),
        (lambda: decoder(x, x, tgt_key_padding_mask=mask), "tgt_key_padding_mask"),
        (lambda: decoder(x, narrow), "memory"),
        (lambda: decoder(x, x, memory_mask=mask), "memory_mask"),
    ):
        with pytest.raises(ValueError, match=f"^{name}: expected"):
            call()
    with pytest.raises(ValueError, match="num_layers: expected an integer >= 0, got -1"):
        nn.TransformerEncoder(encoder, -1)


def test_a_child_set_to_none_is_gone():
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 8), 1, nn.LayerNorm(8))
    encoder.norm = None
    assert not [name for name in encoder.state_dict() if name.startswith("norm.")]


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(7, 4), nn.Linear(4, 7, bias=False)
        self.head.tie("weight", self.embed)

    def forward(self, ids):
        return self.head.forward(self.embed.forward(ids))


def test_tied_weights_are_one():
    model, ids = Tied(), np.arange(3)
    assert model.head.weight is model.embed.weight
    assert list(model.state_dict()) == ["embed.weight", "head.weight"]
    for held in (None, "int8"):
        model.to(weights=held)
        for name in ("embed.weight", "head.weight"):
            table = normal(len(name), 7, 4)
            model.load_state_dict({name: table})
            assert model.embed.weight is model.head.weight is table
            want = nn.Linear(4, 7, bias=False).to(weights=held)
            want.weight = table
            assert_same_bits(model(ids), want(table[ids]))
        model.head.weight = normal(5, 7, 4)
        assert_same_bits(model.embed(ids), model.head.weight[:3])
    for copied in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        copied.embed.weight = normal(6, 7, 4)
        assert copied.head.weight is copied.embed.weight is not model.embed.weight
        assert_same_bits(copied.embed(ids), copied.head.weight[:3])
    with pytest.raises(ValueError, match=r"^state_dict: does not fit Tied:\n  missing: embed.weight, head.weight"):
        model.load_state_dict({})
    before = model.embed.weight
    with pytest.raises(ValueError, match=r"head\.weight: expected shape"):
        model.load_state_dict({"embed.weight": normal(1, 7, 4), "head.weight": normal(1, 7, 5)})
    assert model.head.weight is before
    with pytest.raises(ValueError, match=r"^name: expected a parameter of Linear \('weight'\), got 'bias'"):
        model.head.tie("bias", model.embed)
    with pytest.raises(ValueError, match=r"^other: expected weight of shape \(7, 4\), got \(8, 4\)"):
        model.head.tie("weight", nn.Embedding(8, 4))
    with pytest.raises(TypeError, match=r"^other: expected a Module"):
        model.head.tie("weight", before)


def test_a_list_of_modules_grows_and_is_cut():
    layers = nn.ModuleList(nn.Linear(2, 2) for _ in range(2))
    assert layers.append(nn.LayerNorm(2)) is layers
    assert list(layers.state_dict())[-2:] == ["2.weight", "2.bias"]
    last = layers[1:]
    assert isinstance(last, nn.ModuleList) and list(last) == [layers[1], layers[-1]]
    with pytest.raises(TypeError, match=r"^module: expected a Module, got float32 array of shape"):
        layers.append(np.zeros(2, np.float32))


def test_a_module_that_was_not_begun_says_so():
    class Late(nn.Module):
        def __init__(self):
            self.linear = nn.Linear(2, 2)

    with pytest.raises(AttributeError, match=r"^Late: expected super\(\).__init__\(\) before"):
        Late()
