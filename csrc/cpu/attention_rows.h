// Attention of few queries over many keys: a step of decoding. Bound by reading K and V, so they are read once for all
// heads that share them, and keys are split so that one sequence fills the cores.
//
//   for each item: a split of the keys of one key head, and rows  (parallel)
//     for each block of keys
//       K, V as compute values                                    (widened where they lie, or copied)
//       s = K q, lanes along dim, for up to 4 rows that see the same keys at once; ask memory for V
//       p = exp2(s - max)
//       out = out * alpha + p V, for as many rows at once; ask memory for the next block's K
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
#include "cpu/prefetch.h"
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
  // Rows an item. More heads than have so many read K and V again, which is then little of their work, and other threads can
  // take them: 8 queries of 8 heads that share 256 keys take 0.6 of the time on two threads.
  static constexpr std::int64_t kRowsAnItem = 32;
  // Whether K or V of a narrower type are widened where they lie, for each group of rows anew, or copied once for all. Of what
  // is a few instructions a vector, 6 and 8 rows of 128 dimensions take 0.7 of the time that copies take, 16 rows 0.8 to
  // 0.87 and 32 rows 0.88 to 0.97 (Zen 3). Of float8, 1 and 2 rows take 0.7, 4 rows 0.8, 8 rows 1.1 and 16 rows 1.5;
  // of float16 without F16C 1 to 4 rows take 2 to 3 times as long.
  static bool widens_in_place(DType t, std::int64_t rows) {
    if (t == DType::float16) return kHalvesAtOnce;
    return t != DType::float8_e4m3fn || rows <= 4;
  }
  // Sums in registers, over the rows of a group and over keys or columns: 2 FMA ports x 4 cycles of latency want 8 in
  // flight. A vector of K or V is loaded and widened once for all rows of the group: a key of 128 float32 dimensions and its
  // value, in L2, take 62 to 78 ns for 4 rows, and 98 to 110 row by row (Zen 3).
  static constexpr int kSums = kVectorRegisters == 32 ? 16 : 8;
  static constexpr auto kLanes = std::make_index_sequence<kW>{};
  static constexpr T kInfinity = std::numeric_limits<T>::infinity();
  using Tiles = RowTilesFor<T>;
  static constexpr bool kHasTiles = !std::is_same_v<Tiles, NoRowTiles>;

 public:
  // beside_matrix: whether blocks of more queries run on a matrix unit.
  Rows(const AttentionProblem& problem, const AttentionOutput<T>& output, bool beside_matrix)
      : p_(problem), tiles_(problem), output_(output), products_(p_.dim_qk(), p_.dim_v()), beside_matrix_(beside_matrix) {
    // A block mask that differs between heads gives them different keys: then each head goes alone.
    heads_together_ = p_.block_mask.present() && p_.block_mask.heads > 1 ? 1 : tiles_.per_group;
    dim_qk_ = round_up(p_.dim_qk(), kW);
    dim_v_ = round_up(p_.dim_v(), kW);
    state_row_ = dim_v_ + kW;  // a row's output, then its max and sum
    on_tiles_ = Tiles::serve(p_);
  }

  bool takes(const SequenceMask& sequence) const {
    return sequence.len_q <= few_queries(p_.key.dtype, sequence.len_kv, beside_matrix_, on_tiles_) &&
           (!p_.block_mask.present() || p_.block_mask.block_q >= sequence.len_q);
  }

  // Called for the sequences of the batch in order, before any run().
  std::int64_t items(std::int64_t b, const SequenceMask& sequence) {
    const std::int64_t n = splits(sequence);
    if (n > 1) {
      if (first_state_.empty()) first_state_.assign(static_cast<std::size_t>(p_.batch()) + 1, -1);
      first_state_[static_cast<std::size_t>(b)] = states_;
      states_ += n * p_.heads() * sequence.len_q;
    }
    return sequence.len_q == 0 ? 0 : p_.heads() / heads_together_ * parts(sequence) * n;
  }

  void run(std::int64_t b, const SequenceMask& sequence, std::int64_t item) const {
    const std::int64_t n = splits(sequence);
    const std::int64_t part = item / n % parts(sequence) * heads_an_item(sequence);
    const std::int64_t h0 = item / n / parts(sequence) * heads_together_ + part;
    const KeyRange seen = sequence.seen_by_any(0, sequence.len_q);
    const std::int64_t start = (seen.first / kSplit + item % n) * kSplit;
    Buffers w;
    take_buffers(w, std::min(heads_an_item(sequence), heads_together_ - part) * sequence.len_q);
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
      if (by_parity(p_.value)) join_by_parity<V>(state, dim_v_, kLanes);
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
    bool operator==(const Part& other) const { return first == other.first && last == other.last; }
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

  // Heads that share a key head, cut into items of no more rows than kRowsAnItem where they have more.
  std::int64_t heads_an_item(const SequenceMask& sequence) const {
    return std::clamp<std::int64_t>(kRowsAnItem / std::max<std::int64_t>(sequence.len_q, 1), 1, heads_together_);
  }
  std::int64_t parts(const SequenceMask& sequence) const { return divide_up(heads_together_, heads_an_item(sequence)); }

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
      if (by_parity(p_.key)) split_by_parity<V>(query, dim_qk_, kLanes);
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
      const auto read_scales = [&](const Array& x, T* to) {
        for_runs(x, b, group, j0, keys, [&](int k, int n, const char* from) { read_row(x.dtype, from, x.stride[2], n, to + k); });
      };
      read_scales(p_.key_scales, w.scales);
      read_scales(p_.value_scales, w.scales + kBlock);
    }
    const Ahead values{w.value_at, 0, p_.dim_v() * size_of(value)};
    const Ahead next_keys{w.key_at, further_keys(w, keys), p_.dim_qk() * size_of(key)};
    // f(N, row, apart, seen, ahead) for rows that see the same keys of the block, N of them at once; the first ask ahead.
    const auto for_rows = [&](Ahead ahead, auto&& f) {
      const auto some = [&](std::int64_t rows, std::int64_t first, std::int64_t apart, Part seen) {
        if (seen.first >= seen.last) return;
        for_groups(rows, [&](auto n, std::int64_t r) {
          f(n, first + r * apart, apart, seen, ahead);
          ahead = {};
        });
      };
      const std::int64_t queries = sequence.len_q;
      for (std::int64_t i = 0; i < queries;) {
        const Part seen = seen_in_block(sequence, i, j0, keys);
        std::int64_t same = 1;
        while (i + same < queries && seen == seen_in_block(sequence, i + same, j0, keys)) ++same;
        if (same == queries || w.rows == queries)
          some(same * (w.rows / queries), i, 1, seen);
        else
          for (std::int64_t k = i; k < i + same; ++k) some(w.rows / queries, k, queries, seen);
        i += same;
      }
    };
    for_rows(values, [&](auto n, std::int64_t row, std::int64_t apart, Part seen, const Ahead& ahead) {
      with_loaded<T>(key, [&](auto s) { score<decltype(s), n>(w, row, apart, seen, ahead); });
    });
    for (std::int64_t r = 0; r < w.rows; ++r) {
      const Part seen = seen_in_block(sequence, r % sequence.len_q, j0, keys);
      if (seen.first >= seen.last) continue;
      weigh(w, b, h0, sequence, r, j0, keys, seen);
      if (p_.value_scales.present())
        for (int k = seen.first / kW * kW; k < seen.last; k += kW) {
          T* const weights = w.scores + r * kBlock + k;
          store(weights, load<V>(weights) * load<V>(w.scales + kBlock + k));
        }
    }
    for_rows(next_keys, [&](auto n, std::int64_t row, std::int64_t apart, Part seen, const Ahead& ahead) {
      with_loaded<T>(value, [&](auto s) { add_values<decltype(s), n>(w, row, apart, seen, ahead); });
    });
  }

  // From the keys of a block to those of the next one, if they lie evenly.
  static std::intptr_t further_keys(const Buffers& w, int keys) {
    const auto place_of = [&](int k) { return reinterpret_cast<std::intptr_t>(w.key_at[k]); };
    return keys < kBlock ? 0 : kBlock * (place_of(1) - place_of(0));
  }

  // f(N, first of them) for groups of N = 4, then 2, then 1 of the rows.
  template <class F> static void for_groups(std::int64_t rows, F&& f) {
    std::int64_t r = 0;
    for (; r + 4 <= rows; r += 4) f(std::integral_constant<int, 4>{}, r);
    for (; r + 2 <= rows; r += 2) f(std::integral_constant<int, 2>{}, r);
    if (r < rows) f(std::integral_constant<int, 1>{}, r);
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
        find(p_.key, b, group, j0, keys, w.key_at);
        find(p_.value, b, group, j0, keys, w.value_at);
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

  // f(k, n, where x has key j0 + k) for runs of n keys that follow one another: found once for all of them, which took a tenth
  // of an int8 cache's time key by key (1x32/8x8192x128, Zen 3).
  template <class F> void for_runs(const Array& x, std::int64_t b, std::int64_t group, std::int64_t j0, int keys, F&& f) const {
    for (int k = 0; k < keys;) {
      const Place first = p_.key_place(b, j0 + k);
      const int n = static_cast<int>(p_.keys_together(j0 + k, j0 + keys));
      f(k, n, x.at(first.outer, group, first.position));
      k += n;
    }
  }

  // Where rows of K or V lie.
  void find(const Array& x, std::int64_t b, std::int64_t group, std::int64_t j0, int keys, const char** at) const {
    for_runs(x, b, group, j0, keys, [&](int k, int n, const char* from) {
      for (int i = 0; i < n; ++i) at[k + i] = from + i * x.stride[2];
    });
  }

  // Whether rows of K or V are read, and widened, where they lie.
  static bool widened(const Array& x, std::int64_t dim, std::int64_t rows) {
    // Copying float32 rows to whole cache lines first, so that no load takes two, did not pay: 225 cycles a key against 157
    // for 4 rows of 128 dimensions, the same for 8 (Zen 4).
    return x.stride[3] == size_of(x.dtype) && dim % kW == 0 &&
           (x.dtype == dtype_of<T>() || (loads_as<T>(x.dtype) && widens_in_place(x.dtype, rows)));
  }

  // Whether two vectors of a row hold its numbers at even places and those at odd ones: bfloat16 then takes an instruction a
  // vector, where widening takes two. So do queries, for keys, and the output, for values. 4 and 8 rows take 0.88 to
  // 0.93 of the time, 1 and 2 rows 0.85 (AVX-512, Emerald Rapids; AVX2 0.95 to 1.0).
  bool by_parity(const Array& x) const { return !on_tiles_ && x.dtype == DType::bfloat16; }

  // Rows of K or V: where they lie, or copied as compute values with zeros up to whole vectors; the last one again up to a whole
  // vector of keys. Answers their type there.
  DType place(const Array& x, std::int64_t b, std::int64_t group, std::int64_t j0, int keys, std::int64_t dim, std::int64_t padded,
              std::int64_t rows, T* copies, const char** at) const {
    const bool direct = widened(x, dim, rows);
    find(x, b, group, j0, keys, at);
    for (int k = 0; k < keys && !direct; ++k) {
      T* const copy = copies + k * padded;
      read_row(x.dtype, at[k], x.stride[3], dim, copy);
      std::fill(copy + dim, copy + padded, T(0));
      if (by_parity(x)) split_by_parity<V>(copy, padded, kLanes);
      at[k] = reinterpret_cast<const char*>(copy);
    }
    std::fill(at + keys, at + round_up(keys, kW), at[keys - 1]);
    return direct ? x.dtype : dtype_of<T>();
  }

  // scores[first..last) = q . K for N rows, `apart` rows from one to the next: each along lanes, then across them a vector's
  // width of keys at a time. Scores beyond the range are of no key that counts.
  template <class S, int N> void score(const Buffers& w, std::int64_t row, std::int64_t apart, Part seen, Ahead ahead) const {
    constexpr int at_once = std::min({kW, kSums / N, 8});  // of 16 keys the addresses would not all be in registers
    const T* const queries = w.queries + row * dim_qk_;
    for (int k0 = seen.first / kW * kW; k0 < seen.last; k0 += kW) {
      V sums[N][kW];
      for (int k1 = 0; k1 < kW; k1 += at_once) {
        const S* keys[at_once];
        V acc[N][at_once] = {};
#pragma GCC unroll 16
        for (int k = 0; k < at_once; ++k) keys[k] = reinterpret_cast<const S*>(w.key_at[k0 + k1 + k]);
        if (ahead.bytes > 0)
          for (int k = 0; k < at_once; ++k) ahead.ask(k0 + k1 + k, 0, ahead.bytes);
        // key(k) for all rows.
        const auto add = [&](std::int64_t d, auto&& key) {
          V q[N];
#pragma GCC unroll 4
          for (int n = 0; n < N; ++n) q[n] = in_register(load<V>(queries + n * apart * dim_qk_ + d));
#pragma GCC unroll 16
          for (int k = 0; k < at_once; ++k) {
            const V lanes = key(k);
#pragma GCC unroll 4
            for (int n = 0; n < N; ++n) acc[n][k] = fma(q[n], lanes, acc[n][k]);
          }
        };
        std::int64_t d = 0;
        if constexpr (std::is_same_v<S, BFloat16>)
          for (; d + 2 * kW <= dim_qk_; d += 2 * kW) {
            Words pairs[at_once];
#pragma GCC unroll 16
            for (int k = 0; k < at_once; ++k) pairs[k] = in_register(load<Words>(keys[k] + d));
            add(d, [&](int k) { return lower_of_pairs(pairs[k]); });
            add(d + kW, [&](int k) { return upper_of_pairs(pairs[k]); });
          }
        for (; d < dim_qk_; d += kW) add(d, [&](int k) { return load_as(keys[k] + d); });
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n)
#pragma GCC unroll 16
          for (int k = 0; k < at_once; ++k) sums[n][k1 + k] = acc[n][k];
      }
      for (int n = 0; n < N; ++n) {
        const V s = combine_lanes<Add, kW / 2>(sums[n]);
        store(w.scores + (row + n * apart) * kBlock + k0, p_.key_scales.present() ? s * load<V>(w.scales + k0) : s);
      }
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
      if (p_.bias.present()) read_row(p_.bias.dtype, p_.bias.at(t.b, t.h, t.i0, t.j0), p_.bias.stride[3], last, w.extra);
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

  // out = out * alpha + p V for N rows, a few vectors of columns at a time.
  template <class S, int N> void add_values(const Buffers& w, std::int64_t row, std::int64_t apart, Part seen, Ahead ahead) const {
    // By halves at the end, so that what goes in pairs finds pairs.
    constexpr int at_once = std::min(8, kSums / N), half = std::max(1, at_once / 2), quarter = std::max(1, at_once / 4);
    std::int64_t d = 0;
    for (; d + at_once * kW <= dim_v_; d += at_once * kW) add_columns<S, N, at_once>(w, row, apart, seen, ahead, d);
    for (; d + half * kW <= dim_v_; d += half * kW) add_columns<S, N, half>(w, row, apart, seen, ahead, d);
    for (; d + quarter * kW <= dim_v_; d += quarter * kW) add_columns<S, N, quarter>(w, row, apart, seen, ahead, d);
    for (; d < dim_v_; d += kW) add_columns<S, N, 1>(w, row, apart, seen, ahead, d);
  }
  template <class S, int N, int Columns>
  void add_columns(const Buffers& w, std::int64_t row, std::int64_t apart, Part seen, Ahead ahead, std::int64_t d) const {
    constexpr std::int64_t bytes = Columns * kW * static_cast<std::int64_t>(sizeof(S));
    const std::int64_t first = d * static_cast<std::int64_t>(sizeof(S));
    V sums[N][Columns] = {};
    // Lines that begin in these columns are asked for with them, others were.
    if (first < ahead.bytes && (bytes >= kLine || first % kLine == 0))
      sum_columns<S, Columns>(w, row, apart, seen, d, sums, [&](int k) { ahead.ask(k, first, first + std::max(bytes, kLine)); });
    else
      sum_columns<S, Columns>(w, row, apart, seen, d, sums, [](int) {});
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) {
      T* const out = w.states + (row + n * apart) * state_row_ + d;
      const V alpha = broadcast<V>(w.alpha[row + n * apart]);
#pragma GCC unroll 8
      for (int v = 0; v < Columns; ++v) store(out + v * kW, fma(load<V>(out + v * kW), alpha, sums[n][v]));
    }
  }

  template <class S, int Columns, int N, class Ask>
  void sum_columns(const Buffers& w, std::int64_t row, std::int64_t apart, Part seen, std::int64_t d, V (&sums)[N][Columns],
                   Ask&& ask) const {
    const T* const weights = w.scores + row * kBlock;
    for (int k = seen.first; k < seen.last; ++k) {
      const S* value = reinterpret_cast<const S*>(w.value_at[k]) + d;
      // Hidden from gcc 12, which would keep each column's distance from the row in a register, and for want of these in vectors.
      asm("" : "+r"(value));
      ask(k);
      V weight[N];
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) weight[n] = broadcast<V>(weights[n * apart * kBlock + k]);
      const auto add = [&](int v, V column) {
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n) sums[n][v] = fma(weight[n], column, sums[n][v]);
      };
      if constexpr (std::is_same_v<S, BFloat16> && Columns > 1) {
#pragma GCC unroll 4
        for (int v = 0; v < Columns; v += 2) {
          const auto pairs = load<Words>(value + v * kW);
          add(v, lower_of_pairs(pairs));
          add(v + 1, upper_of_pairs(pairs));
        }
      } else {
#pragma GCC unroll 8
        for (int v = 0; v < Columns; ++v) add(v, load_as(value + v * kW));
      }
    }
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
  bool beside_matrix_;
  std::int64_t dim_qk_;  // padded to whole vectors
  std::int64_t dim_v_;
  std::int64_t state_row_;
  std::vector<std::int64_t> first_state_;
  std::int64_t states_ = 0;
  std::unique_ptr<T[]> memory_;
};

}  // namespace regard::cpu
