"""rotary_embedding against the reference in float64, and what rotations must keep."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import regard
from cases import DTYPES, STRIDES
from helpers import EPSILON, as_float64, assert_near, assert_same_bits, compute_epsilon, normal
from regard import reference

# (batch, heads, len, dim) and pairs: real models' shapes cut small, vector edges, partial and empty.
SHAPES = [
    ((1, 8, 33, 128), 64),  # Llama
    ((2, 3, 5, 96), 12),  # GPT-NeoX: a quarter of the dimensions
    ((1, 2, 17, 64), 16),  # GPT-J
    ((2, 1, 1, 64), 32),  # a step
    ((1, 1, 600, 32), 16),
    ((1, 40, 9, 256), 128),
    *(((2, 2, 3, 2 * n), n) for n in (1, 2, 3, 4, 7, 8, 9, 15, 16, 17, 31, 33)),
    *(((1, 2, 3, n), n // 2) for n in (1, 3, 5, 17, 33)),
    ((2, 2, 3, 70), 16),
    ((2, 2, 3, 8), 0),
    ((0, 2, 3, 8), 4),
    ((2, 0, 3, 8), 4),
    ((2, 2, 0, 8), 4),
]


def angles(pairs, length=700):
    return regard.rotary_tables(2 * pairs, length)


def tolerance(x, dtype):
    """Two products and a sum, each rounded at most at the size of the pair; one rounding of the output."""
    size = np.sqrt(2) * np.abs(as_float64(x)[0]).max(initial=0)
    own = EPSILON[dtype] if dtype in ("float16", "bfloat16") else 0.0
    return float((2 * compute_epsilon(dtype) + own) * size)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "pairs"), SHAPES, ids=str)
def test_every_way_to_give_angles(backend, shape, pairs, dtype, interleaved):
    x, (cos, sin) = normal(0, *shape, dtype=dtype), angles(pairs)
    rng = np.random.default_rng(1)
    positions = rng.integers(0, 700, (shape[0], shape[2]))
    ways = {
        "first rows": (cos, sin),
        "batch, len": (cos, sin, positions),
        "len": (cos, sin, rng.integers(0, 700, shape[2]).astype(np.int32)),
        "rows given": (cos[positions], sin[positions]),
        "one batch": (cos[None, : shape[2]], sin[None, : shape[2]]),
    }
    for name, given in ways.items():
        out = regard.rotary_embedding(x, *given, interleaved=interleaved)
        want = reference.rotary_embedding(*as_float64(x, *given[:2]), *given[2:], interleaved=interleaved)
        assert out.dtype == x.dtype and out.shape == x.shape
        assert_near(out, want, tolerance(x, dtype), name)
        assert_same_bits(out[..., 2 * pairs :], x[..., 2 * pairs :], name)


@pytest.mark.parametrize("dtype", DTYPES)
def test_tables_of_the_dtype_of_x(backend, dtype):
    x, tables = normal(0, 2, 3, 20, 32, dtype=dtype), [t.astype(DTYPES[dtype]) for t in angles(16)]
    want = reference.rotary_embedding(*as_float64(x, *tables))
    assert_near(regard.rotary_embedding(x, *tables), want, tolerance(x, dtype))


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pairs", [16, 13])
def test_bits_do_not_depend_on_strides_layout_batch_or_threads(backend, dtype, pairs, interleaved):
    x, (cos, sin) = normal(0, 2, 3, 40, 40, dtype=dtype), angles(pairs)
    positions = np.random.default_rng(0).integers(0, 700, (2, 40))
    want = regard.rotary_embedding(x, cos, sin, positions, interleaved)
    for name in ("reversed", "every_other", "last_axis_slow", "padded_rows", "misaligned"):
        moved = [STRIDES[name](a) for a in (x, cos, sin)]
        assert_same_bits(regard.rotary_embedding(*moved, positions, interleaved), want, name)
    turned = np.ascontiguousarray(x.swapaxes(1, 2))
    out = regard.rotary_embedding(turned, cos, sin, positions, interleaved, layout="bshd")
    assert_same_bits(np.ascontiguousarray(out.swapaxes(1, 2)), want, "bshd")
    out = regard.rotary_embedding(x[1:, 2:, 5:9], cos, sin, positions[1:, 5:9], interleaved)
    assert_same_bits(out, want[1:, 2:, 5:9].copy(), "a part")
    before = regard.get_num_threads()
    try:
        for threads in (1, 3, 8):
            regard.set_num_threads(threads)
            assert_same_bits(regard.rotary_embedding(x, cos, sin, positions, interleaved), want)
    finally:
        regard.set_num_threads(before)


@pytest.mark.parametrize("interleaved", [False, True])
def test_norms_and_distances_are_kept(backend, interleaved):
    query, key = normal(0, 1, 1, 1, 64), normal(1, 1, 1, 1, 64)
    cos, sin = angles(32)

    def at(x, position):
        return regard.rotary_embedding(x, cos, sin, np.array([position]), interleaved).astype(np.float64)

    lengths = [np.linalg.norm(at(query, p)) for p in (0, 1, 50, 699)]
    # Each pair turns within 2 epsilon, and so does cos^2 + sin^2.
    np.testing.assert_allclose(lengths, np.linalg.norm(query.astype(np.float64)), rtol=8 * EPSILON["float32"])
    scores = [float((at(query, p + 7) * at(key, p)).sum()) for p in (0, 3, 100, 600)]
    near = 16 * EPSILON["float32"] * np.linalg.norm(query) * np.linalg.norm(key)
    np.testing.assert_allclose(scores, scores[0], rtol=0, atol=near)
    assert_same_bits(regard.rotary_embedding(query, cos, sin, np.array([0]), interleaved), query)


def test_against_torch(backend):
    torch = pytest.importorskip("torch")
    x, (cos, sin) = normal(0, 2, 3, 9, 32), angles(16)
    t, c, s = (torch.from_numpy(a) for a in (x, np.tile(cos[:9], 2), np.tile(sin[:9], 2)))
    rotated = torch.cat([-t[..., 16:], t[..., :16]], -1)  # as transformers writes it
    assert_near(regard.rotary_embedding(x, cos, sin), (t * c + rotated * s).numpy(), tolerance(x, "float32"))
    pairs = torch.view_as_complex(t.reshape(2, 3, 9, 16, 2))  # as Llama's own code writes it
    want = torch.view_as_real(pairs * torch.complex(torch.from_numpy(cos[:9]), torch.from_numpy(sin[:9]))).flatten(-2)
    assert_near(regard.rotary_embedding(x, cos, sin, interleaved=True), want.numpy(), tolerance(x, "float32"))
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        out = regard.rotary_embedding(t.to(dtype), torch.from_numpy(cos), torch.from_numpy(sin))
        assert isinstance(out, torch.Tensor) and out.dtype == dtype and out.shape == t.shape
        own = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}[dtype]
        assert_near(out.float().numpy(), (t * c + rotated * s).numpy(), 2 * tolerance(x, own))


@pytest.mark.parametrize("interleaved", [0, 1])
@pytest.mark.parametrize("rotary_dim", [0, 16])
@pytest.mark.parametrize("with_positions", [False, True])
def test_against_the_onnx_operator(backend, interleaved, rotary_dim, with_positions):
    onnx = pytest.importorskip("onnx")
    from onnx.reference import ReferenceEvaluator

    if onnx.defs.onnx_opset_version() < 23:
        pytest.skip("this onnx has no RotaryEmbedding")
    x = normal(0, 2, 3, 5, 32)
    cos, sin = angles(rotary_dim // 2 or 16, 50)
    positions = np.random.default_rng(0).integers(0, 50, (2, 5))
    tables = (cos, sin, positions) if with_positions else (cos[positions], sin[positions])
    names = ["x", "cos", "sin", "positions"][: 1 + len(tables)]
    node = onnx.helper.make_node(
        "RotaryEmbedding", names, ["y"], interleaved=interleaved, rotary_embedding_dim=rotary_dim
    )
    kinds = [onnx.helper.make_tensor_value_info(n, 7 if n == "positions" else 1, None) for n in names]
    graph = onnx.helper.make_graph([node], "g", kinds, [onnx.helper.make_tensor_value_info("y", 1, None)])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 23)])
    (want,) = ReferenceEvaluator(model).run(None, dict(zip(names, (x, *tables), strict=True)))
    out = regard.rotary_embedding(x, *tables, interleaved=bool(interleaved))
    assert_near(out, want.astype(np.float64), tolerance(x, "float32"))


def test_tables():
    cos, sin = regard.rotary_tables(8, 20, 500.0)
    p, i = 13, 3
    assert cos.dtype == np.float32 and cos.shape == sin.shape == (20, 4)
    angle = p * 500.0 ** (-2 * i / 8)
    assert_near(np.array([cos[p, i], sin[p, i]]), np.array([np.cos(angle), np.sin(angle)]), EPSILON["float32"])
    halved = regard.rotary_tables(8, 20, 500.0, scaling=2.0)
    assert_same_bits(halved[0][::2].copy(), cos[:10].copy())
    own = regard.rotary_tables(8, 20, frequencies=500.0 ** (-np.arange(0, 8, 2) / 8), dtype=np.float64)
    assert_near(own[1], sin, EPSILON["float32"])
    assert regard.rotary_tables(0, 3)[0].shape == (3, 0)
    for bad in (
        dict(dim=7),
        dict(dim=-2),
        dict(length=-1),
        dict(base=0),
        dict(scaling=0),
        dict(frequencies=np.ones(3)),
    ):
        with pytest.raises(ValueError, match=f"^{next(iter(bad))}: expected"):
            regard.rotary_tables(**{"dim": 8, "length": 4, **bad})


@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
@pytest.mark.parametrize("interleaved", [False, True])
def test_out_is_written_apart_in_place_and_over_inputs(backend, interleaved, layout):
    for dtype in DTYPES:
        for dim, pairs in ((64, 32), (64, 16), (11, 3)):
            x = normal(0, 2, 5, 5, dim, dtype=dtype)
            tables = angles(pairs, 9)
            want = regard.rotary_embedding(x, *tables, None, interleaved, layout)
            wide = np.zeros((2, 5, 7, dim + 3), x.dtype)[:, :, 1:6, 2:-1]
            for out in (np.empty_like(x), wide):
                assert regard.rotary_embedding(x, *tables, None, interleaved, layout, out) is out
                assert_same_bits(out, want)
            same = x.copy()
            assert regard.rotary_embedding(same, *tables, None, interleaved, layout, same) is same
            assert_same_bits(same, want)
            held = np.zeros((2, 5, 6, dim), x.dtype)  # out begins a row behind x
            held[:, :, :5] = x
            assert_same_bits(
                regard.rotary_embedding(held[:, :, :5], *tables, None, interleaved, layout, held[:, :, 1:]), want
            )


X = normal(0, 2, 3, 5, 8)
COS, SIN = regard.rotary_tables(8, 20)
ERRORS = {
    "x as a list": ((X.tolist(), COS, SIN), TypeError, "x: expected an array"),
    "x of ints": ((X.astype(int), COS, SIN), TypeError, "x: expected dtype float32"),
    "x of three axes": ((X[0], COS, SIN), ValueError, r"x: expected shape \(batch, heads, len, dim\)"),
    "no sin": ((X, COS, None), TypeError, "sin: expected an array"),
    "cos of another dtype": ((X, COS.astype(np.float64), SIN), TypeError, "cos: expected dtype float32 or"),
    "dtypes apart": ((X.astype(np.float16), COS, SIN.astype(np.float16)), TypeError, "sin: expected dtype that of cos"),
    "too many pairs": ((X, *regard.rotary_tables(10, 20)), ValueError, "cos: expected shape .* at most half"),
    "a short table": ((X, COS[:4], SIN[:4]), ValueError, "cos: expected a table of at least len = 5 positions"),
    "another batch": ((X, np.stack([COS[:5]] * 3), np.stack([SIN[:5]] * 3)), ValueError, "cos: expected shape"),
    "another length": ((X, COS[None, :4], SIN[None, :4]), ValueError, "cos: expected shape"),
    "shapes apart": ((X, COS, SIN[:, :3]), ValueError, "sin: expected shape"),
    "rows and positions": ((X, COS[None, :5], SIN[None, :5], np.arange(5)), ValueError, "cos: expected shape"),
    "float positions": ((X, COS, SIN, np.arange(5.0)), TypeError, "positions: expected dtype int32 or int64"),
    "short positions": ((X, COS, SIN, np.arange(4)), ValueError, r"positions: expected shape \(batch = 2, len = 5\)"),
    "positions of a third": ((X, COS, SIN, np.zeros((3, 5), int)), ValueError, "positions: expected shape"),
    "a negative position": ((X, COS, SIN, np.array([0, 1, -1, 3, 4])), ValueError,
                            "positions: expected entries from 0 to max_positions - 1, .* = 20, got -1 at index 2"),
    "a position beyond": ((X, COS, SIN, np.array([[0] * 5, [1, 20, 3, 4, 5]])), ValueError,
                          r"max_positions = 20, got 20 at index \(1, 1\)"),
    "the least int": ((X, COS, SIN, np.full((1, 5), np.iinfo(np.int64).min)), ValueError, r"at index \(0, 0\)"),
    "out of another shape": ((X, COS, SIN, None, False, "bhsd", np.zeros((2, 3, 5, 9), np.float32)), ValueError,
                             "out: expected shape"),
    "out that cannot be written": ((X, COS, SIN, None, False, "bhsd", np.broadcast_to(X[:1], X.shape)), ValueError,
                                   "out: expected"),
    "layout": ((X, COS, SIN, None, False, "sbhd"), ValueError, "layout: expected one of"),
}  # fmt: skip


@pytest.mark.parametrize("name", ERRORS)
def test_errors_name_the_argument(name):
    arguments, kind, message = ERRORS[name]
    with pytest.raises(kind, match=message):
        regard.rotary_embedding(*arguments)


def test_positions_changed_meanwhile_are_refused_or_right(backend):
    """Another thread writes a place far outside: a call sees it and refuses, or never reads by it."""
    x, (cos, sin) = normal(0, 1, 2, 64, 16), regard.rotary_tables(16, 64)
    positions, stop, refused = np.arange(64), threading.Event(), []

    def disturb():
        while not stop.is_set():
            positions[50] = 1 << 40
            positions[50] = 50

    thread = threading.Thread(target=disturb)
    want = regard.rotary_embedding(x, cos, sin, np.arange(64))
    thread.start()
    try:
        for _ in range(300):
            try:
                assert_same_bits(regard.rotary_embedding(x, cos, sin, positions), want)
            except ValueError as error:
                refused.append(str(error))
    finally:
        stop.set()
        thread.join()
    assert all("positions: expected entries" in message for message in refused)
