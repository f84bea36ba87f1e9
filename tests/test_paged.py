"""PagedKVCache: pages are counted, shared and copied when written; attention sees each sequence's own tokens."""

from __future__ import annotations

import numpy as np
import pytest
import regard
from cases import DTYPES
from helpers import as_float64, assert_near, assert_same_bits, normal, output_tolerance
from regard import reference

HEADS, DIM_QK, DIM_V = 2, 16, 8


class Model:
    """What a paged cache should hold: each sequence's tokens as plain arrays, and a cache beside them."""

    def __init__(self, pages=20, page_size=4, dtype="float32", **options):
        self.cache = regard.PagedKVCache(pages, page_size, HEADS, DIM_QK, DIM_V, dtype, **options)
        self.tokens = {}
        self.seed = 0

    def new(self):
        number = self.cache.new_sequence()
        self.tokens[number] = np.zeros((HEADS, 0, DIM_QK), np.float32), np.zeros((HEADS, 0, DIM_V), np.float32)
        return number

    def fork(self, number, length=None):
        fork = self.cache.fork(number, length)
        self.tokens[fork] = tuple(x[:, :length] for x in self.tokens[number])
        return fork

    def append(self, *numbers_and_counts):
        numbers, counts = zip(*numbers_and_counts, strict=True)
        shape = (len(numbers), HEADS, max(counts))
        self.seed += 2
        key, value = normal(self.seed, *shape, DIM_QK), normal(self.seed + 1, *shape, DIM_V)
        self.cache.append(list(numbers), key, value, np.array(counts))
        for i, (number, n) in enumerate(numbers_and_counts):
            held = self.tokens[number]
            self.tokens[number] = tuple(
                np.concatenate([old, new[i, :, :n]], 1) for old, new in zip(held, (key, value), strict=True)
            )

    def truncate(self, number, length):
        self.cache.truncate(number, length)
        self.tokens[number] = tuple(x[:, :length] for x in self.tokens[number])

    def free(self, *numbers):
        self.cache.free(numbers)
        for number in numbers:
            del self.tokens[number]

    def check(self):
        """Every token is where the page table says, pages are counted right, and none is lost."""
        cache = self.cache
        assert cache.sequences == list(self.tokens)
        used = {}
        for number, want in self.tokens.items():
            (table,), (length,) = cache.page_table(number), cache.lengths(number)
            assert length == want[0].shape[1]
            assert len(table) == -(-length // cache.page_size) == len(set(table.tolist()))
            for page in table.tolist():
                used[page] = used.get(page, 0) + 1
            for pages, x in zip((cache.key_pages, cache.value_pages), want, strict=True):
                got = pages[table].reshape(-1, *pages.shape[2:])[:length].swapaxes(0, 1)
                assert_same_bits(got.copy(), x.astype(got.dtype), f"sequence {number}")
        assert cache.free_pages == cache.pages - len(used)
        assert sorted(cache._free + list(used)) == list(range(cache.pages))
        assert {p: int(cache._users[p]) for p in range(cache.pages) if cache._users[p]} == used


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_append_and_share(backend, dtype):
    model = Model(dtype=dtype)
    a, b = model.new(), model.new()
    model.append((a, 6), (b, 1))
    model.check()
    c = model.fork(a)  # shares a full page and one half full
    d = model.fork(a, 3)  # shares a page that a has filled further
    assert model.cache.free_pages == 20 - 3
    model.append((c, 1))  # copies the half full page
    model.check()
    assert model.cache.page_table(c)[0, 0] == model.cache.page_table(a)[0, 0]
    assert model.cache.page_table(c)[0, 1] != model.cache.page_table(a)[0, 1]
    model.append((a, 1), (d, 2), (b, 3))  # a alone owns its last page again; d copies its only one
    model.check()
    model.append((b, 1), (a, 0), (c, 9))
    model.check()
    model.free(a)
    model.check()
    model.truncate(c, 4)
    model.truncate(d, 0)
    model.check()
    model.append((d, 8), (c, 1))
    model.check()
    model.free(b, c, d)
    model.check()
    assert model.cache.free_pages == 20 and not model.cache.sequences


def test_two_sharers_append_in_one_call(backend):
    model = Model(pages=3, page_size=4)
    a = model.new()
    model.append((a, 2))
    b, c = model.fork(a), model.fork(a)
    before = model.cache.free_pages
    model.append((a, 1), (b, 1), (c, 1))  # two copy, the last one keeps the page
    model.check()
    assert model.cache.free_pages == before - 2 == 0


def test_a_page_to_copy_is_counted(backend):
    model = Model(pages=2, page_size=4)
    a = model.new()
    model.append((a, 6))
    b = model.fork(a)
    with pytest.raises(ValueError, match="append: expected at least 1 free pages of 4 tokens, got 0"):
        model.append((b, 1))
    model.check()
    model.free(b)
    model.append((a, 2))
    model.check()


def test_random_histories(backend):
    rng = np.random.default_rng(0)
    for page_size in (1, 3, 16):
        model = Model(pages=24, page_size=page_size)
        for _ in range(150):
            alive = list(model.tokens)
            choice = rng.integers(6)
            if choice == 0 or not alive:
                model.new()
            elif choice == 1 and len(alive) > 3:
                model.free(int(rng.choice(alive)))
            elif choice == 2:
                number = int(rng.choice(alive))
                model.truncate(number, int(rng.integers(model.tokens[number][0].shape[1] + 1)))
            elif choice == 3 and len(alive) < 9:
                number = int(rng.choice(alive))
                model.fork(number, int(rng.integers(model.tokens[number][0].shape[1] + 1)))
            else:
                some = rng.choice(alive, size=rng.integers(1, min(4, len(alive)) + 1), replace=False)
                try:
                    model.append(*((int(n), int(rng.integers(0, 2 * page_size))) for n in some))
                except ValueError as error:
                    if "free pages" not in str(error):
                        raise
            model.check()


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn"])
def test_quantised_pages_equal_a_contiguous_cache(backend, dtype):
    cos, sin = regard.rotary_tables(DIM_QK, 64)
    paged = regard.PagedKVCache(10, 4, HEADS, DIM_QK, DIM_V, dtype, cos=cos, sin=sin)
    plain = regard.KVCache(2, HEADS, 20, DIM_QK, DIM_V, dtype, cos=cos, sin=sin)
    numbers = [paged.new_sequence(), paged.new_sequence()]
    for seed, counts in enumerate(([5, 2], [1, 1], [0, 7])):
        key, value = (normal(2 * seed + i, 2, HEADS, max(counts), n) for i, n in enumerate((DIM_QK, DIM_V)))
        paged.append(numbers, key, value, counts)
        plain.append(key, value, counts)
    fork = paged.fork(numbers[0])
    paged.append(fork, key[:1, :, :1], value[:1, :, :1])  # the scales are copied with their page
    for number, b in ((numbers[0], 0), (numbers[1], 1), (fork, 0)):
        (table,), n = paged.page_table(number), int(plain.lengths[b])
        for pages, x in (
            (paged.key_pages, plain.key),
            (paged.value_pages, plain.value),
            (paged.key_scales, plain.key_scales),
            (paged.value_scales, plain.value_scales),
        ):
            got = pages[table].reshape(-1, *pages.shape[2:])[:n].swapaxes(0, 1)
            assert got.tobytes() == x[b, :, :n].tobytes()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "float8_e4m3fn"])
@pytest.mark.parametrize("given", ["float32", "bfloat16"])
def test_pages_attend_as_a_contiguous_cache_does(backend, dtype, given):
    paged = regard.PagedKVCache(40, 4, HEADS, DIM_QK, DIM_V, dtype)
    plain = regard.KVCache(3, HEADS, 40, DIM_QK, DIM_V, dtype)
    numbers = [paged.new_sequence() for _ in range(3)]
    for seed, counts in enumerate(([25, 2, 0], [1, 1, 1])):
        key, value = (normal(2 * seed + i, 3, HEADS, max(counts), n) for i, n in enumerate((DIM_QK, DIM_V)))
        paged.append(numbers, key, value, counts)
        plain.append(key, value, counts)
    query = normal(9, 3, 2 * HEADS, 1, DIM_QK, dtype=given)
    out, lse = paged.attend(query, numbers, return_lse=True)
    want, want_lse = plain.attend(query, return_lse=True)
    assert_same_bits(out, want)
    assert_same_bits(lse, want_lse)


@pytest.mark.parametrize("dtype", DTYPES)
def test_attend(backend, dtype):
    cache = regard.PagedKVCache(30, 4, HEADS, DIM_QK, DIM_V, dtype)
    numbers = [cache.new_sequence() for _ in range(3)]
    counts = np.array([9, 1, 14])
    key, value = (normal(i, 3, HEADS, 14, n, dtype=dtype) for i, n in enumerate((DIM_QK, DIM_V)))
    cache.append(numbers, key, value, counts)
    query = normal(5, 3, 2 * HEADS, 2, DIM_QK, dtype=dtype)
    order = [numbers[2], numbers[0], numbers[2]]
    out, lse = cache.attend(query, order, causal=True, return_lse=True)
    for row, b in enumerate((2, 0, 2)):
        part = (slice(b, b + 1), slice(None), slice(0, counts[b]))
        arrays = as_float64(query[row : row + 1], key[part], value[part])
        want, want_lse = reference.attention(*arrays, causal=True, alignment="lower_right", return_lse=True)
        assert_near(out[row], want[0], output_tolerance(query, key, value, {}, dtype))
        assert_near(lse[row], want_lse[0], 1e-5)
    empty = cache.new_sequence()
    assert (as_float64(cache.attend(query[:1], empty))[0] == 0).all()


def test_shared_prefix_attention_by_merging(backend):
    """Cascade: all queries at once over the prefix they share, each over its own rest, merged."""
    cache = regard.PagedKVCache(60, 4, HEADS, DIM_QK, DIM_V)
    prefix, counts = cache.new_sequence(), [3, 1, 9]
    key, value = normal(0, 1, HEADS, 40, DIM_QK), normal(1, 1, HEADS, 40, DIM_V)
    cache.append(prefix, key, value)
    numbers = [cache.fork(prefix) for _ in counts]
    own = [(normal(2, 3, HEADS, 9, DIM_QK)), normal(3, 3, HEADS, 9, DIM_V)]
    cache.append(numbers, *own, counts)
    query = normal(4, 3, 2 * HEADS, 1, DIM_QK)
    want, want_lse = cache.attend(query, numbers, return_lse=True)

    together = query.transpose(2, 1, 0, 3)  # one sequence of three queries
    out, lse = regard.attention(together, key, value, return_lse=True)
    rest = [regard.attention(query, *own, key_lengths=np.array(counts), return_lse=True)]
    parts = [(out.transpose(2, 1, 0, 3), lse.transpose(2, 1, 0)), *rest]
    merged, merged_lse = regard.merge_attention(*zip(*parts, strict=True))
    assert_near(merged, want.astype(np.float64), 1e-5)
    assert_near(merged_lse, want_lse.astype(np.float64), 1e-5)


def state(cache):
    arrays = (cache.key_pages, cache.value_pages)
    tables = [(n, cache.page_table(n).tolist(), cache.lengths(n).tolist()) for n in cache.sequences]
    return [x.tobytes() for x in arrays], tables, cache.free_pages, cache._users.tolist()


def visible(cache):
    return state(cache)[1:]


K, V = normal(0, 2, HEADS, 5, DIM_QK), normal(1, 2, HEADS, 5, DIM_V)
ERRORS = {
    "unknown": (lambda c: c.append([0, 7], K, V), ValueError,
                "sequences: expected sequences of this cache, got 7 at index 1"),
    "freed": (lambda c: c.append([0, 2], K, V), ValueError, "got 2 at index 1"),
    "twice": (lambda c: c.append([1, 1], K, V), ValueError, "expected each sequence once, got 1 again at index 1"),
    "floats": (lambda c: c.append(np.array([0.0, 1.0]), K, V), TypeError, "sequences: expected dtype int32 or int64"),
    "below 0": (lambda c: c.append(np.array([0, -1]), K, V), ValueError, "got -1 at index 1"),
    "no number": (lambda c: c.append("0", K, V), TypeError, "sequences: expected an integer"),
    "another batch": (lambda c: c.append([0], K, V), ValueError, r"key: expected shape \(batch = 1"),
    "other heads": (lambda c: c.append([0, 1], K[:, :1], V), ValueError, "key: expected shape .*heads_kv = 2"),
    "other dim_v": (lambda c: c.append([0, 1], K, K), ValueError, "value: expected shape .*dim_v = 8"),
    "ints": (lambda c: c.append([0, 1], K.astype(int), V), TypeError, "key: expected dtype"),
    "no free pages": (lambda c: c.append([0, 1], np.tile(K, (1, 1, 4, 1)), np.tile(V, (1, 1, 4, 1))), ValueError,
                      "append: expected at least 11 free pages of 4 tokens, got 3"),
    "lengths beyond": (lambda c: c.append([0, 1], K, V, [6, 1]), ValueError,
                       "lengths: expected entries from 0 to len = 5"),
    "lengths for three": (lambda c: c.append([0, 1], K, V, [1, 1, 1]), ValueError, r"shape \(sequences = 2,\)"),
    "truncate beyond": (lambda c: c.truncate([0, 1], [6, 7]), ValueError, "the length held = 6, got 7 at index 1"),
    "truncate below 0": (lambda c: c.truncate(0, -1), ValueError, "lengths: expected an integer >= 0"),
    "truncate below 0 by NumPy's": (lambda c: c.truncate(0, np.int64(-1)), ValueError, "an integer >= 0, got -1"),
    "truncate far beyond": (lambda c: c.truncate(0, 2**70), ValueError, "to the length held = 6, got"),
    "truncate twice": (lambda c: c.truncate([0, 0], [1, 1]), ValueError, "expected each sequence once"),
    "fork beyond": (lambda c: c.fork(0, 7), ValueError, "length: expected at most 6, the length of sequence 0, got 7"),
    "fork below 0": (lambda c: c.fork(0, -1), ValueError, "length: expected an integer >= 0"),
    "fork of none": (lambda c: c.fork(9), ValueError, "got 9 at index 0"),
    "free twice": (lambda c: c.free([0, 0]), ValueError, "expected each sequence once"),
    "free unknown": (lambda c: c.free([0, 9]), ValueError, "got 9 at index 1"),
    "attend unknown": (lambda c: c.attend(K, [0, 9]), ValueError, "got 9 at index 1"),
    "attend with lengths": (lambda c: c.attend(K, [0, 1], key_lengths=[1, 1]), TypeError, "key_lengths: expected None"),
    "attend with a table": (lambda c: c.attend(K, [0, 1], page_table=[[1]]), TypeError, "page_table: expected None"),
    "attend upper left": (lambda c: c.attend(K, [0, 1], alignment="upper_left"), ValueError,
                          "alignment: expected None"),
}  # fmt: skip


@pytest.mark.parametrize("name", ERRORS)
def test_an_error_names_the_argument_and_changes_nothing(name):
    call, kind, message = ERRORS[name]
    cache = regard.PagedKVCache(6, 4, HEADS, DIM_QK, DIM_V)
    a = cache.new_sequence()
    cache.append(a, normal(3, 1, HEADS, 6, DIM_QK), normal(4, 1, HEADS, 6, DIM_V))
    cache.fork(a)
    cache.append(cache.new_sequence(), K[:1], V[:1])
    cache.free(2)
    cache.append(cache.new_sequence(), K[:1, :, :4], V[:1, :, :4])
    before = state(cache)
    with pytest.raises(kind, match=message):
        call(cache)
    assert visible(cache) == before[1:]
    used = [p for _, tables, _ in before[1] for p in tables[0]]
    now = [x.reshape(6, -1)[used] for x in (cache.key_pages, cache.value_pages)]
    was = [np.frombuffer(x, np.float32).reshape(6, -1)[used] for x in before[0]]
    assert all(np.array_equal(x, y) for x, y in zip(now, was, strict=True))


def test_constructor():
    cache = regard.PagedKVCache(6, 4, HEADS, DIM_QK, dtype="int8")
    assert cache.key_pages.shape == (6, 4, HEADS, DIM_QK) == cache.value_pages.shape
    assert cache.key_scales.shape == (6, 4, HEADS) and not cache.key_pages.flags.writeable
    assert cache.dtype == "int8" and cache.nbytes == 6 * 4 * HEADS * (2 * DIM_QK + 8)
    assert "free_pages=6" in repr(cache)
    with pytest.raises(ValueError, match="page_size: expected an integer >= 1, got 0"):
        regard.PagedKVCache(6, 0, HEADS, DIM_QK)
    with pytest.raises(TypeError, match="pages: expected an integer"):
        regard.PagedKVCache(None, 4, HEADS, DIM_QK)
    for pages, page_size in ((2**70, 1), (0, 1 << 62)):
        got = f"got pages = {pages}, page_size = {page_size}, heads_kv = 1, dim_qk = 4, dim_v = 4"
        with pytest.raises(ValueError, match=f"PagedKVCache: expected sizes whose memory can be addressed, {got}"):
            regard.PagedKVCache(pages, page_size, 1, 4)
    with pytest.raises(MemoryError, match="no memory for an array of int8, shape"):
        regard.PagedKVCache(1 << 56, 1, 1, 4, dtype="int8")


def test_truncate_by_numbers_of_numpy(backend):
    model = Model()
    number = model.new()
    model.append((number, 7))
    model.truncate(number, model.cache.lengths(number)[0] - 3)
    model.check()
    model.truncate(number, np.array(2, np.uint8))
    model.check()
