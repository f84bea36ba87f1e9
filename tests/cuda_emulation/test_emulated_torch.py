"""PyTorch's CUDA tensors through the kernels and both caches, emulated: tests of CuPy's arrays, and PyTorch's own."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
import regard
from cases import DTYPES
from helpers import assert_near, assert_same_bits, normal
from test_emulated_caches import (  # noqa: F401
    STORAGE,
    test_a_cache_attends,
    test_a_paged_cache,
    test_append_stores_what_the_cpu_stores,
    test_errors_leave_the_cache_as_it_was,
)


@pytest.fixture(name="cupy")
def _cupy(torch_cuda: Any) -> Any:
    return torch_cuda


@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_gives_tensors(torch_cuda, dtype):
    torch = pytest.importorskip("torch")
    arrays = [normal(i, 1, 2, 20, 16, dtype=dtype) for i in range(3)]
    wide = [torch_cuda.asarray(np.repeat(x, 2, axis=3))[..., ::2] for x in arrays]  # strides of PyTorch's
    got = regard.attention(*wide, causal=True)
    assert type(got) is torch_cuda.CudaTensor and got.dtype == getattr(torch, dtype)
    want = regard.attention(*arrays, causal=True).astype(np.float64)
    assert_near(torch_cuda.asnumpy(got), want, {"float64": 1e-12, "float32": 1e-5}.get(dtype, 4e-2))
    assert set(torch_cuda.allocated) == {7}


def test_float8_pages_of_pytorch(torch_cuda):
    pages = [normal(i, 6, 4, 2, 16).astype(ml_dtypes.float8_e4m3fn) for i in range(2)]
    query, table, lengths = normal(2, 2, 4, 3, 16), np.array([[0, 5, 2], [3, 1, 4]]), np.array([9, 12])
    scales = [np.ones((6, 4, 2), np.float32)] * 2
    call = {"causal": True, "alignment": "lower_right"}

    def attend(on: Any) -> Any:
        names = dict(zip(("key_scales", "value_scales"), map(on, scales), strict=True))
        return regard.attention_paged(on(query), *map(on, pages), table, lengths, **names, **call)

    assert_near(torch_cuda.asnumpy(attend(torch_cuda.asarray)), attend(np.asarray).astype(np.float64), 1e-5)


@pytest.mark.parametrize("dtype", STORAGE)
def test_beams_and_tables(torch_cuda, dtype):
    """Sequences move, and tables may lie beside the cache: copies of them are kept."""
    torch = pytest.importorskip("torch")
    like = torch_cuda.asarray(np.zeros(1, np.float32))
    tables = regard.rotary_tables(16, 40)
    device = [torch_cuda.asarray(x) for x in tables]
    cache, cpu = regard.KVCache(3, 2, 30, 16, 8, dtype, like, cos=device[0], sin=device[1]), None
    cpu = regard.KVCache(3, 2, 30, 16, 8, dtype, cos=tables[0], sin=tables[1])
    for x in device:
        x.fill_(float("nan"))
    for step, n in enumerate((5, 1)):
        key, value = normal(step, 3, 2, n, 16), normal(9 + step, 3, 2, n, 8)
        cpu.append(key, value)
        cache.append(torch_cuda.asarray(key), torch_cuda.asarray(value))
        for each in (cpu, cache):
            each.reorder([2, 0, 0] if step == 0 else [1, 2])  # within the memory, and into memory of another size
    assert type(cache.key) is torch_cuda.CudaTensor and cache.nbytes == cpu.nbytes
    assert cache.key.dtype == (torch.uint8 if dtype == "float8_e4m3fn" else getattr(torch, dtype))
    held = torch_cuda.asnumpy(cache.value)
    held = held.view(STORAGE[dtype]) if dtype == "float8_e4m3fn" else held
    assert_same_bits(held[:, :, :6].copy(), cpu.value[:, :, :6].copy())
    query = normal(4, 2, 4, 1, 16)
    got = torch_cuda.asnumpy(cache.attend(torch_cuda.asarray(query)))
    near = {"bfloat16": 5e-2, "float8_e4m3fn": 5e-2}.get(dtype, 1e-3)  # angles round apart
    assert_near(got, cpu.attend(query).astype(np.float64), near)


def test_linear_has_no_gradient_as_nothing_here_has(torch_cuda):
    x, weight = (torch_cuda.asarray(normal(i, n, 5)).requires_grad_() for i, n in enumerate((3, 7)))
    assert not regard.linear(x, weight, activation="relu").requires_grad


def test_kinds_do_not_mix(torch_cuda):
    key = normal(0, 1, 2, 3, 8)
    like = torch_cuda.asarray(key)
    with pytest.raises(TypeError, match="cos: expected an array of like's kind, on its device"):
        regard.KVCache(1, 2, 4, 8, like=like, cos=_Foreign(key[0, 0]), sin=key[0, 0])
    cache = regard.KVCache(1, 2, 4, 8, like=like)
    with pytest.raises(TypeError, match="value: expected an array on the device of key"):
        cache.append(like, key)


class _Foreign:
    """An array on a GPU, of a framework that regard does not know."""

    def __init__(self, x: np.ndarray) -> None:
        self.shape, self.dtype = (len(x), 4), x.dtype

    def __dlpack_device__(self) -> tuple[int, int]:
        return (2, 0)
