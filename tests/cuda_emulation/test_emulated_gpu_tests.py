"""tests/test_cuda.py, which runs on a GPU only: that it can be imported, and that its tests find their fixtures."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parent.parent

PLAN = """
import sys
sys.path.insert(0, sys.argv[1])
import cupy, pytest
from regard import _backend
_backend.cuda = lambda operation: cupy._emulator.emulator()
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", "--setup-plan", "-m", "gpu", sys.argv[2]]))
"""


def test_tests_on_a_gpu_find_their_fixtures(cupy):
    command = [sys.executable, "-c", PLAN, str(Path(__file__).parent / "stand_in"), str(TESTS / "test_cuda.py")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-1000:]
