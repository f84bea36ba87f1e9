// The two products of attention_rows.h on the matrix unit: rows of bfloat16 of all heads that share a key head, 16 at a time.
//
// S = K Q^T takes rows of K as they lie in the cache for its left operand. In out += P V, pairs of rows of V are woven
// together for the right one, and rows of P, rounded to bfloat16, are the left one. A key and its value are then read,
// woven and multiplied faster than memory gives them, however many heads share them; lanes of vectors do their work once
// for every head.
#pragma once

#include <algorithm>
#include <cstring>

#include "cpu/attention_tiles.h"
#include "cpu/parallel.h"
#include "cpu/prefetch.h"
#include "cpu/tile_matrix.h"

namespace regard::cpu {

class RowTiles {
  static constexpr int kW = kWidth<float>;

 public:
  static constexpr int kBlock = 64;  // keys a block
  using Unit = MatrixTiles;

  // One row in 16 is used where no heads share keys: still faster than lanes, and a head's path does not depend on others.
  static bool serve(const AttentionProblem& p) {
    const auto plain = [](const Array& x) { return x.dtype == DType::bfloat16 && x.stride[3] == 2; };
    return p.query.dtype == DType::bfloat16 && plain(p.key) && plain(p.value) && p.dim_qk() > 0 && p.dim_qk() % kTileDepth == 0 &&
           p.dim_v() % kTileColumns == 0;
  }

  RowTiles(std::int64_t dim_qk, std::int64_t dim_v) : steps_(dim_qk / kTileDepth), dim_v_(dim_v) {}

  struct Memory {
    std::size_t queries_at, keys_at, scores_at, weights_at, values_at, output_at;
    std::int64_t row_tiles;
    float* queries;  // [row tiles][steps] tiles of B: Q^T
    float* keys;     // [steps] tiles of A: keys that do not lie in 16 rows of one stride
    float* scores;   // [kBlock][16]
    float* weights;  // [row tiles][kBlock / 32] tiles of A: P
    float* values;   // [kBlock / 32][dim_v / 16] tiles of B: V
    float* output;   // [row tiles][dim_v / 16] tiles of C
  };

  void reserve(Scratch& scratch, std::int64_t rows, Memory& m) const {
    m.row_tiles = divide_up(rows, kTileRows);
    m.queries_at = scratch.reserve<float>(m.row_tiles * steps_ * kTileFloats);
    m.keys_at = scratch.reserve<float>(std::max<std::int64_t>(steps_, 1) * kTileFloats);
    m.scores_at = scratch.reserve<float>(kBlock * kTileColumns);
    m.weights_at = scratch.reserve<float>(m.row_tiles * kSteps * kTileFloats);
    m.values_at = scratch.reserve<float>(kSteps * dim_v_ * kTileRows);
    m.output_at = scratch.reserve<float>(m.row_tiles * dim_v_ * kTileRows);
  }
  void place(const Scratch& scratch, Memory& m) const {
    m.queries = scratch.at<float>(m.queries_at);
    m.keys = scratch.at<float>(m.keys_at);
    m.scores = scratch.at<float>(m.scores_at);
    m.weights = scratch.at<float>(m.weights_at);
    m.values = scratch.at<float>(m.values_at);
    m.output = scratch.at<float>(m.output_at);
  }

  // Q of `rows` rows, and no output yet.
  void start(const Memory& m, const float* queries, std::int64_t rows) const {
    const std::int64_t depth = steps_ * kTileDepth;
    for (std::int64_t first = 0; first < rows; first += kTileRows) {
      const int count = static_cast<int>(std::min<std::int64_t>(rows - first, kTileRows));
      for (int r = 0; r < count; ++r) split_row<1>(queries + (first + r) * depth, depth, m.keys + r * kTileColumns, kTileFloats, 0);
      for (std::int64_t s = 0; s < steps_; ++s)
        transpose_padded(m.keys + s * kTileFloats, kTileColumns, count, kTileColumns,
                         m.queries + (first / kTileRows * steps_ + s) * kTileFloats, kTileColumns, kTileColumns);
    }
    std::fill_n(m.output, m.row_tiles * dim_v_ * kTileRows, 0.0f);
    std::fill_n(m.weights, m.row_tiles * kSteps * kTileFloats, 0.0f);
  }

  // scores[r][k] = q . K for keys that lie at key_at[0 .. keys), `row` floats from row to row.
  void score(const Memory& m, const char* const* key_at, const char* const* value_at, int keys, float* scores, std::int64_t row,
             std::int64_t rows) const {
    for (std::int64_t first = 0; first < rows; first += kTileRows) {
      for (int k = 0; k < keys; k += kTileRows) {
        for (int r = k; first == 0 && r < std::min(k + kTileRows, keys); ++r) ask_for(value_at[r], 2 * dim_v_);
        std::int64_t stride = 64;
        const bool lie = in_rows(key_at + k, keys - k, stride);
        if (!lie) gather(m, key_at + k, keys - k);
        tile_zero<0>();
        for (std::int64_t s = 0; s < steps_; ++s) {
          tile_load<4>(lie ? key_at[k] + s * 2 * kTileDepth : reinterpret_cast<const char*>(m.keys + s * kTileFloats), stride);
          tile_load<6>(m.queries + (first / kTileRows * steps_ + s) * kTileFloats, 64);
          tile_dot<0, 4, 6>();
        }
        tile_store<0>(m.scores + k * kTileColumns, 64);
      }
      transpose_padded(m.scores, kTileColumns, keys, static_cast<int>(std::min<std::int64_t>(rows - first, kTileRows)),
                       scores + first * row, row, static_cast<int>(round_up(keys, kW)));
    }
  }

  // V of one block, for all rows.
  void read_values(const Memory& m, const char* const* value_at, const char* const* key_at, int keys) const {
    const std::intptr_t further = keys == kBlock ? kBlock * (address(key_at[1]) - address(key_at[0])) : 0;
    for (int k = 0; k < round_up(keys, kTileDepth); k += 2) {
      for (int r = k; further != 0 && r < k + 2; ++r) ask_for(reinterpret_cast<const char*>(address(key_at[r]) + further), 2 * dim_v_);
      float* const to = m.values + k / kTileDepth * dim_v_ * kTileRows + k % kTileDepth / 2 * kTileColumns;
      for (std::int64_t d = 0; d < dim_v_; d += kW) {
        Words words{};
        if (k + 1 < keys)
          words = stored_pairs(value_at[k] + 2 * d, value_at[k + 1] + 2 * d);
        else if (k < keys)
          words = widen(reinterpret_cast<const std::uint16_t*>(value_at[k] + 2 * d));
        store(to + d / kTileColumns * kTileFloats + d % kTileColumns, words);
      }
    }
  }

  // out = out * alpha + P V, where scores hold each row's weights of the keys it sees.
  template <class Seen>
  void add_values(const Memory& m, float* scores, std::int64_t row, std::int64_t rows, int keys, const float* alpha, Seen&& seen) const {
    const std::int64_t steps = divide_up(keys, kTileDepth);
    for (std::int64_t r = 0; r < rows; ++r) {
      float* const weights = scores + r * row;
      const auto [first, last] = seen(r);
      std::fill(weights, weights + first, 0.0f);
      std::fill(weights + std::max(first, last), weights + kBlock, 0.0f);
      split_row<1>(weights, kBlock, m.weights + r / kTileRows * kSteps * kTileFloats + r % kTileRows * kTileColumns, kTileFloats, 0);
      if (first < last && alpha[r] != 1)
        for (std::int64_t d = 0; d < dim_v_; d += kTileColumns)
          for (int i = 0; i < kTileColumns; ++i) output_at(m, r, d)[i] *= alpha[r];
    }
    const std::int64_t columns = dim_v_ / kTileColumns;
    for (std::int64_t t = 0; t < m.row_tiles; ++t)
      for (std::int64_t c = 0; c < columns; ++c) {
        float* const sums = m.output + (t * columns + c) * kTileFloats;
        tile_load<0>(sums, 64);
        for (std::int64_t s = 0; s < steps; ++s) {
          tile_load<4>(m.weights + (t * kSteps + s) * kTileFloats, 64);
          tile_load<6>(m.values + (s * columns + c) * kTileFloats, 64);
          tile_dot<0, 4, 6>();
        }
        tile_store<0>(sums, 64);
      }
  }

  void take_output(const Memory& m, std::int64_t r, float* to) const {
    for (std::int64_t d = 0; d < dim_v_; d += kTileColumns) std::copy_n(output_at(m, r, d), kTileColumns, to + d);
  }

 private:
  static constexpr std::int64_t kSteps = kBlock / kTileDepth;

  float* output_at(const Memory& m, std::int64_t r, std::int64_t d) const {
    return m.output + (r / kTileRows * (dim_v_ / kTileColumns) + d / kTileColumns) * kTileFloats + r % kTileRows * kTileColumns +
           d % kTileColumns;
  }

  static std::intptr_t address(const char* p) { return reinterpret_cast<std::intptr_t>(p); }

  // Whether 16 rows lie one stride apart, and which.
  static bool in_rows(const char* const* at, int keys, std::int64_t& stride) {
    if (keys < kTileRows) return false;
    const auto apart = [&](int k) { return address(at[k]) - address(at[k - 1]); };
    for (int k = 2; k < kTileRows; ++k)
      if (apart(k) != apart(1)) return false;
    stride = apart(1);
    return true;
  }

  void gather(const Memory& m, const char* const* at, int keys) const {
    for (int k = 0; k < kTileRows; ++k)
      for (std::int64_t s = 0; s < steps_; ++s) {
        float* const to = m.keys + s * kTileFloats + k * kTileColumns;
        if (k < keys)
          std::memcpy(to, at[k] + s * 2 * kTileDepth, 2 * kTileDepth);
        else
          std::memset(to, 0, 2 * kTileDepth);
      }
  }

  std::int64_t steps_;
  std::int64_t dim_v_;
};

}  // namespace regard::cpu
