"""Writes the type stubs of the compiled modules, or checks that they still fit.

    python tools/stubs.py           write python/regard/_cpu_features.pyi and _cpu.pyi
    python tools/stubs.py --check   exit 1, with a diff, where the installed modules have drifted from them

Every instruction set's module is built from the same bindings, so they share the stub `_cpu.pyi`.
Needs an installed regard and pybind11-stubgen (the extra `dev`).
"""

from __future__ import annotations

import argparse
import ast
import difflib
import subprocess
import sys
import tempfile
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent.parent / "python" / "regard"
HEADER = "# Written by tools/stubs.py from the compiled {}; do not edit.\n"

#: How versions of pybind11 spell the same parameter type, and the type that this package means.
SIMPLER = {
    "typing.SupportsInt | typing.SupportsIndex": "int",
    "typing.SupportsInt": "int",
    "typing.SupportsFloat | typing.SupportsIndex": "float",
    "typing.SupportsFloat": "float",
    "types.CapsuleType": "typing_extensions.CapsuleType",
}


class _Simplify(ast.NodeTransformer):
    """Plain parameter types; no docstrings, and no values of constants, which differ by machine."""

    def visit(self, node: ast.AST) -> ast.AST:
        if isinstance(node, ast.expr) and (name := SIMPLER.get(ast.unparse(node))):
            return ast.parse(name, mode="eval").body
        return super().visit(node)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST:
        if isinstance(node.target, ast.Name) and node.target.id != "__all__":
            node.value = None
        return node

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        node.body = [ast.Expr(ast.Constant(...))]
        return self.generic_visit(node)


def generate(module: str) -> str:
    """The simplified stub of one compiled module."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-P"] if sys.version_info >= (3, 11) else [sys.executable]
        command += ["-m", "pybind11_stubgen", f"regard.{module}", "--exit-code", "-o", folder]
        subprocess.run(command, check=True, cwd=folder)
        source = (Path(folder) / "regard" / f"{module}.pyi").read_text()
    return ast.unparse(_Simplify().visit(ast.parse(source))) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description="Writes the type stubs of the compiled modules.")
    parser.add_argument("--check", action="store_true", help="compare instead of writing")
    check = parser.parse_args().check

    from regard import _backend

    stubs = {"_cpu_features": "_cpu_features"} | {f"_cpu_{isa}": "_cpu" for isa in _backend.possible()}
    drifted = False
    for module, name in stubs.items():
        path = PACKAGE / f"{name}.pyi"
        stub = generate(module)
        if not check:
            path.write_text(HEADER.format("_cpu_<instruction set>" if name == "_cpu" else name) + stub)
            continue
        committed = path.read_text().partition("\n")[2]
        if ast.dump(ast.parse(committed)) != ast.dump(ast.parse(stub)):
            drifted = True
            lines = difflib.unified_diff(
                committed.splitlines(), stub.splitlines(), str(path.name), f"regard.{module}", lineterm=""
            )
            print("\n".join(lines))
    if drifted:
        print("The stubs have drifted: run `python tools/stubs.py` and commit what it writes.")
    return int(drifted)


if __name__ == "__main__":
    sys.exit(main())
