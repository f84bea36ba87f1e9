"""Kernels on the matrix unit: where the machine has one, and over the model of it that tests/amx_model holds.

The model is a module of its own, built where CMake is told so:

cmake --preset amx-model && cmake --build --preset amx-model
REGARD_AMX_MODEL=build/amx-model python -m pytest tests/test_amx.py

Every test of the `backend` fixture runs over the model too where REGARD_AMX_MODEL is set.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import numpy as np
import pytest
import regard
from cases import CASES, STRIDES, TILES, build, case, every_other, last_axis_slow, misaligned, reversed_view
from helpers import as_float64, assert_case, assert_same_bits, normal, problem
from regard import _backend, dense, reference


@pytest.fixture(params=["amx", "amx_model"])
def tiles(request: pytest.FixtureRequest) -> Iterator[str]:
    """An instruction set whose kernels use tiles."""
    name = request.param
    if name not in _backend.possible():
        if name == "amx_model" and "REGARD_AMX_MODEL" not in os.environ:
            pytest.skip("needs REGARD_AMX_MODEL, the folder of a build of the model")
        pytest.skip(_backend.INSTRUCTION_SETS.get(name) or "it was not built")
    threads = regard.get_num_threads()
    with _backend.using(name):
        yield name
    regard.set_num_threads(threads)


def test_modules_say_whether_they_have_tiles():
    for name in _backend.possible():
        with _backend.using(name) as module:
            assert module.tiles == name.startswith("amx")
            if module.tiles:
                assert 0 < module.measure_tiles(0.01) < 1e6
            else:
                with pytest.raises(RuntimeError, match="no matrix tiles"):
                    module.measure_tiles(0.01)


def test_the_model_is_never_chosen():
    assert _backend.possible()[-1] != "amx_model"


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("name", [tile.name for tile in TILES])
def test_tile_edges(tiles, name, dtype):
    query, key, value, options = problem(name, dtype)
    assert_case(name, dtype, *regard.attention(query, key, value, return_lse=True, **options))


@pytest.mark.parametrize("name", CASES)
def test_cases(tiles, name):
    query, key, value, options = problem(name, "bfloat16")
    assert_case(name, "bfloat16", *regard.attention(query, key, value, return_lse=True, **options))


@pytest.mark.parametrize("arrange", STRIDES)
def test_strides_and_threads_change_no_bit(tiles, arrange):
    query, key, value, options = build(case("strides", heads=2, len_q=70, len_kv=110, dim_qk=48, mask="qk"), "bfloat16")
    arranged = [np.ascontiguousarray(STRIDES[arrange](x)) for x in (query, key, value)]
    want = regard.attention(*arranged, **options)
    for threads in (1, 2, 5):
        regard.set_num_threads(threads)
        out = regard.attention(*(STRIDES[arrange](x) for x in (query, key, value)), **options)
        assert_same_bits(out, want, f"{threads} threads")


def test_rows_do_not_depend_on_the_other_queries(tiles):
    query, key, value = (normal(i, 1, 1, n, 64, dtype="bfloat16") for i, n in enumerate((200, 300, 300)))
    want = regard.attention(query, key, value)
    for first, last in ((0, 5), (3, 40), (190, 200), (16, 48)):
        assert_same_bits(regard.attention(query[:, :, first:last], key, value), want[:, :, first:last].copy())


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_bad_values_behind_a_mask_do_not_leak(tiles, bad):
    query, key, value = (normal(i, 1, 2, 100, 32, dtype="bfloat16") for i in range(3))
    mask = np.ones((100, 100), bool)
    mask[:, 60] = False
    want = regard.attention(query, key, value, mask=mask).astype(np.float64)
    key[:, :, 60, 3] = bad
    value[:, :, 60, 5] = bad
    out = regard.attention(query, key, value, mask=mask).astype(np.float64)
    # Such rows are computed again by the plain path, which rounds once and not the weights too.
    np.testing.assert_allclose(out, want, rtol=0, atol=2 * 2.0**-7)


def test_dropout_keeps_what_the_reference_keeps(tiles):
    query, key, value = (normal(i, 2, 2, 70, 32, dtype="bfloat16") for i in range(3))
    out = regard.attention(query, key, value, dropout_p=0.3, seed=7).astype(np.float64)
    want = reference.attention(*as_float64(query, key, value), dropout_p=0.3, seed=7)
    np.testing.assert_allclose(out, want, rtol=0, atol=4 * 2.0**-7)


EDGES = (1, 15, 16, 17, 31, 32, 33, 47, 48, 49, 63, 64, 65, 95, 96, 97)
# (rows, out_features, in_features): edges of tiles, of panels, of steps of the depth; several blocks of each.
SHAPES = [
    *((n, 50, 40) for n in EDGES),
    *((18, n, 40) for n in EDGES),
    *((18, 50, n) for n in EDGES),
    (65, 100, 600),
    (257, 60, 31),
    (300, 97, 2049),
    (5, 1000, 2100),
    (290, 800, 4100),
    (0, 5, 6),
    (5, 0, 6),
    (5, 6, 0),
]


def layer(rows, features, depth):
    return tuple(normal(i, *s, dtype="bfloat16") for i, s in enumerate([(rows, depth), (features, depth), (features,)]))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_linear_of_bfloat16(tiles, shape):
    x, weight, bias = layer(*shape)
    packed = dense.pack_linear(weight, bias, "bfloat16")
    out = dense.linear(x, packed)
    want = reference.linear(*as_float64(x, weight, bias))
    # Sums of in_features products in float32, then one rounding.
    size = np.abs(x.astype(np.float64)) @ np.abs(weight.astype(np.float64)).T + 1
    assert (np.abs(out.astype(np.float64) - want) <= 2.0**-8 * np.abs(want) + 16 * 2.0**-24 * size).all()
    assert_same_bits(dense.linear(x, weight, bias), out, "not packed")


@pytest.mark.parametrize("depth", [90, 4200])
def test_rows_of_linear_are_alone(tiles, depth):
    x, weight, bias = layer(300, 100, depth)
    packed = dense.pack_linear(weight, bias, "bfloat16")
    want = dense.linear(x, packed)
    for first, last in ((0, 1), (5, 21), (40, 73), (10, 290), (299, 300)):
        assert_same_bits(dense.linear(x[first:last], packed), want[first:last].copy())
        assert_same_bits(dense.linear(x[first:last], weight, bias), want[first:last].copy())
    for columns in (1, 48, 50):
        assert_same_bits(dense.linear(x, weight[:columns], bias[:columns]), want[:, :columns].copy())
    for threads in (1, 2, 3, 7):
        regard.set_num_threads(threads)
        assert_same_bits(dense.linear(x, packed), want, f"{threads} threads")
        assert_same_bits(dense.linear(x, weight, bias), want, f"{threads} threads, not packed")


@pytest.mark.parametrize("shape", [(37, 50, 70), (300, 97, 64), (33, 48, 2100)], ids=str)
def test_strides_of_linear(tiles, shape):
    x, weight, bias = layer(*shape)
    want = dense.linear(x, weight, bias)
    views = [reversed_view, every_other, last_axis_slow, misaligned, np.asfortranarray]
    for view in views:
        assert_same_bits(dense.linear(view(x), weight, bias), want, f"x, {view.__name__}")
        assert_same_bits(dense.linear(x, view(weight), bias), want, f"weight, {view.__name__}")
        packed = dense.pack_linear(view(weight), bias, "bfloat16")
        assert_same_bits(dense.linear(x, packed), want, f"packed, {view.__name__}")
    out = np.zeros((shape[0], 2, 2 * shape[1]), x.dtype)[:, 1, ::2]
    dense.linear(x, weight, bias, out=out)
    assert_same_bits(out.copy(), want, "out")
    repeated = np.broadcast_to(x[:1], (40, shape[2]))
    assert_same_bits(dense.linear(repeated, weight, bias), np.repeat(want[:1], 40, 0), "a stride of 0")


@pytest.mark.parametrize("activation", ["relu", "gelu", "silu", "gelu_tanh"])
@pytest.mark.parametrize("rows", [1, 33, 300])
def test_what_follows_linear(tiles, rows, activation):
    x, weight, bias = layer(rows, 70, 60)
    residual = normal(3, rows, 70, dtype="bfloat16")
    want = reference.linear(*as_float64(x, weight, bias), activation) + as_float64(residual)[0]
    for given in (weight, dense.pack_linear(weight, bias, "bfloat16")):
        b = bias if given is weight else None
        out = residual.copy()  # written where it is read
        dense.linear(x, given, b, activation, out=out, residual=out)
        # As above; activations have slopes below 1.13.
        assert (np.abs(as_float64(out)[0] - want) <= 2.0**-8 * np.abs(want) + 2e-4).all()


def test_special_values_of_linear(tiles):
    x, weight, bias = layer(40, 60, 70)
    x[3, 4], x[5, 6], x[7, 69], x[9, 0] = np.nan, np.inf, -np.inf, 3e38
    weight[7], weight[8, 0], weight[20, 3] = 0, 3e38, np.nan
    for given, b in ((weight, bias), (dense.pack_linear(weight, bias, "bfloat16"), None)):
        with np.errstate(all="ignore"):
            out, want = as_float64(dense.linear(x, given, b))[0], as_float64(x)[0] @ as_float64(weight)[0].T
        assert np.isnan(out[3]).all() and np.isnan(out[:, 20]).all()
        assert np.isnan(out[5, 7]) and np.isnan(out[7, 7])
        assert out[9, 8] == np.inf  # beyond float32
        # Elsewhere as in float64, whose range row 9 and column 8 need.
        keep = np.ix_(np.arange(40) != 9, np.arange(60) != 8)
        np.testing.assert_array_equal(np.isnan(out[keep]), np.isnan(want[keep]))
        np.testing.assert_array_equal(np.isinf(out[keep]), np.isinf(want[keep]))


@pytest.mark.parametrize(
    ("rows", "features", "depth"), [*SHAPES, (16, 47, 63), (31, 48, 64), (33, 97, 65), (100, 5, 0)]
)
def test_linear_of_int8_weights_has_the_bits_of_vectors(tiles, rows, features, depth):
    """Sums of bytes are exact, so 16 rows and more, on tiles, and single ones, on vectors, must agree."""
    x, weight = normal(1, rows, depth), normal(2, features, depth)
    packed = dense.pack_linear(weight, normal(3, features), "int8")
    out = dense.linear(x, packed, activation="gelu")
    alone = [dense.linear(x[i : i + 1], packed, activation="gelu") for i in range(rows)]
    assert_same_bits(out, np.concatenate([out[:0], *alone]))
    if rows >= 16:
        assert_same_bits(dense.linear(x[:16], packed, activation="gelu"), out[:16].copy())


def test_precision_trades_digits_of_float32(tiles):
    query, key, value = (normal(i, 1, 2, 300, 64) for i in range(3))
    want = reference.attention(*as_float64(query, key, value))
    error = {
        p: np.abs(regard.attention(query, key, value, precision=p) - want).max() for p in ("highest", "high", "medium")
    }
    # Operands of 24, 16 and 8 bits; outputs are averages of values near 1.
    assert error["highest"] < 5e-7 < error["high"] < 1e-5 < error["medium"] < 1e-2


def test_float16_is_exact_down_to_its_subnormals(tiles):
    """One key: its value comes back as it is, which takes both parts of it."""
    query = np.ones((1, 1, 5, 32), np.float16)
    every = np.arange(0x7C00, dtype=np.uint16).view(np.float16).reshape(-1, 1, 1, 32)
    value = np.concatenate([every, -every])
    query = np.broadcast_to(query, (len(value), 1, 5, 32))
    out = regard.attention(query, np.zeros_like(value), value)
    np.testing.assert_array_equal(out.astype(np.float32), np.broadcast_to(value, out.shape).astype(np.float32))


@pytest.mark.parametrize("packed", [False, True])
def test_explain_knows_what_linear_runs_on(tiles, packed):
    x, weight = normal(1, 64, 96, dtype="bfloat16"), normal(2, 48, 96, dtype="bfloat16")
    found = regard.explain("linear", x, dense.pack_linear(weight, held="bfloat16") if packed else weight)
    assert found.kernel.endswith("linear_tiles.cpp")
    assert found.tiles["matrix_products"] == 1
