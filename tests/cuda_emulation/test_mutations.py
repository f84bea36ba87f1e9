"""The emulator sees mistakes: kernels with one planted in them fail the native kernel tests.

Each mutant is compiled (some seconds) and run by itself; the kernels as they are pass.
"""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
CSRC = HERE.parents[1] / "csrc"
TENSOR = "attention_tensor.cuh"
FRAGMENTS = "attention_fragments.cuh"
HOPPER = "attention_hopper.cuh"
HOPPER_PTX = "ptx_hopper.cuh"
PORTABLE = "attention_portable.cuh"
SCORES = "attention_scores.cuh"
DECODE = "attention_decode.cuh"
LANES = "attention_decode_lanes.cuh"
DECODE_TENSOR = "attention_decode_tensor.cuh"
PROJECT = "project.cuh"
RECURRENT = "recurrent.cuh"
LANE_SUMS = "lane_sums.cuh"
BYTES = "linear_bytes.cuh"

#: The test that sees a file's mutants; test_kernels where none is named.
TESTS = {HOPPER: "test_hopper_kernels", HOPPER_PTX: "test_hopper_kernels"}
TESTS |= {PROJECT: "test_row_kernels", RECURRENT: "test_row_kernels", LANE_SUMS: "test_row_kernels"}
TESTS |= {BYTES: "test_byte_kernels"}

Objects = Callable[[bool], list[str]]


@dataclass(frozen=True)
class Mutation:
    name: str
    file: str
    old: str
    new: str
    sanitizer: bool = False  # seen by AddressSanitizer alone


MUTATIONS = [
    Mutation("no barrier after the copies have landed", TENSOR, "await_copies<1>();\n    block_barrier();",
             "await_copies<1>();"),
    Mutation("no barrier before a stage is used again", TENSOR, "    block_barrier();  // the next fetch",
             "    // the next fetch"),
    Mutation("no wait for the copies", TENSOR, "await_copies<1>();", "await_copies<2>();"),
    Mutation("copies unswizzled, reads swizzled", TENSOR, "copy_async(at(first + r, chunk)",
             "copy_async(base + static_cast<SharedAddress>(((first + r) * kChunks + chunk) * 16)"),
    Mutation("a swizzle that leaves bank conflicts", TENSOR, "(chunk ^ (row & 7))", "(chunk ^ (row & 1))"),
    Mutation("values not transposed", TENSOR, "load_matrices_transposed(v,", "load_matrices(v,"),
    Mutation("one key too many", FRAGMENTS, "|| key(n) >= last) score(n) =", "|| key(n) > last) score(n) ="),
    Mutation("partial tiles taken for whole ones", TENSOR, "all_last < j0 + kKeys", "all_last < j0"),
    Mutation("the last tile left out", TENSOR, "(any.last + kKeys - 1) / kKeys", "any.last / kKeys"),
    Mutation("half of a row's sum", FRAGMENTS, "  l += shuffle_xor(l, 2);\n", ""),
    Mutation("outputs not rescaled", FRAGMENTS, "o[n][half * 2 + 1] *= alpha;", ""),
    Mutation("earlier weights by a product that is not rounded", FRAGMENTS, "rounded_product(x.m, factor) - base",
             "fmaf(x.m, factor, -base)"),
    Mutation("dropout's words not exchanged", FRAGMENTS, "(odd ? other : mine) >>", "mine >>"),
    Mutation("dropout of the other row", FRAGMENTS, "upper | lower << 2", "lower | upper << 2"),
    Mutation("what dropout keeps not scaled", FRAGMENTS, "a.dropout_kept / l", "1.0f / l"),
    Mutation("a row too many fetched", TENSOR, "from, first + r < end);", "from, first + r <= end);", sanitizer=True),
    Mutation("a barrier that only some reach", TENSOR, "    block_barrier();  // the next fetch",
             "    if (thread_index() < 64) block_barrier();  // the next fetch"),
    Mutation("mask ignored", SCORES, "s = *at != 0 ? s", "s = *at != 2 ? s"),
    Mutation("masks and biases of other keys", SCORES, "at += (key(n + 1) - key(n)) * stride", "at += stride"),
    Mutation("one key too many without options, portable", PORTABLE,
             "key(c) < range.last ? s", "key(c) <= range.last ? s"),
    Mutation("no barrier before outputs overwrite values", PORTABLE,
             "  block_barrier();\n  static_assert(P::kOutputs", "  static_assert(P::kOutputs"),
    Mutation("a row's sum from another lane", LANES, "lane % lanes * kRows / lanes;", "lane % kRows;"),
    Mutation("keys beyond the split weigh", LANES, "j < x.end ? score[r * x.pitch] : C(0)",
             "score[r * x.pitch]"),
    Mutation("columns of a second sweep written over the first", LANES, "column > 0 ? score + s[0] : s[0]", "s[0]"),
    Mutation("no barrier before the softmax", DECODE, "  block_barrier();\n  weigh_scores", "  weigh_scores"),
    Mutation("no zeros behind the weights", DECODE, "    if (n - lane < count) row[n] = C(0);\n", ""),
    Mutation("no barrier before sums are added", DECODE,
             "  block_barrier();\n  for (int n = thread_index(); n < x.rows",
             "  for (int n = thread_index(); n < x.rows"),
    Mutation("columns in another order than the queries'", DECODE_TENSOR,
             "upper.neighbours(e), lower.neighbours(e)", "upper.neighbours(e + 2), lower.neighbours(e)"),
    Mutation("two keys exchanged", DECODE_TENSOR, "pair(*this, e, other, e)", "pair(other, e, *this, e)"),
    Mutation("weights of other keys", DECODE_TENSOR, "pack_pair<T>(score[8], score[9])",
             "pack_pair<T>(score[2], score[3])"),
    Mutation("one panel of two left out", DECODE_TENSOR, "narrow ? o[0][e][c] + o[1][e][c]", "narrow ? o[0][e][c]"),
    Mutation("a float8 NaN taken for a number", DECODE_TENSOR, "0x01010101u", "0u"),
    Mutation("an int8 with another sign", DECODE_TENSOR, "^ 0x64806480u", "| 0x64006400u"),
    Mutation("no barrier before values overwrite keys", PORTABLE,
             "v0 += P::kValues) {\n      block_barrier();", "v0 += P::kValues) {"),
    Mutation("no barrier before keys overwrite values", PORTABLE,
             "d += P::kDepth) {\n      block_barrier();", "d += P::kDepth) {"),
    Mutation("one key too many, portable", SCORES, "|| key(n) >= last) score(n) =", "|| key(n) > last) score(n) ="),
    Mutation("barriers not published", HOPPER, "    publish_barriers();\n", ""),
    Mutation("no wait for the queries to land", HOPPER, "    await_phase(shared.query_landed(), queries & 1);\n", ""),
    Mutation("no wait for the keys to land", HOPPER,
             "++ring.n;\n      await_phase(shared.key_landed(ring.stage()), ring.parity());\n", "++ring.n;\n"),
    Mutation("no wait for the values to land", HOPPER,
             "      await_phase(shared.value_landed(before.stage()), before.parity());\n", ""),
    Mutation("no wait for a stage to be free", HOPPER,
             "        await_room(shared.key_free(key.stage()), key.parity() ^ 1);\n", ""),
    Mutation("a wrong parity", HOPPER, "return n / kHopperStages & 1;", "return n & 1;"),
    Mutation("fewer bytes expected than come", HOPPER, "arrive_expecting(landed, kKeys * kColumns * 2)",
             "arrive_expecting(landed, kKeys * kColumns)"),
    Mutation("boxes of a page one upon the other", HOPPER, "r * kPanelColumns * 2), map", "0), map"),
    Mutation("boxes by some of the lanes alone", HOPPER, "const int r = thread_index() * p.box;",
             "const int r = thread_index() * 2 * p.box;"),
    Mutation("boxes of one page alone", HOPPER, "page_of(a, b, j) : a.pages", "page_of(a, b, tile * kKeys) : a.pages"),
    Mutation("a page behind the last one", HOPPER, "j < keys ? page_of(a, b, j) : a.pages", "page_of(a, b, j)",
             sanitizer=True),
    Mutation("dropout of another tile", HOPPER, "row(), tile * kKeys);", "row(), tile);"),
    Mutation("keys given back before they are read", HOPPER, "order_scores(ring.stage());\n      await_phase",
             "release(shared.key_free(ring.stage()));\n      order_scores(ring.stage());\n      await_phase"),
    Mutation("no wait for the scores", HOPPER, "end_scores<1>(ring);", "end_scores<2>(ring);"),
    Mutation("no wait for the outputs", HOPPER, "await_products<0>();\n    pin(o);",
             "await_products<1>();\n    pin(o);"),
    Mutation("no fence before the outputs", HOPPER, "    pin(weights);\n    open_products();\n", "    pin(weights);\n"),
    Mutation("a step in a panel half as far", HOPPER, "k % 4 * 32", "k % 4 * 16"),
    Mutation("panels of values one upon the other", HOPPER, "shared.value(stage), kKeys * Shared::kRowBytes)",
             "shared.value(stage), 0)"),
    Mutation("another swizzle", HOPPER_PTX, "std::uint64_t{1} << 62", "std::uint64_t{2} << 62"),
    Mutation("the other's turn twice", HOPPER, "arrive_named(kTurn + 1 - group,", "arrive_named(kTurn + group,"),
    Mutation("partial tiles taken for whole ones, warpgroups", HOPPER, "all_last < j0 + kKeys", "all_last < j0"),
    Mutation("a box of queries as low as one of keys", HOPPER, "fetch_panels<kHopperQueries, kDim>(",
             "fetch_panels<kKeys, kDim>("),
    Mutation("keys of as many panels as values", HOPPER, "fetch_tile<kKeys, kDim>(", "fetch_tile<kKeys, kDimV>("),
    Mutation("stages of values as far apart as keys'", HOPPER, "stage * kValueBytes", "stage * kKeyBytes"),
    Mutation("an item left out", HOPPER, "block_index() : blocks - 1 - block_index()",
             "block_index() : block_index() - 1"),
    Mutation("no barrier before states overwrite states", RECURRENT,
             "    block_barrier();\n    for (int r = 0;", "    for (int r = 0;"),
    Mutation("no barrier after the states", RECURRENT,
             "    block_barrier();\n    if (unit >= a.hidden) continue;", "    if (unit >= a.hidden) continue;"),
    Mutation("a step behind a sequence's end", RECURRENT, "own.time < length_of", "own.time <= length_of"),
    Mutation("a unit too many", RECURRENT, "if (unit >= a.hidden) return;", "if (unit > a.hidden) return;",
             sanitizer=True),
    Mutation("sums given to other lanes", LANE_SUMS, "upper ? x[n] : x[n + kHalf]", "upper ? x[n + kHalf] : x[n]"),
    Mutation("no barrier before rows overwrite rows", PROJECT,
             "    block_barrier();\n    for (int n = thread_index(); n < kProjectTile",
             "    for (int n = thread_index(); n < kProjectTile"),
    Mutation("no barrier before a stage is used again, bytes", BYTES,
             "    block_barrier();  // all have what", "    // all have what"),
    Mutation("no wait for the copies, bytes", BYTES, "await_copies<kByteStages - 2>()", "await_copies<kByteStages>()"),
    Mutation("no barrier before sums overwrite stages", BYTES,
             "  await_copies<0>();\n  block_barrier();\n", "  await_copies<0>();\n"),
    Mutation("no barrier before sums are read", BYTES, "  block_barrier();\n  static_assert", "  static_assert"),
    Mutation("a swizzle that leaves bank conflicts, bytes", BYTES, "(c ^ (r >> 1 & 3))", "(c ^ (r & 1))"),
    Mutation("halves of the depth exchanged", BYTES, "c + lane / 8 % 2)", "c + 1 - lane / 8 % 2)"),
    Mutation("the last step left out", BYTES, "(a.pitch + kByteDepth - 1) / kByteDepth", "a.pitch / kByteDepth"),
    Mutation("a row too many fetched, bytes", BYTES, "row < (of_x ? a.rows", "row <= (of_x ? a.rows", sanitizer=True),
    Mutation("an output too many read", BYTES, "out0 + o < a.outputs ? out0 + o : a.outputs - 1)", "out0 + o)",
             sanitizer=True),
    Mutation("no barrier before the largest is known", BYTES,
             "  block_barrier();\n  for (int w = 0;", "  for (int w = 0;"),
    Mutation("a window past the last key", PROJECT, "at >= 0 && at < a.len", "at >= 0 && at <= a.len", sanitizer=True),
]  # fmt: skip


def compile_with(options: list[str], sources: list[str], output: Path, sanitizer: bool) -> None:
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        pytest.skip(f"needs a C++ compiler ({compiler})")
    flags = ["-std=c++20", "-O1", "-DREGARD_EMULATED", f"-I{HERE}", "-Wno-unknown-pragmas", "-Wno-psabi"]
    flags += ["-fsanitize=address"] * sanitizer
    subprocess.run([compiler, *flags, *options, *sources, "-o", str(output)], check=True, timeout=300)


@pytest.fixture(scope="module")
def emulator_objects(tmp_path_factory: pytest.TempPathFactory) -> Callable[[bool], list[str]]:
    """What no mutation changes, compiled once, with and without the sanitizer."""
    folder = tmp_path_factory.mktemp("emulator")

    @functools.cache
    def objects(sanitizer: bool) -> list[str]:
        made = [folder / f"{name}-{sanitizer}.o" for name in ("emulation", "runtime_model")]
        for output in made:
            source = str(HERE / f"{output.name.partition('-')[0]}.cpp")
            compile_with([f"-I{CSRC}", "-c"], [source], output, sanitizer)
        return [str(output) for output in made]

    return objects


def build(csrc: Path, folder: Path, test: str, objects: list[str], sanitizer: bool) -> Path:
    program = folder / "kernels"
    sources = [str(HERE / f"{test}.cpp"), str(HERE / "kernels_main.cpp"), *objects, "-lboost_context"]
    compile_with([f"-I{csrc}", f"-DREGARD_TEST={test}"], sources, program, sanitizer)
    return program


def run(program: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(program)], capture_output=True, text=True, timeout=300, check=False)


@pytest.fixture(scope="module", autouse=True)
def _wanted() -> None:
    if "REGARD_CUDA_EMULATION" not in os.environ:
        pytest.skip("needs REGARD_CUDA_EMULATION, as the other emulated tests")


@pytest.mark.slow
@pytest.mark.parametrize("sanitizer", [False, True])
@pytest.mark.parametrize("test", ["test_kernels", "test_hopper_kernels", "test_row_kernels", "test_byte_kernels"])
def test_the_kernels_as_they_are_pass(tmp_path: Path, emulator_objects: Objects, test: str, sanitizer: bool) -> None:
    result = run(build(CSRC, tmp_path, test, emulator_objects(sanitizer), sanitizer))
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.slow
@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: m.name.replace(" ", "_"))
def test_a_mutant_is_caught(tmp_path: Path, emulator_objects: Objects, mutation: Mutation) -> None:
    for folder in ("core", "cuda"):
        shutil.copytree(CSRC / folder, tmp_path / folder)
    source = tmp_path / "cuda" / mutation.file
    text = source.read_text()
    assert text.count(mutation.old) == 1, "the mutation no longer fits its source"
    source.write_text(text.replace(mutation.old, mutation.new))
    test = TESTS.get(mutation.file, "test_kernels")
    result = run(build(tmp_path, tmp_path, test, emulator_objects(mutation.sanitizer), mutation.sanitizer))
    assert result.returncode != 0, "the mutant passes"
    if mutation.sanitizer:
        assert "heap-buffer-overflow" in result.stderr
