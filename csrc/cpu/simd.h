// Vectors of one instruction set under one set of names. simd_<isa>.h gives what compilers cannot derive from their
// own vector types (fused multiply-add, rounding, half conversion); everything else is written here once.
//
//   V = Vec<float> or Vec<double>; kWidth<T> lanes each. Comparisons give lane masks for select().
#pragma once

#include <cstdint>
#include <cstring>
#include <limits>
#include <utility>

#include "core/dtype.h"

#if defined(__AVX512F__)
#include "cpu/simd_avx512.h"
#elif defined(__AVX2__)
#include "cpu/simd_avx2.h"
#else
#include "cpu/simd_baseline.h"
#endif

namespace regard::cpu {

// Words hold whole numbers, four bytes or two bfloat16.
using Floats = float __attribute__((vector_size(kVectorBytes)));
using UnsignedWords = std::uint32_t __attribute__((vector_size(kVectorBytes)));

// acc + the dot product of four unsigned bytes of `a` and four signed ones of `b`, in each word: exact, on 16-bit products.
inline Words dot_bytes(Words acc, Words a, Words b) {
  using Shorts = std::int16_t __attribute__((vector_size(kVectorBytes)));
  const Words even = a & 0x00ff00ff;
  const Words odd = (a - even) >> 8 & 0x00ff00ff;
  const auto even_signed = Words(Shorts(b << 8) >> 8);
  const auto odd_signed = Words(Shorts(b) >> 8);
  return acc + add_products_of_shorts(even, even_signed) + add_products_of_shorts(odd, odd_signed);
}

// Two bfloat16 of each word as floats: those in the lower half, those in the upper one.
inline Vec<float> lower_of_pairs(Words w) { return Vec<float>(w << 16); }
inline Vec<float> upper_of_pairs(Words w) { return Vec<float>(w & -0x10000); }

// Whether load_as() takes one instruction for float16.
#if defined(__F16C__)
constexpr bool kHalvesAtOnce = true;
#else
constexpr bool kHalvesAtOnce = false;
#endif

// What a machine may do in one fast instruction (simd_avx512.h); callers ask native_bytes() and native_pairs() first.
#if !defined(__AVX512F__)
inline bool native_bytes() { return false; }
inline bool native_pairs() { return false; }
inline Words native_dot_bytes(Words acc, Words a, Words b) { return dot_bytes(acc, a, b); }
inline Vec<float> native_dot_pairs(Vec<float> acc, Words a, Words b) {
  return fma(upper_of_pairs(a), upper_of_pairs(b), fma(lower_of_pairs(a), lower_of_pairs(b), acc));
}
#endif

inline Vec<float> float_of_words(Words w) { return Vec<float>(__builtin_convertvector(w, Floats)); }

template <class T> constexpr int kWidth = kVectorBytes / static_cast<int>(sizeof(T));

template <class V> using LaneOf = std::remove_cv_t<std::remove_reference_t<decltype(std::declval<V>()[0])>>;

template <class V> inline V broadcast(LaneOf<V> x) { return x - V{}; }  // x - 0 keeps -0, where x + 0 would not

template <class V> inline V load(const void* p) {
  V v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
template <class V> inline void store(void* p, V v) { std::memcpy(p, &v, sizeof v); }

// v, which from here on is in a register: the compiler (gcc 12) would load it anew for each product that takes it.
template <class V> inline V in_register(V v) {
#if defined(__x86_64__)
  asm("" : "+v"(v));
#else
  asm("" : "+w"(v));
#endif
  return v;
}

template <class M, class V> inline V select(M mask, V yes, V no) { return mask ? yes : no; }

// NaN in `a` is dropped, NaN in `b` is kept (what the x86 instructions do).
template <class V> inline V max(V a, V b) { return a > b ? a : b; }
template <class V> inline V min(V a, V b) { return a < b ? a : b; }

// For normal x with a normal reciprocal.
template <class V> inline V reciprocal(V x) { return 1 / x; }

template <class V> inline V abs(V x) { return x < 0 ? -x : x; }

// What joins lanes, or vectors.
struct Add {
  template <class V> static V combine(V a, V b) { return a + b; }
};
struct Maximum {
  template <class V> static V combine(V a, V b) { return max(a, b); }
};

// v with its upper half joined to its lower one, then the half's, and so on. In registers: through memory, each round
// waits for the last one's stores (layer_norm, three sums a row: 16 x 768 takes 3.1 us, and 3.9 through memory).
template <class Op, int Half, class V, std::size_t... I> inline V fold_lanes(V v, std::index_sequence<I...> lanes) {
  v = Op::combine(v, V(__builtin_shufflevector(v, v, (static_cast<int>(I) ^ Half)...)));
  if constexpr (Half > 1) return fold_lanes<Op, Half / 2>(v, lanes);
  return v;
}
template <class Op, class V> inline LaneOf<V> fold_lanes(V v) {
  constexpr int n = sizeof(V) / sizeof(LaneOf<V>);
  return fold_lanes<Op, n / 2>(v, std::make_index_sequence<n>{})[0];
}
template <class V> inline LaneOf<V> sum_lanes(V v) { return fold_lanes<Add>(v); }
template <class V> inline LaneOf<V> max_lanes(V v) { return fold_lanes<Maximum>(v); }

// 2^t = 2^n p(f) for t <= 0, n = round(t), f = t - n. Results below the smallest normal number are exactly 0:
// subnormal weights would slow every later product (up to 100x) and carry nothing. NaN stays NaN.
// Coefficients: minimax over |f| <= 1/2; largest relative error 5.1e-9 (degree 6), 8.2e-18 (degree 11).
inline Vec<float> exp2_polynomial(Vec<float> f) {
  using V = Vec<float>;
  V p = broadcast<V>(1.5453162945e-4f);
  p = fma(p, f, broadcast<V>(1.3390863365e-3f));
  p = fma(p, f, broadcast<V>(9.6180825573e-3f));
  p = fma(p, f, broadcast<V>(5.5503571142e-2f));
  p = fma(p, f, broadcast<V>(2.4022650761e-1f));
  p = fma(p, f, broadcast<V>(6.9314718803e-1f));
  return fma(p, f, broadcast<V>(1.0f));
}
inline Vec<double> exp2_polynomial(Vec<double> f) {
  using V = Vec<double>;
  V p = broadcast<V>(4.45496059818651839e-10);
  p = fma(p, f, broadcast<V>(7.0725859492692237e-9));
  p = fma(p, f, broadcast<V>(1.01780624458457735e-7));
  p = fma(p, f, broadcast<V>(1.32154425879216897e-6));
  p = fma(p, f, broadcast<V>(1.52527338298361184e-5));
  p = fma(p, f, broadcast<V>(1.54035304417360502e-4));
  p = fma(p, f, broadcast<V>(1.33335581464169353e-3));
  p = fma(p, f, broadcast<V>(9.61812910760688853e-3));
  p = fma(p, f, broadcast<V>(5.55041086648215943e-2));
  p = fma(p, f, broadcast<V>(2.40226506959100982e-1));
  p = fma(p, f, broadcast<V>(6.93147180559945309e-1));
  return fma(p, f, broadcast<V>(1.0));
}
template <class V> inline V exp2_split(V t, V n, V f) {
  constexpr LaneOf<V> lowest = std::numeric_limits<LaneOf<V>>::min_exponent - 1;  // -126, -1022
  return t < lowest ? V{} : scale_by_power_of_two(exp2_polynomial(f), n);
}
// 2^(x (high + low)) for x <= 0: the product's rounding error, and the factor's own, are carried into f. At x = -10 a
// rounded product alone would cost 3e-7 of the result.
template <class V> inline V exp2_scaled(V x, V high, V low) {
  const V t = x * high;
  const V n = round_to_nearest(t);
  return exp2_split(t, n, fma(x, low, product_minus(x, high, n)));
}

// 2^t for t <= 0, shorter where an instruction set has a way: then by a polynomial of that degree.
template <int Degree, class V> inline V exp2_short(V t) {
  const V n = round_to_nearest(t);
  return exp2_split(t, n, t - n);
}

// e^x for x <= 0, by exp2_scaled.
template <class V> inline V exp_nonpositive(V x) {
  using T = LaneOf<V>;
  constexpr double log2_e = 1.4426950408889634;
  constexpr T high = static_cast<T>(log2_e);
  constexpr T low = sizeof(T) == 4 ? static_cast<T>(log2_e - static_cast<double>(high)) : T(2.0355273740931033e-17);
  return exp2_scaled(x, broadcast<V>(high), broadcast<V>(low));
}

// x = n ln2 + f ln2 with whole n, |f| <= 1/2. ln2 is in two parts: n times the high one is exact, so large |x| lose
// nothing, fused or not.
template <class V> inline V exp_parts(V x, V& f) {
  using T = LaneOf<V>;
  constexpr T log2_e = T(1.4426950408889634);
  constexpr T ln2_high = sizeof(T) == 4 ? T(0.693359375) : T(0.693145751953125);
  constexpr T ln2_low = sizeof(T) == 4 ? T(-2.12194440054690583e-4) : T(1.42860682030941723e-6);
  const V n = round_to_nearest(x * broadcast<V>(log2_e));
  f = fma(n, broadcast<V>(-ln2_low), fma(n, broadcast<V>(-ln2_high), x)) * broadcast<V>(log2_e);
  return n;
}

// e^x where it is a normal number below 2^127: |x| <= 87 (float), 708 (double).
template <class V> inline V exp_normal(V x) {
  V f;
  const V n = exp_parts(x, f);
  return scale_by_power_of_two(exp2_polynomial(f), n);
}

// e^x over the whole range: 0 below, inf above, NaN for NaN.
template <class V> inline V exp(V x) {
  using T = LaneOf<V>;
  constexpr T top = sizeof(T) == 4 ? T(88.722839) : T(709.78271289338397);
  constexpr T bottom = sizeof(T) == 4 ? T(-87.33654) : T(-708.3964185322641);
  V f;
  const V n = exp_parts(x, f);
  // 2^128 has no exponent field of its own, nor has 2^-127: large powers are scaled in two steps, small ones in one.
  const V step = n > 0 ? broadcast<V>(1) : V{};
  const V y = scale_by_power_of_two(exp2_polynomial(f), n - step) * (step + 1);
  return x > top ? broadcast<V>(std::numeric_limits<T>::infinity()) : x < bottom ? V{} : y;
}

// Transposes a kWidth x kWidth square held in rows: log2(width) rounds of interleaving.
template <int Step, class V, std::size_t... I> inline void interleave(V& a, V& b, std::index_sequence<I...>) {
  constexpr int n = sizeof...(I);
  const V low = __builtin_shufflevector(a, b, ((I / Step) % 2 ? n + static_cast<int>(I) - Step : static_cast<int>(I))...);
  const V high = __builtin_shufflevector(a, b, ((I / Step) % 2 ? n + static_cast<int>(I) : static_cast<int>(I) + Step)...);
  a = low;
  b = high;
}
template <int Step, class V, int N> inline void transpose_rounds(V (&rows)[N]) {
  if constexpr (Step < N) {
#pragma GCC unroll 16
    for (int r = 0; r < N; ++r)
      if ((r & Step) == 0) interleave<Step>(rows[r], rows[r | Step], std::make_index_sequence<N>{});
    transpose_rounds<2 * Step>(rows);
  }
}
template <class V, int N> inline void transpose(V (&rows)[N]) { transpose_rounds<1>(rows); }

// kWidth elements of any storage type as compute vectors, and back.
inline Vec<float> load_as(const float* p) { return load<Vec<float>>(p); }
inline Vec<double> load_as(const double* p) { return load<Vec<double>>(p); }
inline void store_as(float* p, Vec<float> v) { store(p, v); }
inline void store_as(double* p, Vec<double> v) { store(p, v); }
inline Vec<float> load_as(const BFloat16* p) { return Vec<float>(widen(reinterpret_cast<const std::uint16_t*>(p)) << 16); }
// Rounded to bfloat16, to nearest even, in the upper half of each word; what is below it is left over.
inline UnsignedWords round_to_bfloat16(Vec<float> v) {
  UnsignedWords u;
  std::memcpy(&u, &v, sizeof u);
  return v == v ? u + 0x7fffu + (u >> 16 & 1u) : (u | 0x400000u);
}
inline void store_as(BFloat16* p, Vec<float> v) {
  using Narrow = std::uint16_t __attribute__((vector_size(kVectorBytes / 2)));
  store(p, __builtin_convertvector(round_to_bfloat16(v) >> 16, Narrow));
}

// Words of two bfloat16: first's numbers, then second's, in their order.
#if !defined(__AVX512BF16__)
inline Words bfloat16_in_order(Vec<float> first, Vec<float> second) {
  BFloat16 all[2 * kWidth<float>];
  store_as(all, first);
  store_as(all + kWidth<float>, second);
  return load<Words>(all);
}
// Words of two bfloat16: even's in the lower half, odd's in the upper one.
inline Words bfloat16_pairs(Vec<float> even, Vec<float> odd) {
  return Words((round_to_bfloat16(even) >> 16) | (round_to_bfloat16(odd) & 0xffff0000u));
}
#endif

inline Vec<float> load_as(const Int8* p) {
  return Vec<float>(__builtin_convertvector(widen(reinterpret_cast<const std::int8_t*>(p)), Floats));
}
inline Vec<float> load_as(const Float8* p) {
  const Words bits = widen(reinterpret_cast<const std::uint8_t*>(p));
  const Words magnitude = bits & 0x7f;
  // As to_float(): exponents 120 too small, subnormals whole numbers of 2^-9, NaN where all is ones.
  auto value = Vec<float>((magnitude << 20) + (120 << 23));
  value = magnitude < 8 ? __builtin_convertvector(magnitude, Vec<float>) * 0x1p-9f : value;
  value = magnitude == 0x7f ? broadcast<Vec<float>>(std::numeric_limits<float>::quiet_NaN()) : value;
  return bits > 0x7f ? -value : value;
}

// n <= kWidth elements as a vector, in its first lanes or in its last ones, and zeros in the others. (AVX2 and AVX-512 have
// instructions for numbers of the compute type.)
template <class S> using ComputeOf = decltype(to_float(S{}));
template <class S> inline Vec<ComputeOf<S>> load_few(const S* p, std::int64_t n) {
  S few[kWidth<ComputeOf<S>>] = {};
  std::memcpy(static_cast<void*>(few), static_cast<const void*>(p), static_cast<std::size_t>(n) * sizeof(S));
  return load_as(few);
}
template <class S> inline Vec<ComputeOf<S>> load_last(const S* p, std::int64_t n) {
  S few[kWidth<ComputeOf<S>>] = {};
  std::memcpy(static_cast<void*>(few + kWidth<ComputeOf<S>> - n), static_cast<const void*>(p), static_cast<std::size_t>(n) * sizeof(S));
  return load_as(few);
}
// A vector's first n lanes.
template <class S, class V> inline void store_few(S* p, V v, std::int64_t n) {
  S few[kWidth<LaneOf<V>>];
  store_as(few, v);
  std::memcpy(static_cast<void*>(p), static_cast<const void*>(few), static_cast<std::size_t>(n) * sizeof(S));
}

}  // namespace regard::cpu
