// Copies of arrays whose rows cp.async cannot fetch: 16-bit elements, four axes, any strides.
#pragma once

#include "cuda/operations.h"
#include "cuda/view.cuh"

namespace regard::cuda {

struct PackArguments {
  View from;
  char* to;  // [shape[0], shape[1], shape[2], columns] without gaps
  std::int64_t shape[4];
  std::int64_t columns;  // shape[3] rounded up; the rest is filled with zeros
  std::int64_t elements;
};

constexpr int kPackThreads = 256;

REGARD_KERNEL(kPackThreads, 1)
pack_rows(const REGARD_GRID_CONSTANT PackArguments a) {
  const std::int64_t stride = static_cast<std::int64_t>(block_count()) * kPackThreads;
  for (std::int64_t n = static_cast<std::int64_t>(block_index()) * kPackThreads + thread_index(); n < a.elements; n += stride) {
    const std::int64_t d = n % a.columns;
    std::int64_t row = n / a.columns;
    const std::int64_t k = row % a.shape[2];
    row /= a.shape[2];
    std::uint16_t x = 0;
    if (d < a.shape[3]) x = read<std::uint16_t>(a.from.at(row / a.shape[1], row % a.shape[1], k, d));
    reinterpret_cast<std::uint16_t*>(a.to)[n] = x;
  }
}

// The array itself where its rows lie in aligned chunks of 16 bytes, else a copy that does.
inline Array in_chunks(const Array& x, const Queue& queue) {
  if (x.shape[3] % 8 == 0 && in_vectors(x)) return x;

  PackArguments a{};
  Array copy = x;
  a.from = view_of(x);
  a.columns = (x.shape[3] + 7) / 8 * 8;
  std::int64_t stride = 2;
  for (int axis = 3; axis >= 0; --axis) {
    a.shape[axis] = x.shape[axis];
    copy.stride[axis] = stride;
    stride *= axis == 3 ? a.columns : x.shape[axis];
  }
  a.elements = stride / 2;
  if (a.elements == 0) return x;
  copy.data = a.to = queue.scratch(stride);
  // Enough blocks to fill any GPU; the rest of the work is the loop's.
  launch(pack_rows, std::min<std::int64_t>(1 << 14, (a.elements + kPackThreads - 1) / kPackThreads), kPackThreads, 0, queue.stream, a);
  return copy;
}

}  // namespace regard::cuda
