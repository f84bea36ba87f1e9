"""The command line: what runs here, whether it is right, and how fast it is. Needs NumPy alone."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Sequence

import regard

_COMMANDS = {
    "info": "what this installation is, and what it uses on this machine",
    "check": "compare every operation on every instruction set with the reference; exit status 1 if wrong",
    "bench": "time every operation against NumPy, and PyTorch where installed",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; answers the exit status."""
    parser = argparse.ArgumentParser(prog="python -m regard", description="Attention on plain arrays.")
    parser.add_argument("--version", action="version", version=f"regard {regard.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="info | check | bench")
    for name, about in _COMMANDS.items():
        module = importlib.import_module(f"regard._cli.{name}")
        command = commands.add_parser(name, help=about, description=about)
        command.add_argument("--plain", action="store_true", help="aligned text even where rich is installed")
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    options = parser.parse_args(arguments)
    return int(options.run(options))
