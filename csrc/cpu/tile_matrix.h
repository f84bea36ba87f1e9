// The tile engine on matrix units: C = A B for float operands held as sums of bfloat16.
//
//   A: tiles of 16 rows x 32 steps of the depth. B: tiles of 32 steps (16 pairs down) x 16 columns. Both contiguous, 1 KiB.
//   For a tile of rows (A) or of columns (B), its parts one after another, each part its tiles along the depth.
//
// How many parts, and which of their products count, is a Split: a row of the table below. Everything else is the same
// for every dtype and precision. A float32 is a sum of three bfloat16 (8 + 8 + 8 bits), a float16 one of two; products
// left out are below the error of the ones taken. Small products are summed first, over the whole depth, so that only
// the last ones round at the size of the result.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/simd.h"
#include "cpu/tile_amx.h"

namespace regard::cpu {

// Which part of the left operand meets which of the right one.
struct PartProduct {
  int left;
  int right;
};
template <int Parts, int Count> struct PartProducts {
  static constexpr int kParts = Parts;
  static constexpr int kCount = Count;
  PartProduct list[Count];
};

// bfloat16 as it is, and float32 at precision "medium".
struct SplitOne {
  static constexpr PartProducts<1, 1> kScores{{{0, 0}}};
  static constexpr PartProducts<1, 1> kValues{{{0, 0}}};
};
// float16 exactly; weights of 16 bits against it.
struct SplitHalf {
  static constexpr PartProducts<2, 4> kScores{{{1, 1}, {0, 1}, {1, 0}, {0, 0}}};
  static constexpr PartProducts<2, 3> kValues{{{0, 1}, {1, 0}, {0, 0}}};
};
// float32 at precision "high": 16 bits of each.
struct SplitHigh {
  static constexpr PartProducts<2, 3> kScores{{{0, 1}, {1, 0}, {0, 0}}};
  static constexpr PartProducts<2, 3> kValues = kScores;
};
// float32: what is left out is 2^-27 of the largest product.
struct SplitHighest {
  static constexpr PartProducts<3, 6> kScores{{{0, 2}, {2, 0}, {1, 1}, {0, 1}, {1, 0}, {0, 0}}};
  static constexpr PartProducts<3, 6> kValues = kScores;
};

// words[p] = the p-th bfloat16 (the largest first) of each lane of even, in the lower half, and of odd, in the upper one.
template <int Parts> inline void split_pairs(Vec<float> even, Vec<float> odd, Words (&words)[Parts]) {
#pragma GCC unroll 3
  for (int p = 0; p < Parts; ++p) {
    words[p] = bfloat16_pairs(even, odd);
    even -= lower_of_pairs(words[p]);
    odd -= upper_of_pairs(words[p]);
  }
}

// The same of numbers stored as bfloat16, which are their own only part.
inline Words stored_pairs(const char* even, const char* odd) {
  return widen(reinterpret_cast<const std::uint16_t*>(even)) | widen(reinterpret_cast<const std::uint16_t*>(odd)) << 16;
}

// A row of `n` numbers, a multiple of 32, as rows of tiles along the depth: `tile` floats apart, parts `part` floats. In a
// tile's row, step d is paired with step d + 16, which saves a shuffle: the depth may run in any order that both operands
// share. pairs(d, words) fills in the pairs of steps d and on.
template <int Parts, class F> inline void pair_row(std::int64_t n, float* to, std::int64_t tile, std::int64_t part, F&& pairs) {
  constexpr int w = kWidth<float>;
  for (std::int64_t k = 0; k < n; k += kTileDepth)
    for (int d = 0; d < kTileColumns; d += w) {
      Words words[Parts];
      pairs(k + d, words);
#pragma GCC unroll 3
      for (int p = 0; p < Parts; ++p) store(to + k / kTileDepth * tile + p * part + d, words[p]);
    }
}
template <int Parts> inline void split_row(const float* row, std::int64_t n, float* to, std::int64_t tile, std::int64_t part) {
  pair_row<Parts>(n, to, tile, part, [&](std::int64_t d, Words(&words)[Parts]) {
    split_pairs(load<Vec<float>>(row + d), load<Vec<float>>(row + d + kTileColumns), words);
  });
}
inline void copy_row(const char* row, std::int64_t n, float* to, std::int64_t tile) {
  pair_row<1>(n, to, tile, 0,
              [&](std::int64_t d, Words(&words)[1]) { words[0] = stored_pairs(row + 2 * d, row + 2 * (d + kTileColumns)); });
}

namespace detail {

// Tiles 0 to 3 hold the sums, 4 and 5 tiles of A, 6 and 7 of B: 4 loads of 8 cycles feed 4 products of 16.
template <int Rows, int Columns>
inline void multiply_part(const float* a, std::int64_t a_tile, const float* b, std::int64_t b_tile, std::int64_t steps) {
  for (std::int64_t k = 0; k < steps; ++k) {
    const float* const left = a + k * kTileFloats;
    const float* const right = b + k * kTileFloats;
    tile_load<4>(left, 64);
    tile_load<6>(right, 64);
    tile_dot<0, 4, 6>();
    if constexpr (Columns == 2) {
      tile_load<7>(right + b_tile, 64);
      tile_dot<1, 4, 7>();
    }
    if constexpr (Rows == 2) {
      tile_load<5>(left + a_tile, 64);
      tile_dot<2, 5, 6>();
      if constexpr (Columns == 2) tile_dot<3, 5, 7>();
    }
  }
}

}  // namespace detail

// C, of Rows x Columns tiles, c_row floats apart from row to row. Tiles of rows lie a_tile floats apart, parts a_part.
template <int Rows, int Columns, const auto& Products>
inline void multiply_tiles(const float* a, std::int64_t a_tile, std::int64_t a_part, const float* b, std::int64_t b_tile,
                           std::int64_t b_part, std::int64_t steps, float* c, std::int64_t c_row) {
  tile_zero<0>();
  if constexpr (Columns == 2) tile_zero<1>();
  if constexpr (Rows == 2) tile_zero<2>();
  if constexpr (Rows == 2 && Columns == 2) tile_zero<3>();
  for (const PartProduct product : Products.list)
    detail::multiply_part<Rows, Columns>(a + product.left * a_part, a_tile, b + product.right * b_part, b_tile, steps);
  const std::int64_t bytes = c_row * 4;
  tile_store<0>(c, bytes);
  if constexpr (Columns == 2) tile_store<1>(c + kTileColumns, bytes);
  if constexpr (Rows == 2) tile_store<2>(c + kTileRows * c_row, bytes);
  if constexpr (Rows == 2 && Columns == 2) tile_store<3>(c + kTileRows * c_row + kTileColumns, bytes);
}

// The sums of one packed panel, three tiles across, and Rows tiles of rows. Tiles 0 to 2 hold the upper row of tiles, 3 to
// 5 the lower one; tile 6 holds A and 7 B, which is loaded twice: 7 loads of 8 cycles feed 6 products of 16.
template <int Rows> inline void begin_panel(bool carry, const float* upper, const float* lower) {
  if (!carry) {
    tile_zero<0>();
    tile_zero<1>();
    tile_zero<2>();
    if constexpr (Rows == 1) return;
    tile_zero<3>();
    tile_zero<4>();
    tile_zero<5>();
    return;
  }
  tile_load<0>(upper, 64);
  tile_load<1>(upper + kTileFloats, 64);
  tile_load<2>(upper + 2 * kTileFloats, 64);
  if constexpr (Rows == 1) return;
  tile_load<3>(lower, 64);
  tile_load<4>(lower + kTileFloats, 64);
  tile_load<5>(lower + 2 * kTileFloats, 64);
}

// Sums += A B. A: tiles along the depth, the second row of them a_tile words further. B: rows of three tiles, as a packed
// panel of pairs lies. between() is called once a step: a piece of vector work, done while products run.
template <int Rows, class F>
inline void add_panel(const std::int32_t* a, std::int64_t a_tile, const std::int32_t* b, std::int64_t steps, F&& between) {
  constexpr std::int64_t row = 3 * kTileColumns;
  for (std::int64_t k = 0; k < steps; ++k) {
    const std::int32_t* const left = a + k * kTileFloats;
    const std::int32_t* const right = b + k * kTileRows * row;
    tile_load<6>(left, 64);
    tile_load<7>(right, row * 4);
    tile_dot<0, 6, 7>();
    tile_load<7>(right + kTileColumns, row * 4);
    tile_dot<1, 6, 7>();
    tile_load<7>(right + 2 * kTileColumns, row * 4);
    tile_dot<2, 6, 7>();
    between();
    if constexpr (Rows == 1) continue;
    tile_load<6>(left + a_tile, 64);
    tile_dot<5, 6, 7>();
    tile_load<7>(right + kTileColumns, row * 4);
    tile_dot<4, 6, 7>();
    tile_load<7>(right, row * 4);
    tile_dot<3, 6, 7>();
  }
}

template <int Rows> inline void end_panel(float* upper, float* lower) {
  tile_store<0>(upper, 64);
  tile_store<1>(upper + kTileFloats, 64);
  tile_store<2>(upper + 2 * kTileFloats, 64);
  if constexpr (Rows == 1) return;
  tile_store<3>(lower, 64);
  tile_store<4>(lower + kTileFloats, 64);
  tile_store<5>(lower + 2 * kTileFloats, 64);
}

}  // namespace regard::cpu
