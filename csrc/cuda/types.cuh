// Element types in kernels: what they compute in, loads and stores, vectors of 16 bytes.
#pragma once

#include <climits>
#include <cmath>
#include <cstdint>
#include <type_traits>

#include "core/dtype.h"
#include "cuda/device.cuh"
#include "cuda/ptx.cuh"

namespace regard::cuda {

// Of an axis: positions are int in kernels, with room for a tile beyond the end. Host code refuses more.
constexpr std::int64_t kMostElements = INT_MAX - 1024;

// The type that values of storage type T are computed in.
template <class T> using Compute = std::conditional_t<std::is_same_v<T, double>, double, float>;

// f(C{}) for the type that `dtype` is computed in. Host code.
template <class F> void with_compute(DType dtype, F&& f) {
  if (dtype == DType::float64)
    f(double{});
  else
    f(float{});
}

// f(T{}) for the storage type of `dtype`. Host code.
template <class F> void with_type(DType dtype, F&& f) {
  switch (dtype) {
    case DType::float64: return f(double{});
    case DType::float32: return f(float{});
    case DType::float16: return f(Half{});
    default: return f(BFloat16{});
  }
}

template <class C> REGARD_DEVICE C infinity() { return static_cast<C>(INFINITY); }

REGARD_DEVICE float tanh_of(float x) { return tanhf(x); }
REGARD_DEVICE_CALL double tanh_of(double x) { return tanh(x); }  // 120 instructions, at every score of a thread
REGARD_DEVICE float exp_of(float x) { return expf(x); }
REGARD_DEVICE double exp_of(double x) { return exp(x); }
REGARD_DEVICE float log_of(float x) { return logf(x); }
REGARD_DEVICE double log_of(double x) { return log(x); }
template <class C> REGARD_DEVICE C sigmoid_of(C x) { return C(1) / (C(1) + exp_of(-x)); }
REGARD_DEVICE float erfc_of(float x) { return erfcf(x); }
REGARD_DEVICE double erfc_of(double x) { return erfc(x); }

// Elements as they are computed with, and back: to_float() and from_float(), shorter where a GPU has a way. Of float8, the
// exponent is 120 too small in float's place; a product mends it, subnormals included, which a GPU takes like other numbers.
template <class T> REGARD_DEVICE Compute<T> value_of(T x) {
  if constexpr (std::is_same_v<T, Half>)
    return widened(x);
  else if constexpr (std::is_same_v<T, Float8>)
    return (x.bits & 0x7fu) == 0x7fu ? NAN : float_of((x.bits & 0x80u) << 24 | (x.bits & 0x7fu) << 20) * 0x1p120f;
  else
    return to_float(x);
}
template <class T> REGARD_DEVICE T stored_value(Compute<T> x) {
  if constexpr (std::is_same_v<T, Half>)
    return rounded_to_half(x);
  else if constexpr (std::is_same_v<T, double>)
    return x;
  else
    return from_float<T>(x);
}

// Elements whose type is an argument: in kernels that read few, or share what they read.
template <class C> REGARD_DEVICE C load_as(const char* p, DType type) {
  switch (type) {
    case DType::float64: return static_cast<C>(*reinterpret_cast<const double*>(p));
    case DType::float32: return static_cast<C>(*reinterpret_cast<const float*>(p));
    case DType::float16: return static_cast<C>(value_of(*reinterpret_cast<const Half*>(p)));
    case DType::bfloat16: return static_cast<C>(value_of(*reinterpret_cast<const BFloat16*>(p)));
    case DType::int8: return static_cast<C>(value_of(*reinterpret_cast<const Int8*>(p)));
    default: return static_cast<C>(value_of(*reinterpret_cast<const Float8*>(p)));
  }
}
template <class C> REGARD_DEVICE void store_as(char* p, DType type, C x) {
  switch (type) {
    case DType::float64: *reinterpret_cast<double*>(p) = static_cast<double>(x); break;
    case DType::float32: *reinterpret_cast<float*>(p) = static_cast<float>(x); break;
    case DType::float16: *reinterpret_cast<Half*>(p) = stored_value<Half>(static_cast<float>(x)); break;
    default: *reinterpret_cast<BFloat16*>(p) = stored_value<BFloat16>(static_cast<float>(x)); break;
  }
}

template <class C> REGARD_DEVICE C max_or_nan(C a, C b) { return a != a || a > b ? a : b; }

template <class T> REGARD_DEVICE T read(const char* p) { return *reinterpret_cast<const T*>(p); }

template <class T> REGARD_DEVICE Compute<T> value_at(const char* p) { return value_of(read<T>(p)); }

template <class T> REGARD_DEVICE void write(char* p, Compute<T> x) { *reinterpret_cast<T*>(p) = stored_value<T>(x); }

// As many elements as 16 bytes hold, but at most 8. Sums run in this grain whether or not memory allows such loads: bits
// do not depend on strides.
template <class T> struct alignas(sizeof(T) == 1 ? 8 : 16) Vector {
  static constexpr int kLength = sizeof(T) == 1 ? 8 : 16 / sizeof(T);
  T x[kLength];
};

// Up to one vector of a row from column d on, as it is stored; zeros beyond its end.
template <class T> REGARD_DEVICE Vector<T> stored_grain(const char* row, std::int64_t stride, int d, int dim, bool vectors) {
  constexpr int kGrain = Vector<T>::kLength;
  if (vectors && d + kGrain <= dim) return *reinterpret_cast<const Vector<T>*>(row + d * static_cast<int>(sizeof(T)));
  Vector<T> v;
  const int first = opaque(d);  // else a loop of grains keeps eight addresses in registers
  for (int e = 0; e < kGrain; ++e) v.x[e] = first + e < dim ? read<T>(row + (first + e) * stride) : T{};
  return v;
}

template <class T>
REGARD_DEVICE void load_grain(Compute<T> (&to)[Vector<T>::kLength], const char* row, std::int64_t stride, int d, int dim, bool vectors) {
  const Vector<T> v = stored_grain<T>(row, stride, d, dim, vectors);
  for (int e = 0; e < Vector<T>::kLength; ++e) to[e] = value_of(v.x[e]);
}

}  // namespace regard::cuda
