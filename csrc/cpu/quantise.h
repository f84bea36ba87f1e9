// Rows of float to numbers of one byte with one scale: x / scale, rounded to nearest, ties to even.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>

#include "cpu/simd.h"

namespace regard::cpu {

// The largest number each holds: it stands for the row's largest magnitude.
template <class S> constexpr float kLargest = 0;
template <> constexpr float kLargest<Int8> = 127;
template <> constexpr float kLargest<Float8> = 448;

using UnsignedWords = std::uint32_t __attribute__((vector_size(kVectorBytes)));
using Bytes = std::uint8_t __attribute__((vector_size(kVectorBytes / 4)));

inline UnsignedWords words_of(Vec<float> v) {
  UnsignedWords u;
  std::memcpy(&u, &v, sizeof u);
  return u;
}

// y is within +-127, give or take a rounding: its nearest whole number appears in the low bits of y + 1.5 2^23.
inline Bytes narrowed(Vec<float> y, Int8) { return __builtin_convertvector(words_of(y + 0x1.8p23f) & 0xffu, Bytes); }

// y is within +-448, give or take a rounding.
inline Bytes narrowed(Vec<float> y, Float8) {
  const UnsignedWords u = words_of(y);
  const UnsignedWords magnitude = u & 0x7fffffffu;
  // From 2^-6 on: rounded at the third bit of the mantissa, and the exponent's bias changed from 127 to 7.
  const UnsignedWords normal = (magnitude + 0x7ffffu + (magnitude >> 20 & 1u) - (120u << 23)) >> 20;
  // Below it steps are 2^-9, the last bit of numbers near 2^14.
  const Vec<float> a = abs(y);
  const UnsignedWords subnormal = words_of(a + 0x1p14f) - 0x46800000u;
  const UnsignedWords chosen = a < 0x1p-6f ? subnormal : normal;
  return __builtin_convertvector(chosen | (u >> 24 & 0x80u), Bytes);
}

// Writes n numbers `step` bytes apart and returns their scale. x is padded to whole vectors with zeros.
// A row that is not finite has the scale NaN and zeros: it reads back as NaN.
template <class S> inline float quantise(const float* x, char* to, std::int64_t step, std::int64_t n) {
  using V = Vec<float>;
  constexpr int w = kWidth<float>;
  V top{}, bad{};
  for (std::int64_t k = 0; k < n; k += w) {
    const V v = load<V>(x + k);
    top = max(abs(v), top);
    bad = fma(v, V{}, bad);  // NaN from the first number that is not finite
  }
  const float sum = sum_lanes(bad);
  const bool finite = sum == sum;
  const float scale = finite ? max_lanes(top) / kLargest<S> : std::numeric_limits<float>::quiet_NaN();
  const bool zero = !finite || scale == 0;
  const V divisor = broadcast<V>(zero ? 1.0f : scale);
  for (std::int64_t k = 0; k < n; k += w) {
    Bytes bytes{};
    if (!zero) {
      // A subnormal scale is rounded so coarsely that quotients may exceed the largest number.
      const V y = load<V>(x + k) / divisor;
      bytes = narrowed(min(max(y, broadcast<V>(-kLargest<S>)), broadcast<V>(kLargest<S>)), S{});
    }
    const std::int64_t m = std::min<std::int64_t>(w, n - k);
    if (step == 1 && m == w) {
      store(to + k, bytes);
    } else {
      for (std::int64_t i = 0; i < m; ++i) to[(k + i) * step] = static_cast<char>(bytes[i]);
    }
  }
  return scale;
}

}  // namespace regard::cpu
