"""Whether machine code has the order that two kernels of attention are written for, as ptxas has arranged it.

    python tools/cuda_order.py build/cuda-report/CMakeFiles/*/csrc/cuda/attention_*.o

In attention by warpgroups the softmax stands beside products: powers of two between a wait that leaves one group of
products running and the next wait. In decoding a lane's loads stand side by side: none waits for the one before.

Needs cuobjdump and nvdisasm: the CUDA toolkit's, or nvidia-cuda-cuobjdump and nvidia-cuda-nvdisasm from PyPI. Exits 1
where a kernel has another order, or where there is no kernel of one of the kinds.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterable, Iterator

FUNCTION = re.compile(r"Function : (\w+)")
ARCHITECTURE = re.compile(r"^arch = (\w+)")
INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(.+?)\s*;")

WARPGROUPS = re.compile(r"attention_hopper\w*Lb1E")  # of the mangled name: those whose scores are nothing but products
FEWEST_POWERS = 40  # a lane's scores of a tile of 80 keys
STEP = re.compile(r"(MUFU\.EX2)|WARPGROUP\.DEPBAR\.LE gsb0, 0x(\d)")

DECODE = re.compile(r"attention_decode\w*(Lb0E|TensorProducts)")  # those of dot products
FEWEST_LOADS = 4  # kTogether
LOAD = re.compile(r"LDG\.E\.(64|128)\b")
WAITS = re.compile(r"BRA|BSSY|BSYNC|CALL|SHFL|LDS|STS|PRMT|FFMA|FMUL|FADD|DFMA|HADD2|I2F")  # or may


def kernels(listing: str) -> Iterator[tuple[str, list[str]]]:
    """The instructions of each kernel, under its architecture and name."""
    architecture, name, instructions = "", "", list[str]()
    for line in listing.splitlines():
        if m := ARCHITECTURE.search(line):
            architecture = m[1]
        elif m := FUNCTION.search(line):
            yield name, instructions
            name, instructions = f"{architecture} {m[1]}", []
        elif m := INSTRUCTION.search(line):
            instructions.append(m[1])
    yield name, instructions


def powers_beside_products(instructions: Iterable[str]) -> int:
    most = 0
    count = -1  # while nothing runs
    for instruction in instructions:
        if m := STEP.search(instruction):
            if m[1]:
                count += count >= 0
            else:
                most = max(most, count)
                count = 0 if m[2] != "0" else -1
    return most


def loads_side_by_side(instructions: Iterable[str]) -> int:
    most = count = 0
    for instruction in instructions:
        if LOAD.search(instruction):
            count += 1
            most = max(most, count)
        elif WAITS.search(instruction):
            count = 0
    return most


def main() -> int:
    powers, loads = dict[str, int](), dict[str, int]()
    for path in sys.argv[1:]:
        listing = subprocess.run(["cuobjdump", "-sass", path], capture_output=True, text=True, check=True).stdout
        for name, instructions in kernels(listing):
            if WARPGROUPS.search(name):
                powers[name] = powers_beside_products(instructions)
            elif DECODE.search(name):
                loads[name] = loads_side_by_side(instructions)
    for what, found in (("powers of two beside products", powers), ("loads side by side", loads)):
        for name, count in found.items():
            print(f"{count:4d} {what}  {name}")
        if not found:
            print(f"no kernel with {what}: is it compiled for sm_90a?")
    right = min(powers.values(), default=0) >= FEWEST_POWERS and min(loads.values(), default=0) >= FEWEST_LOADS
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
