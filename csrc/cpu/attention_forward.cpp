// Dot-product attention, forward: out = softmax(scale Q K^T + bias, masked) V without the len_q x len_kv matrix.
//
//   for each item: a block of queries of one head                      (parallel)
//     pack Q^T; max = -inf, sum = 0, out = 0
//     for each block of keys the queries see                          (in order: the merge is sequential)
//       copy K, V as compute values                                   (cache-resident, shared by the block's queries)
//       for each tile of kColumns queries
//         S = K Q^T;  add bias, mask where the tile is partial;  P = exp2(S - max);  out = out * alpha + V^T P
//     out / sum, transposed back; non-finite rows again by the plain path
//
// The online softmax is Milakov & Gimelshein, "Online normalizer calculation for softmax" (2018); tiling with it,
// Dao, "FlashAttention-2" (2023).

#include <algorithm>
#include <cmath>
#include <limits>

#include "cpu/attention_plain.h"
#include "cpu/math.h"
#include "cpu/operations.h"
#include "cpu/parallel.h"
#include "cpu/strided.h"
#include "cpu/tile_simd.h"

namespace regard::cpu {
namespace {

// Keys a block. The score tile (96 x 48 floats, 18 KiB) and Q^T stay in L1 while K and V stream from L2.
constexpr int kKeys = 96;

// Queries an item, a multiple of every tile's columns: they share one copy of K and V. Fewer for wide heads, so that
// Q^T, out and the copies stay within 1 MiB of L2.
constexpr std::int64_t queries_per_item(std::int64_t dim) { return dim <= 128 ? 192 : dim <= 256 ? 96 : 48; }

constexpr double kLog2E = 1.4426950408889634074;

std::int64_t round_up(std::int64_t n, std::int64_t to) { return (n + to - 1) / to * to; }

// Row length of a copied block: whole vectors, and an odd number of cache lines, so that rows spread over all L1 sets.
template <class T> std::int64_t row_length(std::int64_t n) {
  constexpr std::int64_t line = 64 / sizeof(T);
  return (round_up(std::max<std::int64_t>(n, 1), line) / line | 1) * line;
}

template <class T> class Forward {
  using V = Vec<T>;
  static constexpr int kColumns = Tile<T>::kColumns;
  static constexpr int kW = kWidth<T>;
  static constexpr T kInfinity = std::numeric_limits<T>::infinity();

 public:
  explicit Forward(const AttentionProblem& problem) : p_(problem), plain_(problem) {
    // scale = 2^exponent * rest, |rest| in [1, 2): the power goes into Q exactly, so that a product overflows only
    // where the scaled score would, and nothing is rounded twice.
    int exponent = 0;
    std::frexp(p_.scale, &exponent);
    query_factor_ = p_.scale == 0 ? T(1) : static_cast<T>(std::ldexp(1.0, std::clamp(exponent - 1, -120, 120)));
    const double rest = p_.scale / static_cast<double>(query_factor_);
    const double factor = p_.softcap > 0 ? rest / p_.softcap : rest;
    score_factor_ = static_cast<T>(factor);
    score_factor_low_ = static_cast<T>(factor - static_cast<double>(score_factor_));
    transforms_ = p_.softcap > 0 || p_.bias.present() || p_.alibi_slopes.present() || p_.sinks.present() || !(p_.scale > 0);
    score_unit_ = transforms_ ? 1.0 : rest;
    exp_factor_ = static_cast<T>(kLog2E * score_unit_);
    exp_factor_low_ = static_cast<T>(kLog2E * score_unit_ - static_cast<double>(exp_factor_));
    per_group_ = p_.heads_kv() > 0 ? p_.heads() / p_.heads_kv() : 1;

    // Equal blocks rather than full ones and a rest: each item copies K and V for itself.
    const std::int64_t most = queries_per_item(std::max(p_.dim_qk(), p_.dim_v()));
    blocks_ = (p_.len_q() + most - 1) / most;
    block_ = blocks_ > 0 ? std::min(most, round_up((p_.len_q() + blocks_ - 1) / blocks_, kW)) : 0;
    dim_v_padded_ = round_up(p_.dim_v(), Tile<T>::kRows);
    key_row_ = row_length<T>(p_.dim_qk());
    value_row_ = row_length<T>(dim_v_padded_);
  }

  void run() {
    const std::int64_t items = p_.batch() * p_.heads() * blocks_;
    const double work = static_cast<double>(items) * static_cast<double>(block_) * static_cast<double>(p_.len_kv() + 1) *
                        static_cast<double>(p_.dim_qk() + p_.dim_v());
    // Late queries see the most keys under a causal mask: they go first, so that threads end together.
    parallel_for(items, work, [this](std::int64_t item) { run_item(item / blocks_, blocks_ - 1 - item % blocks_); });
  }

 private:
  struct Buffers {
    Scratch scratch;
    T* queries;  // [tiles][dim_qk][kColumns]
    T* output;   // [tiles][dim_v_padded][kColumns]
    T* max;      // [tiles][kColumns], of the scores as the tiles hold them
    T* sum;      // [tiles][kColumns]
    T* keys;     // [kKeys][key_row]
    T* values;   // [kKeys][value_row]
    T* scores;   // [kKeys][kColumns]
    T* extra;    // [kKeys][kColumns]: a tile of bias or mask
    T* staging;  // [kColumns][max(key_row, value_row, kKeys)]
    std::int64_t staging_row;
    double* plain_row;  // [dim_v]
  };

  // One tile of queries against one block of keys.
  struct TileOf {
    std::int64_t b, h;
    std::int64_t i0;  // first query
    int queries;
    int vectors;
    std::int64_t j0;  // first key
    int keys;
  };

  void take_buffers(Buffers& w) const {
    const std::int64_t tiles = (block_ + kColumns - 1) / kColumns;
    w.staging_row = std::max({key_row_, value_row_, row_length<T>(kKeys)});
    const auto queries = w.scratch.template reserve<T>(tiles * p_.dim_qk() * kColumns);
    const auto output = w.scratch.template reserve<T>(tiles * dim_v_padded_ * kColumns);
    const auto max = w.scratch.template reserve<T>(tiles * kColumns);
    const auto sum = w.scratch.template reserve<T>(tiles * kColumns);
    const auto keys = w.scratch.template reserve<T>(kKeys * key_row_);
    const auto values = w.scratch.template reserve<T>(kKeys * value_row_);
    const auto scores = w.scratch.template reserve<T>(kKeys * kColumns);
    const auto extra = w.scratch.template reserve<T>(round_up(kKeys, kW) * kColumns);
    const auto staging = w.scratch.template reserve<T>(kColumns * w.staging_row);
    const auto plain_row = w.scratch.template reserve<double>(p_.dim_v());
    w.scratch.acquire();
    w.queries = w.scratch.template at<T>(queries);
    w.output = w.scratch.template at<T>(output);
    w.max = w.scratch.template at<T>(max);
    w.sum = w.scratch.template at<T>(sum);
    w.keys = w.scratch.template at<T>(keys);
    w.values = w.scratch.template at<T>(values);
    w.scores = w.scratch.template at<T>(scores);
    w.extra = w.scratch.template at<T>(extra);
    w.staging = w.scratch.template at<T>(staging);
    w.plain_row = w.scratch.template at<double>(plain_row);
  }

  void run_item(std::int64_t batch_head, std::int64_t block) const {
    const std::int64_t b = batch_head / p_.heads();
    const std::int64_t h = batch_head % p_.heads();
    const std::int64_t i0 = block * block_;
    const std::int64_t i1 = std::min(i0 + block_, p_.len_q());
    if (i0 >= i1) return;
    Buffers w;
    take_buffers(w);
    const SequenceMask sequence = p_.sequence(b);
    for (std::int64_t i = i0; i < i1; i += kColumns) start_tile(w, b, h, i0, i, std::min<std::int64_t>(kColumns, i1 - i));

    const KeyRange seen = sequence.seen_by_any(i0, i1);
    for (std::int64_t j0 = seen.first / kKeys * kKeys; j0 < seen.last; j0 += kKeys) {
      if (stop_requested()) return;
      const int keys = static_cast<int>(std::min<std::int64_t>(kKeys, sequence.len_kv - j0));
      copy_block(w, b, h / per_group_, j0, keys);
      for (std::int64_t i = i0; i < i1; i += kColumns) {
        const int queries = static_cast<int>(std::min<std::int64_t>(kColumns, i1 - i));
        const KeyRange any = sequence.seen_by_any(i, i + queries);
        if (any.first >= j0 + keys || any.last <= j0) continue;
        const TileOf tile{b, h, i, queries, (queries + kW - 1) / kW, j0, keys};
        run_tile(w, sequence, tile, (i - i0) / kColumns);
      }
    }
    for (std::int64_t i = i0; i < i1; i += kColumns)
      finish_tile(w, b, h, i, static_cast<int>(std::min<std::int64_t>(kColumns, i1 - i)), (i - i0) / kColumns);
  }

  // Q^T of one tile, scaled by a power of two; the softmax's state before any key.
  void start_tile(Buffers& w, std::int64_t b, std::int64_t h, std::int64_t i0, std::int64_t i, std::int64_t queries) const {
    const std::int64_t t = (i - i0) / kColumns;
    const V factor = broadcast<V>(query_factor_);
    for (std::int64_t r = 0; r < queries; ++r) {
      T* const row = w.staging + r * w.staging_row;
      read_row(p_.query.dtype, p_.query.at(b, h, i + r), p_.query.stride[3], p_.dim_qk(), row);
      for (std::int64_t d = 0; d < p_.dim_qk(); d += kW) store(row + d, load<V>(row + d) * factor);
    }
    transpose_padded(w.staging, w.staging_row, static_cast<int>(queries), static_cast<int>(p_.dim_qk()),
                     w.queries + t * p_.dim_qk() * kColumns, kColumns, static_cast<int>(round_up(queries, kW)));
    std::fill_n(w.output + t * dim_v_padded_ * kColumns, dim_v_padded_ * kColumns, T(0));
    const bool sink = p_.sinks.present();
    const T start = sink ? static_cast<T>(read<float>(p_.sinks.at(h))) : -kInfinity;
    std::fill_n(w.max + t * kColumns, kColumns, start);
    std::fill_n(w.sum + t * kColumns, kColumns, start > -kInfinity ? T(1) : T(0));
  }

  // K and V of one block as contiguous compute values, padded with zeros to whole register tiles.
  void copy_block(Buffers& w, std::int64_t b, std::int64_t group, std::int64_t j0, int keys) const {
    for (int r = 0; r < keys; ++r) {
      read_row(p_.key.dtype, p_.key.at(b, group, j0 + r), p_.key.stride[3], p_.dim_qk(), w.keys + r * key_row_);
      T* const value = w.values + r * value_row_;
      read_row(p_.value.dtype, p_.value.at(b, group, j0 + r), p_.value.stride[3], p_.dim_v(), value);
      std::fill(value + p_.dim_v(), value + dim_v_padded_, T(0));
    }
    for (int r = keys; r < round_up(keys, Tile<T>::kRows); ++r) std::fill_n(w.keys + r * key_row_, p_.dim_qk(), T(0));
  }

  void run_tile(Buffers& w, const SequenceMask& sequence, const TileOf& t, std::int64_t index) const {
    multiply<T, Left::depth_contiguous>(w.keys, key_row_, w.queries + index * p_.dim_qk() * kColumns, kColumns, w.scores, kColumns, t.keys,
                                        t.vectors, static_cast<int>(p_.dim_qk()), nullptr);
    if (transforms_) transform(w, sequence, t);
    if (p_.mask.present()) apply_mask(w, t);
    const KeyRange all = sequence.seen_by_all(t.i0, t.i0 + t.queries);
    if (all.first > t.j0 || all.last < t.j0 + t.keys) apply_range(w, sequence, t);

    V alpha[Tile<T>::kVectors];
    softmax(w, t, index, alpha);
    multiply<T, Left::rows_contiguous>(w.values, value_row_, w.scores, kColumns, w.output + index * dim_v_padded_ * kColumns, kColumns,
                                       static_cast<int>(dim_v_padded_), t.vectors, t.keys, alpha);
  }

  // Scores in natural units: scaled, capped, with bias and ALiBi. Scale and bias join in fused steps: rounding the scaled
  // score first doubled the error of large scores.
  void transform(Buffers& w, const SequenceMask& sequence, const TileOf& t) const {
    const V high = broadcast<V>(score_factor_);
    const V low = broadcast<V>(score_factor_low_);
    const auto scaled_plus = [&](V s, V bias) { return fma(s, high, fma(s, low, bias)); };
    const auto capped_plus = [&](V s, V bias) { return fma(broadcast<V>(static_cast<T>(p_.softcap)), tanh(fma(s, high, s * low)), bias); };
    if (p_.softcap > 0)
      add_bias(w, t, capped_plus);
    else
      add_bias(w, t, scaled_plus);
    if (p_.alibi_slopes.present()) {
      const V slope = broadcast<V>(static_cast<T>(read<float>(p_.alibi_slopes.at(t.b, t.h))));
      const T centre = static_cast<T>(t.i0 + sequence.diagonal - t.j0);
      const V lanes = lane_numbers();
      for_each_vector(w, t, [&](V s, int r, int v) { return s - slope * abs(lanes + broadcast<V>(centre + static_cast<T>(v * kW - r))); });
    }
  }

  // scores = combine(score, bias), with a bias of 0 where there is none.
  template <class F> void add_bias(Buffers& w, const TileOf& t, F&& combine) const {
    if (!p_.bias.present()) {
      for_each_vector(w, t, [&](V s, int, int) { return combine(s, V{}); });
    } else if (p_.bias.stride[2] == 0) {
      load_row(w, p_.bias, t);
      for_each_vector(w, t, [&](V s, int r, int) { return combine(s, broadcast<V>(w.extra[r])); });
    } else {
      load_tile(w, p_.bias, t);
      for_each_vector(w, t, [&](V s, int r, int v) { return combine(s, load<V>(w.extra + r * kColumns + v * kW)); });
    }
  }

  void apply_mask(Buffers& w, const TileOf& t) const {
    const V masked = broadcast<V>(-kInfinity);
    if (p_.mask.stride[2] == 0) {
      load_row(w, p_.mask, t);
      for_each_vector(w, t, [&](V s, int r, int) { return w.extra[r] != 0 ? s : masked; });
    } else {
      load_tile(w, p_.mask, t);
      for_each_vector(w, t, [&](V s, int r, int v) { return load<V>(w.extra + r * kColumns + v * kW) != 0 ? s : masked; });
    }
  }

  // Keys outside each query's own range: windows, the causal diagonal, lengths.
  void apply_range(Buffers& w, const SequenceMask& sequence, const TileOf& t) const {
    alignas(64) T first[kColumns] = {};
    alignas(64) T last[kColumns] = {};
    for (int q = 0; q < t.queries; ++q) {
      const KeyRange range = sequence.keys_of(t.i0 + q);
      first[q] = static_cast<T>(std::clamp<std::int64_t>(range.first - t.j0, 0, kKeys));
      last[q] = static_cast<T>(std::clamp<std::int64_t>(range.last - t.j0, 0, kKeys));
    }
    const V masked = broadcast<V>(-kInfinity);
    for_each_vector(w, t, [&](V s, int r, int v) {
      const V key = broadcast<V>(static_cast<T>(r));
      const V kept = key >= load<V>(first + v * kW) ? s : masked;
      return key < load<V>(last + v * kW) ? kept : masked;
    });
  }

  // One block of the online softmax, down the columns: scores become weights relative to the new max.
  void softmax(Buffers& w, const TileOf& t, std::int64_t index, V* alpha) const {
    for (int v = 0; v < t.vectors; ++v) {
      T* const column = w.scores + v * kW;
      T* const max_at = w.max + index * kColumns + v * kW;
      T* const sum_at = w.sum + index * kColumns + v * kW;
      const V before = load<V>(max_at);
      V m = before;
      V odd = m;
      int r = 0;
      for (; r + 2 <= t.keys; r += 2) {
        m = max(load<V>(column + r * kColumns), m);
        odd = max(load<V>(column + (r + 1) * kColumns), odd);
      }
      if (r < t.keys) m = max(load<V>(column + r * kColumns), m);
      m = max(odd, m);
      store(max_at, m);
      // Subtracting before scaling costs an instruction over one fused step, and gives the largest weight as exactly 1
      // however large the scores.
      const V high = broadcast<V>(exp_factor_);
      const V low = broadcast<V>(exp_factor_low_);
      const V base = m == -kInfinity ? V{} : m;
      V sum{};
      for (r = 0; r < t.keys; ++r) {
        const V weight = exp2_scaled(load<V>(column + r * kColumns) - base, high, low);
        sum += weight;
        store(column + r * kColumns, weight);
      }
      alpha[v] = exp2_scaled(before - base, high, low);
      store(sum_at, fma(load<V>(sum_at), alpha[v], sum));
    }
  }

  void finish_tile(Buffers& w, std::int64_t b, std::int64_t h, std::int64_t i0, int queries, std::int64_t index) const {
    T* const out = w.output + index * dim_v_padded_ * kColumns;
    const T* const sum = w.sum + index * kColumns;
    const int vectors = (queries + kW - 1) / kW;
    alignas(64) T bad[kColumns];
    for (int v = 0; v < vectors; ++v) {
      const V l = load<V>(sum + v * kW);
      const V inverse = broadcast<V>(1) / l;
      V finite = l > 0 ? V{} : broadcast<V>(1);
      for (std::int64_t d = 0; d < dim_v_padded_; ++d) {
        const V total = load<V>(out + d * kColumns + v * kW);
        const V quotient = total * inverse;  // one Newton step: a true division's rounding at a third of its cost
        const V o = fma(fma(-quotient, l, total), inverse, quotient);
        finite = finite + (o - o);  // 0 when finite, NaN otherwise
        store(out + d * kColumns + v * kW, o);
      }
      store(bad + v * kW, finite);
    }
    // Back to rows: [dim_v][kColumns] -> [queries][dim_v].
    transpose_back(out, w.staging, w.staging_row, vectors);
    for (int q = 0; q < queries; ++q) {
      double lse = static_cast<double>(w.max[index * kColumns + q]) * score_unit_ + std::log(static_cast<double>(sum[q]));
      if (bad[q] == 0) {
        write_row(p_.out.dtype, p_.out.at(b, h, i0 + q), p_.out.stride[3], p_.dim_v(), w.staging + q * w.staging_row);
      } else {
        const PlainRow plain = plain_.row(b, h, i0 + q, w.plain_row);
        for (std::int64_t d = 0; d < p_.dim_v(); ++d) w.staging[d + q * w.staging_row] = static_cast<T>(w.plain_row[d]);
        write_row(p_.out.dtype, p_.out.at(b, h, i0 + q), p_.out.stride[3], p_.dim_v(), w.staging + q * w.staging_row);
        lse = plain.max + std::log(plain.sum);
      }
      if (p_.lse.present()) {
        const float rounded = static_cast<float>(lse);
        std::memcpy(p_.lse.at(b, h, i0 + q), &rounded, sizeof rounded);
      }
    }
  }

  void transpose_back(const T* from, T* to, std::int64_t to_row, int vectors) const {
    for (int v = 0; v < vectors; ++v)
      for (std::int64_t d = 0; d < dim_v_padded_; d += kW) {
        V square[kW];
        for (int r = 0; r < kW; ++r) square[r] = d + r < dim_v_padded_ ? load<V>(from + (d + r) * kColumns + v * kW) : V{};
        transpose(square);
        for (int r = 0; r < kW; ++r) store(to + (v * kW + r) * to_row + d, square[r]);
      }
  }

  // extra[r] = x[b, h, any query, j0 + r]
  void load_row(Buffers& w, const Array& x, const TileOf& t) const {
    read_any(x, x.at(t.b, t.h, t.i0, t.j0), x.stride[3], t.keys, w.extra);
  }
  // extra[r][q] = x[b, h, i0 + q, j0 + r]
  void load_tile(Buffers& w, const Array& x, const TileOf& t) const {
    for (int q = 0; q < t.queries; ++q) read_any(x, x.at(t.b, t.h, t.i0 + q, t.j0), x.stride[3], t.keys, w.staging + q * w.staging_row);
    transpose_padded(w.staging, w.staging_row, t.queries, t.keys, w.extra, kColumns, t.vectors * kW);
  }
  void read_any(const Array& x, const char* p, std::int64_t stride, int n, T* out) const {
    if (x.dtype == DType::boolean)
      for (int i = 0; i < n; ++i) out[i] = p[i * stride] != 0 ? T(1) : T(0);
    else if (std::is_same_v<T, double> && x.dtype == DType::float32)
      for (int i = 0; i < n; ++i) out[i] = read<float>(p + i * stride);
    else
      read_row(x.dtype, p, stride, n, out);
  }

  template <class F> void for_each_vector(Buffers& w, const TileOf& t, F&& f) const {
    for (int r = 0; r < t.keys; ++r)
      for (int v = 0; v < t.vectors; ++v) {
        T* const at = w.scores + r * kColumns + v * kW;
        store(at, f(load<V>(at), r, v));
      }
  }

  static V lane_numbers() {
    V v{};
    for (int i = 0; i < kW; ++i) v[i] = static_cast<T>(i);
    return v;
  }

  const AttentionProblem& p_;
  PlainAttention plain_;
  T query_factor_;
  T score_factor_;  // scale / query_factor (/ softcap), and what rounding took from it
  T score_factor_low_;
  double score_unit_;  // what 1 in a score tile is worth: tiles stay unscaled where nothing is added to them
  T exp_factor_;       // score_unit * log2(e), and what rounding took from it
  T exp_factor_low_;
  bool transforms_;
  std::int64_t per_group_;
  std::int64_t blocks_;
  std::int64_t block_;
  std::int64_t dim_v_padded_;
  std::int64_t key_row_;
  std::int64_t value_row_;
};

}  // namespace

void attention_forward(const AttentionProblem& problem) {
  with_compute(problem.query.dtype, [&](auto t) { Forward<decltype(t)>(problem).run(); });
}

}  // namespace regard::cpu
