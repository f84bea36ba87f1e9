"""regard.scaled_dot_product_attention has torch's signature and torch's meaning."""

from __future__ import annotations

import inspect
import math

import numpy as np
import pytest
import regard
from cases import DTYPES
from helpers import as_float64, assert_near, normal, output_tolerance
from regard import reference

LEADING = [(), (3,), (2, 4), (2, 1, 3), (0,), (2, 0)]


def arrays(leading, len_q=21, len_kv=34, dim_qk=16, dim_v=24, dtype="float32", kv_leading=None):
    kv_leading = leading if kv_leading is None else kv_leading
    return (
        normal(0, *leading, len_q, dim_qk, dtype=dtype),
        normal(1, *kv_leading, len_kv, dim_qk, dtype=dtype),
        normal(2, *kv_leading, len_kv, dim_v, dtype=dtype),
    )


def check(query, key, value, dtype="float32", **options):
    out = regard.scaled_dot_product_attention(query, key, value, **options)
    want = reference.scaled_dot_product_attention(*as_float64(query, key, value), **options)
    assert out.dtype == query.dtype and out.shape == want.shape
    # Of the options only these bear on the size of scores.
    sizes = {"scale": options.get("scale"), "bias": None}
    mask = options.get("attn_mask")
    if mask is not None and mask.dtype != bool:
        sizes["bias"] = mask
    q, k, v = (x.reshape(math.prod(x.shape[:-2]), 1, *x.shape[-2:]) for x in (query, key, value))
    if q.shape[0] != k.shape[0]:
        k, v = (np.repeat(x, q.shape[0] // x.shape[0], axis=0) for x in (k, v))
    assert_near(out, want, output_tolerance(q, k, v, sizes, dtype))


def test_signature():
    parameters = inspect.signature(regard.scaled_dot_product_attention).parameters
    assert {name: p.default for name, p in parameters.items()} == {
        "query": inspect.Parameter.empty,
        "key": inspect.Parameter.empty,
        "value": inspect.Parameter.empty,
        "attn_mask": None,
        "dropout_p": 0.0,
        "is_causal": False,
        "scale": None,
        "enable_gqa": False,
    }


@pytest.mark.parametrize("leading", LEADING, ids=str)
def test_any_leading_axes(backend, leading):
    check(*arrays(leading))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"scale": -0.7}], ids=str)
def test_dtypes(backend, dtype, options):
    check(*arrays((2, 3), dtype=dtype), dtype=dtype, **options)


@pytest.mark.parametrize(("len_q", "len_kv"), [(5, 9), (9, 5), (1, 40), (40, 1), (0, 3), (3, 0)])
def test_causal_aligns_upper_left(backend, len_q, len_kv):
    query, key, value = arrays((2, 3), len_q, len_kv)
    check(query, key, value, is_causal=True)
    if len_q and len_kv:  # the first row sees the first key alone
        out = regard.scaled_dot_product_attention(query, key, value, is_causal=True)
        assert_near(out[:, :, 0], as_float64(value[:, :, 0])[0], 4 * 2.0**-23 * 5)


@pytest.mark.parametrize(
    "shape", [(21, 34), (1, 34), (21, 1), (34,), (3, 1, 34), (2, 1, 1, 34), (2, 3, 21, 34)], ids=str
)
@pytest.mark.parametrize("kind", ["bool", "float"])
def test_masks_broadcast(backend, shape, kind):
    mask = np.random.default_rng(3).random(shape) > 0.4 if kind == "bool" else normal(3, *shape)
    check(*arrays((2, 3)), attn_mask=mask)


def test_float_mask_of_minus_infinity(backend):
    mask = np.where(np.random.default_rng(0).random((21, 34)) > 0.5, 0, -np.inf).astype(np.float32)
    mask[4] = -np.inf
    query, key, value = arrays((2, 3))
    out = regard.scaled_dot_product_attention(query, key, value, mask)
    as_bool = regard.scaled_dot_product_attention(query, key, value, mask == 0)
    assert (out[:, :, 4] == 0).all() and (as_bool[:, :, 4] == 0).all()
    assert_near(out, as_float64(as_bool)[0], 2 * 200 * 2.0**-23)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_float_mask_of_the_querys_dtype(backend, dtype):
    mask = normal(5, 3, 21, 34, dtype=dtype)
    check(*arrays((2, 3), dtype=dtype), dtype=dtype, attn_mask=mask)


def test_grouped_heads(backend):
    query, key, value = arrays((2, 6), kv_leading=(2, 2))
    check(query, key, value, enable_gqa=True)
    with pytest.raises((TypeError, ValueError), match=r"enable_gqa|heads"):
        regard.scaled_dot_product_attention(query, key, value)
    query, key, value = arrays((2, 6), kv_leading=(2, 4))
    with pytest.raises((TypeError, ValueError), match="heads"):
        regard.scaled_dot_product_attention(query, key, value, enable_gqa=True)


def test_mask_and_causal_exclude_each_other(backend):
    query, key, value = arrays((2, 3))
    with pytest.raises(ValueError, match="attn_mask"):
        regard.scaled_dot_product_attention(query, key, value, np.ones((21, 34), bool), is_causal=True)


def test_strides(backend):
    query, key, value = arrays((2, 3), 40, 60, 16, 16)
    check(query[:, ::-1, ::2], key[::-1, :, ::-1], np.asfortranarray(value))
    check(query.swapaxes(0, 1), key.swapaxes(0, 1), np.broadcast_to(value[:1, :1], (3, 2, 60, 16)))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"is_causal": True},
        {"scale": 0.5},
        {"mask": "bool"},
        {"mask": "float"},
        {"enable_gqa": True},
    ],
    ids=str,
)
def test_agrees_with_torch(backend, options):
    torch = pytest.importorskip("torch")
    options = dict(options)
    kv = (2, 2) if options.get("enable_gqa") else (2, 6)
    query, key, value = arrays((2, 6), kv_leading=kv, dtype="float64")
    kind, mask = options.pop("mask", None), None
    if kind == "bool":
        mask = np.random.default_rng(1).random((6, 21, 34)) > 0.5
        mask[2, 5] = False
    elif kind == "float":
        mask = normal(7, 6, 21, 34, dtype="float64")
    out = regard.scaled_dot_product_attention(query, key, value, mask, **options)
    want = torch.nn.functional.scaled_dot_product_attention(
        *(torch.from_numpy(x) for x in (query, key, value)),
        None if mask is None else torch.from_numpy(mask),
        **options,
    ).numpy()
    # float64 on both sides: a few hundred epsilon for scores that sum terms of up to 30.
    assert_near(out, want, 500 * 2.0**-52)
