"""The reference itself: against its definition written as loops, and against torch."""

from __future__ import annotations

import functools
import math

import numpy as np
import pytest
from helpers import assert_near, normal
from regard import reference

Q, K, V = (normal(i, *s, dtype="float64") for i, s in
           enumerate([(2, 6, 5, 8), (2, 2, 9, 8), (2, 2, 9, 7)]))  # fmt: skip
NEAR = 200 * 2.0**-52  # sums of fewer than ten terms of magnitude below 10, twice over


@pytest.mark.parametrize("alignment", ["upper_left", "lower_right"])
def test_every_option_at_once_against_loops(alignment):
    slopes = np.linspace(0.1, 0.5, 6)
    sinks, bias = normal(3, 6, dtype="float64"), normal(4, 5, 9, dtype="float64")
    mask = np.random.default_rng(5).random((2, 1, 5, 9)) > 0.2
    query_lengths, key_lengths = np.array([3, 5]), np.array([9, 4])
    out, lse, weights = reference.attention(
        Q, K, V, mask=mask, bias=bias, window=(3, 1), alignment=alignment, softcap=2.0, scale=0.4,
        alibi_slopes=slopes, sinks=sinks, query_lengths=query_lengths, key_lengths=key_lengths,
        return_lse=True, return_weights=True,
    )  # fmt: skip
    for b, h, i in np.ndindex(2, 6, 5):
        diagonal = i
        if alignment == "lower_right":
            diagonal += key_lengths[b] - query_lengths[b]
        scores = {}
        for j in range(9):
            inside = i < query_lengths[b] and j < key_lengths[b]
            if inside and mask[b, 0, i, j] and -3 <= j - diagonal <= 1:
                score = 2.0 * math.tanh(0.4 * sum(Q[b, h, i] * K[b, h // 3, j]) / 2.0)
                scores[j] = score + bias[i, j] - slopes[h] * abs(j - diagonal)
        total = math.exp(sinks[h]) + sum(math.exp(s) for s in scores.values())
        want = [math.exp(scores[j]) / total if j in scores else 0.0 for j in range(9)]
        assert_near(weights[b, h, i], np.array(want), NEAR)
        assert_near(out[b, h, i], np.array(want) @ V[b, h // 3], NEAR)
        assert_near(lse[b, h, i], np.array(math.log(total)), NEAR)


def test_precision_follows_the_input():
    for dtype, computed in (("float64", "float64"), ("float32", "float32"), ("float16", "float32")):
        x = normal(0, 1, 2, 5, 8, dtype=dtype)
        out, lse = reference.attention(x, x, x, return_lse=True)
        assert out.dtype == dtype and lse.dtype == computed


def test_attention_against_torch():
    torch = pytest.importorskip("torch")
    torch_attention = torch.nn.functional.scaled_dot_product_attention
    q, k, v = (torch.from_numpy(x) for x in (Q, K, V))
    mask = np.random.default_rng(0).random((2, 1, 5, 9)) > 0.4
    mask[0, 0, 2] = False
    want = torch_attention(q, k, v, torch.from_numpy(mask), enable_gqa=True).numpy()
    assert_near(reference.attention(Q, K, V, mask=mask), want, NEAR)
    got = reference.scaled_dot_product_attention(Q, K, V, mask, enable_gqa=True)
    assert_near(got, want, NEAR)
    want = torch_attention(q, k, v, is_causal=True, scale=-0.3, enable_gqa=True).numpy()
    got = reference.attention(Q, K, V, causal=True, alignment="upper_left", scale=-0.3)
    assert_near(got, want, NEAR)
    got = reference.scaled_dot_product_attention(Q, K, V, is_causal=True, scale=-0.3, enable_gqa=True)
    assert_near(got, want, NEAR)


def test_channels_and_layers_against_torch():
    torch = pytest.importorskip("torch")
    f, t = torch.nn.functional, torch.from_numpy
    activations = {"relu": f.relu, "silu": f.silu, "gelu": f.gelu, "hard_swish": f.hardswish}
    activations["gelu_tanh"] = functools.partial(f.gelu, approximate="tanh")
    gates = {"sigmoid": torch.sigmoid, "tanh": torch.tanh, "hard_sigmoid": f.hardsigmoid}
    x = 3 * normal(0, 3, 4, 5, 6, dtype="float64")
    w = [normal(1 + i, *s, dtype="float64") for i, s in enumerate([(2, 4), (2,), (4, 2), (4,)])]
    for name, activation in activations.items():
        for gate_name, gate in gates.items():
            hidden = activation(f.linear(t(x).mean((2, 3)), t(w[0]), t(w[1])))
            want = t(x) * gate(f.linear(hidden, t(w[2]), t(w[3])))[:, :, None, None]
            got = reference.squeeze_excitation(x, *w, activation=name, gate=gate_name)
            assert_near(got, want.numpy(), 10 * NEAR)
            got = reference.squeeze_excitation(
                x.transpose(0, 2, 3, 1), *w, activation=name, gate=gate_name, layout="nhwc"
            )
            assert_near(got.transpose(0, 3, 1, 2), want.numpy(), 10 * NEAR)
        if name != "hard_swish":
            layer = f.linear(t(x), t(np.ones((7, 6)))) / 3
            got = reference.linear(x / 3, np.ones((7, 6)), None, name)
            assert_near(got, activation(layer).numpy(), NEAR)
    weight, bias = normal(8, 6, dtype="float64"), normal(9, 6, dtype="float64")
    want = f.layer_norm(t(x), (6,), t(weight), t(bias)).numpy()
    assert_near(reference.layer_norm(x, weight, bias), want, NEAR)
    want = f.rms_norm(t(x), (6,), t(weight), 1e-6).numpy()
    assert_near(reference.rms_norm(x, weight), want, NEAR)


def test_of_nothing_there_is_no_warning():
    """Warnings are errors here; the numbers are NumPy's: the mean of nothing is NaN."""
    for shape in ((3, 0), (0,), (0, 4)):
        assert reference.layer_norm(np.zeros(shape)).shape == reference.rms_norm(np.zeros(shape)).shape == shape
    for batch, channels, height in ((2, 3, 0), (2, 0, 4), (0, 3, 4)):
        x = np.zeros((batch, channels, height, 5), np.float32)
        mlp = [np.ones(s, np.float32) for s in ((2, channels), (2,), (channels, 2), (channels,))]
        assert np.isnan(reference.global_average_pool(x)).all()
        assert reference.global_max_pool(x).shape == (batch, channels)
        kernel, taps = np.ones((1, 2, 3, 3), np.float32), np.ones(3, np.float32)
        names = ("w_reduce", "b_reduce", "w_expand", "b_expand")
        for y in (
            reference.squeeze_excitation(x, *mlp),
            reference.channel_attention(x, *mlp),
            reference.spatial_attention(x, kernel),
            reference.cbam(x, w_spatial=kernel, **dict(zip(names, mlp, strict=True))),
            reference.efficient_channel_attention(x, taps),
        ):
            assert y.shape == x.shape
