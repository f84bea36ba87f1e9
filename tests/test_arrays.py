"""Arrays of other libraries, by DLPack: the same kind comes back, on memory it allocated."""

from __future__ import annotations

import numpy as np
import pytest
import regard
from helpers import as_float64, assert_near, assert_same_bits, normal
from regard import reference

torch = pytest.importorskip("torch")

TORCH = {
    "float32": torch.float32,
    "float64": torch.float64,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}


def tensors(dtype, *shape, count=3):
    return [torch.from_numpy(normal(i, *shape)).to(TORCH[dtype]) for i in range(count)]


def as_numpy(tensor):
    """The same values; bfloat16, which NumPy lacks, by its bits."""
    import ml_dtypes

    if tensor.dtype == torch.bfloat16:
        return tensor.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


@pytest.mark.parametrize("dtype", TORCH)
def test_attention(backend, dtype):
    q, k, v = tensors(dtype, 2, 3, 40, 24)
    out, lse = regard.attention(q, k, v, causal=True, return_lse=True)
    assert isinstance(out, torch.Tensor) and isinstance(lse, torch.Tensor)
    assert out.dtype == q.dtype and lse.dtype == torch.float32
    assert out.device == q.device and not out.requires_grad
    arrays = [as_numpy(t) for t in (q, k, v)]
    want, want_lse = regard.attention(*arrays, causal=True, return_lse=True)
    assert_same_bits(as_numpy(out), want)
    assert_same_bits(lse.numpy(), want_lse)
    near = {"float16": 2.0**-8, "bfloat16": 2.0**-5}.get(dtype, 1e-5)  # values are below 4
    assert_near(want, reference.attention(*as_float64(*arrays), causal=True), near)


@pytest.mark.parametrize("dtype", TORCH)
def test_tensors_that_require_gradients_are_taken_for_their_values(backend, dtype):
    q, k, v = tensors(dtype, 2, 3, 40, 24)
    out = torch.full_like(q, 9, requires_grad=True)
    assert regard.attention(q.requires_grad_(), k, v.requires_grad_(), out=out) is out
    want = regard.attention(q.detach(), k, v.detach())
    assert_same_bits(as_numpy(out.detach()), as_numpy(want))
    assert not want.requires_grad and not regard.attention(q, k, v).requires_grad


def test_views_of_negated_numbers_are_refused(backend):
    negated = torch.randn(2, 3, 40, 24, dtype=torch.complex64).conj().imag
    with pytest.raises(TypeError, match=r"attention: expected arrays of their own numbers.*resolve_neg"):
        regard.attention(negated, negated, negated)
    regard.attention(*[negated.resolve_neg()] * 3)


@pytest.mark.parametrize("dtype", TORCH)
def test_strided_tensors(backend, dtype):
    q, k, v = tensors(dtype, 2, 40, 3, 24)
    moved = [t.transpose(1, 2) for t in (q, k, v)]
    out = regard.attention(*moved)
    want = regard.attention(*(as_numpy(t.contiguous()) for t in moved))
    assert_same_bits(as_numpy(out.contiguous()), want)
    expanded = k[:1, :1, :1].expand(2, 40, 3, 24).transpose(1, 2)
    out = regard.attention(moved[0], expanded, moved[2])
    want = regard.attention(*(as_numpy(t.contiguous()) for t in (moved[0], expanded, moved[2])))
    assert_same_bits(as_numpy(out.contiguous()), want)


def test_mask_bias_and_out(backend):
    q, k, v = tensors("float32", 2, 3, 40, 24)
    mask = torch.rand(40, 40, generator=torch.Generator().manual_seed(0)) > 0.3
    bias = tensors("float32", 3, 40, 40, count=1)[0]
    out = torch.empty(2, 3, 40, 24)
    assert regard.attention(q, k, v, mask=mask, bias=bias, out=out) is out
    numpy_arrays = [t.numpy() for t in (q, k, v)]
    want = regard.attention(*numpy_arrays, mask=mask.numpy(), bias=bias.numpy())
    assert_same_bits(out.numpy(), want)


def test_the_query_decides_the_kind(backend):
    q, k, v = tensors("float32", 2, 3, 40, 24)
    assert isinstance(regard.attention(q, k.numpy(), v.numpy()), torch.Tensor)
    assert isinstance(regard.attention(q.numpy(), k, v), np.ndarray)


@pytest.mark.parametrize("dtype", TORCH)
def test_the_other_operations(backend, dtype):
    q, k, v = tensors(dtype, 2, 3, 40, 24)
    x, weight = q[0, 0], k[0, 0]
    calls = {
        "scaled_dot_product_attention": (q, k, v),
        "linear": (x, weight),
        "layer_norm": (x,),
        "rms_norm": (x,),
        "global_average_pool": (q,),
        "squeeze_excitation": (q, k[0, 0, :2, :3], v[0, 0, 0, :2], k[0, 1, :3, :2], v[0, 0, 1, :3]),
    }
    for name, arguments in calls.items():
        function = getattr(regard, name)
        out = function(*arguments)
        assert isinstance(out, torch.Tensor) and out.dtype == q.dtype, name
        want = function(*(as_numpy(t.contiguous()) for t in arguments))
        assert_same_bits(as_numpy(out.contiguous()), want, name)


class Given:
    """An array of the caller's own kind, which gives its memory and takes none."""

    def __init__(self, x):
        self.x = x

    def __dlpack__(self, **options):
        return self.x.__dlpack__(**options)

    def __dlpack_device__(self):
        return self.x.__dlpack_device__()


@pytest.mark.parametrize("dtype", TORCH)
def test_an_array_of_the_callers_own_kind_gives_numpys(backend, dtype):
    q, k, v = tensors(dtype, 2, 3, 40, 24)
    out = regard.attention(Given(q), k, v)
    assert type(out) is np.ndarray
    assert_same_bits(out, as_numpy(regard.attention(q, k, v)))
    x, weight = q[0, 0], k[0, 0]
    assert_same_bits(regard.linear(Given(x), regard.pack_linear(Given(weight))), as_numpy(regard.linear(x, weight)))
    linear = regard.nn.Linear(24, 5)
    assert_same_bits(linear(Given(q)), linear(as_numpy(q)))


def test_a_subclass_of_tensors_gives_tensors(backend):
    class Own(torch.Tensor):
        pass

    q, k, v = tensors("float32", 2, 3, 40, 24)
    out = regard.attention(q.as_subclass(Own), k, v)
    assert isinstance(out, torch.Tensor)
    assert_same_bits(out.numpy(), regard.attention(q, k, v).numpy())


def test_results_outlive_their_inputs(backend):
    def compute():
        q, k, v = tensors("bfloat16", 1, 2, 200, 64)
        return regard.attention(q, k, v)

    outs = [compute() for _ in range(20)]
    for out in outs[1:]:
        assert torch.equal(out, outs[0])
    outs[0].zero_()
    assert outs[1].abs().max() > 0  # each has memory of its own


def test_empty_tensors(backend):
    q, k, v = (torch.zeros(1, 2, n, 8) for n in (5, 0, 0))
    out = regard.attention(q, k, v)
    assert out.shape == (1, 2, 5, 8) and (out == 0).all()


def test_a_tensor_that_needs_gradients_is_refused_or_detached(backend):
    # No backward pass is recorded; a result that pretended otherwise would be silently wrong.
    q, k, v = tensors("float32", 1, 2, 9, 8)
    q.requires_grad_()
    try:
        out = regard.attention(q, k, v)
    except (TypeError, ValueError, BufferError, RuntimeError):
        return
    assert not out.requires_grad
