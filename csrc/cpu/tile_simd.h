// The tile engine on vector units: C = scale * C + A B in registers of kRows x kColumns.
//
//   A, "left":  rows x depth, broadcast element by element; either side may be contiguous.
//   B, "right": depth x columns, whole vectors; columns contiguous, padded to a vector.
//   C:          rows x columns, columns contiguous, kept by the caller between calls.
//
// Attention calls it with A = K, B = Q^T for the scores and A = V^T, B = P for the output: keys run down, queries
// across, so the softmax needs no sum across lanes and K and V are used as they lie. linear() calls it with A = x and
// B = weight^T. Each element is a sum of chains of Chain fused multiply-adds over the depth, whatever tile it falls in: that
// is why results do not depend on how the work is cut (see "Determinism" in docs/design.md). Chains start from zero and
// C joins at their end: its sum over earlier blocks is large, and rounding each step at its size cost up to 3x the
// error on long rows.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "cpu/blocks.h"
#include "cpu/prefetch.h"
#include "cpu/simd.h"

namespace regard::cpu {

// Accumulators = rows x vectors. 2 FMA ports x 4 cycles of latency want 8 or more in flight; the rest is reuse of
// loads. AVX-512: 24 of 32 registers; per depth step 3 + 8 loads feed 24 FMAs. AVX2: 12 of 16.
template <class T> struct Tile {
  static constexpr int kRows = kVectorRegisters == 32 ? 8 : 4;
  static constexpr int kVectors = kVectorBytes == 16 && kVectorRegisters == 16 ? 2 : 3;
  static constexpr int kColumns = kVectors * kWidth<T>;
};

// Steps of one accumulation chain. Rounding errors of a chain grow with its length: 32 keeps float32 scores of 128 and
// more dimensions as accurate as a dot product summed in lanes.
constexpr int kChain = 32;

// Which index of A is contiguous: its depth (K, x) or its rows (V^T, where the depth runs over keys).
enum class Left { depth_contiguous, rows_contiguous };

// Memory that is asked for while products run: so many bytes a step of the depth, kLine at most, tile after tile.
struct StepsAhead {
  const char* next;
  std::int64_t step;
  void ask(int k) const { ask_for_line(next + k * step); }
  StepsAhead after(int steps) const { return {next + steps * step, step}; }
};
struct NothingAhead {
  void ask(int) const {}
  NothingAhead after(int) const { return {}; }
};
// `bytes` at `next`, for a call of multiply() of `steps` in all its tiles: step by step, or at once where registers are 16 and a step
// is too short for one request more (1.03 of the time, AVX2). At once, what comes from a slow L3 fills the core's buffers, and
// all waits: panels of 2 MiB ran at 77 % of FMA unasked, at 80 to 86 % in bursts of 3 KiB, and step by step at 92 to 95 %
// (AVX-512; both Emerald Rapids, one thread).
inline auto ask_ahead(const char* next, std::int64_t bytes, std::int64_t steps) {
  if constexpr (kVectorRegisters == 32) {
    return StepsAhead{next, std::min(divide_up(bytes, steps), kLine)};
  } else {
    ask_for(next, bytes);
    return NothingAhead{};
  }
}

namespace detail {

template <class T, int Rows, int Vectors, Left Order, int Chain, class A = NothingAhead>
inline void multiply_tile(const T* a, std::int64_t lda, const T* b, std::int64_t ldb, T* c, std::int64_t ldc, int depth,
                          const Vec<T>* scale, A ahead = {}) {
  using V = Vec<T>;
  constexpr int rows = Rows;
  constexpr int w = kWidth<T>;
  for (int start = 0; start == 0 || start < depth; start += Chain) {
    const int end = std::min(depth, start + Chain);
    V acc[rows][Vectors] = {};
    // By twos: 0.96 of the time of single steps, with which the end of a short loop is foreseen less often (Zen 3). By fours
    // or eights it is no more.
#pragma GCC unroll 2
    for (int k = start; k < end; ++k) {
      ahead.ask(k);
      if constexpr (Rows < Vectors) {  // the shorter side stays in registers
        V left[rows];
#pragma GCC unroll 8
        for (int r = 0; r < rows; ++r) left[r] = broadcast<V>(Order == Left::depth_contiguous ? a[r * lda + k] : a[k * lda + r]);
#pragma GCC unroll 12
        for (int v = 0; v < Vectors; ++v) {
          const V right = load<V>(b + k * ldb + v * w);
#pragma GCC unroll 8
          for (int r = 0; r < rows; ++r) acc[r][v] = fma(left[r], right, acc[r][v]);
        }
      } else {
        V right[Vectors];
#pragma GCC unroll 3
        for (int v = 0; v < Vectors; ++v) right[v] = load<V>(b + k * ldb + v * w);
#pragma GCC unroll 8
        for (int r = 0; r < rows; ++r) {
          const V left = broadcast<V>(Order == Left::depth_contiguous ? a[r * lda + k] : a[k * lda + r]);
#pragma GCC unroll 3
          for (int v = 0; v < Vectors; ++v) acc[r][v] = fma(left, right[v], acc[r][v]);
        }
      }
    }
    // Hidden from gcc 12, which would keep the addresses of all sums ready on the stack: linear takes 0.98 to 0.99 of the time.
    T* row = c;
    asm volatile("" : "+r"(row));
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r, row += ldc)
#pragma GCC unroll 12
      for (int v = 0; v < Vectors; ++v) {
        T* const at = row + v * w;
        const V sum = acc[r][v];
        store(at, start > 0 ? load<V>(at) + sum : scale ? fma(load<V>(at), scale[v], sum) : sum);
      }
  }
}

// Never inlined: where it was, in a loop of its own, gcc 12 kept the accumulators in memory (1.8x the time).
template <class T, int Vectors, Left Order, int Chain, class A>
[[gnu::noinline]] void multiply_rows(const T* a, std::int64_t lda, const T* b, std::int64_t ldb, T* c, std::int64_t ldc, int rows,
                                     int depth, const Vec<T>* scale, A ahead) {
  const auto tile = [&](auto height, int r) {
    multiply_tile<T, height, Vectors, Order, Chain>(a + (Order == Left::depth_contiguous ? r * lda : r), lda, b, ldb, c + r * ldc, ldc,
                                                    depth, scale, ahead);
    ahead = ahead.after(depth);
  };
  // One vector of kRows = 4 rows has 4 sums in flight, half of what the units could take: then two tiles go at once.
  constexpr int kRows = Tile<T>::kRows;
  int r = 0;
  if constexpr (Vectors * kRows < 8)
    for (; r + 2 * kRows <= rows; r += 2 * kRows) tile(std::integral_constant<int, 2 * kRows>{}, r);
  for (; r < rows; r += kRows) tile(std::integral_constant<int, kRows>{}, r);
}

}  // namespace detail

// C = (scale ? C * scale : 0) + A B for `rows` (rounded up to kRows: A and C must have room) and `vectors` <= kVectors
// vectors of columns. `scale` holds one factor a column. A depth cut in several calls, at multiples of Chain, with the
// sums carried by a scale of 1, gives the same bits as one call.
template <class T, Left Order, int Chain = kChain, class A = NothingAhead>
void multiply(const T* a, std::int64_t lda, const T* b, std::int64_t ldb, T* c, std::int64_t ldc, int rows, int vectors, int depth,
              const Vec<T>* scale, A ahead = {}) {
  switch (vectors) {
    case 1: return detail::multiply_rows<T, 1, Order, Chain, A>(a, lda, b, ldb, c, ldc, rows, depth, scale, ahead);
    case 2: return detail::multiply_rows<T, 2, Order, Chain, A>(a, lda, b, ldb, c, ldc, rows, depth, scale, ahead);
    default:
      if constexpr (Tile<T>::kVectors == 3)
        return detail::multiply_rows<T, 3, Order, Chain, A>(a, lda, b, ldb, c, ldc, rows, depth, scale, ahead);
  }
}

// Compiled once, in tile_simd.cpp.
extern template void multiply<float, Left::depth_contiguous>(const float*, std::int64_t, const float*, std::int64_t, float*, std::int64_t,
                                                             int, int, int, const Vec<float>*, NothingAhead);
extern template void multiply<float, Left::rows_contiguous>(const float*, std::int64_t, const float*, std::int64_t, float*, std::int64_t,
                                                            int, int, int, const Vec<float>*, NothingAhead);
extern template void multiply<double, Left::depth_contiguous>(const double*, std::int64_t, const double*, std::int64_t, double*,
                                                              std::int64_t, int, int, int, const Vec<double>*, NothingAhead);
extern template void multiply<double, Left::rows_contiguous>(const double*, std::int64_t, const double*, std::int64_t, double*,
                                                             std::int64_t, int, int, int, const Vec<double>*, NothingAhead);

// The same for fewer than kRows rows, rounded up to 1, 2, 4 or kRows of them: what is left of a block, or all of a small
// one. Reading B then costs more than the arithmetic, so the rows that are not there are worth leaving out.
template <class T, Left Order, int Chain = kChain>
inline void multiply_few(const T* a, std::int64_t lda, const T* b, std::int64_t ldb, T* c, std::int64_t ldc, int rows, int depth,
                         const Vec<T>* scale) {
  constexpr int vectors = Tile<T>::kVectors;
  if (rows == 1) return detail::multiply_tile<T, 1, vectors, Order, Chain>(a, lda, b, ldb, c, ldc, depth, scale);
  if (rows == 2) return detail::multiply_tile<T, 2, vectors, Order, Chain>(a, lda, b, ldb, c, ldc, depth, scale);
  if (rows <= 4) return detail::multiply_tile<T, 4, vectors, Order, Chain>(a, lda, b, ldb, c, ldc, depth, scale);
  return detail::multiply_tile<T, Tile<T>::kRows, vectors, Order, Chain>(a, lda, b, ldb, c, ldc, depth, scale);
}

}  // namespace regard::cpu
