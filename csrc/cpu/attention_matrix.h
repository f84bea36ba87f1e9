// Attention's two products on the matrix unit: S = K Q^T and out = out * alpha + V^T P, by tile_matrix.h.
//
// K is the left operand, in rows along its dimensions; Q is packed once an item; S comes out keys down and queries across,
// as on vector units, so that the softmax and all that edits scores is the same code. P is then nearly a right operand:
// two rows of keys to a row of pairs. Only V has to be transposed.
//
// K and V are split and packed once a block of keys, for all queries of the item. While the softmax of one tile of 32
// queries runs on the vector units, the matrix unit is given pieces of the last tile's V^T P and of the next one's K Q^T.
//
// Counted, not measured (no machine with tiles was at hand), for 16 queries x 16 keys of 64 dimensions, bfloat16: 4
// products of 16 cycles = 64 cycles of the matrix unit, with 4 loads of 8 cycles beside them; 16 vectors of softmax, of
// 16 instructions each (the largest: 1, exponential and sum: 14, rounding to bfloat16: 1) = 128 cycles of two vector
// ports. Joining products to the output adds, for 96 keys, an instruction and three accesses for each vector of it.
// float32 takes six times the products, 384 cycles: then the softmax hides behind them, and not they behind it.
#pragma once

#include <algorithm>

#include "cpu/attention_scores.h"
#include "cpu/parallel.h"
#include "cpu/tile_matrix.h"

namespace regard::cpu {

template <class Split> class MatrixProducts {
  using V = Vec<float>;
  static constexpr int kW = kWidth<float>;
  static constexpr int kParts = Split::kScores.kParts;           // of Q and K
  static constexpr int kValueParts = Split::kValues.kParts;      // of P and V
  static constexpr std::int64_t kKeySteps = kKeys / kTileDepth;  // of the depth that runs over keys
  static_assert(kKeys % kTileDepth == 0 && kTileDepth % kChain == 0 && kTileColumns % kW == 0);

 public:
  // Queries of a tile: 2 x 2 tiles of sums use every loaded tile twice, and two tiles of queries in flight make the 64
  // rows for which a tile of K or V should be used while it is near.
  static constexpr int kColumns = 2 * kTileColumns;
  static constexpr int kRows = kTileRows;
  static constexpr bool kOverlaps = true;
  // Items of twice as many queries as on vector units, because packing K and V costs more: counted, some 4,000 instructions
  // for 96 keys of 64 dimensions in bfloat16 and 12,000 in float32, where the softmax of 192 queries has 24,000.
  static constexpr int kShare = 2;
  using Scores = ScoreTiles<float, kColumns>;
  using Buffers = Scores::Buffers;
  using Unit = MatrixTiles;

  struct Memory {
    std::size_t queries_at, keys_at, values_at, weights_at, sums_at, pairs_at;
    float* queries;  // [tiles][2][kParts][steps] tiles of B
    float* keys;     // [kKeys / 16][kParts][steps] tiles of A
    float* values;   // [dim_v_padded / 16][kValueParts][kKeySteps] tiles of A: V^T
    float* weights;  // [2][kValueParts][kKeySteps] tiles of B: P
    float* sums;     // [32][kColumns]: products that are still to join the output
    float* pairs;    // [kValueParts][16][value_row]: pairs of rows of V
  };

  MatrixProducts(const AttentionProblem& problem, const Scores& scores) : p_(problem), scores_(scores) {
    steps_ = divide_up(p_.dim_qk(), kTileDepth);
    dim_v_padded_ = round_up(p_.dim_v(), kRows);
    value_row_ = row_length<float>(dim_v_padded_);
  }

  std::int64_t staging_row() const { return std::max(row_length<float>(steps_ * kTileDepth), value_row_); }

  void reserve(Scratch& scratch, std::int64_t tiles, Memory& m) const {
    m.queries_at = scratch.reserve<float>(tiles * 2 * kParts * steps_ * kTileFloats);
    m.keys_at = scratch.reserve<float>(kKeys / kTileRows * kParts * steps_ * kTileFloats);
    m.values_at = scratch.reserve<float>(dim_v_padded_ / kTileRows * kValuesTile);
    m.weights_at = scratch.reserve<float>(2 * kValuesTile);
    m.sums_at = scratch.reserve<float>(2 * kTileRows * kColumns);
    m.pairs_at = scratch.reserve<float>(std::max(kValueParts * value_row_, kParts * steps_ * kTileColumns) * kTileRows);
  }
  void place(const Scratch& scratch, Memory& m, Buffers& w) const {
    w.keys = nullptr;
    m.queries = scratch.at<float>(m.queries_at);
    m.keys = scratch.at<float>(m.keys_at);
    m.values = scratch.at<float>(m.values_at);
    m.weights = scratch.at<float>(m.weights_at);
    m.sums = scratch.at<float>(m.sums_at);
    m.pairs = scratch.at<float>(m.pairs_at);
  }

  // Q^T of one tile, scaled by a power of two.
  void read_queries(const Memory& m, const Buffers& w, const TileOf& t, std::int64_t index) const {
    const V factor = broadcast<V>(scores_.factors.query);
    const std::int64_t padded = steps_ * kTileDepth;
    const std::int64_t row = kParts * steps_ * kTileColumns;  // dwords: all parts of a query
    for (int c = 0; c < 2; ++c) {
      const int queries = std::clamp(t.queries - c * kTileColumns, 0, kTileColumns);
      for (int r = 0; r < queries; ++r) {
        const Place at = p_.query_place(t.b, t.i0 + c * kTileColumns + r);
        read_row(p_.query.dtype, p_.query.at(at.outer, t.h, at.position), p_.query.stride[3], p_.dim_qk(), w.staging);
        for (std::int64_t d = 0; d < p_.dim_qk(); d += kW) store(w.staging + d, load<V>(w.staging + d) * factor);
        std::fill(w.staging + p_.dim_qk(), w.staging + padded, 0.0f);
        split_row<kParts>(w.staging, padded, m.pairs + r * row, kTileColumns, steps_ * kTileColumns);
      }
      transpose_padded(m.pairs, row, queries, static_cast<int>(row), queries_of(m, index, c), kTileColumns, kTileColumns);
    }
  }

  // K and V of one block, padded with zeros to whole tiles.
  void read_block(const Memory& m, const Buffers& w, std::int64_t b, std::int64_t h, std::int64_t j0, int keys) const {
    const std::int64_t padded = steps_ * kTileDepth;
    float* const row = w.staging;
    const bool copied = kParts == 1 && p_.key.dtype == DType::bfloat16 && p_.key.stride[3] == 2 && p_.dim_qk() == padded;
    for (int r = 0; r < round_up(keys, kTileRows); ++r) {
      float* const tiles = m.keys + r / kTileRows * kParts * steps_ * kTileFloats + r % kTileRows * kTileColumns;
      if (copied && r < keys) {
        copy_row(stored_row(p_.key, b, h, j0 + r), padded, tiles, kTileFloats);
        continue;
      }
      if (r < keys) scores_.read_stored(p_.key, p_.key_scales, b, h, j0 + r, p_.dim_qk(), row);
      std::fill(row + (r < keys ? p_.dim_qk() : 0), row + padded, 0.0f);
      split_row<kParts>(row, padded, tiles, kTileFloats, steps_ * kTileFloats);
    }
    for (int first = 0; first < keys; first += kTileDepth) read_values(m, w, b, h, j0 + first, std::min(keys - first, kTileDepth), first);
  }

  // Pieces that the two products come in: each a few hundred cycles of the matrix unit.
  int key_pieces(const TileOf& t) const { return static_cast<int>(divide_up(t.keys, 2 * kTileRows)); }
  int value_pieces() const { return static_cast<int>(divide_up(dim_v_padded_, 2 * kTileRows)); }

  // Rows 32 * piece and on of S = K Q^T.
  void multiply_keys(const Memory& m, float* scores, const TileOf& t, std::int64_t index, int piece) const {
    const std::int64_t tile = kParts * steps_ * kTileFloats;
    const int r = piece * 2 * kTileRows;
    const float* const keys = m.keys + (t.row + r) / kTileRows * tile;
    multiply_block<Split::kScores>(t.keys - r, t.queries, keys, tile, steps_ * kTileFloats, queries_of(m, index, 0), tile,
                                   steps_ * kTileFloats, steps_, scores + r * kColumns);
  }

  // P of one tile, in pairs of keys. Rows up to a whole step are zeros.
  void take_weights(const Memory& m, float* scores, const TileOf& t) const {
    const int padded = static_cast<int>(round_up(t.keys, kTileDepth));
    std::fill(scores + t.keys * kColumns, scores + padded * kColumns, 0.0f);
    for (int r = 0; r < padded; r += 2)
      for (int v = 0; v < t.vectors; ++v) {
        const int column = v * kW;
        Words words[kValueParts];
        split_pairs(load<V>(scores + r * kColumns + column), load<V>(scores + (r + 1) * kColumns + column), words);
        float* const to = m.weights + column / kTileColumns * kValuesTile + r / kTileDepth * kTileFloats +
                          r % kTileDepth / 2 * kTileColumns + column % kTileColumns;
        for (int p = 0; p < kValueParts; ++p) store(to + p * kKeySteps * kTileFloats, words[p]);
      }
  }

  // Rows 32 * piece and on of out = out * alpha + V^T P, P as take_weights() left it.
  void add_values(const Memory& m, const TileOf& t, float* out, const V* alpha, int piece) const {
    const std::int64_t first = piece * 2 * kTileRows;
    const int rows = static_cast<int>(std::min<std::int64_t>(dim_v_padded_ - first, 2 * kTileRows));
    constexpr std::int64_t part = kKeySteps * kTileFloats;
    const float* const values = m.values + first / kTileRows * kValuesTile + t.row / kTileDepth * kTileFloats;
    multiply_block<Split::kValues>(rows, t.queries, values, kValuesTile, part, m.weights, kValuesTile, part, divide_up(t.keys, kTileDepth),
                                   m.sums);
    for (int r = 0; r < rows; ++r)
      for (int v = 0; v < t.vectors; ++v) {
        float* const at = out + (first + r) * kColumns + v * kW;
        store(at, fma(load<V>(at), alpha[v], load<V>(m.sums + r * kColumns + v * kW)));
      }
  }

 private:
  // Floats of all parts of one tile of V^T's rows, or of P's columns.
  static constexpr std::int64_t kValuesTile = kValueParts * kKeySteps * kTileFloats;

  const char* stored_row(const Array& x, std::int64_t b, std::int64_t h, std::int64_t j) const {
    const Place at = p_.key_place(b, j);
    return x.at(at.outer, h / scores_.per_group, at.position);
  }

  float* queries_of(const Memory& m, std::int64_t index, int column) const {
    return m.queries + (index * 2 + column) * kParts * steps_ * kTileFloats;
  }

  // Keys first .. first + keys of the block: one step of the depth of V^T P.
  void read_values(const Memory& m, const Buffers& w, std::int64_t b, std::int64_t h, std::int64_t j0, int keys, int first) const {
    float* const even = w.staging;
    float* const odd = w.staging + w.staging_row;
    const bool copied = kValueParts == 1 && p_.value.dtype == DType::bfloat16 && p_.value.stride[3] == 2 && p_.dim_v() == dim_v_padded_;
    for (int r = 0; r < kTileDepth; r += 2) {
      if (copied && r + 1 < keys) {
        const char* const first_row = stored_row(p_.value, b, h, j0 + r);
        const char* const second_row = stored_row(p_.value, b, h, j0 + r + 1);
        for (std::int64_t d = 0; d < dim_v_padded_; d += kW)
          store(m.pairs + r / 2 * value_row_ + d, stored_pairs(first_row + 2 * d, second_row + 2 * d));
        continue;
      }
      for (int i = 0; i < 2; ++i) {
        float* const row = i == 0 ? even : odd;
        const bool there = r + i < keys;
        if (there) scores_.read_stored(p_.value, p_.value_scales, b, h, j0 + r + i, p_.dim_v(), row);
        std::fill(row + (there ? p_.dim_v() : 0), row + dim_v_padded_, 0.0f);
      }
      for (std::int64_t d = 0; d < dim_v_padded_; d += kW) {
        Words words[kValueParts];
        split_pairs(load<V>(even + d), load<V>(odd + d), words);
        for (int p = 0; p < kValueParts; ++p) store(m.pairs + (p * kTileRows + r / 2) * value_row_ + d, words[p]);
      }
    }
    for (std::int64_t d = 0; d < dim_v_padded_; d += kTileRows)
      for (int p = 0; p < kValueParts; ++p)
        transpose_padded(m.pairs + p * kTileRows * value_row_ + d, value_row_, kTileRows, kTileRows,
                         m.values + d / kTileRows * kValuesTile + (p * kKeySteps + first / kTileDepth) * kTileFloats, kTileColumns,
                         kTileColumns);
  }

  // One or two tiles down and across, as many as `rows` and `columns` need.
  template <const auto& Products>
  static void multiply_block(int rows, int columns, const float* a, std::int64_t a_tile, std::int64_t a_part, const float* b,
                             std::int64_t b_tile, std::int64_t b_part, std::int64_t steps, float* c) {
    const bool two_rows = rows > kTileRows;
    const bool two_columns = columns > kTileColumns;
    if (two_rows && two_columns)
      multiply_tiles<2, 2, Products>(a, a_tile, a_part, b, b_tile, b_part, steps, c, kColumns);
    else if (two_rows)
      multiply_tiles<2, 1, Products>(a, a_tile, a_part, b, b_tile, b_part, steps, c, kColumns);
    else if (two_columns)
      multiply_tiles<1, 2, Products>(a, a_tile, a_part, b, b_tile, b_part, steps, c, kColumns);
    else
      multiply_tiles<1, 1, Products>(a, a_tile, a_part, b, b_tile, b_part, steps, c, kColumns);
  }

  const AttentionProblem& p_;
  const Scores& scores_;
  std::int64_t steps_;  // of the depth that runs over dimensions
  std::int64_t dim_v_padded_;
  std::int64_t value_row_;
};

// Calls f(Split{}) with the split that serves the problem; answers whether there is one. float64 has none, nor have caches
// whose dtype is another than the query's.
//
// Depths are padded to 32 and rows to 16, and a float32 takes up to six products: a product of tiles, 8,192
// multiply-adds in 16 cycles, does the work of 16 cycles' worth of vectors (2 x 16 a cycle), so it pays down to narrow
// heads, and where it does not the vector units are used. One head's dimensions and dtype decide, nothing else.
template <class F> bool with_matrix_products(const AttentionProblem& p, F&& f) {
  if (p.key.dtype != p.query.dtype) return false;
  const auto serve = [&](auto split) {
    using Split = decltype(split);
    const std::int64_t tiles =
        Split::kScores.kCount * round_up(p.dim_qk(), kTileDepth) + Split::kValues.kCount * round_up(p.dim_v(), kTileRows);
    const bool pays = tiles < 16 * (p.dim_qk() + p.dim_v());
    if (pays) f(split);
    return pays;
  };
  switch (p.query.dtype) {
    case DType::bfloat16: return serve(SplitOne{});
    case DType::float16: return serve(SplitHalf{});
    case DType::float32: break;
    default: return false;
  }
  switch (p.precision) {
    case Precision::medium: return serve(SplitOne{});
    case Precision::high: return serve(SplitHigh{});
    default: return serve(SplitHighest{});
  }
}

}  // namespace regard::cpu
