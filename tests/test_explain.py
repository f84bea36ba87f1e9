"""regard.explain: it says what runs, counts right, refuses what the call refuses, and runs nothing."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import regard
from cases import DTYPES
from helpers import normal
from regard import _backend, _costs, reference
from regard._cli.operations import OPERATIONS

ROOT = Path(__file__).resolve().parent.parent
CASES = [pytest.param(o, c, id=f"{o.name}-{c.label}") for o in OPERATIONS for c in (*o.check, *o.bench[-1:])]


def image(seed: int = 0) -> dict[str, Any]:
    return {
        "x": normal(seed, 2, 12, 9, 7),
        "w_reduce": normal(1, 3, 12),
        "b_reduce": normal(2, 3),
        "w_expand": normal(3, 12, 3),
        "b_expand": normal(4, 12),
    }


def test_every_operation_has_costs():
    assert set(_costs.COSTS) == set(reference.__all__)


@pytest.mark.parametrize(("operation", "case"), CASES)
def test_every_operation_is_explained(backend, operation, case):
    arguments = case.arguments(np.float32)
    found = regard.explain(operation.name, **arguments)
    assert found.instruction_set == backend and found.reason
    assert found.flops >= 0 and found.bytes > 0 and found.memory >= 0
    assert set(found.times) == {"multiply-adds", "exponentials", "bandwidth", "call overhead"}
    assert found.bound in found.times
    assert found.seconds >= max(found.times.values())
    assert found.tiles["vector_bytes"] in (16, 32, 64)
    for stage in found.stages:
        assert 1 <= stage.threads <= regard.get_num_threads() and stage.items >= 0
        assert not (ROOT / "csrc").is_dir() or ((ROOT / stage.source).is_file() and (ROOT / stage.item).is_file())
    text = str(found)
    assert text.startswith(f"{operation.name}(") and found.bound in text and backend in text


@pytest.mark.parametrize("dtype", DTYPES)
def test_bytes_and_flops_of_a_plain_call(backend, dtype):
    q, k, v = (normal(i, 2, 3, n, d, dtype=dtype) for i, (n, d) in enumerate(((40, 16), (50, 16), (50, 24))))
    found = regard.explain("attention", q, k, v)
    item = DTYPES[dtype].itemsize
    assert found.bytes == item * (q.size + k.size + v.size + 2 * 3 * 40 * 24)
    assert found.flops == 2 * 2 * 3 * 40 * 50 * (16 + 24)
    assert found.exponentials == 2 * 3 * 40 * 50
    assert found.kernel.startswith("csrc/cpu/attention_forward.cpp")
    assert found.stages[0].items == 2 * 3
    assert found.tiles["queries_per_item"] % found.tiles["columns"] == 0


@pytest.mark.parametrize("seed", range(30))
def test_pairs_are_those_that_masks_leave(seed):
    """Counted one by one in the reference's masks."""
    rng = np.random.default_rng(seed)
    batch, heads, len_q, len_kv = 3, 2, *(int(n) for n in rng.integers(0, 12, 2))
    options: dict[str, Any] = {
        "causal": bool(rng.integers(2)),
        "window": [None, (2, 1), (None, 0), (3, None), (0, 0), (50, 50)][rng.integers(6)],
        "alignment": ("upper_left", "lower_right")[rng.integers(2)],
    }
    if rng.integers(2):
        options["query_lengths"] = rng.integers(0, len_q + 1, batch)
    if rng.integers(2):
        options["key_lengths"] = rng.integers(0, len_kv + 1, batch)
    steps = reference.dot_product
    lengths = options.get("query_lengths"), options.get("key_lengths")
    distance = steps.distance_to_diagonal(len_q, len_kv, options["alignment"], *lengths)
    visible = (
        steps.in_window(distance, *(options["window"] or (None, None)), causal=options["causal"])
        & steps.in_prefix(lengths[0], len_q)[:, None, :, None]
        & steps.in_prefix(lengths[1], len_kv)[:, None, None, :]
    )
    visible = np.broadcast_to(visible, (batch, 1, len_q, len_kv))
    q, k = np.zeros((batch, heads, len_q, 4)), np.zeros((batch, heads, len_kv, 4))
    found = regard.explain("attention", q, k, k, **options)
    assert found.exponentials == heads * visible.sum()
    seen = visible.any(axis=2).sum() / max(batch * len_kv, 1)
    # All keys between the first and the last that a sequence sees.
    assert found.bytes >= seen * (2 * k.nbytes) + 2 * q.nbytes


@pytest.mark.parametrize("seed", range(12))
def test_pairs_under_a_block_mask(seed):
    rng = np.random.default_rng(seed)
    batch, heads, len_q, len_kv = int(rng.integers(1, 3)), 2, 37, 50
    blocks = rng.random((*[(1, 1), (batch, 1), (batch, heads), (1, heads)][seed % 4], 5, 4)) < 0.5
    mask = regard.BlockMask.from_blocks(blocks, len_q=len_q, len_kv=len_kv, block_size=(8, 16))
    options: dict[str, Any] = {"causal": bool(seed % 2), "alignment": "lower_right"}
    if seed % 3 == 0:
        options["key_lengths"] = rng.integers(0, len_kv + 1, batch)
    q, k = np.zeros((batch, heads, len_q, 4)), np.zeros((batch, heads, len_kv, 4))
    found = regard.explain("attention", q, k, k, mask=mask, **options)
    steps = reference.dot_product
    distance = steps.distance_to_diagonal(len_q, len_kv, "lower_right", None, options.get("key_lengths"))
    visible = (
        steps.in_window(distance, None, None, causal=options["causal"])
        & steps.in_prefix(options.get("key_lengths"), len_kv)[:, None, None, :]
        & mask.to_dense()
    )
    assert found.exponentials == np.broadcast_to(visible, (batch, heads, len_q, len_kv)).sum()
    assert found.bytes <= regard.explain("attention", q, k, k, **options).bytes


def test_packed_and_paged_sequences(backend):
    """As many flops as the same sequences padded, and the pages that hold keys are read."""
    q, k = normal(0, 2, 4, 9, 16), normal(1, 2, 2, 20, 16)
    queries, keys = np.array([9, 4]), np.array([20, 7])
    options: dict[str, Any] = {"causal": True, "alignment": "lower_right"}
    padded = regard.explain("attention", q, k, k, query_lengths=queries, key_lengths=keys, **options)
    rows, stored = np.zeros((13, 4, 16), np.float32), np.zeros((27, 2, 16), np.float32)
    packed = regard.explain(
        "attention_varlen", rows, stored, stored, np.array([0, 9, 13]), np.array([0, 20, 27]), **options
    )
    pages = np.zeros((9, 5, 2, 16), np.float32)
    table = np.arange(8).reshape(2, 4)
    paged = regard.explain("attention_paged", q, pages, pages, table, keys, query_lengths=queries, **options)
    assert padded.flops == packed.flops == paged.flops > 0
    assert paged.bytes == 2 * 27 * 2 * 16 * 4 + 2 * q.nbytes + table.nbytes + keys.nbytes + queries.nbytes


def test_few_queries_take_their_own_path(backend):
    q, k = np.zeros((1, 8, 1, 64), np.float32), np.zeros((1, 2, 9000, 64), np.float32)
    found = regard.explain("attention", q, k, k)
    assert found.kernel == "csrc/cpu/attention_forward.cpp (attention_rows.h)"
    splits = -(-9000 // found.tiles["keys_per_split"])
    assert found.stages[0].items == 2 * splits
    assert found.tiles["few_queries"] >= 1


def test_memory_is_counted_once_however_often_it_is_repeated(backend):
    q, k, v = (normal(i, 1, 2, 64, 16) for i in range(3))
    alone = regard.explain("attention", q, k, v).bytes
    mask = np.ones((1, 64), bool)
    wide = np.broadcast_to(mask, (1, 2, 64, 64))
    for given in (mask, wide):
        assert regard.explain("attention", q, k, v, mask=given).bytes == alone + 64


def test_extra_memory_does_not_grow_with_the_lengths(backend):
    # Whole items, of any backend: a single thread is given the longest.
    small, large = (np.zeros((1, 1, n, 64), np.float32) for n in (1536, 49152))
    before = regard.get_num_threads()
    regard.set_num_threads(1)
    try:
        memory = [regard.explain("attention", x, x, x).memory for x in (small, large)]
    finally:
        regard.set_num_threads(before)
    assert 0 < memory[0] == memory[1]


def test_a_packed_weight_is_extra_memory(backend):
    found = regard.explain("linear", normal(0, 1024, 96), normal(1, 192, 96))
    assert found.memory >= 192 * 96 * 4


def test_threads_and_items(backend):
    q = np.zeros((1, 4, 1024, 64), np.float32)
    before = regard.get_num_threads()
    try:
        for n in (1, 3):
            regard.set_num_threads(n)
            found = regard.explain("attention", q, q, q)
            (stage,) = found.stages
            assert stage.threads == n
            longest = found.tiles["queries_per_item"]
            assert stage.items == 4 * -(-1024 // longest)
        assert longest == 192  # shorter items, so that each of three threads has some
        (stage,) = regard.explain("attention", q[:, :, :8], q[:, :, :8], q[:, :, :8]).stages
        assert stage.threads == 1
    finally:
        regard.set_num_threads(before)


BAD_CALLS = [
    ("attention", (normal(0, 1, 2, 3, 4), normal(0, 1, 2, 5, 3), normal(0, 1, 2, 5, 3)), {}),
    ("attention", (normal(0, 1, 2, 3, 4),), {}),
    ("attention", 3 * (normal(0, 1, 2, 3, 4),), {"window": (-1, 2)}),
    ("attention", 3 * (normal(0, 1, 2, 3, 4),), {"softcap": -1.0}),
    ("attention", 3 * (normal(0, 1, 2, 3, 4),), {"colour": "red"}),
    ("attention", 3 * (normal(0, 1, 2, 3, 4),), {"out": normal(0, 1, 2, 3, 5)}),
    ("attention", 3 * (normal(0, 1, 2, 3, 4),), {"key_lengths": np.array([7])}),
    ("attention", ([1], [2], [3]), {}),
    ("linear", (normal(0, 3, 4), normal(0, 5, 6)), {}),
    ("layer_norm", (normal(0, 3, 4), normal(0, 5)), {}),
    ("squeeze_excitation", (), {**image(), "activation": "tanh"}),
    ("cbam", (), image()),
    ("additive_attention", 3 * (normal(0, 1, 2, 3),), {"v": normal(0, 4)}),
]


@pytest.mark.parametrize(("name", "args", "options"), BAD_CALLS)
def test_refuses_as_the_call_does(backend, name, args, options):
    with pytest.raises((TypeError, ValueError)) as called:
        getattr(regard, name)(*args, **options)
    with pytest.raises((TypeError, ValueError)) as explained:
        regard.explain(name, *args, **options)
    assert type(called.value) is type(explained.value) and str(called.value) == str(explained.value)
    q = normal(0, 1, 2, 3, 4)  # and calls are meant again
    np.testing.assert_allclose(regard.attention(q, q, q), reference.attention(q, q, q), atol=1e-5)


def test_unknown_operations():
    with pytest.raises(ValueError, match="operation: expected one of additive_attention, attention, "):
        regard.explain("convolution", np.zeros(3))
    with pytest.raises(TypeError):
        regard.explain()  # type: ignore[call-arg]


@pytest.mark.parametrize("size", [4, 200])
def test_nothing_is_written(backend, size):
    q = normal(0, 1, 2, size, 16)
    out = np.full_like(q, 7)
    regard.explain("attention", q, q, q, out=out)
    regard.explain("attention", q, q, q, query_lengths=np.array([size - 2]), out=out)
    assert (out == 7).all()
    out = np.full((1, 2, size, 4), 7, np.float32)
    regard.explain("linear", q, normal(1, 4, 16), out=out)
    regard.explain("layer_norm", q, out=q)
    assert (out == 7).all() and (q == normal(0, 1, 2, size, 16)).all()
    for channels in (12, 256):
        given = {"x": normal(0, 2, channels, 20, 20), "w_reduce": normal(1, 3, channels), "b_reduce": None}
        given |= {"w_expand": normal(3, channels, 3), "b_expand": None}
        for name, more in (("squeeze_excitation", {}), ("cbam", {"w_spatial": normal(4, 1, 2, 3, 3)})):
            regard.explain(name, **given, **more, out=given["x"])
        assert (given["x"] == normal(0, 2, channels, 20, 20)).all()


def test_other_threads_compute_meanwhile(backend):
    q = normal(0, 1, 2, 100, 16)
    want = regard.attention(q, q, q)
    found: list[Any] = []
    _backend.cpu.start_rehearsal()
    try:
        other = threading.Thread(target=lambda: found.append(regard.attention(q, q, q)))
        other.start()
        other.join()
    finally:
        stages, shared = _backend.cpu.end_rehearsal()
    np.testing.assert_array_equal(found[0], want)
    assert stages == [] and shared == 0


def test_other_arrays(backend):
    torch = pytest.importorskip("torch", reason="an array that is not NumPy's")
    for dtype in ("float32", "bfloat16"):
        q = normal(0, 1, 2, 30, 16, dtype=dtype)
        t = torch.zeros(1, 2, 30, 16, dtype=getattr(torch, dtype))
        want, found = (
            regard.explain("attention", q, q, q, causal=True),
            regard.explain("attention", t, t, t, causal=True),
        )
        for field in ("kernel", "tiles", "stages", "flops", "exponentials", "bytes", "memory"):
            assert getattr(found, field) == getattr(want, field), field


def test_a_refused_explanation_leaves_the_thread_usable() -> None:
    wide = np.broadcast_to(np.zeros((1, 1, 1, 1), np.float32), (1, 1, 8, 2**43))
    small = np.zeros((1, 1, 8, 4), np.float32)
    with pytest.raises(MemoryError):
        regard.explain("attention", wide, wide, small)
    assert np.isfinite(regard.attention(small, small, small)).all()
