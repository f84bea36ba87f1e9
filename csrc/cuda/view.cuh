// Arrays of up to four axes as kernels get them.
#pragma once

#include <algorithm>
#include <cstdint>
#include <initializer_list>

#include "core/array.h"
#include "cuda/types.cuh"

namespace regard::cuda {

struct View {
  char* data;  // null: absent
  std::int64_t stride[4];

  template <class... Index> REGARD_DEVICE char* at(Index... index) const {
    char* p = data;
    int axis = 0;
    ((p += static_cast<std::int64_t>(index) * stride[axis++]), ...);
    return p;
  }
};

// Data may be null where an array is empty: such views are never read, and must not look absent.
inline View view_of(const Array& x) {
  View v{};
  if (!x.present()) return v;
  static char nothing;
  v.data = x.data != nullptr ? x.data : &nothing;
  for (int a = 0; a < std::min(x.rank, 4); ++a) v.stride[a] = x.stride[a];
  return v;
}

// For axes that kernels count in int.
inline void require_room(std::initializer_list<std::int64_t> lengths) {
  for (const std::int64_t n : lengths)
    if (n > kMostElements) throw NoKernel("no CUDA kernel for axes of 2^31 - 1024 elements or more");
}

// int32 or int64 numbers.
struct Indices {
  View view;
  bool wide;  // int64

  constexpr bool present() const { return view.data != nullptr; }
  template <class... Index> REGARD_DEVICE std::int64_t at(Index... index) const {
    const char* const p = view.at(index...);
    return wide ? read<std::int64_t>(p) : read<std::int32_t>(p);
  }
};

inline Indices indices_of(const Array& x) { return {view_of(x), x.dtype == DType::int64}; }

// A number that came from a device unchecked: whatever it is, nothing outside [low, high] is touched.
REGARD_DEVICE std::int64_t held(std::int64_t x, std::int64_t low, std::int64_t high) { return x < low ? low : x > high ? high : x; }

// The valid prefix of sequence b: all where there are no lengths.
REGARD_DEVICE int length_of(const Indices& lengths, int b, int limit) {
  return lengths.present() ? static_cast<int>(held(lengths.at(b), 0, limit)) : limit;
}

// Whether each row of the array starts at a multiple of 16 bytes and has no gaps.
inline bool in_vectors(const Array& x) {
  std::int64_t odd = reinterpret_cast<std::intptr_t>(x.data) % 16;
  for (int axis = 0; axis < x.rank - 1; ++axis)
    if (x.shape[axis] > 1) odd |= x.stride[axis] % 16;
  return odd == 0 && x.stride[x.rank - 1] == size_of(x.dtype);
}

}  // namespace regard::cuda
