// How bulk copies see an array in global memory. runtime.cu asks the driver for it, tests/cuda_emulation/ has its own.
#pragma once

#include <cstdint>

#include "core/array.h"

namespace regard::cuda {

struct alignas(128) TensorMap {
  std::uint64_t opaque[16];
};

constexpr int kPanelColumns = 64;  // 128 bytes of 16-bit elements: the widest swizzle

// Whether one copy can take a box out of the array: rows without gaps, at multiples of 16 bytes, strides that go forward.
// Strides of axes of length 1 do not matter.
inline bool has_tensor_map(const Array& x) {
  std::int64_t odd = reinterpret_cast<std::intptr_t>(x.data) % 16;
  bool forward = true;
  for (int axis = 0; axis < 3; ++axis) {
    if (x.shape[axis] <= 1) continue;
    odd |= x.stride[axis] % 16;
    forward = forward && x.stride[axis] > 0 && x.stride[axis] < std::int64_t{1} << 40;
  }
  return odd == 0 && forward && (x.shape[3] <= 1 || x.stride[3] == 2);
}

// Of an array [batch, heads, len, dim] of 16-bit elements, none of its axes empty: boxes of `rows` rows and kPanelColumns
// columns of one head, whose chunk c of 16 bytes of row r lies at c ^ (r % 8) in shared memory. Zeros beyond the array.
TensorMap tensor_map_of(const Array& x, int rows);

}  // namespace regard::cuda
