// The portable floor: 16-byte vectors of the compiler's own kind (SSE4.2 under x86-64-v2, NEON on aarch64).
// Included by simd.h only.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "core/dtype.h"

namespace regard::cpu {

constexpr int kVectorBytes = 16;
#if defined(__aarch64__)
constexpr int kVectorRegisters = 32;
#else
constexpr int kVectorRegisters = 16;
#endif
using Float4 = float __attribute__((vector_size(16)));
using Double2 = double __attribute__((vector_size(16)));
template <class T> using Vec = std::conditional_t<std::is_same_v<T, double>, Double2, Float4>;

// Words of four bytes.
using Words = std::int32_t __attribute__((vector_size(16)));

// Narrow whole numbers as words.
template <class N> inline Words widen(const N* p) {
  N narrow[4];
  std::memcpy(narrow, p, sizeof narrow);
  Words w;
  for (int i = 0; i < 4; ++i) w[i] = narrow[i];
  return w;
}

// In each word, the sum of two products of signed 16-bit numbers.
inline Words add_products_of_shorts(Words a, Words b) {
#if defined(__SSE2__)
  using Shorts = short __attribute__((vector_size(16)));
  return Words(__builtin_ia32_pmaddwd128(Shorts(a), Shorts(b)));
#else
  using Bits = std::uint32_t __attribute__((vector_size(16)));
  const auto lower = [](Words w) { return Words(Bits(w) << 16) >> 16; };
  return lower(a) * lower(b) + (a >> 16) * (b >> 16);
#endif
}

// Not fused where the target has no such instruction: results differ in the last bit between instruction sets only.
inline Float4 fma(Float4 a, Float4 b, Float4 c) { return a * b + c; }
inline Double2 fma(Double2 a, Double2 b, Double2 c) { return a * b + c; }

// a b - n for n near a b: the rounding error of the product survives. Without a fused instruction the factors are split
// into halves whose products are exact (Dekker 1971).
template <class V, class Bits> inline V product_minus_split(V a, V b, V n, Bits upper_half) {
  const auto upper = [&](V x) {
    Bits u;
    std::memcpy(&u, &x, sizeof u);
    u &= upper_half;
    std::memcpy(&x, &u, sizeof x);
    return x;
  };
  const V a1 = upper(a), a2 = a - a1, b1 = upper(b), b2 = b - b1;
  return (((a1 * b1 - n) + a1 * b2) + a2 * b1) + a2 * b2;
}
inline Float4 product_minus(Float4 a, Float4 b, Float4 n) {
  using Bits = std::uint32_t __attribute__((vector_size(16)));
  return product_minus_split(a, b, n, Bits{} + 0xfffff000u);
}
inline Double2 product_minus(Double2 a, Double2 b, Double2 n) {
  using Bits = std::uint64_t __attribute__((vector_size(16)));
  return product_minus_split(a, b, n, Bits{} + 0xfffffffff8000000u);
}

inline bool all_below(Float4 a, Float4 b) {
  const Words below = a < b;
  return (below[0] & below[1] & below[2] & below[3]) != 0;
}

// Adding and taking away 1.5 2^23 (2^52) rounds to a whole number wherever one can still be smaller than the step;
// larger numbers are whole already.
inline Float4 round_to_nearest(Float4 x) {
  const Float4 magic = Float4{} + 0x1.8p23f;
  const Float4 rounded = (x + magic) - magic;
  return x > -0x1p22f ? (x < 0x1p22f ? rounded : x) : x;
}
inline Double2 round_to_nearest(Double2 x) {
  const Double2 magic = Double2{} + 0x1.8p52;
  const Double2 rounded = (x + magic) - magic;
  return x > -0x1p51 ? (x < 0x1p51 ? rounded : x) : x;
}

// x 2^n for whole n with 2^n a normal number; elsewhere the lanes are meaningless, and callers replace them.
// The whole number is read from the low mantissa bits of n + 1.5 2^23 (2^52): no conversion that could trap.
inline Float4 scale_by_power_of_two(Float4 x, Float4 n) {
  using Bits = std::uint32_t __attribute__((vector_size(16)));
  const Float4 shifted = n + 0x1.8p23f;
  Bits u;
  std::memcpy(&u, &shifted, sizeof u);
  u = (u + 127u) << 23;
  Float4 power;
  std::memcpy(&power, &u, sizeof power);
  return x * power;
}
inline Double2 scale_by_power_of_two(Double2 x, Double2 n) {
  using Bits = std::uint64_t __attribute__((vector_size(16)));
  const Double2 shifted = n + 0x1.8p52;
  Bits u;
  std::memcpy(&u, &shifted, sizeof u);
  u = (u + 1023u) << 52;
  Double2 power;
  std::memcpy(&power, &u, sizeof power);
  return x * power;
}

// Element by element through memcpy: p may be misaligned.
inline Float4 load_as(const Half* p) {
  Half h[4];
  std::memcpy(h, p, sizeof h);
  return Float4{to_float(h[0]), to_float(h[1]), to_float(h[2]), to_float(h[3])};
}
inline void store_as(Half* p, Float4 v) {
  Half h[4];
  for (int i = 0; i < 4; ++i) h[i] = from_float<Half>(v[i]);
  std::memcpy(p, h, sizeof h);
}

}  // namespace regard::cpu
