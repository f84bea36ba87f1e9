// Attention's two products on vector units: S = K Q^T and out = out * alpha + V^T P, by tile_simd.h.
#pragma once

#include <algorithm>

#include "cpu/attention_scores.h"
#include "cpu/parallel.h"

namespace regard::cpu {

template <class T> class VectorProducts {
 public:
  static constexpr int kColumns = Tile<T>::kColumns;  // queries of a tile
  static constexpr int kRows = Tile<T>::kRows;        // dim_v is padded to whole ones
  static constexpr int kShare = 2;                    // the largest items are of so many times the fewest queries
  static constexpr bool kOverlaps = false;            // both products run where the softmax runs
  static constexpr int kMostBlocks = 1;               // of keys, copied at once
  using Scores = ScoreTiles<T, kColumns>;
  using Buffers = typename Scores::Buffers;

  // What lies in a worker's Scratch beside the scores.
  struct Memory {
    std::size_t queries_at;
    std::size_t keys_at;
    std::size_t values_at;
    T* queries;  // [tiles][dim_qk][kColumns]
    T* keys;     // [kKeys][key_row], where they have to be copied
    T* values;   // [kKeys][value_row], likewise
    // Of the block at hand.
    typename Scores::StoredRows block_keys, block_values;
  };
  struct Unit {};  // what a worker holds while it computes

  VectorProducts(const AttentionProblem& problem, const Scores& scores) : p_(problem), scores_(scores) {
    dim_v_padded_ = round_up(p_.dim_v(), kRows);
    value_row_ = row_length<T>(dim_v_padded_);
  }

  std::int64_t staging_row() const { return std::max(scores_.key_row, value_row_); }
  static int blocks_at_once() { return 1; }

  void reserve(Scratch& scratch, std::int64_t tiles, Memory& m) const {
    m.queries_at = scratch.template reserve<T>(tiles * p_.dim_qk() * kColumns);
    m.keys_at = scratch.template reserve<T>(kKeys * scores_.key_row);
    m.values_at = scratch.template reserve<T>(kKeys * value_row_);
  }
  void place(const Scratch& scratch, Memory& m) const {
    m.queries = scratch.template at<T>(m.queries_at);
    m.keys = scratch.template at<T>(m.keys_at);
    m.values = scratch.template at<T>(m.values_at);
  }

  void read_queries(const Memory& m, const Buffers& w, const TileOf& t, std::int64_t index) const {
    scores_.read_queries(w, t, m.queries + index * p_.dim_qk() * kColumns);
  }

  void read_block(Memory& m, const Buffers&, std::int64_t b, std::int64_t h, std::int64_t j0, int keys, int) const {
    m.block_keys = scores_.stored_rows(p_.key, p_.key_scales, b, h, j0, keys, p_.dim_qk(), m.keys, scores_.key_row);
    m.block_values = scores_.stored_rows(p_.value, p_.value_scales, b, h, j0, keys, p_.dim_v(), m.values, value_row_);
  }

  void multiply_keys(const Memory& m, const Buffers& w, const SequenceMask& sequence, const TileOf& t, std::int64_t index) const {
    for_each_part(sequence, t, [&](const Part& part) {
      const KeyRange keys{part.keys.first / kRows * kRows, part.keys.last};
      scores_.multiply_keys(w, m.block_keys, t, m.queries + index * p_.dim_qk() * kColumns, part.first_vector, part.vectors, keys);
    });
  }

  void add_values(const Memory& m, const Buffers& w, const SequenceMask& sequence, const TileOf& t, T* out, const Vec<T>* alpha) const {
    for_each_part(sequence, t, [&](const Part& part) {
      const std::int64_t first = part.keys.first / kChain * kChain;
      const std::int64_t column = part.first_vector * kWidth<T>;
      const auto [values, row] = m.block_values;
      multiply<T, Left::rows_contiguous>(values + (t.row + first) * row, row, w.scores + first * kColumns + column, kColumns, out + column,
                                         kColumns, static_cast<int>(dim_v_padded_), part.vectors, static_cast<int>(part.keys.last - first),
                                         alpha + part.first_vector);
    });
  }

 private:
  // Queries of a tile, whole vectors of them, that see the same of its keys.
  struct Part {
    int first_vector;
    int vectors;
    KeyRange keys;  // of the tile
  };

  // The edge of a window or of a causal mask crosses a tile as stairs of a vector's width: the products leave out what lies
  // beyond. A window of 256 costs 1.29 of the plain call a seen pair, and 1.39 with whole tiles; causal at 1024 1.07, and 1.10 (Zen 4).
  template <class F> void for_each_part(const SequenceMask& sequence, const TileOf& t, F&& f) const {
    constexpr int w = kWidth<T>;
    const auto keys_of = [&](int v) {
      const KeyRange seen = sequence.seen_by_any(t.i0 + v * w, t.i0 + std::min((v + 1) * w, t.queries));
      const auto within = [&](std::int64_t j) { return std::clamp<std::int64_t>(j - t.j0, 0, t.keys); };
      return KeyRange{within(seen.first), within(seen.last)};
    };
    for (int v = 0; v < t.vectors;) {
      Part part{v, 1, keys_of(v)};
      for (++v; v < t.vectors; ++v, ++part.vectors) {
        const KeyRange next = keys_of(v);
        if (next.first != part.keys.first || next.last != part.keys.last) break;
      }
      if (part.keys.first < part.keys.last) f(part);
    }
  }

  const AttentionProblem& p_;
  const Scores& scores_;
  std::int64_t dim_v_padded_;
  std::int64_t value_row_;
};

}  // namespace regard::cpu
