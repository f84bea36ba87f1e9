// The tile engine on words of four bytes: C += A B, where a word of A and one of B are four 8-bit numbers or two bfloat16,
// and their product is the dot product of those.
//
//   A: rows x words, a row contiguous. B: words x kPanel columns. C: rows x columns of float or int32, kept by the caller.
//
// Twice (bfloat16) and four times (8 bits) the products of tile_simd.h for as many instructions and bytes.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/prefetch.h"
#include "cpu/simd.h"
#include "cpu/tile_simd.h"

namespace regard::cpu {

// Four unsigned bytes times four signed ones, summed exactly: every instruction set has the same result.
struct Bytes {
  using Sum = Words;
  struct Unit {};                                   // what a worker holds while it computes
  static constexpr int kRows = Tile<float>::kRows;  // C has room for whole ones
  static constexpr int kStep = 1;                   // rows of A are whole steps of words
  static constexpr int kChain = 1 << 30;
  static Sum dot(Sum acc, Words a, Words b) { return dot_bytes(acc, a, b); }
};
// The same in one instruction, where the machine has it (native_bytes()).
struct NativeBytes : Bytes {
  static Sum dot(Sum acc, Words a, Words b) { return native_dot_bytes(acc, a, b); }
};
// Two bfloat16 times two, where the machine has a fast instruction for it (native_pairs()). Chains of 128 numbers, as in linear.cpp.
struct NativePairs {
  using Sum = Vec<float>;
  struct Unit {};
  static constexpr int kRows = Tile<float>::kRows;
  static constexpr int kStep = 1;
  static constexpr int kChain = 64;
  static Sum dot(Sum acc, Words a, Words b) { return native_dot_pairs(acc, a, b); }
};

// Vectors of a tile of few rows: of a panel, all that the sums in registers allow. More sums are beside each other then, and what
// is read lies in longer runs: one row by weights of bfloat16 took 1.5 times as long by halves of a panel, two rows 1.3
// times (AVX2, 512 x 2048 and 1024 x 1024, in L3).
template <int Rows>
constexpr int kWideVectors = std::min(static_cast<int>(kPanelBytes / kVectorBytes), (kVectorRegisters == 32 ? 24 : 12) / Rows);

// The row of a panel that comes eight rows after this one, where few rows of A go through panels once: weights that come from
// memory take 0.87 (int8) to 0.95 (bfloat16) of the time without, those in L3 up to 1.04 (one row, one thread of a Zen 3).
inline void ask_for_panel(const std::int32_t* row) { ask_for(reinterpret_cast<const char*>(row) + 8 * kPanelBytes, kPanelBytes); }

template <class Op, int Rows, int Vectors = Tile<float>::kVectors>
inline void multiply_words_tile(const std::int32_t* a, std::int64_t lda, const std::int32_t* b, std::int64_t ldb, std::int32_t* c,
                                std::int64_t ldc, std::int64_t words) {
  using Sum = typename Op::Sum;
  constexpr int w = kWidth<float>;
  for (std::int64_t start = 0; start < words; start += Op::kChain) {
    const std::int64_t end = std::min<std::int64_t>(words, start + Op::kChain);
    Sum acc[Rows][Vectors] = {};
    for (std::int64_t k = start; k < end; ++k) {
      if constexpr (Rows == 1 && Vectors * w == kPanelBytes / 4) ask_for_panel(b + k * ldb);
      Words right[Vectors];
#pragma GCC unroll 12
      for (int v = 0; v < Vectors; ++v) right[v] = load<Words>(b + k * ldb + v * w);
#pragma GCC unroll 8
      for (int r = 0; r < Rows; ++r) {
        const Words left = Words{} + a[r * lda + k];
#pragma GCC unroll 12
        for (int v = 0; v < Vectors; ++v) acc[r][v] = Op::dot(acc[r][v], left, right[v]);
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 12
      for (int v = 0; v < Vectors; ++v) {
        std::int32_t* const at = c + r * ldc + v * w;
        store(at, load<Sum>(at) + acc[r][v]);
      }
  }
}

// C += A B for one panel of kPanelBytes a row and `rows` rows (A and C have room for them rounded up to Tile::kRows).
template <class Op>
inline void multiply_words(const std::int32_t* a, std::int64_t lda, const std::int32_t* b, std::int32_t* c, std::int64_t ldc, int rows,
                           std::int64_t words) {
  constexpr int kRows = Tile<float>::kRows;
  constexpr int columns = Tile<float>::kColumns;
  constexpr std::int64_t ldb = kPanelBytes / 4;
  if (rows == 1) {
    constexpr int vectors = kWideVectors<1>;
    for (int j = 0; j < ldb; j += vectors * kWidth<float>) multiply_words_tile<Op, 1, vectors>(a, lda, b + j, ldb, c + j, ldc, words);
    return;
  }
  for (int j = 0; j < ldb; j += columns) {
    int r = 0;
    for (; r + kRows <= rows; r += kRows) multiply_words_tile<Op, kRows>(a + r * lda, lda, b + j, ldb, c + r * ldc + j, ldc, words);
    const int rest = rows - r;
    const std::int32_t* const left = a + r * lda;
    std::int32_t* const sums = c + r * ldc + j;
    if (rest == 0) continue;
    if (rest == 1)
      multiply_words_tile<Op, 1>(left, lda, b + j, ldb, sums, ldc, words);
    else if (rest == 2)
      multiply_words_tile<Op, 2>(left, lda, b + j, ldb, sums, ldc, words);
    else if (rest <= 4)
      multiply_words_tile<Op, 4>(left, lda, b + j, ldb, sums, ldc, words);
    else
      multiply_words_tile<Op, kRows>(left, lda, b + j, ldb, sums, ldc, words);
  }
}

// Left operands of float, right ones of bfloat16 pairs (panels of `depth` / 2 rows): the chains, and so the bits, of
// tile_simd.h's multiply_few on the same numbers held as floats.
template <int Rows, int Vectors, int Chain>
inline void multiply_pairs_tile(const float* a, std::int64_t lda, const std::int32_t* b, float* c, std::int64_t ldc, int depth,
                                bool carry) {
  using V = Vec<float>;
  constexpr int w = kWidth<float>;
  constexpr std::int64_t ldb = kPanelBytes / 4;
  static_assert(Chain % 2 == 0);
  for (int start = 0; start == 0 || start < depth; start += Chain) {
    const int end = std::min(depth, start + Chain);
    V acc[Rows][Vectors] = {};
    // As in tile_simd.h, the shorter side stays in registers.
    const auto add = [&](int k, auto&& part) {
      const auto right_of = [&](int v) { return part(load<Words>(b + k / 2 * ldb + v * w)); };
      if constexpr (Rows < Vectors) {
        V left[Rows];
#pragma GCC unroll 8
        for (int r = 0; r < Rows; ++r) left[r] = broadcast<V>(a[r * lda + k]);
#pragma GCC unroll 12
        for (int v = 0; v < Vectors; ++v) {
          const V right = right_of(v);
#pragma GCC unroll 8
          for (int r = 0; r < Rows; ++r) acc[r][v] = fma(left[r], right, acc[r][v]);
        }
      } else {
        V right[Vectors];
#pragma GCC unroll 12
        for (int v = 0; v < Vectors; ++v) right[v] = right_of(v);
#pragma GCC unroll 8
        for (int r = 0; r < Rows; ++r) {
          const V left = broadcast<V>(a[r * lda + k]);
#pragma GCC unroll 12
          for (int v = 0; v < Vectors; ++v) acc[r][v] = fma(left, right[v], acc[r][v]);
        }
      }
    };
    for (int k = start; k < end; k += 2) {
      if constexpr (Vectors * w == ldb) ask_for_panel(b + k / 2 * ldb);
      add(k, lower_of_pairs);
      if (k + 1 < end) add(k + 1, upper_of_pairs);
    }
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 12
      for (int v = 0; v < Vectors; ++v) {
        float* const at = c + r * ldc + v * w;
        store(at, start > 0 || carry ? load<V>(at) + acc[r][v] : acc[r][v]);
      }
  }
}

// Rows for which weights of bfloat16 are widened in registers: with 16 of these, three rows and more would widen each weight
// anew for every row (8 rows took 1.5 times as long as by chains widened in L1; Zen 3).
constexpr int kRowsOfPairs = kVectorRegisters == 32 ? Tile<float>::kRows : 2;

// For so many rows, over a whole panel. A and C have room for them rounded up to 1, 2, 4 or kRowsOfPairs.
template <int Chain>
inline void multiply_few_pairs(const float* a, std::int64_t lda, const std::int32_t* b, float* c, std::int64_t ldc, int rows, int depth,
                               bool carry) {
  const auto tile = [&](auto height) {
    constexpr int vectors = kWideVectors<height>;
    for (int j = 0; j < kPanelBytes / 4; j += vectors * kWidth<float>)
      multiply_pairs_tile<height, vectors, Chain>(a, lda, b + j, c + j, ldc, depth, carry);
  };
  if (rows == 1) return tile(std::integral_constant<int, 1>{});
  if constexpr (kRowsOfPairs > 2) {
    if (rows > 4) return tile(std::integral_constant<int, kRowsOfPairs>{});
    if (rows > 2) return tile(std::integral_constant<int, 4>{});
  }
  tile(std::integral_constant<int, 2>{});
}

}  // namespace regard::cpu
