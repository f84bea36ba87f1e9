// The element types, and exact scalar conversions between them and float. Compiles for host and device.
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>

namespace regard {

enum class DType : std::uint8_t { float32, float64, float16, bfloat16, boolean, int32, int64, int8, float8_e4m3fn, other };

constexpr bool is_float(DType t) { return t <= DType::bfloat16; }
constexpr bool is_scaled(DType t) { return t == DType::int8 || t == DType::float8_e4m3fn; }  // 8 bits, with a scale a row

constexpr std::int64_t size_of(DType t) {
  switch (t) {
    case DType::float64:
    case DType::int64: return 8;
    case DType::float32:
    case DType::int32: return 4;
    case DType::float16:
    case DType::bfloat16: return 2;
    default: return 1;
  }
}

// Storage-only 16-bit floats: arithmetic is done in float.
struct Half {
  std::uint16_t bits;
};
struct BFloat16 {
  std::uint16_t bits;
};
// Storage-only 8-bit values of caches, each row with a scale of its own. float8_e4m3fn has no infinities, and NaN where
// exponent and mantissa are all ones (Micikevicius et al., "FP8 Formats for Deep Learning", 2022).
struct Int8 {
  std::int8_t value;
};
struct Float8 {
  std::uint8_t bits;
};

template <class T> constexpr DType dtype_of();
template <> constexpr DType dtype_of<float>() { return DType::float32; }
template <> constexpr DType dtype_of<double>() { return DType::float64; }
template <> constexpr DType dtype_of<Half>() { return DType::float16; }
template <> constexpr DType dtype_of<BFloat16>() { return DType::bfloat16; }
template <> constexpr DType dtype_of<Int8>() { return DType::int8; }
template <> constexpr DType dtype_of<Float8>() { return DType::float8_e4m3fn; }

// constexpr throughout, so that device code may call them (nvcc's --expt-relaxed-constexpr).
constexpr std::uint32_t bits_of(float x) { return std::bit_cast<std::uint32_t>(x); }
constexpr float float_of(std::uint32_t u) { return std::bit_cast<float>(u); }

constexpr float to_float(float x) { return x; }
constexpr double to_float(double x) { return x; }
constexpr float to_float(Int8 x) { return x.value; }
constexpr float to_float(Float8 x) {
  const std::uint32_t sign = std::uint32_t{x.bits & 0x80u} << 24;
  const std::uint32_t magnitude = x.bits & 0x7fu;
  if (magnitude == 0x7fu) return float_of(sign | 0x7fc00000u);
  // In float's place the exponent is 120 too small; subnormals (eighths of 2^-6) are whole numbers of 2^-9.
  const float value = magnitude < 8 ? static_cast<float>(magnitude) * 0x1p-9f : float_of((magnitude << 20) + (120u << 23));
  return float_of(sign | bits_of(value));
}
constexpr float to_float(BFloat16 x) { return float_of(std::uint32_t{x.bits} << 16); }
constexpr float to_float(Half x) {
  const std::uint32_t sign = std::uint32_t{x.bits & 0x8000u} << 16;
  const std::uint32_t magnitude = x.bits & 0x7fffu;
  // Shifted into float's place the exponent is 112 too small; a product with 2^112 mends it, subnormals included.
  const std::uint32_t scaled = bits_of(float_of(magnitude << 13) * 0x1p112f);
  const std::uint32_t special = magnitude >= 0x7c00u ? 0x7f800000u : 0u;  // inf and NaN keep a full exponent
  return float_of(sign | scaled | special);
}

// Rounds to nearest, ties to even; NaN stays NaN.
template <class T> constexpr T from_float(float x);
template <> constexpr float from_float<float>(float x) { return x; }
template <> constexpr BFloat16 from_float<BFloat16>(float x) {
  const std::uint32_t u = bits_of(x);
  if ((u & 0x7fffffffu) > 0x7f800000u) return {static_cast<std::uint16_t>(u >> 16 | 0x40u)};
  return {static_cast<std::uint16_t>((u + 0x7fffu + (u >> 16 & 1u)) >> 16)};
}
template <> constexpr Half from_float<Half>(float x) {
  const std::uint32_t u = bits_of(x);
  const std::uint32_t sign = u >> 16 & 0x8000u;
  const std::uint32_t magnitude = u & 0x7fffffffu;
  std::uint32_t h;
  if (magnitude > 0x7f800000u) {
    h = 0x7e00u;
  } else if (magnitude >= 0x477ff000u) {  // 65520 and above round to inf
    h = 0x7c00u;
  } else if (magnitude < 0x38800000u) {  // below 2^-14: adding 0.5 rounds at the last subnormal bit, 2^-24
    h = bits_of(float_of(magnitude) + 0.5f) - 0x3f000000u;
  } else {
    h = (magnitude + 0xfffu + (magnitude >> 13 & 1u) - 0x38000000u) >> 13;
  }
  return {static_cast<std::uint16_t>(sign | h)};
}

}  // namespace regard
