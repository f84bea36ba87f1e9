"""Input that a careless or hostile caller passes: a right answer or a typed exception, no crash.

Each group of calls runs in one fresh interpreter under a limit on its memory, prints one line a
call, and so shows which one killed it, should one do so.
"""

from __future__ import annotations

import functools

import pytest
from helpers import run_python
from regard import _backend

PRELUDE = """
import resource, sys, warnings
import ml_dtypes
import numpy as np
import regard
from regard import reference

# Allocations that this cannot hold must fail as MemoryError, and must not swap.
limit = 6 << 30
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
warnings.simplefilter("error")

rng = np.random.default_rng(0)
def normal(*shape):
    return rng.standard_normal(shape).astype(np.float32)

q, k, v = normal(2, 3, 9, 8), normal(2, 3, 9, 8), normal(2, 3, 9, 8)
zero = np.zeros((1, 1, 1, 1), np.float32)

def wide(*shape, fill=0.5, dtype=np.float32):
    "An array of any shape out of one element: every stride is 0."
    one = np.array(fill, dtype)
    return np.lib.stride_tricks.as_strided(one, shape, (0,) * len(shape))

def right(actual, *arguments, function=reference.attention, **options):
    "Whether `actual` is what the reference gives for the same arguments."
    want = function(*(np.asarray(x).astype(np.float64) for x in arguments), **options)
    near = 1e-2 if np.asarray(actual).itemsize == 2 else 1e-4
    same = np.allclose(np.asarray(actual).astype(np.float64), want, rtol=near, atol=near)
    return "right" if same else "WRONG"

def call(name, function):
    print(name, end=" ", flush=True)
    try:
        verdict = function()
        if not isinstance(verdict, str):  # an array, where an exception was expected
            verdict = "WRONG" if verdict is False else "ACCEPTED"
    except (TypeError, ValueError, MemoryError) as error:
        # By the base class: NumPy has subclasses of all three.
        kinds = (TypeError, ValueError, MemoryError)
        verdict = next(kind.__name__ for kind in kinds if isinstance(error, kind))
    except BaseException as error:
        verdict = "UNTYPED " + repr(error)
    print(verdict, flush=True)

def attend(*arguments, **options):
    return right(regard.attention(*arguments, **options), *arguments, **options)
"""

TYPED = {"TypeError", "ValueError"}

# group -> name -> (expression, verdicts allowed)
CALLS: dict[str, dict[str, tuple[str, set[str]]]] = {
    "dtypes": {
        "int32": ("attend(*(x.astype(np.int32) for x in (q, k, v)))", {"TypeError"}),
        "complex": ("attend(*(x.astype(np.complex64) for x in (q, k, v)))", {"TypeError"}),
        "bool": ("attend(*(x > 0 for x in (q, k, v)))", {"TypeError"}),
        "object": ("attend(*(x.astype(object) for x in (q, k, v)))", {"TypeError"}),
        "object_key": ("attend(q, k.astype(object), v)", {"TypeError"}),
        "string": ("attend(*(x.astype('U8') for x in (q, k, v)))", {"TypeError"}),
        "structured": ("attend(*(x.view([('a', 'f4')]) for x in (q, k, v)))", {"TypeError"}),
        "datetime": ("attend(*(x.astype('M8[s]') for x in (q, k, v)))", {"TypeError"}),
        "longdouble": ("attend(*(x.astype(np.longdouble) for x in (q, k, v)))", {"TypeError"}),
        "mixed": ("attend(q, k.astype(np.float64), v)", {"TypeError"}),
        "float8": ("attend(*(x.astype(ml_dtypes.float8_e4m3fn) for x in (q, k, v)))",
                   {"TypeError"}),
        "big_endian": ("attend(*(x.astype('>f4') for x in (q, k, v)))", {"right", *TYPED}),
        "big_endian_f2": ("attend(*(x.astype('>f2') for x in (q, k, v)))", {"right", *TYPED}),
        "big_endian_value": ("attend(q, k, v.astype('>f4'))", {"right", *TYPED}),
        "big_endian_bias": ("attend(q, k, v, bias=q[..., :1].astype('>f4'))", {"right", *TYPED}),
        "int_mask": ("attend(q, k, v, mask=np.ones((9, 9), int))", {"TypeError"}),
        "uint8_mask": ("attend(q, k, v, mask=np.ones((9, 9), np.uint8))", {"TypeError"}),
        "object_mask": ("attend(q, k, v, mask=np.ones((9, 9), object))", {"TypeError"}),
        "int_bias": ("attend(q, k, v, bias=np.ones((9, 9), int))", {"TypeError"}),
        "none": ("attend(None, None, None)", TYPED),
        "number": ("attend(1.0, 2.0, 3.0)", TYPED),
        "text": ("attend('query', 'key', 'value')", TYPED),
        "list": ("attend(q.tolist(), k.tolist(), v.tolist())", {"right", *TYPED}),
        "dict": ("attend({}, {}, {})", TYPED),
        "nothing": ("regard.attention()", {"TypeError"}),
    },
    "shapes": {
        "rank_0": ("attend(zero[0, 0, 0, 0], zero, zero)", TYPED),
        "rank_1": ("attend(q[0, 0, 0], k[0, 0, 0], v[0, 0, 0])", TYPED),
        "rank_3": ("attend(q[0], k[0], v[0])", TYPED),
        "rank_5": ("attend(q[None], k[None], v[None])", TYPED),
        "rank_32": ("attend(q.reshape((1,) * 28 + q.shape), k, v)", TYPED),
        "batch": ("attend(q, k[:1], v[:1])", TYPED),
        "batch_of_value": ("attend(q, k, v[:1])", TYPED),
        "heads": ("attend(q, k[:, :2], v[:, :2])", TYPED),
        "heads_of_value": ("attend(q, k, v[:, :1])", TYPED),
        "more_kv_heads": ("attend(q[:, :1], k, v)", TYPED),
        "no_kv_heads": ("attend(q, k[:, :0], v[:, :0])", TYPED),
        "dim_qk": ("attend(q, k[..., :7], v)", TYPED),
        "dim_qk_0": ("regard.attention(q[..., :0], k[..., :0], v) is not None and 'right'",
                     {"right", *TYPED}),
        "dim_v_0": ("regard.attention(q, k, v[..., :0]).size == 0 and 'right'",
                    {"right", *TYPED}),
        "len_kv": ("attend(q, k, v[:, :, :8])", TYPED),
        "mask": ("attend(q, k, v, mask=np.ones((9, 8), bool))", TYPED),
        "mask_rank_5": ("attend(q, k, v, mask=np.ones((1, 1, 1, 9, 9), bool))",
                        {"right", *TYPED}),
        "mask_bigger": ("attend(q, k, v, mask=np.ones((5, 3, 9, 9), bool))", TYPED),
        "mask_empty": ("attend(q, k, v, mask=np.ones((9, 0), bool))", TYPED),
        "bias": ("attend(q, k, v, bias=q)", TYPED),
        "layout": ("attend(q, k, v, layout='sbhd')", TYPED),
        "layout_type": ("attend(q, k, v, layout=3)", TYPED),
        "precision": ("attend(q, k, v, precision='best')", TYPED),
        "window": ("attend(q, k, v, window=(-1, 2))", TYPED),
        "window_of_one": ("attend(q, k, v, window=(2,))", TYPED),
        "window_number": ("attend(q, k, v, window=3)", TYPED),
        "window_huge": ("attend(q, k, v, window=(2**62, 2**62)) ", {"right", *TYPED}),
        "window_beyond_int64": ("attend(q, k, v, window=(2**70, None))", {"right", *TYPED}),
        "scale_text": ("attend(q, k, v, scale='large')", TYPED),
        "scale_array": ("attend(q, k, v, scale=normal(3))", TYPED),
        "scale_nan": ("np.isnan(regard.attention(q, k, v, scale=np.nan)).all() and 'right'",
                      {"right", *TYPED}),
        "softcap_0": ("regard.attention(q, k, v, softcap=0.0) is not None and 'right'",
                      {"right", *TYPED}),
        "softcap_negative": ("regard.attention(q, k, v, softcap=-2.0) is not None and 'right'",
                             {"right", *TYPED}),
        "dropout_2": ("attend(q, k, v, dropout_p=2.0)", TYPED),
        "slopes": ("attend(q, k, v, alibi_slopes=normal(4))", TYPED),
        "sinks": ("attend(q, k, v, sinks=normal(4))", TYPED),
        "lengths_too_long": ("attend(q, k, v, key_lengths=np.array([9, 10]))", TYPED),
        "lengths_negative": ("attend(q, k, v, key_lengths=np.array([9, -1]))", TYPED),
        "lengths_huge": ("attend(q, k, v, query_lengths=np.array([2**62, 1]))", TYPED),
        "lengths_float": ("attend(q, k, v, key_lengths=np.array([9.0, 3.0]))", TYPED),
        "lengths_shape": ("attend(q, k, v, key_lengths=np.array([9, 9, 9]))", TYPED),
        "set_threads_0": ("regard.set_num_threads(0)", TYPED),
        "set_threads_negative": ("regard.set_num_threads(-3)", TYPED),
        "set_threads_text": ("regard.set_num_threads('two')", TYPED),
    },
    "memory": {
        "read_only_inputs": ("[x.setflags(write=False) for x in (q, k, v)] and attend(q, k, v)",
                             {"right"}),
        "read_only_out": ("o = np.zeros_like(q); o.setflags(write=False); "
                          "regard.attention(q, k, v, out=o)", TYPED),
        "out_of_stride_0": ("regard.attention(q, k, v, out=wide(2, 3, 9, 8))", TYPED),
        "out_float64": ("regard.attention(q, k, v, out=np.zeros(q.shape))", TYPED),
        "out_big_endian": ("regard.attention(q, k, v, out=np.zeros(q.shape, '>f4'))", TYPED),
        "out_shape": ("regard.attention(q, k, v, out=np.zeros((2, 3, 9, 7), np.float32))", TYPED),
        "out_list": ("regard.attention(q, k, v, out=[])", TYPED),
        "out_misaligned": ("o = np.zeros(q.nbytes + 1, np.uint8)[1:].view(np.float32)"
                           ".reshape(q.shape); r = regard.attention(q, k, v, out=o); "
                           "result = right(r, q, k, v)", {"right", *TYPED}),
        "out_is_query": ("a = q.copy(); r = regard.attention(a, k, v, out=a); "
                         "result = right(r, q, k, v)", {"right"}),
        "out_is_all": ("a = q.copy(); r = regard.attention(a, a, a, out=a); "
                       "result = right(r, q, q, q)", {"right"}),
        "out_overlaps_mask": ("b = np.zeros(2 * 3 * 9 * 8, np.float32); "
                              "m = b.view(bool)[: 81].reshape(9, 9); "
                              "m[...] = np.eye(9, dtype=bool); "
                              "w = m.copy(); r = regard.attention(q, k, v, mask=m, "
                              "out=b.reshape(q.shape)); result = right(r, q, k, v, mask=w)",
                              {"right"}),
        "out_overlaps_bias": ("b = normal(2 * 3 * 9 * 8); a = b[:81].reshape(9, 9); w = a.copy(); "
                              "r = regard.attention(q, k, v, bias=a, out=b.reshape(q.shape)); "
                              "result = right(r, q, k, v, bias=w)", {"right"}),
        "out_reversed_query": ("a = q.copy(); r = regard.attention(a, k, v, out=a[:, :, ::-1]); "
                               "result = right(r, q, k, v)", {"right"}),
        "misaligned": ("u = [np.zeros(x.nbytes + 3, np.uint8)[3:].view(np.float32)"
                       ".reshape(x.shape) for x in (q, k, v)]; "
                       "[a.__setitem__(..., x) for a, x in zip(u, (q, k, v))]; "
                       "result = attend(*u)", {"right"}),
        "misaligned_float16": ("h = [x.astype(np.float16) for x in (q, k, v)]; "
                               "u = [np.zeros(x.nbytes + 1, np.uint8)[1:].view(np.float16)"
                               ".reshape(x.shape) for x in h]; "
                               "[a.__setitem__(..., x) for a, x in zip(u, h)]; "
                               "result = 'right' if (regard.attention(*u) == regard.attention(*h))"
                               ".all() else 'WRONG'", {"right"}),
        "stride_of_one_byte": ("b = np.zeros(999, np.uint8); "
                               "s = np.lib.stride_tricks.as_strided(b[:4].view(np.float32), "
                               "(1, 1, 5, 8), (1, 1, 1, 1)); result = attend(s, s, s)",
                               {"right", *TYPED}),
        "subclass": ("m = np.ma.masked_array(q, q > 0); regard.attention(m, k, v); "
                     "result = 'right'", {"right", *TYPED}),
        "memmap": ("import tempfile; f = tempfile.TemporaryFile(); "
                   "m = np.memmap(f, np.float32, 'w+', shape=q.shape); m[...] = q; "
                   "result = attend(m, k, v)", {"right"}),
        "empty": ("attend(q[:0], k[:0], v[:0])", {"right"}),
        "empty_stride": ("attend(wide(0, 2**40, 2**20, 8)[:, :3], k[:0], v[:0])",
                         {"right", *TYPED}),
    },
    "sizes": {
        # 2^31 and more elements in an input, and little to do and to allocate: strides are 0.
        "query_beyond_2_31": ("r = regard.attention(wide(1, 8, (1 << 16) + 1, 1 << 12), "
                              "wide(1, 1, 1, 1 << 12), wide(1, 1, 1, 1, fill=3)); "
                              "result = 'right' if (r == 3).all() else 'WRONG'",
                              {"right", "MemoryError"}),
        "key_beyond_2_31": ("r = regard.attention(wide(1, 1, 1, 1 << 12), "
                            "wide(1, 1, (1 << 19) + 1, 1 << 12), "
                            "wide(1, 1, (1 << 19) + 1, 1, fill=3)); "
                            "result = 'right' if np.allclose(r, 3, rtol=1e-4) else 'WRONG'",
                            {"right", "MemoryError"}),
        "batch_beyond_2_31": ("r = regard.attention(wide((1 << 12) + 1, 8, 16, 1 << 12), "
                              "wide((1 << 12) + 1, 1, 1, 1 << 12), "
                              "wide((1 << 12) + 1, 1, 1, 1, fill=3)); "
                              "result = 'right' if (r == 3).all() else 'WRONG'",
                              {"right", "MemoryError"}),
        "mask_beyond_2_31": ("x = wide(2, 64, 1 << 12, 1); r = regard.attention(x, "
                             "wide(2, 1, 1 << 12, 1), wide(2, 1, 1 << 12, 1, fill=3), "
                             "mask=wide(2, 64, 1 << 12, 1 << 12, fill=True, dtype=bool)); "
                             "result = 'right' if np.allclose(r, 3, rtol=1e-4) else 'WRONG'",
                             {"right", "MemoryError"}),
        "stride_beyond_2_31": ("b = np.zeros((1 << 29) + 64, np.float32); b[:8] = 1; b[-8:] = 2; "
                               "s = np.lib.stride_tricks.as_strided(b[:8], (1, 1, 2, 8), "
                               "(0, 0, 4 * (b.size - 8), 4)); result = attend(s, s, s)",
                               {"right", "MemoryError"}),
        "output_too_big": ("regard.attention(wide(1, 1, 1 << 31, 1), wide(1, 1, 1, 1), "
                           "wide(1, 1, 1, 1))", {"MemoryError", "ValueError"}),
        "output_beyond_2_63": ("regard.attention(wide(1 << 20, 1 << 10, 1 << 20, 1), "
                               "wide(1 << 20, 1 << 10, 1, 1), wide(1 << 20, 1 << 10, 1, 1 << 20))",
                               {"MemoryError", "ValueError"}),
        "dim_v_beyond_memory": ("regard.attention(wide(1, 1, 1, 1), wide(1, 1, 1, 1), "
                                "wide(1, 1, 1, 1 << 40))", {"MemoryError", "ValueError"}),
        "bfloat16_too_big": ("regard.attention(*(wide(1 << 10, 1 << 10, 1 << 10, 1 << 10, "
                             "dtype=ml_dtypes.bfloat16) for _ in range(3)))",
                             {"MemoryError", "ValueError"}),
        "linear_too_big": ("regard.linear(wide(1 << 20, 1), wide(1 << 20, 1))",
                           {"MemoryError", "ValueError"}),
        "linear_beyond_2_63": ("regard.linear(wide(1 << 40, 1), wide(1 << 40, 1))",
                               {"MemoryError", "ValueError"}),
        "pool_beyond_2_31": ("r = regard.global_average_pool("
                             "wide(1, 1 << 7, 1 << 12, (1 << 12) + 1)); "
                             "result = 'right' if np.allclose(r, 0.5, rtol=1e-4) else 'WRONG'",
                             {"right", "MemoryError"}),
        "se_too_big": ("regard.squeeze_excitation(wide(1 << 10, 1 << 10, 1 << 10, 1 << 10), "
                       "normal(4, 1 << 10), normal(4), normal(1 << 10, 4), normal(1 << 10))",
                       {"MemoryError", "ValueError"}),
        # After all that, the process still works.
        "still_right": ("attend(q, k, v)", {"right"}),
    },
    "others": {
        "linear_rank_0": ("regard.linear(zero[0, 0, 0, 0], normal(3, 1))", TYPED),
        "linear_inner": ("regard.linear(normal(4, 5), normal(3, 6))", TYPED),
        "linear_weight_rank": ("regard.linear(normal(4, 5), normal(5))", TYPED),
        "linear_bias": ("regard.linear(normal(4, 5), normal(3, 5), normal(4))", TYPED),
        "linear_activation": ("regard.linear(normal(4, 5), normal(3, 5), None, 'swish')", TYPED),
        "linear_activation_type": ("regard.linear(normal(4, 5), normal(3, 5), None, 7)", TYPED),
        "linear_int": ("regard.linear(np.ones((4, 5), int), np.ones((3, 5), int))", TYPED),
        "linear_mixed": ("regard.linear(normal(4, 5), normal(3, 5).astype(np.float64))", TYPED),
        "linear_big_endian": ("a, b = normal(4, 5), normal(3, 5); "
                              "result = right(regard.linear(a.astype('>f4'), b), a, b, "
                              "function=reference.linear)", {"right", *TYPED}),
        "linear_misaligned": ("a, b = normal(4, 5), normal(3, 5); "
                              "u = np.zeros(81, np.uint8)[1:].view(np.float32).reshape(4, 5); "
                              "u[...] = a; result = right(regard.linear(u, b), a, b, "
                              "function=reference.linear)", {"right"}),
        "linear_empty": ("a, b = normal(0, 5), normal(3, 5); result = 'right' if "
                         "regard.linear(a, b).shape == (0, 3) else 'WRONG'", {"right"}),
        "linear_inner_0": ("r = regard.linear(normal(4, 0), normal(3, 0)); "
                           "result = 'right' if (r == 0).all() and r.shape == (4, 3) else 'WRONG'",
                           {"right", *TYPED}),
        "norm_rank_0": ("regard.layer_norm(zero[0, 0, 0, 0])", TYPED),
        "norm_weight": ("regard.layer_norm(normal(3, 4), normal(5))", TYPED),
        "norm_bias": ("regard.layer_norm(normal(3, 4), normal(4), normal(5))", TYPED),
        "norm_eps": ("regard.layer_norm(normal(3, 4), eps='small')", TYPED),
        "norm_int": ("regard.rms_norm(np.ones((3, 4), int))", TYPED),
        "pool_rank": ("regard.global_average_pool(normal(3))", TYPED),
        "pool_layout": ("regard.global_average_pool(normal(1, 2, 3, 4), layout='chwn')", TYPED),
        "pool_int": ("regard.global_average_pool(np.ones((1, 2, 3, 4), int))", TYPED),
        "se_weights": ("regard.squeeze_excitation(normal(1, 4, 3, 3), normal(2, 5), normal(2), "
                       "normal(4, 2), normal(4))", TYPED),
        "se_expand": ("regard.squeeze_excitation(normal(1, 4, 3, 3), normal(2, 4), normal(2), "
                      "normal(4, 3), normal(4))", TYPED),
        "se_bias": ("regard.squeeze_excitation(normal(1, 4, 3, 3), normal(2, 4), normal(3), "
                    "normal(4, 2), normal(4))", TYPED),
        "se_activation": ("regard.squeeze_excitation(normal(1, 4, 3, 3), normal(2, 4), normal(2), "
                          "normal(4, 2), normal(4), activation='relu6')", TYPED),
        "se_gate": ("regard.squeeze_excitation(normal(1, 4, 3, 3), normal(2, 4), normal(2), "
                    "normal(4, 2), normal(4), gate=('hard_sigmoid', 1))", TYPED),
        "se_out": ("o = np.zeros((1, 4, 3, 3), np.float32); o.setflags(write=False); "
                   "regard.squeeze_excitation(normal(1, 4, 3, 3), normal(2, 4), normal(2), "
                   "normal(4, 2), normal(4), out=o)", TYPED),
        "se_out_is_x": ("x = normal(1, 4, 3, 3); w = normal(2, 4), normal(2), normal(4, 2), "
                        "normal(4); a = x.copy(); r = regard.squeeze_excitation(a, *w, out=a); "
                        "result = right(r, x, *w, function=reference.squeeze_excitation)",
                        {"right"}),
        "sdpa_int_mask": ("regard.scaled_dot_product_attention(q, k, v, np.ones((9, 9), int))",
                          TYPED),
        "sdpa_rank_1": ("regard.scaled_dot_product_attention(q[0, 0, 0], k[0, 0, 0], v[0, 0, 0])",
                        TYPED),
        "sdpa_both": ("regard.scaled_dot_product_attention(q, k, v, np.ones((9, 9), bool), 0.0, "
                      "True)", TYPED),
        "sdpa_mask_shape": ("regard.scaled_dot_product_attention(q, k, v, np.ones((9, 8), bool))",
                            TYPED),
    },
}  # fmt: skip


def program(calls: dict[str, tuple[str, set[str]]]) -> str:
    lines = [PRELUDE]
    for name, (body, _) in calls.items():
        *statements, last = (part.strip() for part in body.split(";"))
        if not last.startswith("result = "):
            last = f"result = {last}"
        lines.append(f"def {name}():")
        lines += [f"    {line}" for line in (*statements, last) if line]
        lines.append("    return result")
        lines.append(f"call({name!r}, {name})")
    return "\n".join(lines)


@functools.cache
def verdicts(group: str, isa: str) -> tuple[dict[str, str], str]:
    done = run_python(program(CALLS[group]), isa, timeout=300)
    said = dict(line.partition(" ")[::2] for line in done.stdout.splitlines())
    end = f"exit status {done.returncode}\n{done.stderr[-2000:]}"
    if done.returncode != 0 and said:
        said[list(said)[-1]] += f" and then the process ended, {end}"
    return said, end


@pytest.mark.parametrize("isa", _backend.possible())
@pytest.mark.parametrize(("group", "name"), [(g, n) for g in CALLS for n in CALLS[g]])
def test_hostile(group, name, isa):
    said, end = verdicts(group, isa)
    assert name in said, f"an earlier call ended the process: {end}"
    assert said[name] in CALLS[group][name][1]
