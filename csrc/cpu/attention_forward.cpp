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
// Sequences of few queries take attention_rows.h instead. The online softmax is Milakov & Gimelshein, "Online normalizer
// calculation for softmax" (2018); tiling with it, Dao, "FlashAttention-2" (2023).

#include <algorithm>
#include <limits>
#include <vector>

#include "cpu/attention_output.h"
#include "cpu/attention_rows.h"
#include "cpu/attention_scores.h"
#include "cpu/operations.h"
#include "cpu/parallel.h"

namespace regard::cpu {
namespace {

template <class T> class Blocks {
  using V = Vec<T>;
  static constexpr int kColumns = Tile<T>::kColumns;
  static constexpr int kW = kWidth<T>;
  static constexpr T kInfinity = std::numeric_limits<T>::infinity();

 public:
  Blocks(const AttentionProblem& problem, const AttentionOutput<T>& output) : p_(problem), tiles_(problem), output_(output) {
    most_ = queries_per_item(std::max(p_.dim_qk(), p_.dim_v()));
    dim_v_padded_ = round_up(p_.dim_v(), Tile<T>::kRows);
    value_row_ = row_length<T>(dim_v_padded_);
  }

  QueryBlocks cut(std::int64_t queries) const { return {queries, p_.block_mask.block_q, most_, kW}; }

  // One block of queries of one head, against all keys they see.
  void run(std::int64_t b, std::int64_t h, const QueryBlocks& blocks, std::int64_t item) const {
    const std::int64_t i0 = blocks.first(item);
    const std::int64_t i1 = blocks.last(item);
    if (i0 >= i1) return;
    Buffers w;
    take_buffers(w, i1 - i0);
    const SequenceMask sequence = p_.sequence(b);
    const auto tile_at = [&](std::int64_t i, std::int64_t j0, int keys) {
      const int queries = static_cast<int>(std::min<std::int64_t>(kColumns, i1 - i));
      return TileOf{b, h, i, queries, (queries + kW - 1) / kW, j0, keys};
    };
    for (std::int64_t i = i0; i < i1; i += kColumns) start_tile(w, tile_at(i, 0, 0), (i - i0) / kColumns);

    p_.for_each_run(b, h, i0, sequence.seen_by_any(i0, i1), [&](KeyRange seen) {
      for (std::int64_t j0 = seen.first / kKeys * kKeys; j0 < seen.last; j0 += kKeys) {
        if (stop_requested()) return;
        // Blocks begin at multiples of kKeys, which windows do not; a run of a block mask ends where it says.
        const std::int64_t first = p_.block_mask.present() ? std::max(j0, seen.first) : j0;
        const std::int64_t end = p_.block_mask.present() ? seen.last : sequence.len_kv;
        const int keys = static_cast<int>(std::min<std::int64_t>(j0 + kKeys, end) - first);
        read_block(w, b, h, first, keys);
        for (std::int64_t i = i0; i < i1; i += kColumns) {
          TileOf tile = tile_at(i, first, keys);
          const KeyRange any = sequence.seen_by_any(i, i + tile.queries);
          if (any.first >= first + keys || any.last <= first) continue;
          // Only the keys that the tile sees, from a chain's start: what is left out would add exact zeros.
          tile.row = static_cast<int>(std::max<std::int64_t>(any.first - first, 0)) / kChain * kChain;
          tile.j0 = first + tile.row;
          tile.keys = static_cast<int>(std::min<std::int64_t>(any.last - tile.j0, keys - tile.row));
          run_tile(w, sequence, tile, (i - i0) / kColumns);
        }
      }
    });
    for (std::int64_t i = i0; i < i1; i += kColumns) finish_tile(w, tile_at(i, 0, 0), (i - i0) / kColumns);
  }

 private:
  struct Buffers {
    Scratch scratch;
    typename ScoreTiles<T>::Buffers tile;
    T* queries;         // [tiles][dim_qk][kColumns]
    T* output;          // [tiles][dim_v_padded][kColumns]
    T* max;             // [tiles][kColumns], of the scores as the tiles hold them
    T* sum;             // [tiles][kColumns]
    T* values;          // [kKeys][value_row]
    double* plain_row;  // [dim_v]
  };

  void take_buffers(Buffers& w, std::int64_t block) const {
    const std::int64_t tiles = (block + kColumns - 1) / kColumns;
    w.tile.staging_row = std::max({tiles_.key_row, value_row_, row_length<T>(kKeys)});
    const auto queries = w.scratch.template reserve<T>(tiles * p_.dim_qk() * kColumns);
    const auto output = w.scratch.template reserve<T>(tiles * dim_v_padded_ * kColumns);
    const auto max = w.scratch.template reserve<T>(tiles * kColumns);
    const auto sum = w.scratch.template reserve<T>(tiles * kColumns);
    const auto keys = w.scratch.template reserve<T>(kKeys * tiles_.key_row);
    const auto values = w.scratch.template reserve<T>(kKeys * value_row_);
    const auto scores = w.scratch.template reserve<T>(kKeys * kColumns);
    const auto extra = w.scratch.template reserve<T>(round_up(kKeys, kW));
    const auto staging = w.scratch.template reserve<T>(kColumns * w.tile.staging_row);
    const auto plain_row = w.scratch.template reserve<double>(p_.dim_v());
    w.scratch.acquire();
    w.queries = w.scratch.template at<T>(queries);
    w.output = w.scratch.template at<T>(output);
    w.max = w.scratch.template at<T>(max);
    w.sum = w.scratch.template at<T>(sum);
    w.tile.keys = w.scratch.template at<T>(keys);
    w.values = w.scratch.template at<T>(values);
    w.tile.scores = w.scratch.template at<T>(scores);
    w.tile.extra = w.scratch.template at<T>(extra);
    w.tile.staging = w.scratch.template at<T>(staging);
    w.plain_row = w.scratch.template at<double>(plain_row);
  }

  // The softmax's state before any key.
  void start_tile(Buffers& w, const TileOf& t, std::int64_t index) const {
    tiles_.read_queries(w.tile, t, w.queries + index * p_.dim_qk() * kColumns);
    std::fill_n(w.output + index * dim_v_padded_ * kColumns, dim_v_padded_ * kColumns, T(0));
    const bool sink = p_.sinks.present();
    const T start = sink ? static_cast<T>(read<float>(p_.sinks.at(t.h))) : -kInfinity;
    std::fill_n(w.max + index * kColumns, kColumns, start);
    std::fill_n(w.sum + index * kColumns, kColumns, start > -kInfinity ? T(1) : T(0));
  }

  // K and V of one block as contiguous compute values, padded with zeros to whole register tiles.
  void read_block(Buffers& w, std::int64_t b, std::int64_t h, std::int64_t j0, int keys) const {
    tiles_.read_keys(w.tile, b, h, j0, keys);
    for (int r = 0; r < keys; ++r) {
      T* const value = w.values + r * value_row_;
      tiles_.read_stored(p_.value, p_.value_scales, b, h, j0 + r, p_.dim_v(), value);
      std::fill(value + p_.dim_v(), value + dim_v_padded_, T(0));
    }
  }

  void run_tile(Buffers& w, const SequenceMask& sequence, const TileOf& t, std::int64_t index) const {
    tiles_.multiply_keys(w.tile, t, w.queries + index * p_.dim_qk() * kColumns);
    tiles_.edit(w.tile, sequence, t);
    V alpha[Tile<T>::kVectors];
    softmax(w, t, index, alpha);
    if (p_.dropout.present()) tiles_.apply_dropout(w.tile, t);
    multiply<T, Left::rows_contiguous>(w.values + t.row * value_row_, value_row_, w.tile.scores, kColumns,
                                       w.output + index * dim_v_padded_ * kColumns, kColumns, static_cast<int>(dim_v_padded_), t.vectors,
                                       t.keys, alpha);
  }

  // One block of the online softmax, down the columns: scores become weights relative to the new max.
  void softmax(Buffers& w, const TileOf& t, std::int64_t index, V* alpha) const {
    for (int v = 0; v < t.vectors; ++v) {
      T* const column = w.tile.scores + v * kW;
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
      const V high = broadcast<V>(tiles_.factors.exp);
      const V low = broadcast<V>(tiles_.factors.exp_low);
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

  void finish_tile(Buffers& w, const TileOf& t, std::int64_t index) const {
    T* const out = w.output + index * dim_v_padded_ * kColumns;
    const T* const max = w.max + index * kColumns;
    const T* const sum = w.sum + index * kColumns;
    alignas(64) T bad[kColumns];
    for (int v = 0; v < t.vectors; ++v) {
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
    transpose_back(out, w.tile.staging, w.tile.staging_row, t.vectors);
    for (int q = 0; q < t.queries; ++q)
      output_.write(t.b, t.h, t.i0 + q, w.tile.staging + q * w.tile.staging_row, max[q], sum[q], bad[q] == 0, w.plain_row);
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

  const AttentionProblem& p_;
  ScoreTiles<T> tiles_;
  const AttentionOutput<T>& output_;
  std::int64_t most_;
  std::int64_t dim_v_padded_;
  std::int64_t value_row_;
};

// Cuts the batch into items of both paths and runs them.
template <class T> class Forward {
 public:
  explicit Forward(const AttentionProblem& problem) : p_(problem), output_(problem), blocks_(problem, output_), rows_(problem, output_) {}

  void run() {
    const std::int64_t items = lay_out();
    rows_.allocate();
    // Late queries see the most keys under a causal mask: they go first, so that threads end together.
    parallel_for(items, work_, Rehearse::scratch, [this](std::int64_t item) { run_item(item); });
    rows_.merge();
    if (empty_rows_ + output_.unowned() > 0) write_empty_rows();
  }

 private:
  // Rows beyond the sequences' lengths.
  void write_empty_rows() const {
    const double work = static_cast<double>((empty_rows_ + output_.unowned()) * p_.heads()) * static_cast<double>(p_.dim_v());
    parallel_for(p_.batch() * p_.heads(), work, [this](std::int64_t item) {
      const std::int64_t b = item / p_.heads();
      for (std::int64_t i = p_.sequence(b).len_q; i < p_.rows_of(b) && !stop_requested(); ++i) output_.write_empty(b, item % p_.heads(), i);
    });
    parallel_for(output_.unowned(), work, [this](std::int64_t row) { output_.write_unowned(row); });
  }

  std::int64_t items_of(std::int64_t b) {
    const SequenceMask sequence = p_.sequence(b);
    empty_rows_ += p_.rows_of(b) - sequence.len_q;
    work_ += static_cast<double>(p_.heads() * sequence.len_q) * static_cast<double>(sequence.len_kv + 1) *
             static_cast<double>(p_.dim_qk() + p_.dim_v());
    return rows_.takes(sequence) ? rows_.items(b, sequence) : p_.heads() * blocks_.cut(sequence.len_q).count();
  }

  // ends_[b]: items of the sequences before b + 1.
  std::int64_t lay_out() {
    std::int64_t items = 0;
    ends_.reserve(static_cast<std::size_t>(p_.batch()));
    for (std::int64_t b = 0; b < p_.batch(); ++b) ends_.push_back(items += items_of(b));
    return items;
  }

  void run_item(std::int64_t item) const {
    const auto end = std::upper_bound(ends_.begin(), ends_.end(), item);
    const std::int64_t b = end - ends_.begin();
    const std::int64_t within = b == 0 ? item : item - ends_[static_cast<std::size_t>(b) - 1];
    const SequenceMask sequence = p_.sequence(b);
    if (rows_.takes(sequence)) return rows_.run(b, sequence, within);
    const QueryBlocks blocks = blocks_.cut(sequence.len_q);
    blocks_.run(b, within / blocks.count(), blocks, blocks.count() - 1 - within % blocks.count());
  }

  const AttentionProblem& p_;
  AttentionOutput<T> output_;
  Blocks<T> blocks_;
  Rows<T> rows_;
  std::vector<std::int64_t> ends_;
  double work_ = 0;
  std::int64_t empty_rows_ = 0;
};

}  // namespace

void attention_forward(const AttentionProblem& problem) {
  with_compute(problem.query.dtype, [&](auto t) { Forward<decltype(t)>(problem).run(); });
}

}  // namespace regard::cpu
