// The tile engine on matrix units: C = A B for float operands held as sums of bfloat16.
//
//   A: tiles of 16 rows x 32 steps of the depth. B: tiles of 32 steps (16 pairs down) x 16 columns. Both contiguous, 1 KiB.
//   For a tile of rows (A) or of columns (B), its parts one after another, each part its tiles along the depth.
//
// How many parts, and which of their products count, is a Split: a row of the table below. Everything else is the same
// for every dtype and precision. A float32 is a sum of three bfloat16 (8 + 8 + 8 bits), a float16 one of two; products
// left out are below the error of the ones taken.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#include "cpu/simd.h"
#include "cpu/tile_amx.h"

namespace regard::cpu {

// Which part of the left operand meets which of the right one, in the order in which neighbours share a part: a part that
// stays is not loaded again. The order costs no accuracy: a product of tiles sums its 32 steps apart and adds them to the
// sums in one rounding.
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
  static constexpr int kDegree = 4;  // of the polynomial of weights
};
// float16 exactly; weights of 16 bits against it.
struct SplitHalf {
  static constexpr PartProducts<2, 4> kScores{{{1, 0}, {1, 1}, {0, 1}, {0, 0}}};
  static constexpr PartProducts<2, 3> kValues{{{1, 0}, {0, 0}, {0, 1}}};
  static constexpr int kDegree = 4;
};
// float32 at precision "high": 16 bits of each.
struct SplitHigh {
  static constexpr PartProducts<2, 3> kScores{{{1, 0}, {0, 0}, {0, 1}}};
  static constexpr PartProducts<2, 3> kValues = kScores;
  static constexpr int kDegree = 4;
};
// float32: what is left out is 2^-27 of the largest product.
struct SplitHighest {
  static constexpr PartProducts<3, 6> kScores{{{2, 0}, {1, 0}, {1, 1}, {0, 1}, {0, 2}, {0, 0}}};
  static constexpr PartProducts<3, 6> kValues = kScores;
  static constexpr int kDegree = 6;
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

// The same of positive numbers, whose parts but the last are cut off, not rounded: 7 instructions a vector for three parts
// where rounding takes 10, on ports that products leave free. What meets them is rounded, so that the products left out
// have either sign. NaN may become anything.
template <int Parts> inline void split_weights(Vec<float> even, Vec<float> odd, Words (&words)[Parts]) {
  using V = Vec<float>;
  constexpr std::uint32_t upper = 0xffff0000u;
#pragma GCC unroll 3
  for (int p = 0; p < Parts; ++p) {
    auto e = UnsignedWords(even);
    auto o = UnsignedWords(odd);
    if (p + 1 == Parts) {
      e += 0x8000u;
      o += 0x8000u;
    }
    words[p] = Words(e >> 16 | (o & upper));
    even -= V(e & upper);
    odd -= V(o & upper);
  }
}

// The same of numbers stored as bfloat16, which are their own only part.
inline Words stored_pairs(const char* even, const char* odd) {
  return widen(reinterpret_cast<const std::uint16_t*>(even)) | widen(reinterpret_cast<const std::uint16_t*>(odd)) << 16;
}

// A row of `n` numbers, a multiple of 32, as rows of tiles along the depth: `tile` floats apart, parts `part` floats.
template <int Parts> inline void split_row(const float* row, std::int64_t n, float* to, std::int64_t tile, std::int64_t part) {
  constexpr int w = kWidth<float>;
  for (std::int64_t k = 0; k < n; k += 2 * w) {
    Vec<float> first = load<Vec<float>>(row + k);
    Vec<float> second = load<Vec<float>>(row + k + w);
    float* const at = to + k / kTileDepth * tile + k % kTileDepth / 2;
#pragma GCC unroll 3
    for (int p = 0; p < Parts; ++p) {
      const auto* const stored = reinterpret_cast<const BFloat16*>(at + p * part);
      store(at + p * part, bfloat16_in_order(first, second));
      first -= load_as(stored);
      second -= load_as(stored + w);
    }
  }
}
inline void copy_row(const char* row, std::int64_t n, float* to, std::int64_t tile) {
  for (std::int64_t k = 0; k < n; k += kTileDepth) std::memcpy(to + k / kTileDepth * tile, row + 2 * k, 2 * kTileDepth);
}

// C (+)= A B for one block of C, one or two tiles down and across, in steps of the depth: the matrix unit is given a step at
// a time, between pieces of other work. Tiles 0 to 3 hold C from the first step to the last.
struct TileBlock {
  const float* a;  // a tile of rows: all its parts, a_part floats apart, each its steps along the depth
  std::int64_t a_tile, a_part;
  const float* b;
  std::int64_t b_tile, b_part;
  std::int64_t steps;
  float* c;
  std::int64_t c_row;
  bool two_rows, two_columns;
  bool carries;  // adds to C as it is
};

namespace detail {

// Tiles 4 and 5 are A's, 6 and 7 are B's: 4 loads of 8 cycles feed 4 products of 16.
template <int Rows, int Columns, PartProduct Product, bool LoadLeft, bool LoadRight>
inline void multiply_parts(const TileBlock& x, std::int64_t step) {
  if constexpr (LoadRight) {
    const float* const right = x.b + Product.right * x.b_part + step * kTileFloats;
    tile_load<6>(right, 64);
    if constexpr (Columns == 2) tile_load<7>(right + x.b_tile, 64);
  }
  if constexpr (LoadLeft) {
    const float* const left = x.a + Product.left * x.a_part + step * kTileFloats;
    tile_load<4>(left, 64);
    if constexpr (Rows == 2) tile_load<5>(left + x.a_tile, 64);
  }
  tile_dot<0, 4, 6>();
  if constexpr (Columns == 2) tile_dot<1, 4, 7>();
  if constexpr (Rows == 2) tile_dot<2, 5, 6>();
  if constexpr (Rows == 2 && Columns == 2) tile_dot<3, 5, 7>();
}

template <int Rows, int Columns, class F> inline void for_each_sum(const TileBlock& x, F&& f) {
  f(std::integral_constant<int, 0>{}, x.c);
  if constexpr (Columns == 2) f(std::integral_constant<int, 1>{}, x.c + kTileColumns);
  if constexpr (Rows == 2) f(std::integral_constant<int, 2>{}, x.c + kTileRows * x.c_row);
  if constexpr (Rows == 2 && Columns == 2) f(std::integral_constant<int, 3>{}, x.c + kTileRows * x.c_row + kTileColumns);
}

template <int Rows, int Columns, const auto& Products> inline void multiply_step(const TileBlock& x, std::int64_t step, int product) {
  constexpr int count = std::remove_reference_t<decltype(Products)>::kCount;
  if (step == 0 && product == 0)
    for_each_sum<Rows, Columns>(x, [&](auto tile, const float* c) {
      if (x.carries)
        tile_load<tile()>(c, x.c_row * 4);
      else
        tile_zero<tile()>();
    });
  [&]<std::size_t... I>(std::index_sequence<I...>) {
    (void)((product == static_cast<int>(I) &&
            (multiply_parts < Rows, Columns, Products.list[I], I == 0 || Products.list[I].left != Products.list[I == 0 ? 0 : I - 1].left,
             I == 0 || Products.list[I].right != Products.list[I == 0 ? 0 : I - 1].right > (x, step), true)) ||
           ...);
  }(std::make_index_sequence<static_cast<std::size_t>(count)>{});
  if (step + 1 == x.steps && product + 1 == count)
    for_each_sum<Rows, Columns>(x, [&](auto tile, float* c) { tile_store<tile()>(c, x.c_row * 4); });
}

}  // namespace detail

// One product of one step of a block's depth, from the first product of step 0 on. Those of one block follow one another,
// with no other block's between.
template <const auto& Products> inline void multiply_step(const TileBlock& x, std::int64_t step, int product) {
  if (x.two_rows && x.two_columns) return detail::multiply_step<2, 2, Products>(x, step, product);
  if (x.two_rows) return detail::multiply_step<2, 1, Products>(x, step, product);
  if (x.two_columns) return detail::multiply_step<1, 2, Products>(x, step, product);
  detail::multiply_step<1, 1, Products>(x, step, product);
}

// Three tiles side by side, `apart` floats from one to the next, each of rows `row` floats apart.
template <int First> inline void load_three(const void* from, std::int64_t apart, std::int64_t row) {
  const auto* const at = static_cast<const float*>(from);
  tile_load<First>(at, row * 4);
  tile_load<First + 1>(at + apart, row * 4);
  tile_load<First + 2>(at + 2 * apart, row * 4);
}
template <int First> inline void store_three(void* to, std::int64_t apart, std::int64_t row) {
  auto* const at = static_cast<float*>(to);
  tile_store<First>(at, row * 4);
  tile_store<First + 1>(at + apart, row * 4);
  tile_store<First + 2>(at + 2 * apart, row * 4);
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
  load_three<0>(upper, kTileFloats, kTileColumns);
  if constexpr (Rows == 2) load_three<3>(lower, kTileFloats, kTileColumns);
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
  store_three<0>(upper, kTileFloats, kTileColumns);
  if constexpr (Rows == 2) store_three<3>(lower, kTileFloats, kTileColumns);
}

// C += A B for rows of bytes, four to a word, and a packed panel of them, three tiles across. Rows are whole tiles, and a row
// of A whole steps of 16 words; the words of B after the last whole step lie in `last`, zeros behind them. Sums are exact.
inline void multiply_bytes(const std::int32_t* a, std::int64_t lda, const std::int32_t* b, std::int64_t ldb, std::int32_t* c,
                           std::int64_t rows, std::int64_t words, const std::int32_t* last) {
  for (std::int64_t r = 0; r < rows; r += kTileRows) {
    std::int32_t* const sums = c + r * ldb;
    load_three<0>(sums, kTileColumns, ldb);
    for (std::int64_t k = 0; k < words; k += kTileColumns) {
      const std::int32_t* const right = k + kTileColumns <= words ? b + k * ldb : last;
      tile_load<4>(a + r * lda + k, lda * 4);
      tile_load<5>(right, ldb * 4);
      tile_dot_bytes<0, 4, 5>();
      tile_load<6>(right + kTileColumns, ldb * 4);
      tile_dot_bytes<1, 4, 6>();
      tile_load<7>(right + 2 * kTileColumns, ldb * 4);
      tile_dot_bytes<2, 4, 7>();
    }
    store_three<0>(sums, kTileColumns, ldb);
  }
}

}  // namespace regard::cpu
