// What the emulated device says it is: tests change it to reach the kernels of other GPUs.
#pragma once

#include "cuda/runtime.h"

namespace regard::cuda::model {
Device& device();
Clocks& clocks();  // none, until a test says some
}  // namespace regard::cuda::model
