"""Rules of the code base that no compiler checks."""

from __future__ import annotations

import importlib.util
import re
import struct
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import run_python
from regard import _backend, _cpu_features

ROOT = Path(__file__).resolve().parent.parent
CSRC = ROOT / "csrc"
SUFFIXES = {".py", ".pyi", ".cpp", ".h", ".cu", ".cuh", ".md", ".txt", ".toml"}
MAX_LINES = 600

#: The only files that may name an intrinsic: one a vector unit or matrix unit.
INTRINSIC_FILES = re.compile(r"(simd_\w+|tile_amx)\.h")
INTRINSIC = re.compile(
    r"\b_mm\d*_\w+|\b__m\d+[id]?\b|\b_tile_\w+|\bv(ld|st|fma|add|mul)\w*q_[fsu]\d+\b|intrin\.h|arm_neon\.h"
)
BLAS = re.compile(r"\bcblas_\w+|\b[sdh]gemm_?\b|mkl|openblas|cublas|cudnn|onednn|dnnl", re.IGNORECASE)

needs_sources = pytest.mark.skipif(not CSRC.is_dir(), reason="needs the repository")


def sources(*folders: str) -> Iterator[tuple[Path, str]]:
    for folder in folders:
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in SUFFIXES and "build" not in path.relative_to(ROOT).parts:
                yield path.relative_to(ROOT), path.read_text()


def code(text: str) -> str:
    """C++ without comments."""
    return re.sub(r"//[^\n]*|/\*.*?\*/", "", text, flags=re.DOTALL)


def offences(pattern: str | re.Pattern[str], *folders: str, allowed: re.Pattern[str] | None = None) -> list[str]:
    return [
        f"{path}: {match[0]}"
        for path, text in sources(*folders)
        if path.suffix != ".md" and not (allowed and allowed.fullmatch(path.name))
        for match in re.finditer(pattern, code(text))
    ]


def includes(path: Path, seen: set[Path] | None = None) -> set[Path]:
    """A source's own headers, and theirs."""
    seen = set() if seen is None else seen
    for name in re.findall(r'#include "([^"]+)"', path.read_text()):
        header = CSRC / name
        if header.exists() and header not in seen:
            seen.add(header)
            includes(header, seen)
    return seen


@needs_sources
def test_files_stay_short() -> None:
    folders = ("csrc", "python", "tests", "bench", "examples", "docs", "tools")
    long = {str(path): n for path, text in sources(*folders) if (n := text.count("\n")) > MAX_LINES}
    assert not long, f"over {MAX_LINES} lines: {long}"


@needs_sources
def test_core_is_free_of_its_users() -> None:
    """core/ says what is computed: no OpenMP, intrinsics, CUDA runtime or Python."""
    assert not offences(
        r"#include <(omp|Python|pybind11|cuda|immintrin)[^>]*>|#pragma omp|#include \"(?!core/)[^\"]*\"",
        "csrc/core",
    )
    assert not offences(INTRINSIC, "csrc/core")


@needs_sources
def test_the_backends_do_not_know_each_other() -> None:
    assert not offences(
        r"#include [<\"]cud[ag][^>\"]*[>\"]|#include [<\"](pybind11|Python|bindings)[^>\"]*[>\"]", "csrc/cpu"
    )
    if (CSRC / "cuda").exists():
        assert not offences(r"#include [<\"](cpu/|pybind11|Python|bindings)[^>\"]*[>\"]", "csrc/cuda")


@needs_sources
def test_intrinsics_stay_in_their_headers() -> None:
    assert not offences(INTRINSIC, "csrc/cpu", "csrc/core", "csrc/bindings", allowed=INTRINSIC_FILES)


@needs_sources
def test_memory_is_asked_for_in_one_way() -> None:
    """By the built-in function alone, gcc drops what it does not inline: see cpu/prefetch.h."""
    assert not offences("__builtin_prefetch", "csrc/cpu", allowed=re.compile(r"prefetch\.h"))


@needs_sources
def test_bindings_are_functions_and_know_no_vector_width() -> None:
    """Several instruction sets live in one process, and the bindings are compiled once for all of them."""
    assert not offences(r"\bclass_<|\benum_<|register_exception", "csrc/bindings")
    for path in (CSRC / "bindings").glob("*.cpp"):
        wide = [h.name for h in includes(path) if h.name.startswith(("simd", "tile_"))]
        assert not wide, f"{path.name} includes {wide}"


@needs_sources
def test_no_foreign_kernels_and_no_fast_math() -> None:
    assert not offences(BLAS, "csrc")
    for path in (ROOT / "CMakeLists.txt", ROOT / "pyproject.toml", ROOT / "CMakePresets.json"):
        settings = re.sub(r"#[^\n]*", "", path.read_text())
        assert not re.search(r"-ffast-math|-Ofast|-funsafe-math|find_package\(BLAS", settings), path.name


@needs_sources
def test_vector_loops_call_no_math_library() -> None:
    """libm's results differ between systems: kernels have float32 functions of their own."""
    assert not offences(r"\bstd::(expf|tanhf|erff?)\(|\b(expf|tanhf)\(", "csrc/cpu")


def initialisers(path: Path) -> int:
    """How many functions a shared object runs when it is loaded (entries of .init_array)."""
    elf = path.read_bytes()
    if elf[:5] != b"\x7fELF\x02":
        pytest.skip("not a 64-bit ELF file")
    (table,) = struct.unpack_from("<Q", elf, 40)
    size, count, _ = struct.unpack_from("<HHH", elf, 58)
    sections = [struct.unpack_from("<IIQQQQ", elf, table + i * size) for i in range(count)]
    init_array = 14
    return sum(length // 8 for _, kind, _, _, _, length in sections if kind == init_array)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads ELF files")
@pytest.mark.parametrize("isa", _backend.built())
def test_loading_runs_no_wide_instruction(isa: str) -> None:
    """No static initialiser comes from a source compiled for an instruction set.

    The module of features is compiled for none: what it runs, the compiler's own start-up code, is allowed.
    """
    module = importlib.util.find_spec(f"regard._cpu_{isa}")
    assert module is not None
    assert initialisers(Path(str(module.origin))) == initialisers(Path(str(_cpu_features.__file__)))


def test_import_is_light() -> None:
    result = run_python(
        textwrap.dedent(
            """
            import sys
            import regard
            heavy = {"torch", "cupy", "jax", "rich", "matplotlib", "ml_dtypes", "onnx", "tokenizers"}
            heavy |= {"safetensors", "regard.nn", "regard.reference", "regard.onnx"}
            print(sorted(heavy & set(sys.modules)))
            """
        )
    )
    assert result.stdout.strip() == "[]", result.stdout + result.stderr


def test_a_call_leaves_floating_point_as_it_was() -> None:
    """Neither import nor use sets flush-to-zero: half the smallest normal number stays a number."""
    result = run_python(
        textwrap.dedent(
            """
            import numpy as np
            tiny = np.full(64, np.finfo(np.float32).tiny, np.float32)
            before = (tiny * np.float32(0.5)).tobytes()
            import regard
            assert (tiny * np.float32(0.5)).tobytes() == before and before != bytes(256), "import"
            x = np.ones((1, 2, 200, 16), np.float32)
            regard.attention(x, x, x)
            assert (tiny * np.float32(0.5)).tobytes() == before, "call"
            print("same")
            """
        )
    )
    assert result.stdout.strip() == "same", result.stdout + result.stderr


@pytest.mark.parametrize("name", ["sse9", "AVX2", "_cpu_avx2", " "])
def test_unknown_instruction_set_lists_the_possible_ones(name: str) -> None:
    result = run_python("import regard", isa=name)
    assert result.returncode == 1
    names = ", ".join(_backend.possible())
    assert f"REGARD_ISA: expected one of {names}, got {name!r} (no such instruction set)" in result.stderr


def test_impossible_instruction_set_says_why() -> None:
    impossible = {n: why for n, why in _backend.INSTRUCTION_SETS.items() if why}
    if not impossible:
        pytest.skip("this machine runs every instruction set")
    for name, why in impossible.items():
        result = run_python("import regard", isa=name)
        assert result.returncode == 1
        assert f"got {name!r} ({why})" in result.stderr


@pytest.mark.parametrize("isa", _backend.possible())
def test_environment_forces_an_instruction_set(isa: str) -> None:
    result = run_python("from regard import _backend; print(_backend.isa, _backend.cpu.__name__)", isa=isa)
    assert result.stdout.split() == [isa, f"regard._cpu_{isa}"], result.stderr


@needs_sources
def test_version_is_said_once_a_place() -> None:
    import regard

    for name, pattern in [
        ("pyproject.toml", r'^version = "(.*)"'),
        ("CMakeLists.txt", r"regard VERSION (\S+)"),
    ]:
        found = re.search(pattern, (ROOT / name).read_text(), re.MULTILINE)
        assert found is not None
        assert found[1] == regard.__version__, name


@needs_sources
@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="needs git")
def test_nothing_built_is_committed() -> None:
    try:
        listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("git does not answer here")
    assert not [f for f in listed.split() if f.endswith((".so", ".o", ".whl", ".pyc"))]
    # Weights that an example's own script has trained are no build's, if they are small.
    weights = [ROOT / f for f in listed.split() if f.endswith(".safetensors")]
    assert not [str(f) for f in weights if f.parent.name != "examples" or f.stat().st_size > 2_000_000]
