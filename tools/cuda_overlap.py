"""Whether the softmax of attention by warpgroups stands beside products in machine code, as ptxas has ordered it.

    python tools/cuda_overlap.py build/cuda-report/CMakeFiles/regard_cuda_hopper.dir/csrc/cuda/*.o

Needs cuobjdump and nvdisasm: the CUDA toolkit's, or nvidia-cuda-cuobjdump and nvidia-cuda-nvdisasm from PyPI. Exits 1
where a kernel that is to compute powers of two while outputs are multiplied waits for the outputs first.
"""

from __future__ import annotations

import re
import subprocess
import sys

FUNCTION = re.compile(r"Function : (\w*attention_hopper\w*)")
STEP = re.compile(r"(MUFU\.EX2)|WARPGROUP\.DEPBAR\.LE gsb0, 0x(\d)")
PLAIN = "Lb1E"  # of the mangled name: the kernels with that order
FEWEST = 40  # a lane's scores of a tile of 80 keys


def beside_products(listing: str) -> dict[str, int]:
    """Powers of two between a wait that leaves one group of products running and the next wait, by kernel."""
    found = {}
    name = ""
    count = -1  # while nothing runs
    for line in listing.splitlines():
        if m := FUNCTION.search(line):
            name, count = m[1], -1
            if PLAIN in name:
                found[name] = 0
        elif name in found and (m := STEP.search(line)):
            if m[1]:
                count += count >= 0
            else:
                found[name] = max(found[name], count)
                count = 0 if m[2] != "0" else -1
    return found


def main() -> int:
    found = {}
    for path in sys.argv[1:]:
        listing = subprocess.run(["cuobjdump", "-sass", path], capture_output=True, text=True, check=True)
        found |= beside_products(listing.stdout)
    for name, count in found.items():
        print(f"{count:4d} powers of two beside products  {name}")
    if not found:
        print("no kernel with products of warpgroups: is it compiled for sm_90a?")
    return 0 if found and min(found.values()) >= FEWEST else 1


if __name__ == "__main__":
    sys.exit(main())
