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

// As with_storage<float>(), for all that masks, biases and caches hold beside doubles: also bool, read as int8, and numbers of
// one byte.
template <class F> inline void with_stored(DType t, F&& f) {
  switch (t) {
    case DType::boolean:
    case DType::int8: return f(Int8{});
    case DType::float8_e4m3fn: return f(Float8{});
    default: return with_storage<float>(t, f);
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

// What follows is compiled once, in strided.cpp, for T = float and double: copied into every kernel that reads a row, it was a
// third of the machine code and of the time to compile it.

// out[0..n) = n elements of dtype t, `stride` bytes apart: any but whole numbers of four bytes and more. bool is read as
// int8: false becomes 0, true something else.
template <class T> void read_row(DType t, const char* p, std::int64_t stride, std::int64_t n, T* out);

// The reverse, for the dtypes whose compute type is T.
template <class T> void write_row(DType t, char* p, std::int64_t stride, std::int64_t n, const T* in);

// to[c * to_stride + r] = from[r * from_stride + c] for r < rows, c < columns, written up to `padded` rows with zeros
// (padded: a multiple of the vector width, >= rows). from_stride >= columns rounded up to a width.
template <class T>
void transpose_padded(const T* from, std::int64_t from_stride, int rows, int columns, T* to, std::int64_t to_stride, int padded);

}  // namespace regard::cpu
