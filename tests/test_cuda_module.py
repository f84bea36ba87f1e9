"""What holds of CUDA on every machine: the module loads without a driver, and says why it cannot be used."""

from __future__ import annotations

import importlib
import importlib.util

import numpy as np
import pytest
import regard
from regard import _backend
from regard._cli import info


class OnAGpu:
    """What only looks like a GPU's array."""

    shape = (1, 1, 2, 8)
    ndim = 4
    dtype = np.dtype(np.float32)

    def __dlpack_device__(self) -> tuple[int, int]:
        return (2, 0)


def state() -> str | None:
    if importlib.util.find_spec("regard._cuda") is None:
        return "this build has no CUDA kernels"
    return importlib.import_module("regard._cuda").why_not()


def test_info_says_whether_and_why() -> None:
    line = dict(info.rows())["CUDA"]
    reason = state()
    assert line == "yes" if reason is None else line.startswith("no: ") and reason in line


def test_an_array_on_a_gpu_is_refused_with_the_reason() -> None:
    reason = state()
    if reason is None:
        pytest.skip("this machine has a GPU")
    x = OnAGpu()
    with pytest.raises(NotImplementedError, match=f"^attention: an array on a GPU, but .*{reason}"):
        regard.attention(x, x, x)
    with pytest.raises(NotImplementedError, match=r"^cuda: an array on a GPU, but"):
        _backend.cuda("cuda")
