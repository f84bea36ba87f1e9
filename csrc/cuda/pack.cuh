// Copies of arrays whose rows asynchronous copies cannot fetch, in 16-bit elements.
#pragma once

#include "cuda/attention_arguments.cuh"
#include "cuda/operations.h"
#include "cuda/tensor_map.h"

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

// Enough blocks to fill any GPU; the rest of the work is the kernel's loop's.
inline std::int64_t pack_blocks(std::int64_t elements) {
  return std::min<std::int64_t>(1 << 14, (elements + kPackThreads - 1) / kPackThreads);
}

// Whether rows of 16-bit elements lie in aligned chunks of 16 bytes.
inline bool fits_chunks(const Array& x) { return x.shape[3] % 8 == 0 && in_vectors(x); }

// A copy without gaps but for the rows, which are filled up to chunks of 16 bytes.
inline Array packed(const Array& x, const Queue& queue) {
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
  if (x.shape[0] == 1) copy.stride[0] = 0;  // packed sequences have one axis for all
  a.elements = stride / 2;
  if (a.elements == 0) return x;
  copy.data = a.to = queue.scratch(stride);
  launch(pack_rows, pack_blocks(a.elements), kPackThreads, 0, queue.stream, a);
  return copy;
}

struct GatherArguments {
  AttentionArguments a;
  View from;    // the pages, of any type
  View scales;  // or absent
  char* to;     // [batch, heads_kv, len_kv, columns] in the query's type, without gaps
  int dim;
  int columns;
};

// Behind a sequence's length there are zeros as far as a tile goes; the rest is left as it is, since nobody fetches it.
REGARD_KERNEL(kPackThreads, 1)
gather_pages(const REGARD_GRID_CONSTANT GatherArguments p) {
  const AttentionArguments& a = p.a;
  const int heads_kv = a.heads / a.group;
  const std::int64_t stride = static_cast<std::int64_t>(block_count()) * kPackThreads;
  const std::int64_t elements = static_cast<std::int64_t>(a.batch) * heads_kv * a.len_kv * p.columns;
  for (std::int64_t n = static_cast<std::int64_t>(block_index()) * kPackThreads + thread_index(); n < elements; n += stride) {
    const int d = static_cast<int>(n % p.columns);
    const int j = static_cast<int>(n / p.columns % a.len_kv);
    const int head = static_cast<int>(n / p.columns / a.len_kv);
    const int b = head / heads_kv;
    const int behind = j - length_of(a.key_lengths, b, a.len_kv);
    if (behind >= kMostTileKeys) continue;
    float x = 0;
    if (behind < 0 && d < p.dim) {
      x = load_as<float>(paged_row(a, p.from, b, head % heads_kv, j) + d * p.from.stride[3], a.stored);
      x *= row_scale(a, p.scales, b, head % heads_kv, j);
    }
    store_as(p.to + n * 2, a.type, x);
  }
}

// Keys or values of pages, one sequence's after another's, rounded to the query's type; rows are filled up with zeros.
inline Array gathered(const AttentionArguments& a, const Array& from, const View& scales, const Queue& queue) {
  const int dim = static_cast<int>(from.shape[3]);
  GatherArguments p{a, view_of(from), scales, nullptr, dim, (dim + 7) / 8 * 8};
  Array copy = from;
  copy.dtype = a.type;
  const std::int64_t shape[] = {a.batch, from.shape[1], a.len_kv, p.columns};
  std::int64_t stride = 2;
  for (int axis = 3; axis >= 0; --axis) {
    copy.shape[axis] = shape[axis];
    copy.stride[axis] = stride;
    stride *= shape[axis];
  }
  if (copy.size() == 0) return copy;
  copy.data = p.to = queue.scratch(stride);
  launch(gather_pages, pack_blocks(copy.size()), kPackThreads, 0, queue.stream, p);
  return copy;
}

struct FillArguments {
  char* to;
  std::int64_t bytes;
};

REGARD_KERNEL(kPackThreads, 1)
fill_bytes(const REGARD_GRID_CONSTANT FillArguments a) {
  const std::int64_t stride = static_cast<std::int64_t>(block_count()) * kPackThreads;
  for (std::int64_t n = static_cast<std::int64_t>(block_index()) * kPackThreads + thread_index(); n < a.bytes; n += stride) a.to[n] = 0;
}

// An array without gaps.
inline void fill_zeros(const Array& x, const Queue& queue) {
  const std::int64_t bytes = x.size() * size_of(x.dtype);
  launch(fill_bytes, pack_blocks(bytes), kPackThreads, 0, queue.stream, FillArguments{x.data, bytes});
}

}  // namespace regard::cuda
