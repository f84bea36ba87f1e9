// The len_q x len_kv matrix itself: scores after a stage, or the weights that the output is the sum with. The one thing
// about attention that costs that much memory; asked for by name.
//
//   for each tile of queries                (parallel, as are heads where their mean is not asked for)
//     for each head
//       for each block of keys              S = K Q^T, edited as in the forward path, turned back into rows
//       for each row                        hidden keys -inf;  softmax in one piece;  dropout

#include <algorithm>
#include <cmath>
#include <limits>

#include "cpu/attention_plain.h"
#include "cpu/attention_scores.h"
#include "cpu/math.h"
#include "cpu/operations.h"
#include "cpu/parallel.h"

namespace regard::cpu {
namespace {

template <class T> class Weights {
  using V = Vec<T>;
  static constexpr int kColumns = Tile<T>::kColumns;
  static constexpr int kW = kWidth<T>;
  static constexpr T kInfinity = std::numeric_limits<T>::infinity();

 public:
  Weights(const AttentionProblem& problem, Stage stage) : p_(problem), tiles_(problem), plain_(problem), stage_(stage) {
    row_ = round_up(std::max<std::int64_t>(p_.len_kv(), 1), kKeys);
    heads_ = p_.weights.shape[1];
  }

  void run() {
    const std::int64_t tiles = (p_.len_q() + kColumns - 1) / kColumns;
    const double work =
        static_cast<double>(p_.batch() * p_.heads() * p_.len_q()) * static_cast<double>(p_.len_kv() + 1) * static_cast<double>(p_.dim_qk());
    parallel_for(p_.batch() * heads_ * tiles, work, Rehearse::scratch, [this, tiles](std::int64_t item) {
      const std::int64_t row = item / tiles;
      run_tile(row / heads_, row % heads_, item % tiles * kColumns);
    });
  }

 private:
  // Queries i0 and on of row h of the weights: of head h, or of the mean of all.
  void run_tile(std::int64_t b, std::int64_t h, std::int64_t i0) const {
    const int queries = static_cast<int>(std::min<std::int64_t>(kColumns, p_.len_q() - i0));
    const std::int64_t merged = p_.heads() / heads_;
    typename ScoreTiles<T>::Buffers w;
    w.staging_row = std::max(tiles_.key_row, row_length<T>(kKeys));
    Scratch scratch;
    const auto packed = scratch.template reserve<T>(p_.dim_qk() * kColumns);
    const auto keys = scratch.template reserve<T>(kKeys * tiles_.key_row);
    const auto scores = scratch.template reserve<T>(round_up(kKeys, kW) * kColumns);
    const auto extra = scratch.template reserve<T>(round_up(kKeys, kW));
    const auto staging = scratch.template reserve<T>(kColumns * w.staging_row);
    const auto rows = scratch.template reserve<T>(kColumns * row_);
    const auto sums = scratch.template reserve<T>(merged > 1 ? queries * row_ : 0);
    scratch.acquire();
    w.scores = scratch.template at<T>(scores);
    w.extra = scratch.template at<T>(extra);
    w.staging = scratch.template at<T>(staging);
    T* const matrix = scratch.template at<T>(rows);
    T* const sum = merged > 1 ? scratch.template at<T>(sums) : matrix;

    if (merged > 1) std::fill_n(sum, queries * row_, T(0));
    for (std::int64_t m = 0; m < merged; ++m) {
      of_head(w, b, h * merged + m, i0, queries, scratch.template at<T>(packed), scratch.template at<T>(keys), matrix);
      if (stop_requested()) return;
      if (merged > 1) add(matrix, queries, sum);
    }
    for (int q = 0; q < queries; ++q) {
      T* const row = sum + q * row_;
      if (merged > 1)
        for (std::int64_t j = 0; j < p_.len_kv(); ++j) row[j] /= static_cast<T>(merged);
      write_row(p_.weights.dtype, p_.weights.at(b, h, i0 + q), p_.weights.stride[3], p_.len_kv(), row);
    }
  }

  void add(const T* matrix, int queries, T* sum) const {
    for (std::int64_t r = 0; r < queries * row_; r += row_)
      for (std::int64_t j = r; j < r + p_.len_kv(); j += kW) store(sum + j, load<V>(sum + j) + load<V>(matrix + j));
  }

  void of_head(const typename ScoreTiles<T>::Buffers& w, std::int64_t b, std::int64_t h, std::int64_t i0, int queries, T* packed, T* keys,
               T* matrix) const {
    const SequenceMask sequence = p_.sequence(b);
    const int present = static_cast<int>(std::clamp<std::int64_t>(sequence.len_q - i0, 0, queries));
    TileOf t{b, h, i0, present, (present + kW - 1) / kW, 0, 0};
    if (present > 0) tiles_.read_queries(w, t, packed);
    for (t.j0 = 0; present > 0 && t.j0 < sequence.len_kv; t.j0 += kKeys) {
      if (stop_requested()) return;
      t.keys = static_cast<int>(std::min<std::int64_t>(kKeys, sequence.len_kv - t.j0));
      const auto stored = tiles_.stored_rows(p_.key, p_.key_scales, b, h, t.j0, t.keys, p_.dim_qk(), keys, tiles_.key_row);
      tiles_.prefetch_edits(t);
      tiles_.multiply_keys(w, stored, t, packed, 0, t.vectors, {0, t.keys});
      if (tiles_.factors.transforms) tiles_.transform(w, sequence, t);
      if (p_.mask.present()) tiles_.apply_mask(w, t);
      transpose_padded(w.scores, kColumns, t.keys, t.vectors * kW, matrix + t.j0, row_, static_cast<int>(round_up(t.keys, kW)));
    }
    for (int q = 0; q < queries; ++q) {
      T* const row = matrix + q * row_;
      hide(sequence, b, h, i0 + q, row);
      if (stage_ == Stage::weights)
        softmax(b, h, i0 + q, row);
      else
        for (std::int64_t j = 0; j < p_.len_kv(); ++j) row[j] = static_cast<T>(static_cast<double>(row[j]) * tiles_.factors.unit);
    }
  }

  // -inf for every key that windows, lengths or blocks keep from query i.
  void hide(const SequenceMask& sequence, std::int64_t b, std::int64_t h, std::int64_t i, T* row) const {
    std::int64_t end = 0;
    const KeyRange seen = sequence.keys_of(i);
    if (seen.first < seen.last)
      p_.for_each_run(b, h, i, seen, [&](KeyRange run) {
        std::fill(row + end, row + run.first, -kInfinity);
        end = run.last;
      });
    std::fill(row + end, row + p_.len_kv(), -kInfinity);
  }

  void softmax(std::int64_t b, std::int64_t h, std::int64_t i, T* row) const {
    const std::int64_t n = p_.len_kv();
    const std::int64_t padded = round_up(n, kW);
    std::fill(row + n, row + padded, -kInfinity);
    const T sink = p_.sinks.present() ? static_cast<T>(read<float>(p_.sinks.at(h))) : -kInfinity;
    V largest = broadcast<V>(sink);
    for (std::int64_t j = 0; j < padded; j += kW) largest = max(load<V>(row + j), largest);
    const T m = max_lanes(largest);
    const T base = m == -kInfinity ? T(0) : m;
    const V high = broadcast<V>(tiles_.factors.exp);
    const V low = broadcast<V>(tiles_.factors.exp_low);
    V sums = {};
    for (std::int64_t j = 0; j < padded; j += kW) {
      const V weight = exp2_scaled(load<V>(row + j) - base, high, low);
      sums += weight;
      store(row + j, weight);
    }
    const T sum = sum_lanes(sums) + exp2_scaled(broadcast<V>(sink - base), high, low)[0];
    if (!(sum > 0) || sum > std::numeric_limits<T>::max()) {  // no key, or scores that tiles cannot carry
      std::fill_n(row, n, T(0));
      const auto found = plain_.weights(b, h, i);
      for (std::size_t k = 0; k < found.keys.size(); ++k) row[found.keys[k]] = static_cast<T>(found.weights[k]);
      return;
    }
    const V divisor = broadcast<V>(sum);
    const V inverse = broadcast<V>(1) / divisor;  // a division for each took a quarter of the time of 12 heads' mean
    for (std::int64_t j = 0; j < n; j += kW) store(row + j, divided(load<V>(row + j), divisor, inverse));
    if (p_.dropout.present()) p_.dropout.apply(b, h, i, 0, n, row);
  }

  const AttentionProblem& p_;
  ScoreTiles<T> tiles_;
  PlainAttention plain_;
  Stage stage_;
  std::int64_t row_;
  std::int64_t heads_;  // of the weights: all, or 1 for their mean
};

}  // namespace

void attention_weights(const AttentionProblem& problem, Stage stage) {
  const AttentionProblem p = problem.up_to(stage);
  with_compute(p.query.dtype, [&](auto t) { Weights<decltype(t)>(p, stage).run(); });
}

}  // namespace regard::cpu
