"""The emulator sees mistakes: kernels with one planted in them fail the native kernel tests.

Each mutant is compiled (some ten seconds) and run by itself; the kernels as they are pass.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
CSRC = HERE.parents[1] / "csrc"
TENSOR = "attention_tensor.cuh"
PORTABLE = "attention_portable.cuh"
SCORES = "attention_scores.cuh"


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
    Mutation("one key too many", TENSOR, "if (j < first || j >= last)", "if (j < first || j > last)"),
    Mutation("partial tiles taken for whole ones", TENSOR, "all_last < j0 + kKeys", "all_last < j0"),
    Mutation("the last tile left out", TENSOR, "(any.last + kKeys - 1) / kKeys", "any.last / kKeys"),
    Mutation("half of a row's sum", TENSOR, "      l += shuffle_xor(l, 2);\n", ""),
    Mutation("outputs not rescaled", TENSOR, "o[r][n][half * 2 + 1] *= alpha;", ""),
    Mutation("a row too many fetched", TENSOR, "from, first + r < end);", "from, first + r <= end);", sanitizer=True),
    Mutation("a barrier that only some reach", TENSOR, "    block_barrier();  // the next fetch",
             "    if (thread_index() < 64) block_barrier();  // the next fetch"),
    Mutation("mask ignored", SCORES, "*a.mask.at(b, h, i, j) == 0) s =", "*a.mask.at(b, h, i, j) == 2) s ="),
    Mutation("no barrier before values overwrite keys", PORTABLE,
             "v0 += P::kValues) {\n      block_barrier();", "v0 += P::kValues) {"),
    Mutation("no barrier before keys overwrite values", PORTABLE,
             "d += P::kDepth) {\n      block_barrier();", "d += P::kDepth) {"),
    Mutation("one key too many, portable", PORTABLE, "j >= range.last", "j > range.last"),
]  # fmt: skip


def build(csrc: Path, folder: Path, sanitizer: bool) -> Path:
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        pytest.skip(f"needs a C++ compiler ({compiler})")
    program = folder / "kernels"
    flags = ["-std=c++20", "-O1", "-DREGARD_EMULATED", f"-I{csrc}", f"-I{HERE}", "-Wno-unknown-pragmas"]
    flags += ["-fsanitize=address"] * sanitizer
    sources = [str(HERE / f"{name}.cpp") for name in ("emulation", "runtime_model", "test_kernels", "kernels_main")]
    subprocess.run([compiler, *flags, *sources, "-lboost_context", "-o", str(program)], check=True, timeout=300)
    return program


def run(program: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(program)], capture_output=True, text=True, timeout=300, check=False)


@pytest.fixture(scope="module", autouse=True)
def _wanted() -> None:
    if "REGARD_CUDA_EMULATION" not in os.environ:
        pytest.skip("needs REGARD_CUDA_EMULATION, as the other emulated tests")


@pytest.mark.slow
@pytest.mark.parametrize("sanitizer", [False, True])
def test_the_kernels_as_they_are_pass(tmp_path: Path, sanitizer: bool) -> None:
    result = run(build(CSRC, tmp_path, sanitizer))
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.slow
@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: m.name.replace(" ", "_"))
def test_a_mutant_is_caught(tmp_path: Path, mutation: Mutation) -> None:
    for folder in ("core", "cuda"):
        shutil.copytree(CSRC / folder, tmp_path / folder)
    source = tmp_path / "cuda" / mutation.file
    text = source.read_text()
    assert text.count(mutation.old) == 1, "the mutation no longer fits its source"
    source.write_text(text.replace(mutation.old, mutation.new))
    result = run(build(tmp_path, tmp_path, mutation.sanitizer))
    assert result.returncode != 0, "the mutant passes"
    if mutation.sanitizer:
        assert "heap-buffer-overflow" in result.stderr
