// Rows of any dtype and stride to contiguous compute values (float, or double for float64), and back.
#pragma once

#include <algorithm>
#include <cstdint>

#include "core/array.h"
#include "cpu/simd.h"

namespace regard::cpu {

// Calls f(S{}) with the storage type of `t`, among those whose compute type is T.
template <class T, class F> inline void with_storage(DType t, F&& f) {
  if constexpr (std::is_same_v<T, double>) {
    f(double{});
  } else {
    switch (t) {
      case DType::float16: return f(Half{});
      case DType::bfloat16: return f(BFloat16{});
      default: return f(float{});
    }
  }
}

// Calls f(T{}) with the compute type of `t`.
template <class F> inline void with_compute(DType t, F&& f) {
  if (t == DType::float64)
    f(double{});
  else
    f(float{});
}

template <class S> inline S read(const char* p) {
  S s;
  std::memcpy(&s, p, sizeof s);
  return s;
}

// The element as float64, whatever its type.
inline double element(DType t, const char* p) {
  switch (t) {
    case DType::float64: return read<double>(p);
    case DType::float32: return read<float>(p);
    case DType::float16: return to_float(read<Half>(p));
    case DType::int8: return to_float(read<Int8>(p));
    case DType::float8_e4m3fn: return to_float(read<Float8>(p));
    default: return to_float(read<BFloat16>(p));
  }
}

// out[0..n) = n elements of storage S, `stride` bytes apart.
template <class S, class T> inline void read_row(const char* p, std::int64_t stride, std::int64_t n, T* out) {
  if (stride != static_cast<std::int64_t>(sizeof(S))) {
    for (std::int64_t i = 0; i < n; ++i) out[i] = to_float(read<S>(p + i * stride));
    return;
  }
  std::int64_t i = 0;
  if constexpr (std::is_same_v<T, float> || sizeof(S) == sizeof(T)) {
    constexpr int w = kWidth<T>;
    for (; i + w <= n; i += w) store(out + i, load_as(reinterpret_cast<const S*>(p) + i));
  }
  for (; i < n; ++i) out[i] = to_float(read<S>(p + i * stride));
}

template <class T> inline T round_to(T x, float) { return x; }
template <class S, class T> inline void write_row(char* p, std::int64_t stride, std::int64_t n, const T* in) {
  constexpr int w = kWidth<T>;
  std::int64_t i = 0;
  if (stride == static_cast<std::int64_t>(sizeof(S)))
    for (; i + w <= n; i += w) store_as(reinterpret_cast<S*>(p) + i, load<Vec<T>>(in + i));
  for (; i < n; ++i) {
    S s;
    if constexpr (std::is_same_v<S, double>)
      s = in[i];
    else
      s = from_float<S>(in[i]);
    std::memcpy(p + i * stride, &s, sizeof s);
  }
}

template <class T> inline void read_row(DType t, const char* p, std::int64_t stride, std::int64_t n, T* out) {
  with_storage<T>(t, [&](auto s) { read_row<decltype(s)>(p, stride, n, out); });
}
template <class T> inline void write_row(DType t, char* p, std::int64_t stride, std::int64_t n, const T* in) {
  with_storage<T>(t, [&](auto s) { write_row<decltype(s)>(p, stride, n, in); });
}

// to[c * to_stride + r] = from[r * from_stride + c] for r < rows, c < columns, written up to `padded` rows with zeros
// (padded: a multiple of the vector width, >= rows). Vectors of squares; from_stride >= columns rounded up to a width.
template <class T>
inline void transpose_padded(const T* from, std::int64_t from_stride, int rows, int columns, T* to, std::int64_t to_stride, int padded) {
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

}  // namespace regard::cpu
