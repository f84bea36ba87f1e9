"""Forward passes of regard.nn take their memory from one stack that is kept between calls."""

from __future__ import annotations

import sys
import threading
import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from cases import DTYPES
from helpers import assert_same_bits, normal, run_python
from regard import _backend, nn
from regard.nn import _workspace

BATCH, LENGTH, WIDTH = 4, 128, 128
#: What Python objects of a call (views, tuples, closures) and counted lengths may take together.
SMALL = 48 << 10


def peak(call: Callable[[], Any]) -> int:
    """Bytes that NumPy and Python held at once during the call, beyond what there was."""
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        call()
        return tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()


def encoder_layer(**options: Any) -> Callable[..., Any]:
    return nn.TransformerEncoderLayer(WIDTH, 4, 4 * WIDTH, batch_first=True, **options).forward


def decoder_layer(**options: Any) -> Callable[..., Any]:
    layer = nn.TransformerDecoderLayer(WIDTH, 4, 4 * WIDTH, batch_first=True, **options)
    memories = {normal(9, 1, dtype=dtype).dtype: normal(9, BATCH, 60, WIDTH, dtype=dtype) for dtype in DTYPES}
    return lambda x, out: layer.forward(x, memories[x.dtype], tgt_is_causal=True, out=out)


def attention(x: Any, out: Any) -> Any:
    return ATTENTION.forward(x, x, x, need_weights=False, residual=x, out=out)[0]


ATTENTION = nn.MultiheadAttention(WIDTH, 4, batch_first=True, num_heads_kv=2)
WITH_OUT: dict[str, Callable[..., Any]] = {
    "attention": attention,
    "encoder layer": encoder_layer(),
    "encoder layer, rotary": encoder_layer(rotary=nn.RotaryEmbedding(WIDTH // 4, LENGTH)),
    "encoder layer, pre-norm": encoder_layer(norm_first=True, activation="gelu"),
    "decoder layer": decoder_layer(),
    "decoder layer, pre-norm": decoder_layer(norm_first=True),
}


@pytest.mark.parametrize("name", WITH_OUT)
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_a_call_with_out_allocates_nothing_large(backend, name, dtype):
    x = normal(0, BATCH, LENGTH, WIDTH, dtype=dtype)
    out = np.empty_like(x)
    assert x.nbytes > 2 * SMALL
    WITH_OUT[name](x, out=out)
    assert peak(lambda: WITH_OUT[name](x, out=out)) < SMALL


def stacks() -> dict[str, Callable[[Any], Any]]:
    layer = nn.TransformerEncoderLayer(WIDTH, 4, 4 * WIDTH, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 3, nn.LayerNorm(WIDTH))
    swiglu = nn.FeedForward(WIDTH, 4 * WIDTH, "swiglu")
    padding = np.arange(LENGTH) >= np.array([[LENGTH], [100], [3], [64]])
    int8 = nn.TransformerEncoder(layer, 3).to(weights="int8")
    return {
        "encoder": encoder.forward,
        "encoder, padded": lambda x: encoder.forward(x, src_key_padding_mask=padding),
        "encoder, int8": int8.forward,
        "swiglu": swiglu.forward,
    }


@pytest.mark.parametrize("name", stacks())
def test_a_call_allocates_its_result_only(backend, name):
    call, x = stacks()[name], normal(0, BATCH, LENGTH, WIDTH)
    call(x)
    assert x.nbytes <= peak(lambda: call(x)) < x.nbytes + SMALL


@pytest.mark.parametrize("kind", [nn.TransformerDecoderLayer, nn.TransformerEncoderLayer])
def test_steps_of_decoding_allocate_nothing_large(backend, kind):
    """A cache has its whole room from the first step on, and goes on in it where beams change places."""
    rotary = nn.RotaryEmbedding(WIDTH // 4, 64)
    layer = kind(WIDTH, 4, 4 * WIDTH, batch_first=True, rotary=rotary)
    options: dict[str, Any] = {
        "embed": lambda tokens, positions: np.zeros((*tokens.shape, WIDTH), np.float32),
        "project": lambda hidden: hidden,
        "max_len": 64,
    }
    if kind is nn.TransformerDecoderLayer:
        decoder = nn.CachedDecoder(nn.TransformerDecoder(layer, 2), normal(0, 3, 60, WIDTH), **options)
    else:
        decoder = nn.CachedDecoder(nn.TransformerEncoder(layer, 2), rows=3, **options)
    decoder.step(np.zeros((3, 20), np.int64))
    decoder.select(np.array([0, 0, 1, 1, 2, 2]))
    tokens = np.zeros((6, 1), np.int64)
    decoder.step(tokens)

    def steps() -> None:
        for _ in range(20):
            decoder.step(tokens)

    assert peak(steps) < SMALL
    moved = 3 * 2 * 41 * WIDTH * 4  # keys and values of a layer's rows that change
    assert peak(lambda: decoder.select(np.array([1, 0, 2, 3, 5, 5]))) < moved + SMALL


def test_smaller_calls_and_other_dtypes_need_nothing_more(backend):
    """After the largest: the stack is one piece, and serves any size below."""
    call = encoder_layer()
    large = normal(0, BATCH, LENGTH, WIDTH)
    call(large)
    for dtype in ("float16", "bfloat16"):  # packed at the first call with the dtype
        call(large[:1, :2].astype(DTYPES[dtype]))
    for shape, dtype in (((4, 64), "float32"), ((1, 128), "float16"), ((3, 100), "bfloat16")):
        x = normal(1, *shape, WIDTH, dtype=dtype)
        out = np.empty_like(x)
        assert peak(lambda x=x, out=out: call(x, out=out)) < SMALL


def test_what_is_kept_is_one_piece_and_a_failed_call_gives_it_back():
    layer = nn.TransformerEncoderLayer(WIDTH, 4, 4 * WIDTH, batch_first=True)
    x = normal(0, BATCH, LENGTH, WIDTH)
    layer(x)
    stack = _workspace._stack
    assert (len(stack.chunks), stack.used, stack.depth) == (1, 0, 0)
    with pytest.raises(ValueError):
        layer(x, np.zeros((3, 3), bool))
    assert (len(stack.chunks), stack.used, stack.depth) == (1, 0, 0)


def test_results_are_not_in_the_memory_that_is_used_again(backend):
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(WIDTH, 4, 64, batch_first=True), 2)
    x, y = normal(0, 2, 30, WIDTH), normal(1, 2, 30, WIDTH)
    first = encoder(x)
    held = first.copy()
    encoder(y)
    assert_same_bits(first, held)


def test_threads_have_memory_of_their_own(backend):
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), 2)
    inputs = [normal(i, 2, 20 + i, 32) for i in range(4)]
    wants = [encoder(x) for x in inputs]
    outs: list[Any] = [None] * 4

    def work(i: int) -> None:
        for _ in range(20):
            outs[i] = encoder(inputs[i])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for out, want in zip(outs, wants, strict=True):
        assert_same_bits(out, want)


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss counts differently elsewhere")
@pytest.mark.parametrize("isa", _backend.possible())
def test_calls_need_no_more_memory_from_one_to_the_next(isa):
    """What kernels take for themselves, which tracemalloc does not see, is kept or given back as well."""
    done = run_python(
        """
import resource
import numpy as np
from regard import nn
layer = nn.TransformerEncoderLayer(128, 4, 512, batch_first=True)
x = np.random.default_rng(0).standard_normal((4, 128, 128), np.float32)
out = np.empty_like(x)
def work(n):
    for _ in range(n):
        for weights in (None, "int8"):
            layer.to(weights=weights).forward(x, out=out)
work(5)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
work(40)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
""",
        isa,
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 8  # 80 calls that kept one array like x each would be 20 MiB
