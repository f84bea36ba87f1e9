"""What docs/attention.md says of regard in "Semantics where libraries disagree", row by row."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import regard
from cases import DTYPES
from helpers import EPSILON, normal

PAGE = Path(__file__).resolve().parent.parent / "docs" / "attention.md"

#: Few queries over few and many keys, and a block of queries: the paths of the kernel.
SHAPES = [(1, 5), (3, 200), (70, 130)]


def arrays(len_q: int, len_kv: int, dtype: str = "float32") -> list[np.ndarray]:
    return [normal(i, 1, 2, n, 16, dtype=dtype) for i, n in enumerate((len_q, len_kv, len_kv))]


def rows() -> dict[str, str]:
    """First and second column of the table."""
    text = PAGE.read_text().partition("## Semantics")[2] if PAGE.exists() else ""
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| ")]
    return {row[0]: row[1] for row in cells if row[0] != ""}


def test_every_row_has_its_test():
    if not PAGE.exists():
        pytest.skip("needs the repository")
    assert set(rows()) == set(TESTED)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_that_sees_no_key(backend, shape, dtype):
    q, k, v = arrays(*shape, dtype=dtype)
    mask = np.ones((1, 1, *shape), bool)
    mask[..., 0, :] = False
    for options in ({"mask": mask}, {"bias": np.where(mask, 0, -np.inf).astype(np.float32)}):
        out, lse = regard.attention(q, k, v, return_lse=True, **options)
        assert (out[:, :, 0] == 0).all() and (lse[:, :, 0] == -np.inf).all()
        assert (out[:, :, 1:] != 0).any() or shape[0] == 1
        assert np.isfinite(lse[:, :, 1:]).all()


@pytest.mark.parametrize("len_q", [1, 70])
def test_no_keys(backend, len_q):
    q, k, v = arrays(len_q, 0)
    out, lse = regard.attention(q, k, v, return_lse=True)
    assert (out == 0).all() and (lse == -np.inf).all()


@pytest.mark.parametrize("shape", SHAPES)
def test_causal_when_lengths_differ(backend, shape):
    q, k, v = arrays(*shape)
    with pytest.raises(ValueError, match=r"'upper_left'.*'lower_right'"):
        regard.attention(q, k, v, causal=True)
    for alignment, diagonal in (("upper_left", 0), ("lower_right", shape[1] - shape[0])):
        out = regard.attention(q, k, v, causal=True, alignment=alignment)
        mask = np.tri(*shape, diagonal, dtype=bool)
        np.testing.assert_allclose(out, regard.attention(q, k, v, mask=mask), atol=20 * EPSILON["float32"])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_bad_numbers_behind_a_mask(backend, shape, bad):
    q, k, v = arrays(*shape)
    mask = np.ones(shape, bool)
    mask[:, 3] = False
    want = regard.attention(q, k, v, mask=mask)
    k[:, :, 3], v[:, :, 3] = bad, bad
    np.testing.assert_allclose(regard.attention(q, k, v, mask=mask), want, atol=20 * EPSILON["float32"])


@pytest.mark.parametrize("shape", SHAPES)
def test_nan_among_visible_keys(backend, shape):
    q, k, v = arrays(*shape)
    mask = np.ones(shape, bool)
    mask[0, 3] = False
    for x in (k, v):
        kept = x[:, :, 3].copy()
        x[:, :, 3] = np.nan
        out = regard.attention(q, k, v, mask=mask)
        assert np.isfinite(out[:, :, 0]).all() and np.isnan(out[:, :, 1:]).all()
        x[:, :, 3] = kept


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("sign", [1, -1])
def test_infinite_scores(backend, shape, sign):
    q, k, v = arrays(*shape)
    q[..., 0] = 1
    k[:, :, 3, 0] = sign * np.inf
    out = regard.attention(q, k, v)
    if sign > 0:
        assert np.isnan(out).all()
    else:
        rest = np.delete(np.arange(shape[1]), 3)
        np.testing.assert_allclose(out, regard.attention(q, k[:, :, rest], v[:, :, rest]), atol=20 * EPSILON["float32"])


@pytest.mark.parametrize("shape", SHAPES)
def test_logits_of_1e5(backend, shape):
    # Whole numbers: scores are exact, so the largest stands out and weighs 1.
    rng = np.random.default_rng(0)
    q = rng.integers(-3, 4, (1, 2, shape[0], 16)).astype(np.float32)
    k = rng.permutation(np.arange(shape[1] * 16) % 251).reshape(1, 1, shape[1], 16).astype(np.float32)
    k = np.repeat(k, 2, axis=1)
    v = normal(2, 1, 2, shape[1], 16)
    scores = (q @ k.swapaxes(-1, -2)) * 1000
    assert np.abs(scores).max() > 1e5
    best = scores == scores.max(axis=-1, keepdims=True)
    want = (best / best.sum(axis=-1, keepdims=True)) @ v.astype(np.float64)
    np.testing.assert_allclose(regard.attention(q, k, v, scale=1000.0), want, atol=4 * EPSILON["float32"])


@pytest.mark.parametrize("shape", SHAPES)
def test_order_of_scale_softcap_bias_and_mask(backend, shape):
    q, k, v = arrays(*shape)
    bias = 3 * normal(5, 1, 1, *shape)
    mask = normal(6, 1, 1, *shape) < 1
    slopes = np.float32([0.1, 0.2])
    distance = np.abs(np.arange(shape[1]) - np.arange(shape[0])[:, None])
    s = 2 * np.tanh(0.5 * (q.astype(np.float64) @ k.swapaxes(-1, -2)) / 2) + bias - slopes[:, None, None] * distance
    p = np.exp(np.where(mask, s, -np.inf))
    want = p / p.sum(axis=-1, keepdims=True) @ v.astype(np.float64)
    out = regard.attention(
        q, k, v, scale=0.5, softcap=2.0, bias=bias, mask=mask, alibi_slopes=slopes, alignment="upper_left"
    )
    np.testing.assert_allclose(out, want, atol=60 * EPSILON["float32"])


def test_what_masks_mean(backend):
    q, k, v = arrays(3, 5)
    mask = np.array([True, True, False, True, False])
    kept = np.flatnonzero(mask)
    np.testing.assert_allclose(
        regard.attention(q, k, v, mask=mask),
        regard.attention(q, k[:, :, kept], v[:, :, kept]),
        atol=20 * EPSILON["float32"],
    )
    for refused in (mask.astype(np.float32), mask.astype(np.int32)):
        with pytest.raises(TypeError, match=r"mask: expected dtype bool .*use bias="):
            regard.attention(q, k, v, mask=refused)
    hidden = np.where(mask, 0, -np.inf).astype(np.float32)
    np.testing.assert_array_equal(regard.attention(q, k, v, bias=hidden), regard.attention(q, k, v, mask=mask))


def test_mask_and_causal_both_hold(backend):
    q, k, v = arrays(6, 6)
    mask = normal(7, 6, 6) < 0.5
    both = regard.attention(q, k, v, mask=mask, causal=True)
    np.testing.assert_allclose(
        both, regard.attention(q, k, v, mask=mask & np.tri(6, dtype=bool)), atol=20 * EPSILON["float32"]
    )


def test_what_dropout_keeps(backend):
    q, k, v = arrays(40, 60)
    _, weights = regard.attention(q, k, v, return_weights=True)
    options = {"dropout_p": 0.5, "seed": 3, "return_weights": True}
    _, dropped = regard.attention(q, k, v, **options)
    kept = dropped != 0
    assert 0.4 < kept.mean() < 0.6
    np.testing.assert_allclose(dropped[kept], 2 * weights[kept], rtol=20 * EPSILON["float32"])
    # A place drops or stays whatever else the call holds.
    _, fewer = regard.attention(q[:, :1, :7], k[:, :1], v[:, :1], **options)
    np.testing.assert_array_equal(fewer != 0, kept[:, :1, :7])


def test_fewer_key_heads(backend):
    q, k, v = normal(0, 1, 4, 3, 16), normal(1, 1, 2, 5, 16), normal(2, 1, 2, 5, 16)
    repeated = (np.repeat(x, 2, axis=1) for x in (k, v))
    np.testing.assert_array_equal(regard.attention(q, k, v), regard.attention(q, *repeated))


#: The test of each row of the table.
TESTED = {
    "A row that sees no key": test_a_row_that_sees_no_key,
    "len_kv = 0": test_no_keys,
    "Causal, len_q ≠ len_kv": test_causal_when_lengths_differ,
    "NaN or inf behind a mask": test_bad_numbers_behind_a_mask,
    "NaN among visible keys": test_nan_among_visible_keys,
    "A score of +inf": test_infinite_scores,
    "A score of -inf": test_infinite_scores,
    "Logits of 1e5": test_logits_of_1e5,
    "Order": test_order_of_scale_softcap_bias_and_mask,
    "A bool mask": test_what_masks_mean,
    "A float mask": test_what_masks_mean,
    "An integer mask": test_what_masks_mean,
    "Mask and causal together": test_mask_and_causal_both_hold,
    "What dropout keeps": test_what_dropout_keeps,
    "Fewer key heads than heads": test_fewer_key_heads,
}
