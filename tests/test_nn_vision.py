"""regard.nn.VisionTransformer against one written here on plain PyTorch functions."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from cases import DTYPES
from helpers import assert_same_bits, normal
from regard import nn

WORDS = {"image_size": 24, "patch_size": 8, "num_layers": 2, "num_heads": 3, "hidden_dim": 36, "mlp_dim": 50}


def state_of(module: Any, seed: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return {
        name: (rng.standard_normal(x.shape) / max(x.shape[-1], 4) ** 0.5).astype(np.float32)
        for name, x in module.state_dict().items()
    }


def by_torch(state: dict[str, Any], x: Any, heads: int, activation: str = "gelu") -> Any:
    """The paper's equations 1 to 4, with torchvision's names for the weights."""
    torch = pytest.importorskip("torch", reason="PyTorch computes what is expected")
    f = torch.nn.functional
    w = {name: torch.from_numpy(np.array(value)) for name, value in state.items()}

    def linear(y: Any, name: str) -> Any:
        return f.linear(y, w[f"{name}.weight"], w[f"{name}.bias"])

    def norm(y: Any, name: str) -> Any:
        return f.layer_norm(y, y.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], 1e-6)

    weight = w["conv_proj.weight"]
    y = f.conv2d(torch.from_numpy(x), weight, w["conv_proj.bias"], stride=weight.shape[-1]).flatten(2).transpose(1, 2)
    y = torch.cat([w["class_token"].expand(len(y), 1, -1), y], 1) + w["encoder.pos_embedding"]
    i = 0
    while f"encoder.layers.encoder_layer_{i}.ln_1.weight" in w:
        layer = f"encoder.layers.encoder_layer_{i}"
        z = norm(y, f"{layer}.ln_1")
        qkv = f.linear(z, w[f"{layer}.self_attention.in_proj_weight"], w[f"{layer}.self_attention.in_proj_bias"])
        q, k, v = qkv.reshape(*z.shape[:2], 3, heads, -1).permute(2, 0, 3, 1, 4)
        z = f.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(y.shape)
        y = y + linear(z, f"{layer}.self_attention.out_proj")
        hidden = getattr(f, activation)(linear(norm(y, f"{layer}.ln_2"), f"{layer}.mlp.0"))
        y = y + linear(hidden, f"{layer}.mlp.3")
        i += 1
    y = norm(y, "encoder.ln")[:, 0]
    if "heads.pre_logits.weight" in w:
        y = torch.tanh(linear(y, "heads.pre_logits"))
    return linear(y, "heads.head").numpy()


@pytest.mark.parametrize(
    "more",
    [{}, {"representation_size": 20, "num_classes": 7}, {"in_channels": 1, "activation": "relu"}, {"patch_size": 12}],
    ids=str,
)
def test_against_torch(backend, more):
    module = nn.VisionTransformer(**WORDS | more)
    state = state_of(module)
    assert module.load_state_dict(state) == ([], [])
    x = normal(1, 3, more.get("in_channels", 3), 24, 24)
    want = by_torch(state, x, 3, more.get("activation", "gelu"))
    assert want.shape == (3, more.get("num_classes", 1000))
    np.testing.assert_allclose(module(x), want, rtol=1e-5, atol=1e-5)
    assert_same_bits(module(np.asfortranarray(x[1:2])), module(x)[1:2])


def test_positions_set_anew_are_the_ones_used():
    x = normal(0, 1, 3, 24, 24)
    ours = nn.VisionTransformer(**WORDS)
    before = ours(x)
    ours.encoder.pos_embedding = positions = normal(1, *ours.encoder.pos_embedding.shape)
    after = ours(x)
    assert np.abs(after - before).max() > 0.01
    fresh = nn.VisionTransformer(**WORDS)
    fresh.load_state_dict(ours.state_dict())
    assert_same_bits(after, fresh(x))
    assert ours.state_dict()["encoder.pos_embedding"] is positions


def test_torchvision_and_timm_names():
    module = nn.VisionTransformer(**WORDS)
    names = set(module.state_dict())
    # As torchvision.models.vit_b_16().state_dict() has them.
    expected = {"class_token", "conv_proj.weight", "conv_proj.bias", "encoder.pos_embedding", "heads.head.weight"}
    expected |= {"heads.head.bias", "encoder.ln.weight", "encoder.ln.bias"}
    for i in range(2):
        for part in ("ln_1.", "self_attention.in_proj_", "self_attention.out_proj.", "ln_2.", "mlp.0.", "mlp.3."):
            expected |= {f"encoder.layers.encoder_layer_{i}.{part}{kind}" for kind in ("weight", "bias")}
    assert names == expected
    state = state_of(module)
    timm = {
        "cls_token": "class_token",
        "pos_embed": "encoder.pos_embedding",
    }
    for kind in ("weight", "bias"):
        timm |= {f"patch_embed.proj.{kind}": f"conv_proj.{kind}", f"head.{kind}": f"heads.head.{kind}"}
        timm[f"norm.{kind}"] = f"encoder.ln.{kind}"
        for i in range(2):
            layer = f"encoder.layers.encoder_layer_{i}"
            timm |= {
                f"blocks.{i}.norm1.{kind}": f"{layer}.ln_1.{kind}",
                f"blocks.{i}.attn.qkv.{kind}": f"{layer}.self_attention.in_proj_{kind}",
                f"blocks.{i}.attn.proj.{kind}": f"{layer}.self_attention.out_proj.{kind}",
                f"blocks.{i}.norm2.{kind}": f"{layer}.ln_2.{kind}",
                f"blocks.{i}.mlp.fc1.{kind}": f"{layer}.mlp.0.{kind}",
                f"blocks.{i}.mlp.fc2.{kind}": f"{layer}.mlp.3.{kind}",
            }
    assert module.load_state_dict({name: state[ours] for name, ours in timm.items()}) == ([], [])
    assert all(module.state_dict()[name] is value for name, value in state.items())
    with pytest.raises(ValueError, match=r"unexpected: blocks\.0\.ls1\.gamma"):
        module.load_state_dict({**state, "blocks.0.ls1.gamma": np.ones(36, np.float32)})


@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes(backend, dtype):
    module = nn.VisionTransformer(**WORDS, num_classes=5)
    module.load_state_dict(state_of(module))
    x = normal(1, 2, 3, 24, 24, dtype=dtype)
    out, want = module(x), module(x.astype(np.float64))
    assert out.dtype == x.dtype
    # 16-bit results are rounded some ten times on the way, at values of a few units.
    within = {"float64": 0, "float32": 1e-5, "float16": 0.03, "bfloat16": 0.25}[dtype]
    np.testing.assert_allclose(np.float64(out), want, rtol=within, atol=within)


def test_int8_weights(backend):
    module = nn.VisionTransformer(**WORDS, num_classes=50)
    module.load_state_dict(state_of(module))
    x = normal(1, 4, 3, 24, 24)
    want = module(x)
    out = module.to(weights="int8")(x)
    assert 0 < np.sqrt(np.square(out - want).mean()) < 0.05 * want.std()


def test_mistakes():
    module = nn.VisionTransformer(**WORDS)
    with pytest.raises(ValueError, match=r"x: expected shape \(batch, 3, 24, 24\)"):
        module(np.zeros((1, 3, 24, 16), np.float32))
    with pytest.raises(TypeError, match="x: expected an array of dtype"):
        module(np.zeros((1, 3, 24, 24), np.uint8))
    with pytest.raises(ValueError, match="image_size: expected a positive multiple of patch_size = 7, got 24"):
        nn.VisionTransformer(**WORDS | {"patch_size": 7})
    with pytest.raises(ValueError, match="multiples of patch_size = 8"):
        module.conv_proj(np.zeros((1, 3, 20, 24), np.float32))
