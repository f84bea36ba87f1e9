// Attention of few queries over many keys: a step of decoding. Bound by reading K and V, so they are read once for all
// heads that share them, and keys are split so that one sequence fills the cores.
//
//   for each item: a split of the keys of one key head            (parallel)
//     for each block of keys
//       K, V as compute values                                    (where they lie, if they are floats in rows)
//       for each query row of the heads that share them
//         s = K q, lanes along dim;  p = exp2(s - max);  out = out * alpha + p V
//   merge the splits of each row in order                         (where there is more than one)
//
// Splitting is Dao et al., "Flash-Decoding for long-context inference" (2023).
#pragma once

#include <algorithm>
#include <limits>
#include <memory>
#include <type_traits>

#include "cpu/attention_output.h"
#include "cpu/attention_scores.h"
#include "cpu/parallel.h"
#include "cpu/tile_amx.h"
#ifdef REGARD_MATRIX_TILES
#include "cpu/attention_row_tiles.h"
#endif

namespace regard::cpu {

// What multiplies rows of T where a matrix unit can; nothing does where there is none, or for double.
struct NoRowTiles {
  struct Memory {};
  static bool serve(const AttentionProblem&) { return false; }
  NoRowTiles(std::int64_t, std::int64_t) {}
};
#ifdef REGARD_MATRIX_TILES
template <class T> using RowTilesFor = std::conditional_t<std::is_same_v<T, float>, RowTiles, NoRowTiles>;
#else
template <class T> using RowTilesFor = NoRowTiles;
#endif

template <class T> class Rows {
  using V = Vec<T>;
  static constexpr int kW = kWidth<T>;
  // Keys a block. Longer ones spread a row's softmax over more keys; K of 128 dimensions still fits L1 while all rows
  // score it, and V while all rows add it.
  static constexpr int kBlock = 64;
  // Up to so many rows each convert K and V of narrower types for themselves; more share a copy. A key of 128 bfloat16
  // dimensions and its value, for 1, 2, 4 and 8 rows: 15, 26, 48 and 88 ns, and 40, 41, 56 and 87 by copies (Zen 4).
  static constexpr std::int64_t kConvertingRows = 4;
  static constexpr T kInfinity = std::numeric_limits<T>::infinity();
  using Tiles = RowTilesFor<T>;
  static constexpr bool kHasTiles = !std::is_same_v<Tiles, NoRowTiles>;

 public:
  Rows(const AttentionProblem& problem, const AttentionOutput<T>& output)
      : p_(problem), tiles_(problem), output_(output), products_(p_.dim_qk(), p_.dim_v()) {
    // A block mask that differs between heads gives them different keys: then each head goes alone.
    heads_together_ = p_.block_mask.present() && p_.block_mask.heads > 1 ? 1 : tiles_.per_group;
    dim_qk_ = round_up(p_.dim_qk(), kW);
    dim_v_ = round_up(p_.dim_v(), kW);
    state_row_ = dim_v_ + kW;  // a row's output, then its max and sum
    on_tiles_ = Tiles::serve(p_);
  }

  bool takes(const SequenceMask& sequence) const {
    return sequence.len_q <= kFewQueries && (!p_.block_mask.present() || p_.block_mask.block_q >= sequence.len_q);
  }

  // Called for the sequences of the batch in order, before any run().
  std::int64_t items(std::int64_t b, const SequenceMask& sequence) {
    const std::int64_t n = splits(sequence);
    if (n > 1) {
      if (first_state_.empty()) first_state_.assign(static_cast<std::size_t>(p_.batch()) + 1, -1);
      first_state_[static_cast<std::size_t>(b)] = states_;
      states_ += n * p_.heads() * sequence.len_q;
    }
    return sequence.len_q == 0 ? 0 : p_.heads() / heads_together_ * n;
  }

  void run(std::int64_t b, const SequenceMask& sequence, std::int64_t item) const {
    const std::int64_t n = splits(sequence);
    const std::int64_t h0 = item / n * heads_together_;
    const KeyRange seen = sequence.seen_by_any(0, sequence.len_q);
    const std::int64_t start = (seen.first / kSplit + item % n) * kSplit;
    Buffers w;
    take_buffers(w, heads_together_ * sequence.len_q);
    start_rows(w, b, h0, sequence.len_q, item % n == 0);
    const KeyRange split{std::max(seen.first, start), std::min(seen.last, start + kSplit)};
    const auto run_split = [&](auto&& block) {
      if (split.first >= split.last) return;
      p_.for_each_run(b, h0, 0, split, [&](KeyRange keys) {
        for (std::int64_t j0 = keys.first / kBlock * kBlock; j0 < keys.last; j0 += kBlock) {
          if (stop_requested()) return;
          const std::int64_t first = std::max(j0, keys.first);
          block(first, static_cast<int>(std::min(j0 + kBlock, keys.last) - first));
        }
      });
    };
    if (on_tiles_)
      run_on_tiles(w, b, h0, sequence, run_split);
    else
      run_split([&](std::int64_t first, int keys) { run_block(w, b, h0, sequence, first, keys); });
    for (std::int64_t r = 0; r < w.rows; ++r) {
      T* const state = w.states + r * state_row_;
      if (n == 1)
        finish(w.plain_row, b, h0 + r / sequence.len_q, r % sequence.len_q, state);
      else
        std::copy_n(state, state_row_, state_at(b, h0 + r / sequence.len_q, r % sequence.len_q, sequence.len_q, n, item % n));
    }
  }

  // After all items: rows whose keys were split.
  void merge() {
    if (states_ == 0) return;
    const std::int64_t rows = p_.batch() * p_.heads();
    parallel_for(rows, static_cast<double>(states_ * state_row_), [this](std::int64_t row) {
      const std::int64_t b = row / p_.heads();
      const SequenceMask sequence = p_.sequence(b);
      const std::int64_t n = splits(sequence);
      if (!takes(sequence) || n == 1) return;
      for (std::int64_t i = 0; i < sequence.len_q; ++i) merge_row(b, row % p_.heads(), i, sequence.len_q, n);
    });
  }

  // Memory for the states of rows whose keys are split.
  void allocate() {
    if (states_ == 0) return;
    memory_.reset(new T[static_cast<std::size_t>(states_ * state_row_)]);
    note_memory(static_cast<std::size_t>(states_ * state_row_) * sizeof(T));
  }

 private:
  struct Part {
    int first;
    int last;
  };

  struct Buffers {
    Scratch scratch;
    T* queries;             // [rows][dim_qk]
    T* states;              // [rows][state_row]
    T* keys;                // [kBlock][dim_qk], where they have to be copied
    T* values;              // [kBlock][dim_v]
    T* scores;              // [rows][kBlock]: scores, then weights
    T* alpha;               // [rows]: what their output so far is worth
    T* extra;               // [kBlock]
    T* scales;              // [2][kBlock]: of keys, of values
    const char** key_at;    // [kBlock]
    const char** value_at;  // [kBlock]
    double* plain_row;      // [dim_v]
    std::int64_t rows;
    typename Tiles::Memory products;
  };

  void take_buffers(Buffers& w, std::int64_t rows) const {
    w.rows = rows;
    const auto queries = w.scratch.template reserve<T>(rows * dim_qk_);
    const auto states = w.scratch.template reserve<T>(rows * state_row_);
    const auto keys = w.scratch.template reserve<T>(kBlock * dim_qk_);
    const auto values = w.scratch.template reserve<T>(kBlock * dim_v_);
    const auto scores = w.scratch.template reserve<T>(rows * kBlock + round_up(rows, kW) + 3 * kBlock);
    const auto key_at = w.scratch.template reserve<const char*>(2 * kBlock);
    const auto plain_row = w.scratch.template reserve<double>(p_.dim_v());
    if constexpr (kHasTiles)
      if (on_tiles_) products_.reserve(w.scratch, rows, w.products);
    w.scratch.acquire();
    if constexpr (kHasTiles)
      if (on_tiles_) products_.place(w.scratch, w.products);
    w.queries = w.scratch.template at<T>(queries);
    w.states = w.scratch.template at<T>(states);
    w.keys = w.scratch.template at<T>(keys);
    w.values = w.scratch.template at<T>(values);
    w.scores = w.scratch.template at<T>(scores);
    w.alpha = w.scores + rows * kBlock;
    w.extra = w.alpha + round_up(rows, kW);
    w.scales = w.extra + kBlock;
    w.key_at = w.scratch.template at<const char*>(key_at);
    w.value_at = w.key_at + kBlock;
    w.plain_row = w.scratch.template at<double>(plain_row);
  }

  std::int64_t splits(const SequenceMask& sequence) const {
    const KeyRange seen = sequence.seen_by_any(0, sequence.len_q);
    return std::max<std::int64_t>(1, (seen.last + kSplit - 1) / kSplit - seen.first / kSplit);
  }

  T* state_at(std::int64_t b, std::int64_t h, std::int64_t i, std::int64_t len_q, std::int64_t n, std::int64_t split) const {
    return memory_.get() + (first_state_[static_cast<std::size_t>(b)] + (h * len_q + i) * n + split) * state_row_;
  }

  void start_rows(Buffers& w, std::int64_t b, std::int64_t h0, std::int64_t len_q, bool first_split) const {
    for (std::int64_t r = 0; r < w.rows; ++r) {
      const std::int64_t h = h0 + r / len_q;
      T* const query = w.queries + r * dim_qk_;
      const Place at = p_.query_place(b, r % len_q);
      read_row(p_.query.dtype, p_.query.at(at.outer, h, at.position), p_.query.stride[3], p_.dim_qk(), query);
      for (std::int64_t d = 0; d < p_.dim_qk(); ++d) query[d] *= tiles_.factors.query;
      std::fill(query + p_.dim_qk(), query + dim_qk_, T(0));
      T* const state = w.states + r * state_row_;
      std::fill_n(state, dim_v_, T(0));
      // A sink is one more logit, of the first split.
      const T start = first_split && p_.sinks.present() ? static_cast<T>(read<float>(p_.sinks.at(h))) : -kInfinity;
      state[dim_v_] = start;
      state[dim_v_ + 1] = start > -kInfinity ? T(1) : T(0);
    }
  }

  void run_block(Buffers& w, std::int64_t b, std::int64_t h0, const SequenceMask& sequence, std::int64_t j0, int keys) const {
    const std::int64_t group = h0 / tiles_.per_group;
    const DType key = place(p_.key, b, group, j0, keys, p_.dim_qk(), dim_qk_, w.rows, w.keys, w.key_at);
    const DType value = place(p_.value, b, group, j0, keys, p_.dim_v(), dim_v_, w.rows, w.values, w.value_at);
    if (p_.key_scales.present()) {
      for (int k = 0; k < keys; ++k) {
        const Place at = p_.key_place(b, j0 + k);
        w.scales[k] = read<float>(p_.key_scales.at(at.outer, group, at.position));
        w.scales[kBlock + k] = read<float>(p_.value_scales.at(at.outer, group, at.position));
      }
    }
    for (std::int64_t r = 0; r < w.rows; ++r) {
      const Part seen = seen_in_block(sequence, r % sequence.len_q, j0, keys);
      if (seen.first >= seen.last) continue;
      T* const scores = w.scores + r * kBlock;
      with_loaded<T>(key, [&](auto s) { score<decltype(s)>(w, w.queries + r * dim_qk_, scores, seen.first, seen.last); });
      weigh(w, b, h0, sequence, r, j0, keys, seen);
      if (p_.value_scales.present())
        for (int k = seen.first; k < seen.last; ++k) scores[k] *= w.scales[kBlock + k];
    }
    for (std::int64_t r = 0; r < w.rows; ++r) {
      const auto [first, last] = seen_in_block(sequence, r % sequence.len_q, j0, keys);
      if (first >= last) continue;
      with_loaded<T>(
          value, [&](auto s) { add_values<decltype(s)>(w, w.scores + r * kBlock, w.states + r * state_row_, w.alpha[r], first, last); });
    }
  }

  // The same with both products on the matrix unit, for all blocks of a split.
  template <class F>
  void run_on_tiles([[maybe_unused]] Buffers& w, [[maybe_unused]] std::int64_t b, [[maybe_unused]] std::int64_t h0,
                    [[maybe_unused]] const SequenceMask& sequence, [[maybe_unused]] F&& run_split) const {
    if constexpr (kHasTiles) {
      static_assert(kBlock == Tiles::kBlock);
      const typename Tiles::Unit unit;
      products_.start(w.products, w.queries, w.rows);
      run_split([&](std::int64_t j0, int keys) {
        const std::int64_t group = h0 / tiles_.per_group;
        for (int k = 0; k < keys; ++k) {
          const Place at = p_.key_place(b, j0 + k);
          w.key_at[k] = p_.key.at(at.outer, group, at.position);
          w.value_at[k] = p_.value.at(at.outer, group, at.position);
        }
        const auto seen = [&](std::int64_t r) { return seen_in_block(sequence, r % sequence.len_q, j0, keys); };
        products_.score(w.products, w.key_at, w.value_at, keys, w.scores, kBlock, w.rows);
        products_.read_values(w.products, w.value_at, w.key_at, keys);
        for (std::int64_t r = 0; r < w.rows; ++r)
          if (seen(r).first < seen(r).last) weigh(w, b, h0, sequence, r, j0, keys, seen(r));
        products_.add_values(w.products, w.scores, kBlock, w.rows, keys, w.alpha, seen);
      });
      for (std::int64_t r = 0; r < w.rows; ++r) products_.take_output(w.products, r, w.states + r * state_row_);
    }
  }

  static Part seen_in_block(const SequenceMask& sequence, std::int64_t i, std::int64_t j0, int keys) {
    const KeyRange seen = sequence.keys_of(i);
    return {static_cast<int>(std::clamp<std::int64_t>(seen.first - j0, 0, keys)),
            static_cast<int>(std::clamp<std::int64_t>(seen.last - j0, 0, keys))};
  }

  // Rows of K or V: where they lie, or copied as compute values with zeros up to whole vectors. Answers their type there.
  DType place(const Array& x, std::int64_t b, std::int64_t group, std::int64_t j0, int keys, std::int64_t dim, std::int64_t padded,
              std::int64_t rows, T* copies, const char** at) const {
    // Copying float32 rows to whole cache lines first, so that no load takes two, did not pay: 225 cycles a key against 157
    // for 4 rows of 128 dimensions, the same for 8 (Zen 4).
    const bool whole = x.stride[3] == size_of(x.dtype) && dim == padded;
    const bool direct = whole && (x.dtype == dtype_of<T>() || (loads_as<T>(x.dtype) && rows <= kConvertingRows));
    for (int k = 0; k < keys; ++k) {
      const Place row = p_.key_place(b, j0 + k);
      const char* const from = x.at(row.outer, group, row.position);
      if (direct) {
        at[k] = from;
      } else {
        T* const copy = copies + k * padded;
        read_any(x, from, x.stride[3], dim, copy);
        std::fill(copy + dim, copy + padded, T(0));
        at[k] = reinterpret_cast<const char*>(copy);
      }
    }
    return direct ? x.dtype : dtype_of<T>();
  }

  // scores[first..last) = q . K, each along lanes, then across them a vector's width of keys at a time.
  template <class S> void score(const Buffers& w, const T* query, T* scores, int first, int last) const {
    const auto key = [&](int k, std::int64_t d) { return load_as(reinterpret_cast<const S*>(w.key_at[k]) + d); };
    for (int k0 = first / kW * kW; k0 < last; k0 += kW) {
      V sums[kW];
#pragma GCC unroll 16
      for (int k = 0; k < kW; ++k) sums[k] = V{};
      const int end = std::min(k0 + kW, last);
      if (end - k0 == kW && k0 >= first) {
        for (std::int64_t d = 0; d < dim_qk_; d += kW) {
          const V q = load<V>(query + d);
#pragma GCC unroll 16
          for (int k = 0; k < kW; ++k) sums[k] = fma(q, key(k0 + k, d), sums[k]);
        }
      } else {
        for (int k = std::max(first - k0, 0); k < end - k0; ++k)
          for (std::int64_t d = 0; d < dim_qk_; d += kW) sums[k] = fma(load<V>(query + d), key(k0 + k, d), sums[k]);
      }
      const V s = combine_lanes<Add, kW / 2>(sums);
      store(scores + k0, p_.key_scales.present() ? s * load<V>(w.scales + k0) : s);
    }
  }

  // Scores of one row become weights.
  void weigh(Buffers& w, std::int64_t b, std::int64_t h0, const SequenceMask& sequence, std::int64_t r, std::int64_t j0, int keys,
             Part seen) const {
    const TileOf row{b, h0 + r / sequence.len_q, r % sequence.len_q, 1, 1, j0, keys};
    T* const scores = w.scores + r * kBlock;
    edit(w, row, sequence, scores, seen.first, seen.last);
    w.alpha[r] = softmax(w.states + r * state_row_, scores, seen.first, seen.last);
    if (p_.dropout.present()) p_.dropout.apply(row.b, row.h, row.i0, j0 + seen.first, seen.last - seen.first, scores + seen.first);
  }

  // What ScoreTiles::edit() does, along one row of keys.
  void edit(const Buffers& w, const TileOf& t, const SequenceMask& sequence, T* scores, int first, int last) const {
    if (tiles_.factors.transforms) {
      const V high = broadcast<V>(tiles_.factors.score);
      const V low = broadcast<V>(tiles_.factors.score_low);
      if (p_.bias.present()) read_any(p_.bias, p_.bias.at(t.b, t.h, t.i0, t.j0), p_.bias.stride[3], last, w.extra);
      const bool slopes = p_.alibi_slopes.present();
      const V slope = broadcast<V>(slopes ? static_cast<T>(read<float>(p_.alibi_slopes.at(t.b, t.h))) : T(0));
      for (int k = first / kW * kW; k < last; k += kW) {
        V s = load<V>(scores + k);
        const V bias = p_.bias.present() ? load<V>(w.extra + k) : V{};
        s = p_.softcap > 0 ? fma(broadcast<V>(static_cast<T>(p_.softcap)), tanh(fma(s, high, s * low)), bias)
                           : fma(s, high, fma(s, low, bias));
        if (slopes) s = s - slope * abs(broadcast<V>(static_cast<T>(t.i0 + sequence.diagonal - t.j0 - k)) - lane_numbers<T>());
        store(scores + k, s);
      }
    }
    if (p_.mask.present()) {
      const char* const mask = p_.mask.at(t.b, t.h, t.i0, t.j0);
      for (int k = first; k < last; ++k)
        if (mask[k * p_.mask.stride[3]] == 0) scores[k] = -kInfinity;
    }
  }

  // One block of the online softmax: scores become weights relative to the new max. Returns what the row's output so far
  // is worth.
  T softmax(T* state, T* scores, int first, int last) const {
    const int begin = first / kW * kW;
    const int end = static_cast<int>(round_up(last, kW));
    for (int k = begin; k < first; ++k) scores[k] = -kInfinity;
    for (int k = last; k < end; ++k) scores[k] = -kInfinity;
    V largest = broadcast<V>(state[dim_v_]);
    for (int k = begin; k < end; k += kW) largest = max(load<V>(scores + k), largest);
    const T before = state[dim_v_];
    const T m = max_lanes(largest);
    const V high = broadcast<V>(tiles_.factors.exp);
    const V low = broadcast<V>(tiles_.factors.exp_low);
    const T base = m == -kInfinity ? T(0) : m;
    V sum{};
    for (int k = begin; k < end; k += kW) {
      const V weight = exp2_scaled(load<V>(scores + k) - base, high, low);
      sum += weight;
      store(scores + k, weight);
    }
    const T alpha = exp2_scaled(broadcast<V>(before - base), high, low)[0];
    state[dim_v_] = m;
    state[dim_v_ + 1] = state[dim_v_ + 1] * alpha + sum_lanes(sum);
    return alpha;
  }

  // out = out * alpha + p V, a few vectors of columns at a time.
  template <class S> void add_values(const Buffers& w, const T* weights, T* out, T alpha, int first, int last) const {
    std::int64_t d = 0;
    for (; d + 8 * kW <= dim_v_; d += 8 * kW) add_columns<S, 8>(w, weights, out, alpha, first, last, d);
    for (; d + 4 * kW <= dim_v_; d += 4 * kW) add_columns<S, 4>(w, weights, out, alpha, first, last, d);
    for (; d < dim_v_; d += kW) add_columns<S, 1>(w, weights, out, alpha, first, last, d);
  }
  template <class S, int N>
  void add_columns(const Buffers& w, const T* weights, T* out, T alpha, int first, int last, std::int64_t d) const {
    V sums[N] = {};
    for (int k = first; k < last; ++k) {
      const V weight = broadcast<V>(weights[k]);
      const S* const value = reinterpret_cast<const S*>(w.value_at[k]) + d;
#pragma GCC unroll 8
      for (int v = 0; v < N; ++v) sums[v] = fma(weight, load_as(value + v * kW), sums[v]);
    }
#pragma GCC unroll 8
    for (int v = 0; v < N; ++v) store(out + d + v * kW, fma(load<V>(out + d + v * kW), broadcast<V>(alpha), sums[v]));
  }

  // The splits of one row, in order, into the first.
  void merge_row(std::int64_t b, std::int64_t h, std::int64_t i, std::int64_t len_q, std::int64_t n) const {
    T* const into = state_at(b, h, i, len_q, n, 0);
    T m = into[dim_v_];
    for (std::int64_t s = 1; s < n; ++s) m = std::max(m, into[s * state_row_ + dim_v_]);
    const T base = m == -kInfinity ? T(0) : m;
    T total = 0;
    for (std::int64_t s = 0; s < n; ++s) {
      const T* const part = into + s * state_row_;
      const T alpha =
          exp2_scaled(broadcast<V>(part[dim_v_] - base), broadcast<V>(tiles_.factors.exp), broadcast<V>(tiles_.factors.exp_low))[0];
      total += alpha * part[dim_v_ + 1];
      for (std::int64_t d = 0; d < dim_v_; ++d) into[d] = s == 0 ? alpha * part[d] : into[d] + alpha * part[d];
    }
    into[dim_v_] = m;
    into[dim_v_ + 1] = total;
    Scratch scratch;
    const auto plain_row = scratch.template reserve<double>(p_.dim_v());
    scratch.acquire();
    finish(scratch.template at<double>(plain_row), b, h, i, into);
  }

  void finish(double* plain_row, std::int64_t b, std::int64_t h, std::int64_t i, T* state) const {
    const T m = state[dim_v_];
    const T l = state[dim_v_ + 1];
    T finite = l > 0 ? T(0) : T(1);
    for (std::int64_t d = 0; d < dim_v_; ++d) {
      state[d] /= l;
      finite += state[d] - state[d];  // 0 when finite, NaN otherwise
    }
    output_.write(b, h, i, state, m, l, finite == 0, plain_row);
  }

  const AttentionProblem& p_;
  ScoreTiles<T> tiles_;
  const AttentionOutput<T>& output_;
  Tiles products_;
  std::int64_t heads_together_;
  bool on_tiles_;
  std::int64_t dim_qk_;  // padded to whole vectors
  std::int64_t dim_v_;
  std::int64_t state_row_;
  std::vector<std::int64_t> first_state_;
  std::int64_t states_ = 0;
  std::unique_ptr<T[]> memory_;
};

}  // namespace regard::cpu
