"""Registers, spills and shared memory of each CUDA kernel, from what ptxas said in a build.

    cmake --preset cuda-report && cmake --build --preset cuda-report 2>&1 | tee build.log
    python tools/cuda_report.py build.log

Exits 1 where a kernel spills registers, where ptxas does not let products of warpgroups overlap or does not hand
registers from one to the other, or where the log tells of no kernel.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ENTRY = re.compile(r"Compiling entry function '(\w+)' for '(\w+)'")
SPILLS = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
HELD_BACK = re.compile(
    r".*(?:wgmma.mma_async instructions are serialized|warpgroup.(?:wait|arrive) is injected|'setmaxnreg' ignored).*"
)
USED = re.compile(r"Used (\d+) registers(?:.*?(\d+) bytes smem)?")


def kernels(log: str) -> list[tuple[str, str, int, int]]:
    """(mangled name, architecture, registers, bytes spilled) of each kernel and architecture."""
    found = []
    name = arch = ""
    spilled = 0
    for line in log.splitlines():
        if m := ENTRY.search(line):
            name, arch, spilled = m[1], m[2], 0
        elif m := SPILLS.search(line):
            spilled += int(m[2])
        elif (m := USED.search(line)) and name:
            found.append((name, arch, int(m[1]), spilled))
            name = ""
    return found


def readable(names: list[str]) -> list[str]:
    try:
        result = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return names
    return [re.sub(r"\(.*|regard::cuda::|regard::|^void ", "", line) for line in result.stdout.splitlines()]


def main() -> int:
    log = Path(sys.argv[1]).read_text()
    found = kernels(log)
    held_back = HELD_BACK.findall(log)
    for (_, arch, registers, spilled), name in sorted(
        zip(found, readable([k[0] for k in found]), strict=True), key=lambda row: (row[1], row[0][1])
    ):
        print(f"{registers:4d} registers {spilled:5d} bytes spilled  {arch:7s} {name}")
    for line in held_back:
        print(line)
    if not found:
        print("no kernel in this log: was it built with REGARD_CUDA_REPORT=ON?")
    return 0 if found and not held_back and not any(k[3] for k in found) else 1


if __name__ == "__main__":
    sys.exit(main())
