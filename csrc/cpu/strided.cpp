#include "cpu/strided.h"

#include <algorithm>
#include <cstring>
#include <type_traits>

namespace regard::cpu {
namespace {

template <class S, class T> void read_as(const char* p, std::int64_t stride, std::int64_t n, T* out) {
  constexpr int w = kWidth<T>;
  // A float where double is computed, or the reverse (a cache read by a query of another dtype), has no vectors here.
  if (stride != static_cast<std::int64_t>(sizeof(S)) || !std::is_same_v<ComputeOf<S>, T>) {
    for (std::int64_t i = 0; i < n; ++i) out[i] = static_cast<T>(to_float(read<S>(p + i * stride)));
    return;
  }
  if constexpr (std::is_same_v<ComputeOf<S>, T>) {
    const S* const from = reinterpret_cast<const S*>(p);
    if (n < w) return store_few(out, load_few(from, n), n);
    for (std::int64_t i = 0; i + w <= n; i += w) store(out + i, load_as(from + i));
    if (n % w != 0) store(out + n - w, load_as(from + n - w));  // once more some of those before
  }
}

template <class S, class T> void write_as(char* p, std::int64_t stride, std::int64_t n, const T* in) {
  constexpr int w = kWidth<T>;
  S* const to = reinterpret_cast<S*>(p);
  if (stride != static_cast<std::int64_t>(sizeof(S))) {
    for (std::int64_t i = 0; i < n; i += w) {
      const std::int64_t some = std::min<std::int64_t>(w, n - i);
      S few[w];
      store_as(few, load_few(in + i, some));
      for (std::int64_t j = 0; j < some; ++j) std::memcpy(p + (i + j) * stride, few + j, sizeof(S));
    }
  } else if (n < w) {
    store_few(to, load_few(in, n), n);
  } else {
    for (std::int64_t i = 0; i + w <= n; i += w) store_as(to + i, load<Vec<T>>(in + i));
    if (n % w != 0) store_as(to + n - w, load<Vec<T>>(in + n - w));
  }
}

}  // namespace

template <class T> void read_row(DType t, const char* p, std::int64_t stride, std::int64_t n, T* out) {
  if (t == DType::float64) return read_as<double>(p, stride, n, out);
  with_stored(t, [&](auto s) { read_as<decltype(s)>(p, stride, n, out); });
}

template <class T> void write_row(DType t, char* p, std::int64_t stride, std::int64_t n, const T* in) {
  with_storage<T>(t, [&](auto s) { write_as<decltype(s)>(p, stride, n, in); });
}

// Vectors of squares.
template <class T>
void transpose_padded(const T* from, std::int64_t from_stride, int rows, int columns, T* to, std::int64_t to_stride, int padded) {
  using V = Vec<T>;
  constexpr int w = kWidth<T>;
  for (int r = 0; r < padded; r += w)
    for (int c = 0; c < columns; c += w) {
      V square[w];
      for (int i = 0; i < w; ++i) square[i] = r + i < rows ? load<V>(from + (r + i) * from_stride + c) : V{};
      transpose(square);
      for (int i = 0; i < std::min(w, columns - c); ++i) store(to + (c + i) * to_stride + r, square[i]);
    }
}

template void read_row(DType, const char*, std::int64_t, std::int64_t, float*);
template void read_row(DType, const char*, std::int64_t, std::int64_t, double*);
template void write_row(DType, char*, std::int64_t, std::int64_t, const float*);
template void write_row(DType, char*, std::int64_t, std::int64_t, const double*);
template void transpose_padded(const float*, std::int64_t, int, int, float*, std::int64_t, int);
template void transpose_padded(const double*, std::int64_t, int, int, double*, std::int64_t, int);

}  // namespace regard::cpu
