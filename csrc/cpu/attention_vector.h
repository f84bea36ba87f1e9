// Attention's two products on vector units: S = K Q^T and out = out * alpha + V^T P, by tile_simd.h.
#pragma once

#include <algorithm>

#include "cpu/attention_scores.h"

namespace regard::cpu {

template <class T> class VectorProducts {
 public:
  static constexpr int kColumns = Tile<T>::kColumns;  // queries of a tile
  static constexpr int kRows = Tile<T>::kRows;        // dim_v is padded to whole ones
  static constexpr int kShare = 1;                    // items are of so many times queries_per_item()
  static constexpr bool kOverlaps = false;            // both products run where the softmax runs
  using Scores = ScoreTiles<T, kColumns>;
  using Buffers = typename Scores::Buffers;

  // What lies in a worker's Scratch beside the scores.
  struct Memory {
    std::size_t queries_at;
    std::size_t keys_at;
    std::size_t values_at;
    T* queries;  // [tiles][dim_qk][kColumns]
    T* values;   // [kKeys][value_row]
  };
  struct Unit {};  // what a worker holds while it computes

  VectorProducts(const AttentionProblem& problem, const Scores& scores) : p_(problem), scores_(scores) {
    dim_v_padded_ = round_up(p_.dim_v(), kRows);
    value_row_ = row_length<T>(dim_v_padded_);
  }

  std::int64_t staging_row() const { return std::max(scores_.key_row, value_row_); }

  void reserve(Scratch& scratch, std::int64_t tiles, Memory& m) const {
    m.queries_at = scratch.template reserve<T>(tiles * p_.dim_qk() * kColumns);
    m.keys_at = scratch.template reserve<T>(kKeys * scores_.key_row);
    m.values_at = scratch.template reserve<T>(kKeys * value_row_);
  }
  void place(const Scratch& scratch, Memory& m, Buffers& w) const {
    m.queries = scratch.template at<T>(m.queries_at);
    w.keys = scratch.template at<T>(m.keys_at);
    m.values = scratch.template at<T>(m.values_at);
  }

  void read_queries(const Memory& m, const Buffers& w, const TileOf& t, std::int64_t index) const {
    scores_.read_queries(w, t, m.queries + index * p_.dim_qk() * kColumns);
  }

  // K and V of one block as contiguous compute values, padded with zeros to whole register tiles.
  void read_block(const Memory& m, const Buffers& w, std::int64_t b, std::int64_t h, std::int64_t j0, int keys) const {
    scores_.read_keys(w, b, h, j0, keys);
    for (int r = 0; r < keys; ++r) {
      T* const value = m.values + r * value_row_;
      scores_.read_stored(p_.value, p_.value_scales, b, h, j0 + r, p_.dim_v(), value);
      std::fill(value + p_.dim_v(), value + dim_v_padded_, T(0));
    }
  }

  // Each product is a function of its own: inlined where the softmax is, its accumulators were spilled (gcc 12), and
  // 1 x 1 x 1024 x 64 took 4.0 ms for 3.0 on a Zen 4.
  [[gnu::noinline]] void multiply_keys(const Memory& m, const Buffers& w, const TileOf& t, std::int64_t index) const {
    scores_.multiply_keys(w, t, m.queries + index * p_.dim_qk() * kColumns);
  }

  [[gnu::noinline]] void add_values(const Memory& m, const Buffers& w, const TileOf& t, T* out, const Vec<T>* alpha) const {
    multiply<T, Left::rows_contiguous>(m.values + t.row * value_row_, value_row_, w.scores, kColumns, out, kColumns,
                                       static_cast<int>(dim_v_padded_), t.vectors, t.keys, alpha);
  }

 private:
  const AttentionProblem& p_;
  const Scores& scores_;
  std::int64_t dim_v_padded_;
  std::int64_t value_row_;
};

}  // namespace regard::cpu
