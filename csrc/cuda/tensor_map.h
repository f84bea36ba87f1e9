// How bulk copies see an array in global memory. runtime.cu asks the driver for it, tests/cuda_emulation/ has its own.
#pragma once

#include <algorithm>
#include <cstdint>

#include "core/array.h"

namespace regard::cuda {

struct alignas(128) TensorMap {
  std::uint64_t opaque[16];
};

constexpr int kPanelColumns = 64;  // 128 bytes of 16-bit elements: the widest swizzle

constexpr std::int64_t kMapStrides = std::int64_t{1} << 40;  // what strides are less than

// Whether one copy can take a box out of the array: rows without gaps, at multiples of 16 bytes, that do not overlap, strides
// that go forward. Strides of axes of length 1 do not matter.
inline bool has_tensor_map(const Array& x) {
  std::int64_t odd = reinterpret_cast<std::intptr_t>(x.data) % 16;
  bool forward = x.shape[2] <= 1 || x.stride[2] >= x.shape[3] * 2;
  for (int axis = 0; axis < 3; ++axis) {
    if (x.shape[axis] <= 1) continue;
    odd |= x.stride[axis] % 16;
    forward = forward && x.stride[axis] > 0 && x.stride[axis] < kMapStrides;
  }
  return odd == 0 && forward && (x.shape[3] <= 1 || x.stride[3] == 2);
}

// An array as the driver is told of it: columns first, whose stride it knows. An axis of length 1 gets the stride that it would
// have without gaps, as the driver's manual builds strides from lengths; where heads lie inside of rows they fall all the same.
struct MapShape {
  std::uint64_t length[4];
  std::uint64_t stride[3];  // bytes

  explicit MapShape(const Array& x) {
    std::int64_t end = 0;
    for (int axis = 0; axis < 4; ++axis) {
      const std::int64_t n = x.shape[3 - axis];
      length[axis] = static_cast<std::uint64_t>(n);
      const std::int64_t bytes = axis == 0 ? 2 : n > 1 ? x.stride[3 - axis] : std::min(end, kMapStrides - 16);
      if (axis > 0) stride[axis - 1] = static_cast<std::uint64_t>(bytes);
      end = std::max(end, (bytes * n + 15) / 16 * 16);
    }
  }
};

// Of an array [batch, heads, len, dim] of 16-bit elements, none of its axes empty: boxes of `rows` rows and kPanelColumns
// columns of one head, whose chunk c of 16 bytes of row r lies at c ^ (r % 8) in shared memory. Zeros beyond the array.
TensorMap tensor_map_of(const Array& x, int rows);

}  // namespace regard::cuda
