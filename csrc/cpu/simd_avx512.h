// AVX-512 (x86-64-v4): 64-byte vectors. Included by simd.h only.
#pragma once

#include <cpuid.h>
#include <immintrin.h>

#include <type_traits>

#include "core/dtype.h"

namespace regard::cpu {

constexpr int kVectorBytes = 64;
constexpr int kVectorRegisters = 32;
template <class T> using Vec = std::conditional_t<std::is_same_v<T, double>, __m512d, __m512>;

inline __m512 fma(__m512 a, __m512 b, __m512 c) { return _mm512_fmadd_ps(a, b, c); }
inline __m512d fma(__m512d a, __m512d b, __m512d c) { return _mm512_fmadd_pd(a, b, c); }
// a b - n for n near a b: the rounding error of the product survives.
inline __m512 product_minus(__m512 a, __m512 b, __m512 n) { return fma(a, b, -n); }
inline __m512d product_minus(__m512d a, __m512d b, __m512d n) { return fma(a, b, -n); }
inline __m512 max(__m512 a, __m512 b) { return _mm512_max_ps(a, b); }
inline __m512d max(__m512d a, __m512d b) { return _mm512_max_pd(a, b); }
inline __m512 min(__m512 a, __m512 b) { return _mm512_min_ps(a, b); }
inline __m512d min(__m512d a, __m512d b) { return _mm512_min_pd(a, b); }

// Words of four bytes, and functions that read them as smaller numbers (see simd.h).
using Words = std::int32_t __attribute__((vector_size(64)));

// Narrow whole numbers as words. The compiler (gcc 12) takes bytes apart one by one for this, and words in five steps.
inline Words widen(const std::int8_t* p) { return Words(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))); }
inline Words widen(const std::uint8_t* p) { return Words(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))); }
inline Words widen(const std::uint16_t* p) { return Words(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))); }

// In each word, the sum of two products of signed 16-bit numbers.
inline Words add_products_of_shorts(Words a, Words b) { return Words(_mm512_madd_epi16(__m512i(a), __m512i(b))); }

// Instructions that not every machine with AVX-512 has, by name: the compiler is not told to use them elsewhere. vpdpbusd
// adds four products of unsigned and signed bytes, without saturation; vdpbf16ps two of bfloat16, subnormals taken for 0.
// Asked at the first call: __builtin_cpu_supports() would ask while the module loads, and CPUID costs a microsecond where
// a hypervisor answers it.
struct CpuidRegisters {
  unsigned a = 0, b = 0, c = 0, d = 0;
};
inline CpuidRegisters cpuid(unsigned leaf, unsigned subleaf) {
  CpuidRegisters r;
  __get_cpuid_count(leaf, subleaf, &r.a, &r.b, &r.c, &r.d);  // leaves zeros where the processor has no such leaf
  return r;
}
inline bool native_bytes() {
  static const bool yes = (cpuid(7, 0).c >> 11 & 1u) != 0;  // AVX512_VNNI
  return yes;
}
inline bool native_pairs() {
  // Not on Intel's processors from Sapphire Rapids on, known by AVX512_FP16: it takes 2.25 cycles there, for 32 multiply-adds
  // (fused ones of float32: 32 a cycle). MiniLM of 8 x 256 tokens with bfloat16 weights took 301 ms by it, and takes 170.
  static const bool yes = [] {
    const bool there = (cpuid(7, 1).a >> 5 & 1u) != 0;      // AVX512_BF16
    const bool has_half = (cpuid(7, 0).d >> 23 & 1u) != 0;  // AVX512_FP16
    return there && !(has_half && cpuid(0, 0).b == signature_INTEL_ebx);
  }();
  return yes;
}
inline Words native_dot_bytes(Words acc, Words a, Words b) {
  asm("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(a), "v"(b));
  return acc;
}
inline __m512 native_dot_pairs(__m512 acc, Words a, Words b) {
  asm("vdpbf16ps %2, %1, %0" : "+v"(acc) : "v"(a), "v"(b));
  return acc;
}

#if defined(__AVX512BF16__)
// Words of two bfloat16, rounded to nearest even (subnormals to 0): first's numbers, then second's, in their order.
inline Words bfloat16_in_order(__m512 first, __m512 second) { return Words(__m512i(_mm512_cvtne2ps_pbh(second, first))); }
// even's in the lower half, odd's in the upper one.
inline Words bfloat16_pairs(__m512 even, __m512 odd) {
  using Halves = std::uint16_t __attribute__((vector_size(64)));
  const auto apart = Halves(bfloat16_in_order(even, odd));
  return Words(__builtin_shufflevector(apart, apart, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23, 8, 24, 9, 25, 10, 26, 11, 27,
                                       12, 28, 13, 29, 14, 30, 15, 31));
}
#endif

// Within 1 ulp, for normal x with a normal reciprocal. A division takes 6 cycles on Zen 4 and 16 on Sapphire Rapids;
// this, of 14 bits and a Newton step, 3 to 4.
inline __m512 reciprocal(__m512 x) {
  const __m512 r = _mm512_rcp14_ps(x);
  return _mm512_fmadd_ps(_mm512_fnmadd_ps(x, r, _mm512_set1_ps(1)), r, r);
}

inline bool all_below(__m512 a, __m512 b) { return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ) == 0xffff; }
inline bool all_equal(__m512 a, __m512 b) { return _mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ) == 0xffff; }

inline __m512 round_to_nearest(__m512 x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline __m512d round_to_nearest(__m512d x) { return _mm512_roundscale_pd(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }

// x 2^n for whole n.
inline __m512 scale_by_power_of_two(__m512 x, __m512 n) { return _mm512_scalef_ps(x, n); }
inline __m512d scale_by_power_of_two(__m512d x, __m512d n) { return _mm512_scalef_pd(x, n); }

// 2^t within 2.9e-6 (degree 4) or 1.4e-8 (degree 6), exact where t is whole: minimax over the fraction; VSCALEF takes the
// whole part by itself. Results below the smallest normal number are not made 0: for what turns them into bfloat16.
template <int Degree> inline __m512 exp2_short(__m512 t) {
  static_assert(Degree == 4 || Degree == 6);
  const __m512 f = _mm512_reduce_ps(t, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);  // t - floor(t)
  __m512 p;
  if constexpr (Degree == 4) {
    p = fma(_mm512_set1_ps(1.34266876e-2f), f, _mm512_set1_ps(5.2242469e-2f));
    p = fma(p, f, _mm512_set1_ps(2.41280213e-1f));
    p = fma(p, f, _mm512_set1_ps(6.93044841e-1f));
  } else {
    p = fma(_mm512_set1_ps(2.16129192e-4f), f, _mm512_set1_ps(1.24678458e-3f));
    p = fma(p, f, _mm512_set1_ps(9.67545155e-3f));
    p = fma(p, f, _mm512_set1_ps(5.54852821e-2f));
    p = fma(p, f, _mm512_set1_ps(2.40229309e-1f));
    p = fma(p, f, _mm512_set1_ps(6.93147063e-1f));
  }
  return _mm512_scalef_ps(fma(p, f, _mm512_set1_ps(1)), t);
}

inline __m512 load_as(const Half* p) { return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
inline void store_as(Half* p, __m512 v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

// The first n < 16 (8) numbers and zeros. Through memory, as for other types, the vector waits for the stores of its parts.
inline __m512 load_few(const float* p, std::int64_t n) { return _mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << n) - 1), p); }
inline __m512d load_few(const double* p, std::int64_t n) { return _mm512_maskz_loadu_pd(static_cast<__mmask8>((1u << n) - 1), p); }

}  // namespace regard::cpu
