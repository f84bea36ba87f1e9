"""Finds the compiled emulator: REGARD_CUDA_EMULATION names the folder that it was built in."""

from __future__ import annotations

import importlib
import os
import sys
from typing import Any


def emulator() -> Any:
    folder = os.environ["REGARD_CUDA_EMULATION"]
    if folder not in sys.path:
        sys.path.insert(0, folder)
    return importlib.import_module("regard_cuda_emulated")
