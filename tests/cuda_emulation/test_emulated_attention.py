"""regard.attention on device arrays, the kernels emulated: the cases of tests/cases.py against the reference."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import regard
from cases import CASES, DTYPES, STRIDES
from helpers import (
    as_float64,
    assert_case,
    assert_near,
    assert_same_bits,
    lse_tolerance,
    normal,
    output_tolerance,
    problem,
)
from regard import reference
from regard.dense import pack_linear

#: A GPU without bfloat16 tensor cores, a consumer card, and data-centre cards: compute capability, shared memory.
DEVICES = {
    "sm_75": (75, 65536),
    "sm_80": (80, 166912),
    "sm_86": (86, 101376),
    "sm_90": (90, 232448),
    "sm_100": (100, 232448),
}

#: What `counters` counts.
LAUNCHES, PRODUCTS, MATRIX_LOADS, BANK_CONFLICTS, GROUP_PRODUCTS = range(5)

#: An emulated product takes microseconds: cases above this many multiplications stay with the CPU's tests.
MOST = 100e6


def work(name: str) -> float:
    case = CASES[name]
    len_kv = case.len_q if case.len_kv is None else case.len_kv
    rows = case.len_q if case.len_q <= 8 else max(case.len_q, 64)  # few queries take the splitting kernel
    return case.batch * case.heads * rows * len_kv * max(case.dim_qk, 64) * 2.0


SMALL = [name for name in CASES if work(name) <= MOST]
TAGGED = [name for name in SMALL if "dtypes" in CASES[name].tags]


def on_device(cupy: Any, options: dict[str, Any]) -> dict[str, Any]:
    return {k: cupy.asarray(x) if isinstance(x, np.ndarray) else x for k, x in options.items()}


def run(cupy: Any, name: str, dtype: str) -> tuple[np.ndarray, np.ndarray]:
    query, key, value, options = problem(name, dtype)
    arrays = [cupy.asarray(x) for x in (query, key, value)]
    out, lse = regard.attention(*arrays, return_lse=True, **on_device(cupy, options))
    assert type(out) is cupy.ndarray and type(lse) is cupy.ndarray
    return cupy.asnumpy(out), cupy.asnumpy(lse)


def check(cupy: Any, name: str, dtype: str) -> None:
    if any(x.ctypes.data % x.itemsize for x in problem(name, dtype)[:3]):
        pytest.skip("device arrays are aligned to their elements: test_misaligned_arrays_are_refused")
    assert_case(name, dtype, *run(cupy, name, dtype))


@pytest.mark.parametrize("name", SMALL)
def test_bfloat16(cupy, tensor_cores, name):
    check(cupy, name, "bfloat16")


@pytest.mark.parametrize("name", TAGGED)
def test_float16(cupy, tensor_cores, name):
    check(cupy, name, "float16")


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", TAGGED)
def test_other_dtypes(cupy, name, dtype):
    check(cupy, name, dtype)


@pytest.mark.parametrize("name", [n for n in SMALL if not n.startswith(("len_", "decode_", "dim_"))])
def test_float32(cupy, name):
    check(cupy, name, "float32")


@pytest.mark.parametrize("device", ["sm_75", "sm_86"])
@pytest.mark.parametrize("name", ["dim_64", "dim_256", "deepseek_192_128", "mask_bhqk", "bshd"])
def test_other_devices(cupy, emulator, name, device):
    emulator.set_device(*DEVICES[device])
    before = emulator.counters()
    check(cupy, name, "bfloat16")
    assert emulator.counters()[LAUNCHES] > before[LAUNCHES]
    assert (emulator.counters()[PRODUCTS] > before[PRODUCTS]) == (device != "sm_75")


@pytest.mark.parametrize(
    ("device", "dim_qk", "dim_v", "options", "kernel"),
    [
        ("sm_80", 64, 64, {}, PRODUCTS),
        ("sm_90", 64, 64, {}, GROUP_PRODUCTS),
        ("sm_90", 128, 72, {"softcap": 5.0}, GROUP_PRODUCTS),
        ("sm_90", 129, 64, {}, GROUP_PRODUCTS),
        ("sm_90", 64, 256, {"causal": True}, GROUP_PRODUCTS),
        ("sm_90", 257, 64, {}, None),
        ("sm_90", 64, 64, {"dropout_p": 0.5, "seed": 1}, GROUP_PRODUCTS),
        ("sm_80", 64, 64, {"dropout_p": 0.5, "seed": 1}, PRODUCTS),
        ("sm_90", 64, 64, {"scale": 1e-30}, None),
        ("sm_100", 64, 64, {}, PRODUCTS),
    ],
)
def test_which_kernel_has_a_problem(cupy, emulator, device, dim_qk, dim_v, options, kernel):
    emulator.set_device(*DEVICES[device])
    query, key = (cupy.asarray(normal(i, 1, 1, 9, dim_qk, dtype="bfloat16")) for i in range(2))
    value = cupy.asarray(normal(2, 1, 1, 9, dim_v, dtype="bfloat16"))
    before = emulator.counters()
    regard.attention(query, key, value, **options)
    moved = [c for c in (PRODUCTS, GROUP_PRODUCTS) if emulator.counters()[c] > before[c]]
    assert moved == ([] if kernel is None else [kernel])


@pytest.mark.parametrize("name", ["vit_196_and_class_token", "mask_and_bias_and_causal", "dim_64", "dim_128"])
def test_the_order_of_lanes_does_not_matter_on_tensor_cores(cupy, emulator, tensor_cores, name):
    check_order(cupy, emulator, name, "bfloat16")


@pytest.mark.parametrize("name", ["mask_and_bias_and_causal", "dim_64", "dim_128"])
def test_the_order_of_lanes_does_not_matter(cupy, emulator, name):
    check_order(cupy, emulator, name, "float32")


def check_order(cupy, emulator, name, dtype):
    if name not in SMALL:
        pytest.skip("too large for the emulator")
    want = run(cupy, name, dtype)
    for seed in (1, 2):
        emulator.set_order(True, seed)
        for x, y in zip(run(cupy, name, dtype), want, strict=True):
            assert_same_bits(x, y)


def test_no_bank_conflicts(cupy, emulator):
    emulator.set_device(*DEVICES["sm_80"])
    before = emulator.counters()
    for name in ("dim_64", "dim_128", "dim_256"):
        run(cupy, name, "bfloat16")
    loads, conflicts = (emulator.counters()[i] - before[i] for i in (MATRIX_LOADS, BANK_CONFLICTS))
    assert loads > 0 and conflicts == 0


@pytest.mark.parametrize("arrange", ["reversed", "every_other", "last_axis_slow", "padded_rows"])
def test_bits_do_not_depend_on_strides_or_batch(cupy, dtype, arrange):
    arrays = [normal(i, 2, 2, 40, 64, dtype=dtype) for i in range(3)]
    want = cupy.asnumpy(regard.attention(*map(cupy.asarray, arrays), causal=True))
    moved = [cupy.asarray(STRIDES[arrange](x)) for x in arrays]
    assert_same_bits(cupy.asnumpy(regard.attention(*moved, causal=True)), want)
    one = [cupy.asarray(np.ascontiguousarray(x[1:, 1:])) for x in arrays]
    assert_same_bits(cupy.asnumpy(regard.attention(*one, causal=True)), want[1:, 1:])


def test_bits_do_not_depend_on_what_lies_beside(cupy, tensor_cores):
    """Several tiles a head and several heads a block: what one item leaves in shared memory must not reach the next."""
    arrays = [normal(i, 2, 2, 150, 64, dtype="bfloat16") for i in range(3)]
    lengths = np.int32([150, 131])
    want = cupy.asnumpy(regard.attention(*map(cupy.asarray, arrays), causal=True, key_lengths=cupy.asarray(lengths)))
    for b, h in np.ndindex(2, 2):
        one = [cupy.asarray(np.ascontiguousarray(x[b : b + 1, h : h + 1])) for x in arrays]
        got = regard.attention(*one, causal=True, key_lengths=cupy.asarray(lengths[b : b + 1]))
        assert_same_bits(cupy.asnumpy(got), want[b : b + 1, h : h + 1])


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_masked_cannot_leak(cupy, dtype, bad):
    query, key, value = (normal(i, 1, 2, 40, 64, dtype=dtype) for i in range(3))
    mask = np.ones((1, 1, 40, 40), bool)
    mask[..., 7] = False
    key[:, :, 7], value[:, :, 7] = bad, bad
    out = regard.attention(*map(cupy.asarray, (query, key, value)), mask=cupy.asarray(mask))
    keep = np.arange(40) != 7
    want = reference.attention(*as_float64(query, key[:, :, keep], value[:, :, keep]))
    assert_near(cupy.asnumpy(out), want, output_tolerance(query, key[:, :, keep], value[:, :, keep], {}, dtype))


def test_products_beyond_float32(cupy, dtype):
    query, key, value = (normal(i, 1, 1, 20, 64, dtype=dtype) for i in range(3))
    query, key = ((x.astype(np.float64) * 1e25).astype(x.dtype) for x in (query, key))
    out = regard.attention(*map(cupy.asarray, (query, key, value)))
    want = reference.attention(*as_float64(query, key, value))
    assert_near(cupy.asnumpy(out), want, output_tolerance(value, value, value, {}, dtype))


# ---- The Python path -------------------------------------------------------------------------------------


def arrays_on(cupy, count=3, dtype="float32", shape=(1, 2, 20, 16)):
    return [cupy.asarray(normal(i, *shape, dtype=dtype)) for i in range(count)]


def test_memory_comes_from_the_current_stream(cupy):
    arrays = arrays_on(cupy, dtype="bfloat16", shape=(1, 2, 20, 12))  # rows that need a copy: scratch memory too
    cupy.cuda.allocated.clear()
    with cupy.cuda.Stream(77):
        regard.attention(*arrays, return_lse=True)
    assert len(cupy.cuda.allocated) == 5 and set(cupy.cuda.allocated) == {77}


def test_out_is_written_and_returned(cupy):
    q, k, v = arrays_on(cupy)
    want = cupy.asnumpy(regard.attention(q, k, v))
    out = cupy.empty(q.shape, np.float32)
    assert regard.attention(q, k, v, out=out) is out
    assert_same_bits(cupy.asnumpy(out), want)
    assert regard.attention(q, k, v, out=k) is k
    assert_same_bits(cupy.asnumpy(k), want)


def test_scaled_dot_product_attention(cupy):
    q, k, v = arrays_on(cupy, shape=(2, 1, 2, 9, 8))
    mask = np.random.default_rng(0).random((9, 9)) > 0.4
    out = regard.scaled_dot_product_attention(q, k, v, attn_mask=cupy.asarray(mask))
    want = reference.scaled_dot_product_attention(*(cupy.asnumpy(x) for x in (q, k, v)), attn_mask=mask)
    assert_near(cupy.asnumpy(out), want, 1e-5)


def test_lengths_on_the_host_are_checked_and_on_the_device_held_to_their_range(cupy):
    q, k, v = arrays_on(cupy)
    want = cupy.asnumpy(regard.attention(q, k, v, key_lengths=cupy.asarray(np.int64([7]))))
    assert_same_bits(cupy.asnumpy(regard.attention(q, k, v, key_lengths=np.int32([7]))), want)
    with pytest.raises(ValueError, match="key_lengths: expected entries from 0 to len_kv = 20, got 21 at index 0"):
        regard.attention(q, k, v, key_lengths=np.int32([21]))
    whole = cupy.asnumpy(regard.attention(q, k, v))
    for n in (20, 21, 2**31 - 1):
        assert_same_bits(cupy.asnumpy(regard.attention(q, k, v, key_lengths=cupy.asarray(np.int64([n])))), whole)
    nothing = regard.attention(q, k, v, key_lengths=cupy.asarray(np.int32([-5])))
    assert (cupy.asnumpy(nothing) == 0).all()


def test_errors_name_the_argument(cupy):
    q, k, v = arrays_on(cupy)
    with pytest.raises(TypeError, match="key: expected an array on the device of query"):
        regard.attention(q, cupy.asnumpy(k), v)
    with pytest.raises(ValueError, match="value: expected shape"):
        regard.attention(q, k, arrays_on(cupy, 1, shape=(1, 2, 21, 16))[0])
    with pytest.raises(TypeError, match="key: expected the dtype of query"):
        regard.attention(q, arrays_on(cupy, 1, "float64")[0], v)
    with pytest.raises(TypeError, match="key_lengths: expected dtype int32 or int64"):
        regard.attention(q, k, v, key_lengths=cupy.asarray(np.float32([3])))
    with pytest.raises(NotImplementedError, match="no kernel for arrays of cupy"):
        regard.attention(cupy.asnumpy(q), k, v)


def test_misaligned_arrays_are_refused(cupy):
    q, k, v = arrays_on(cupy)
    shifted = cupy.ndarray(np.ndarray(k.shape, np.float32, cupy.empty((2 * 20 * 16 + 1) * 4, np.uint8)._host, 1))
    with pytest.raises(ValueError, match="key: expected elements at multiples of their size"):
        regard.attention(q, shifted, v)
    packed = np.zeros(k.shape, [("key", np.float32), ("flag", np.bool_)])["key"]  # five bytes apart
    with pytest.raises(ValueError, match="key: expected elements at multiples of their size"):
        regard.attention(q, cupy.ndarray(packed), v)


def check_dropout(cupy, query, key, value, **options):
    """What the CPU's kernel gives, with the same weights dropped; values of 1 turn outputs into weights."""
    options = dict(dropout_p=0.4, seed=2**40 + 7, return_lse=True) | options
    out, lse = regard.attention(*map(cupy.asarray, (query, key, value)), **on_device(cupy, options))
    want, want_lse = regard.attention(query, key, value, **options)
    assert ((cupy.asnumpy(out) == 0) == (want == 0)).all() and (want == 0).any()
    dtype = query.dtype.name
    tolerance = output_tolerance(query, key, value, {}, dtype) / (1 - options["dropout_p"])
    assert_near(cupy.asnumpy(out), as_float64(want)[0], 2 * tolerance)
    assert_near(cupy.asnumpy(lse), as_float64(want_lse)[0], 2 * lse_tolerance(query, key, want_lse, {}, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_dropout_drops_what_the_cpu_drops(cupy, dtype):
    query, key = (normal(i, 2, 2, 33, 24, dtype=dtype) for i in range(2))
    check_dropout(cupy, query, key, np.eye(33, dtype=query.dtype)[None, None].repeat(2, 0).repeat(2, 1))


@pytest.mark.parametrize(
    "options",
    [{}, dict(dropout_p=0.999999), dict(mask=np.random.default_rng(2).random((70, 140)) < 0.7, softcap=5.0)],
    ids=["plain", "hardly any weight", "mask, softcap"],
)
@pytest.mark.parametrize("len_kv", [60, 140])  # the head dimension of the values as well
def test_dropout_on_tensor_cores(cupy, emulator, tensor_cores, len_kv, options):
    query, key = normal(0, 2, 2, 70, 40, dtype="bfloat16"), normal(1, 2, 1, len_kv, 40, dtype="bfloat16")
    options = options | ({"mask": options["mask"][:, :len_kv]} if "mask" in options else {})
    before = emulator.counters()
    check_dropout(cupy, query, key, np.eye(len_kv, dtype=query.dtype)[None, None].repeat(2, 0), **options)
    assert sum(emulator.counters()[c] - before[c] for c in (PRODUCTS, GROUP_PRODUCTS)) > 0


def test_dropout_of_all_weights(cupy, tensor_cores):
    query, key, value = arrays_on(cupy, dtype="float16")
    out, lse = regard.attention(query, key, value, dropout_p=1.0, seed=1, return_lse=True)
    assert (cupy.asnumpy(out) == 0).all() and np.isfinite(cupy.asnumpy(lse)).all()


def test_weights_packed_on_the_host_are_refused(cupy):
    x = arrays_on(cupy, 1, shape=(3, 8))[0]
    with pytest.raises(TypeError, match="weight: expected a PackedLinear on the device of x, got one on the CPU"):
        regard.linear(x, pack_linear(np.zeros((4, 8), np.float32)))


def test_without_cuda_the_error_says_why(cupy, monkeypatch):
    monkeypatch.undo()
    q, k, v = arrays_on(cupy)
    with pytest.raises(NotImplementedError, match="attention: an array on a GPU, but"):
        regard.attention(q, k, v)
