// AVX2, FMA and F16C (x86-64-v3): 32-byte vectors. Included by simd.h only.
#pragma once

#include <immintrin.h>

#include <type_traits>

#include "core/dtype.h"

namespace regard::cpu {

constexpr int kVectorBytes = 32;
constexpr int kVectorRegisters = 16;
template <class T> using Vec = std::conditional_t<std::is_same_v<T, double>, __m256d, __m256>;

inline __m256 fma(__m256 a, __m256 b, __m256 c) { return _mm256_fmadd_ps(a, b, c); }
inline __m256d fma(__m256d a, __m256d b, __m256d c) { return _mm256_fmadd_pd(a, b, c); }
// a b - n for n near a b: the rounding error of the product survives.
inline __m256 product_minus(__m256 a, __m256 b, __m256 n) { return fma(a, b, -n); }
inline __m256d product_minus(__m256d a, __m256d b, __m256d n) { return fma(a, b, -n); }
inline __m256 max(__m256 a, __m256 b) { return _mm256_max_ps(a, b); }
inline __m256d max(__m256d a, __m256d b) { return _mm256_max_pd(a, b); }
inline __m256 min(__m256 a, __m256 b) { return _mm256_min_ps(a, b); }
inline __m256d min(__m256d a, __m256d b) { return _mm256_min_pd(a, b); }

// Words of four bytes; in each, the sum of two products of signed 16-bit numbers.
using Words = std::int32_t __attribute__((vector_size(32)));

// Narrow whole numbers as words. The compiler (gcc 12) takes bytes apart one by one for this.
inline Words widen(const std::int8_t* p) { return Words(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)))); }
inline Words widen(const std::uint8_t* p) { return Words(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)))); }
inline Words widen(const std::uint16_t* p) { return Words(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))); }
inline Words add_products_of_shorts(Words a, Words b) { return Words(_mm256_madd_epi16(__m256i(a), __m256i(b))); }

inline bool all_below(__m256 a, __m256 b) { return _mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_LT_OQ)) == 0xff; }
inline bool all_equal(__m256 a, __m256 b) { return _mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_EQ_OQ)) == 0xff; }

inline __m256 round_to_nearest(__m256 x) { return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline __m256d round_to_nearest(__m256d x) { return _mm256_round_pd(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }

// x 2^n for whole n with 2^n a normal number; elsewhere the lanes are meaningless, and callers replace them.
inline __m256 scale_by_power_of_two(__m256 x, __m256 n) {
  const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
  return _mm256_mul_ps(x, _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23)));
}
inline __m256d scale_by_power_of_two(__m256d x, __m256d n) {
  const __m256i exponent = _mm256_add_epi64(_mm256_cvtepi32_epi64(_mm256_cvtpd_epi32(n)), _mm256_set1_epi64x(1023));
  return _mm256_mul_pd(x, _mm256_castsi256_pd(_mm256_slli_epi64(exponent, 52)));
}

inline __m256 load_as(const Half* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
inline void store_as(Half* p, __m256 v) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

// The first n < 8 (4) numbers and zeros. Through memory, as for other types, the vector waits for the stores of its parts.
inline __m256 load_few(const float* p, std::int64_t n) {
  const __m256i lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  return _mm256_maskload_ps(p, _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(n)), lanes));
}
inline __m256d load_few(const double* p, std::int64_t n) {
  return _mm256_maskload_pd(p, _mm256_cmpgt_epi64(_mm256_set1_epi64x(n), _mm256_setr_epi64x(0, 1, 2, 3)));
}

}  // namespace regard::cpu
