// Scores of attention: a tile of keys (down) and queries (across), or a row of keys.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "cpu/attention_tiles.h"
#include "cpu/lanes.h"
#include "cpu/math.h"
#include "cpu/prefetch.h"
#include "cpu/strided.h"

namespace regard::cpu {

constexpr double kLog2E = 1.4426950408889634074;

// The scale, in the parts in which it enters.
template <class T> struct ScoreFactors {
  T query;  // a power of two
  T score;  // scale / query (/ softcap), and what rounding took from it
  T score_low;
  double unit;  // what 1 in a score is worth: scores stay unscaled where nothing is added to them
  T exp;        // unit * log2(e), and what rounding took from it
  T exp_low;
  bool transforms;

  explicit ScoreFactors(const AttentionProblem& p) {
    // scale = 2^exponent * rest, |rest| in [1, 2): the power goes into Q exactly, so that a product overflows only
    // where the scaled score would, and nothing is rounded twice.
    int exponent = 0;
    std::frexp(p.scale, &exponent);
    query = p.scale == 0 ? T(1) : static_cast<T>(std::ldexp(1.0, std::clamp(exponent - 1, -120, 120)));
    const double rest = p.scale / static_cast<double>(query);
    const double factor = p.softcap > 0 ? rest / p.softcap : rest;
    score = static_cast<T>(factor);
    score_low = static_cast<T>(factor - static_cast<double>(score));
    transforms = p.softcap > 0 || p.bias.present() || p.alibi_slopes.present() || p.sinks.present() || !(p.scale > 0);
    unit = transforms ? 1.0 : rest;
    exp = static_cast<T>(kLog2E * unit);
    exp_low = static_cast<T>(kLog2E * unit - static_cast<double>(exp));
  }
};

// Whether load_as() makes vectors of compute values from that type, and f(S{}) for one of those.
template <class T> constexpr bool loads_as(DType t) { return (t == DType::float64) == std::is_same_v<T, double>; }
template <class T, class F> inline void with_loaded(DType t, F&& f) {
  if constexpr (std::is_same_v<T, double>)
    f(double{});
  else
    with_stored(t, f);
}

// One tile of queries against one block of keys, of one head.
struct TileOf {
  std::int64_t b, h;
  std::int64_t i0;  // first query
  int queries;
  int vectors;
  std::int64_t j0;  // first key
  int keys;
  int row = 0;  // of the first key in the block that was copied
};

// Fills and edits tiles of scores: S[key][query], kColumns across.
template <class T, int Columns = Tile<T>::kColumns> class ScoreTiles {
  using V = Vec<T>;
  static constexpr int kColumns = Columns;
  static constexpr int kW = kWidth<T>;

 public:
  // Memory of a worker, kept by the caller.
  struct Buffers {
    T* scores;   // [kKeys][kColumns]
    T* extra;    // [kKeys], padded to a vector: a row of bias or mask
    T* staging;  // [kColumns][staging_row]
    std::int64_t staging_row;
  };

  explicit ScoreTiles(const AttentionProblem& problem) : p_(problem), factors(problem), key_row(row_length<T>(problem.dim_qk())) {
    per_group = p_.heads_kv() > 0 ? std::max<std::int64_t>(1, p_.heads() / p_.heads_kv()) : 1;
  }

  // Q^T of one tile, scaled by a power of two.
  void read_queries(const Buffers& w, const TileOf& t, T* to) const {
    for (int r = 0; r < t.queries; ++r) read_query(t, r, w.staging + r * w.staging_row);
    transpose_padded(w.staging, w.staging_row, t.queries, static_cast<int>(p_.dim_qk()), to, kColumns,
                     static_cast<int>(round_up(t.queries, kW)));
  }

  // Query r of the tile, scaled likewise; `to` has room for whole vectors.
  void read_query(const TileOf& t, int r, T* to) const {
    const V factor = broadcast<V>(factors.query);
    const bool whole = lies_in_vectors(p_.query, p_.dim_qk());
    const Place at = p_.query_place(t.b, t.i0 + r);
    const char* const from = p_.query.at(at.outer, t.h, at.position);
    if (!whole) read_row(p_.query.dtype, from, p_.query.stride[3], p_.dim_qk(), to);
    const T* const values = whole ? reinterpret_cast<const T*>(from) : to;
    for (std::int64_t d = 0; d < p_.dim_qk(); d += kW) store(to + d, load<V>(values + d) * factor);
  }

  // Rows of compute values, `row` values apart.
  struct StoredRows {
    const T* first;
    std::int64_t row;
  };

  // Rows j0 .. j0 + rows of K or V for register tiles: where they lie, if these can read them there, or copied, padded with
  // zeros to whole tiles. In place 1x4x1024x64 takes 0.93 of the time, 8x12x128x64 0.98 (AVX-512, Emerald Rapids; AVX2 0.99).
  // Rows further apart than they are long are copied all the same: many of them would share few sets of L1.
  StoredRows stored_rows(const Array& x, const Array& scales, std::int64_t b, std::int64_t h, std::int64_t j0, int rows, std::int64_t dim,
                         T* copy, std::int64_t copy_row) const {
    constexpr int tile = Tile<T>::kRows;
    const Place place = p_.key_place(b, j0);
    const char* const first = x.at(place.outer, h / per_group, place.position);
    if (lies_in_vectors(x, dim) && dim % tile == 0 && rows % tile == 0 && x.stride[2] == dim * size_of(x.dtype) &&
        p_.keys_together(j0, j0 + rows) == rows && reinterpret_cast<std::uintptr_t>(first) % sizeof(T) == 0)
      return {reinterpret_cast<const T*>(first), dim};
    read_stored_rows(x, scales, b, h, j0, rows, dim, copy, copy_row);
    const std::int64_t padded = round_up(dim, tile);
    for (int r = 0; r < rows && dim < padded; ++r) std::fill(copy + r * copy_row + dim, copy + r * copy_row + padded, T(0));
    for (int r = rows; r < round_up(rows, tile); ++r) std::fill_n(copy + r * copy_row, padded, T(0));
    return {copy, copy_row};
  }

  // Whether rows are whole vectors of compute values: read without a call for each, which cost an eighth of attention over
  // 256 keys of 32 dimensions (Zen 3).
  static bool lies_in_vectors(const Array& x, std::int64_t dim) {
    return x.dtype == dtype_of<T>() && x.stride[3] == size_of(x.dtype) && dim % kW == 0;
  }

  // Rows of K or V from j0 on, `to_row` apart.
  void read_stored_rows(const Array& x, const Array& scales, std::int64_t b, std::int64_t h, std::int64_t j0, int rows, std::int64_t dim,
                        T* to, std::int64_t to_row) const {
    const bool whole = lies_in_vectors(x, dim);
    const std::int64_t group = h / per_group;
    for (int r = 0; r < rows; ++r, to += to_row) {
      if (!whole) {
        read_stored(x, scales, b, h, j0 + r, dim, to);
        continue;
      }
      const Place at = p_.key_place(b, j0 + r);
      const T* const from = reinterpret_cast<const T*>(x.at(at.outer, group, at.position));
      for (std::int64_t d = 0; d < dim; d += kW) store(to + d, load<V>(from + d));
    }
  }

  // Row j of K or V, with its scale where the cache has one.
  void read_stored(const Array& x, const Array& scales, std::int64_t b, std::int64_t h, std::int64_t j, std::int64_t dim, T* to) const {
    const Place at = p_.key_place(b, j);
    const std::int64_t group = h / per_group;
    read_row(x.dtype, x.at(at.outer, group, at.position), x.stride[3], dim, to);
    if (!scales.present()) return;
    const T factor = read<float>(scales.at(at.outer, group, at.position));
    for (std::int64_t d = 0; d < dim; ++d) to[d] *= factor;
  }

  // S = K Q^T, for some of the tile's vectors of queries and of its keys, from a multiple of kRows.
  void multiply_keys(const Buffers& w, StoredRows stored, const TileOf& t, const T* queries, int first_vector, int vectors,
                     KeyRange keys) const {
    multiply<T, Left::depth_contiguous>(stored.first + (t.row + keys.first) * stored.row, stored.row, queries + first_vector * kW, kColumns,
                                        w.scores + keys.first * kColumns + first_vector * kW, kColumns,
                                        static_cast<int>(keys.last - keys.first), vectors, static_cast<int>(p_.dim_qk()), nullptr);
  }

  // Asks for the tile's mask and bias before the products: their rows lie far apart, and waiting for each where it is used
  // cost as much as adding it.
  void prefetch_edits(const TileOf& t) const {
    for (const Array* x : {&p_.mask, &p_.bias})
      if (x->present() && x->stride[2] != 0) prefetch(*x, t);
  }

  // All that is added or hidden.
  void edit(const Buffers& w, const SequenceMask& sequence, const TileOf& t) const {
    if (factors.transforms) transform(w, sequence, t);
    hide(w, sequence, t);
  }

  // Scores in natural units: scaled, capped, with bias and ALiBi. Scale and bias join in fused steps: rounding the scaled
  // score first doubled the error of large scores.
  void transform(const Buffers& w, const SequenceMask& sequence, const TileOf& t) const {
    const V high = broadcast<V>(factors.score);
    const V low = broadcast<V>(factors.score_low);
    const auto scaled_plus = [&](V s, V bias) { return fma(s, high, fma(s, low, bias)); };
    const auto capped_plus = [&](V s, V bias) {
      return fma(broadcast<V>(static_cast<T>(p_.softcap)), tanh_of_small(fma(s, high, s * low)), bias);
    };
    if (p_.softcap > 0)
      add_bias(w, t, capped_plus);
    else
      add_bias(w, t, scaled_plus);
    if (p_.alibi_slopes.present()) {
      const V slope = broadcast<V>(static_cast<T>(read<float>(p_.alibi_slopes.at(t.b, t.h))));
      const T centre = static_cast<T>(t.i0 + sequence.diagonal - t.j0);
      const V lanes = lane_numbers<T>();
      for_each_vector(w, t, [&](V s, int r, int v) { return s - slope * abs(lanes + broadcast<V>(centre + static_cast<T>(v * kW - r))); });
    }
  }

  // -inf where the mask, a window, the causal diagonal or a length hides the key.
  void hide(const Buffers& w, const SequenceMask& sequence, const TileOf& t) const {
    if (p_.mask.present()) apply_mask(w, t);
    const KeyRange all = sequence.seen_by_all(t.i0, t.i0 + t.queries);
    if (all.first > t.j0 || all.last < t.j0 + t.keys) apply_range(w, sequence, t);
  }

  // -inf where the mask is false.
  void apply_mask(const Buffers& w, const TileOf& t) const {
    const V masked = broadcast<V>(-std::numeric_limits<T>::infinity());
    if (p_.mask.stride[2] == 0) {
      load_row(w, p_.mask, t);
      for_each_vector(w, t, [&](V s, int r, int) { return w.extra[r] != 0 ? s : masked; });
    } else {
      join(w, p_.mask, t, [&](V s, V seen) { return seen != 0 ? s : masked; });
    }
  }

  // Multiplies the tile by what dropout leaves of each weight.
  void apply_dropout(const Buffers& w, const TileOf& t) const {
    const Philox random(p_.dropout.seed);
    const std::uint64_t threshold = p_.dropout.threshold();
    const T kept = static_cast<T>(p_.dropout.kept_scale());
    std::uint32_t words[kColumns][4];
    for (int r = 0; r < t.keys; ++r) {
      const std::int64_t j = t.j0 + r;
      if (r == 0 || j % 4 == 0)
        for (int q = 0; q < t.vectors * kW; ++q) {
          Dropout::counter_of(t.b, t.h, t.i0 + q, j, words[q]);
          random.words(words[q]);
        }
      for (int q = 0; q < t.vectors * kW; ++q) w.scores[r * kColumns + q] *= words[q][j % 4] >= threshold ? kept : T(0);
    }
  }

  template <class F> void for_each_vector(const Buffers& w, const TileOf& t, F&& f) const {
    for (int r = 0; r < t.keys; ++r)
      for (int v = 0; v < t.vectors; ++v) {
        T* const at = w.scores + r * kColumns + v * kW;
        store(at, f(load<V>(at), r, v));
      }
  }

 private:
  // scores = combine(score, bias), with a bias of 0 where there is none.
  template <class F> void add_bias(const Buffers& w, const TileOf& t, F&& combine) const {
    if (!p_.bias.present()) {
      for_each_vector(w, t, [&](V s, int, int) { return combine(s, V{}); });
    } else if (p_.bias.stride[2] == 0) {
      load_row(w, p_.bias, t);
      for_each_vector(w, t, [&](V s, int r, int) { return combine(s, broadcast<V>(w.extra[r])); });
    } else {
      join(w, p_.bias, t, combine);
    }
  }

  // Keys outside each query's own range.
  void apply_range(const Buffers& w, const SequenceMask& sequence, const TileOf& t) const {
    alignas(64) T first[kColumns] = {};
    alignas(64) T last[kColumns] = {};
    for (int q = 0; q < t.queries; ++q) {
      const KeyRange range = sequence.keys_of(t.i0 + q);
      first[q] = static_cast<T>(std::clamp<std::int64_t>(range.first - t.j0, 0, kKeys));
      last[q] = static_cast<T>(std::clamp<std::int64_t>(range.last - t.j0, 0, kKeys));
    }
    const V masked = broadcast<V>(-std::numeric_limits<T>::infinity());
    for_each_vector(w, t, [&](V s, int r, int v) {
      const V key = broadcast<V>(static_cast<T>(r));
      const V kept = key >= load<V>(first + v * kW) ? s : masked;
      return key < load<V>(last + v * kW) ? kept : masked;
    });
  }

  // extra[r] = x[b, h, any query, j0 + r]
  void load_row(const Buffers& w, const Array& x, const TileOf& t) const {
    read_row(x.dtype, x.at(t.b, t.h, t.i0, t.j0), x.stride[3], t.keys, w.extra);
  }
  // scores = combine(score, x[b, h, i0 + query, j0 + key]), square by square: x has keys across, scores have queries. Joined
  // in registers: a turned tile of its own would push the scores out of L1 (18 KiB each, of 32 on Zen 4).
  template <class F> void join(const Buffers& w, const Array& x, const TileOf& t, F&& combine) const {
    for (int v = 0; v < t.vectors; ++v)
      for (int r = 0; r < t.keys; r += kW) {
        const int keys = std::min(kW, t.keys - r);
        V square[kW];
        read_square(w, x, t, v * kW, r, keys, square);
        T* const at = w.scores + r * kColumns + v * kW;
        for (int k = 0; k < keys; ++k) store(at + k * kColumns, combine(load<V>(at + k * kColumns), square[k]));
      }
  }

  // square[k] = x[b, h, i0 + query ..., j0 + key + k], zeros beyond the tile.
  [[gnu::noinline]] void read_square(const Buffers& w, const Array& x, const TileOf& t, int query, int key, int keys,
                                     V (&square)[kW]) const {
    const int queries = std::min(kW, t.queries - query);
    const char* const at = x.at(t.b, t.h, t.i0 + query, t.j0 + key);
    const auto whole = [&](auto storage) {
      using S = decltype(storage);
      for (int q = 0; q < kW; ++q) square[q] = q < queries ? load_as(reinterpret_cast<const S*>(at + q * x.stride[2])) : V{};
    };
    if (keys == kW && x.stride[3] == size_of(x.dtype) && loads_as<T>(x.dtype)) {
      with_loaded<T>(x.dtype, whole);
    } else {
      for (int q = 0; q < kW; ++q) {
        if (q < queries) read_row(x.dtype, at + q * x.stride[2], x.stride[3], keys, w.staging);
        square[q] = q < queries ? load<V>(w.staging) : V{};
      }
    }
    transpose(square);
  }

  // Asks for a tile's share of x.
  void prefetch(const Array& x, const TileOf& t) const {
    const std::int64_t step = x.stride[3];
    for (int q = 0; q < t.queries; ++q) {
      const char* const row = x.at(t.b, t.h, t.i0 + q, t.j0);
      if (0 <= step && step <= kLine)
        ask_for(row, step * t.keys);
      else
        for (int r = 0; r < t.keys; ++r) ask_for_line(row + r * step);
    }
  }

  const AttentionProblem& p_;

 public:
  const ScoreFactors<T> factors;
  const std::int64_t key_row;
  std::int64_t per_group;
};

// Compiled once, in attention_scores.cpp.
extern template class ScoreTiles<float>;
extern template class ScoreTiles<double>;

}  // namespace regard::cpu
