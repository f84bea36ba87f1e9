"""regard.nn.AdditiveAttention: the function with its weights, and keys that are projected once."""

from __future__ import annotations

import numpy as np
import pytest
import regard
from cases import DTYPES
from helpers import EPSILON, assert_near, assert_same_bits, normal
from regard import nn


def module_and_inputs(dtype: str, bias: bool = True):
    module = nn.AdditiveAttention(12, 20, 33, bias=bias)
    shapes = {name: x.shape for name, x in module.state_dict().items()}
    assert shapes == {"w_query": (33, 12), "w_key": (33, 20), "v": (33,)} | ({"bias": (33,)} if bias else {})
    module.load_state_dict(
        {n: normal(i, *s, dtype=dtype) / np.asarray(4, DTYPES[dtype]) for i, (n, s) in enumerate(shapes.items())}
    )
    return module, normal(7, 3, 5, 12, dtype=dtype), normal(8, 3, 40, 20, dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [True, False])
def test_module_is_the_function(backend, dtype, bias):
    module, query, key = module_and_inputs(dtype, bias)
    lengths = np.array([40, 7, 0])
    want = regard.additive_attention(query, key, key, **module.state_dict(), key_lengths=lengths, return_weights=True)
    out = module(query, key, key_lengths=lengths, return_weights=True)
    for x, y in zip(out, want, strict=True):
        assert_same_bits(x, y)
    assert_same_bits(module(query, key, key[..., :3], key_lengths=lengths), want[0][..., :3].copy())


@pytest.mark.parametrize("dtype", DTYPES)
def test_precomputed_keys_serve_every_step(backend, dtype):
    module, query, key = module_and_inputs(dtype)
    lengths = np.array([40, 7, 1])
    want, want_weights = module(query, key, key_lengths=lengths, return_weights=True)
    projected = module.precompute(key)
    # The projection's bias joins at another place, and both round to the dtype once.
    near = 40 * EPSILON["float64" if dtype == "float64" else "float32"] + (
        EPSILON[dtype] * 4 if len(dtype) > 7 or dtype == "float16" else 0
    )
    for i in range(5):
        out, weights = module(query[:, i : i + 1], projected, key_lengths=lengths, return_weights=True)
        assert out.dtype == query.dtype
        assert_near(out, want[:, i : i + 1].astype(float), near)
        assert_near(weights, want_weights[:, i : i + 1].astype(float), near)
    assert_near(module(query, projected, key[..., :2], key_lengths=lengths), want[..., :2].astype(float), near)


def test_torch_arrays():
    torch = pytest.importorskip("torch")
    module, query, key = module_and_inputs("float32")
    projected = module.precompute(torch.from_numpy(key))
    out = module(torch.from_numpy(query), projected)
    assert isinstance(out, torch.Tensor)
    assert_near(out.numpy(), module(query, key).astype(float), 1e-5)


def test_mistakes_are_named():
    module, query, key = module_and_inputs("float32")
    with pytest.raises(ValueError, match=r"query: .*dim_query = 12"):
        module(key, key)
    with pytest.raises(ValueError, match=r"key: .*dim_key = 20"):
        module.precompute(query)
    with pytest.raises(TypeError, match="key: expected the dtype of query"):
        module(query, module.precompute(key.astype(np.float64)))
    for value, message in ((key.astype(np.float64), "the dtype of query, float32"), ([1.0], "an array of dtype")):
        with pytest.raises(TypeError, match=f"value: expected {message}"):
            module(query, module.precompute(key), value)
