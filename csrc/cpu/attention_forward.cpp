// Dot-product attention, forward: out = softmax(scale Q K^T + bias, masked) V without the len_q x len_kv matrix.
//
//   for each item: a block of queries of one head                      (parallel)
//     pack Q^T; max = -inf, sum = 0, out = 0
//     for each block of keys the queries see                          (in order: the merge is sequential)
//       K, V as compute values                                        (where they lie, or copied: shared by the block's queries)
//       for each tile of kColumns queries
//         S = K Q^T;  add bias, mask where the tile is partial;  P = exp2(S - max);  out = out * alpha + V^T P
//     out / sum, transposed back; non-finite rows again by the plain path
//
// Sequences of few queries take attention_rows.h instead. The online softmax is Milakov & Gimelshein, "Online normalizer
// calculation for softmax" (2018); tiling with it, Dao, "FlashAttention-2" (2023).

#include <algorithm>
#include <array>
#include <limits>
#include <vector>

#include "cpu/attention_output.h"
#include "cpu/attention_rows.h"
#include "cpu/attention_scores.h"
#include "cpu/attention_vector.h"
#include "cpu/math.h"
#include "cpu/operations.h"
#include "cpu/parallel.h"
#include "cpu/tile_amx.h"
#ifdef REGARD_MATRIX_TILES
#include "cpu/attention_matrix.h"
#endif

namespace regard::cpu {
namespace {

// A tile's part in the overlap of products and softmax: pieces of the products, given out between vectors of the softmax.
template <class F> class Pieces {
 public:
  Pieces(std::int64_t count, std::int64_t pauses, F run) : count_(count), pauses_(pauses), run_(run) {}
  // As many pieces a pause as spread them evenly.
  void pause() {
    ++pause_;
    while (next_ < count_ && next_ * pauses_ < pause_ * count_) run_(next_++);
  }
  void finish() {
    while (next_ < count_) run_(next_++);
  }

 private:
  std::int64_t count_;
  std::int64_t pauses_;
  F run_;
  std::int64_t next_ = 0;
  std::int64_t pause_ = 0;
};

// Products is one of attention_vector.h and attention_matrix.h: which one depends on the problem's dtype and dimensions.
template <class T, class Products> class Blocks {
  using V = Vec<T>;
  static constexpr int kColumns = Products::kColumns;
  static constexpr int kW = kWidth<T>;
  static constexpr int kVectors = kColumns / kW;
  static constexpr T kInfinity = std::numeric_limits<T>::infinity();

 public:
  Blocks(const AttentionProblem& problem, const AttentionOutput<T>& output)
      : p_(problem), tiles_(problem), products_(problem, tiles_), output_(output) {
    most_ = queries_per_item(p_, Products::kShare);
    dim_v_padded_ = round_up(p_.dim_v(), Products::kRows);
  }

  QueryBlocks cut(std::int64_t queries) const { return {queries, p_.block_mask.block_q, most_, kW}; }

  // One block of queries of one head, against all keys they see.
  void run(std::int64_t b, std::int64_t h, const QueryBlocks& blocks, std::int64_t item) const {
    const std::int64_t i0 = blocks.first(item);
    const std::int64_t i1 = blocks.last(item);
    if (i0 >= i1) return;
    Buffers w;
    take_buffers(w, i1 - i0);
    [[maybe_unused]] const typename Products::Unit unit;
    const SequenceMask sequence = p_.sequence(b);
    const auto tile_at = [&](std::int64_t i) {
      const int queries = static_cast<int>(std::min<std::int64_t>(kColumns, i1 - i));
      return TileOf{b, h, i, queries, (queries + kW - 1) / kW, 0, 0};
    };
    for (std::int64_t i = i0; i < i1; i += kColumns) start_tile(w, tile_at(i), (i - i0) / kColumns);

    KeyBlocks blocks_of_keys;
    const auto run_blocks = [&] {
      for (int n = 0; n < blocks_of_keys.count; ++n) {
        const KeyBlock& block = blocks_of_keys.list[static_cast<std::size_t>(n)];
        products_.read_block(w.products, w.tile, b, h, block.first, block.keys, n);
      }
      Walk walk{i0, i1, blocks_of_keys, sequence, tile_at};
      if constexpr (Products::kOverlaps)
        run_overlapped(w, sequence, walk);
      else
        for (Step step; walk.next(step);) run_tile(w, sequence, step);
      blocks_of_keys.count = 0;
    };
    p_.for_each_run(b, h, i0, sequence.seen_by_any(i0, i1), [&](KeyRange seen) {
      for (std::int64_t j0 = seen.first / kKeys * kKeys; j0 < seen.last; j0 += kKeys) {
        if (stop_requested()) return;
        // Blocks begin at multiples of kKeys, which windows do not; a run of a block mask ends where it says.
        const std::int64_t first = p_.block_mask.present() ? std::max(j0, seen.first) : j0;
        const std::int64_t end = p_.block_mask.present() ? seen.last : sequence.len_kv;
        blocks_of_keys.list[static_cast<std::size_t>(blocks_of_keys.count++)] = {
            first, static_cast<int>(std::min<std::int64_t>(j0 + kKeys, end) - first)};
        if (blocks_of_keys.count == products_.blocks_at_once()) run_blocks();
      }
    });
    run_blocks();
    for (std::int64_t i = i0; i < i1; i += kColumns) finish_tile(w, tile_at(i), (i - i0) / kColumns);
  }

 private:
  static constexpr int kSlots = Products::kOverlaps ? 2 : 1;  // tiles in flight

  // Blocks of keys whose copies lie in the worker's memory at once.
  struct KeyBlock {
    std::int64_t first;
    int keys;
  };
  struct KeyBlocks {
    std::array<KeyBlock, Products::kMostBlocks> list;
    int count = 0;
  };

  // One tile of queries against one block of keys.
  struct Step {
    TileOf tile;
    std::int64_t index;  // of the tile in the item
    int block;
  };

  // All blocks that a tile sees, tile by tile.
  template <class F> struct Walk {
    std::int64_t i, i1;
    const KeyBlocks& blocks;
    const SequenceMask& sequence;
    F& tile_at;
    std::int64_t index = 0;
    int block = 0;
    KeyRange any{0, -1};

    bool next(Step& step) {
      for (; i < i1; i += kColumns, ++index, block = 0) {
        const TileOf tile = tile_at(i);
        if (block == 0) any = sequence.seen_by_any(i, i + tile.queries);
        while (block < blocks.count) {
          const auto [first, keys] = blocks.list[static_cast<std::size_t>(block++)];
          if (any.first >= first + keys || any.last <= first) continue;
          step = {tile, index, block - 1};
          // Only the keys that the tile sees, from a chain's start: what is left out would add exact zeros.
          step.tile.row = static_cast<int>(std::max<std::int64_t>(any.first - first, 0)) / kChain * kChain;
          step.tile.j0 = first + step.tile.row;
          step.tile.keys = static_cast<int>(std::min<std::int64_t>(any.last - step.tile.j0, keys - step.tile.row));
          return true;
        }
      }
      return false;
    }
  };
  template <class F> Walk(std::int64_t, std::int64_t, const KeyBlocks&, const SequenceMask&, F&) -> Walk<F>;

  struct Buffers {
    Scratch scratch;
    typename Products::Memory products;
    typename Products::Buffers tile;
    T* scores[kSlots];  // [kKeys][kColumns]
    T* output;          // [tiles][dim_v_padded][kColumns]
    T* max;             // [tiles][kColumns], of the scores as the tiles hold them
    T* sum;             // [tiles][kColumns]
    double* plain_row;  // [dim_v]
  };

  void take_buffers(Buffers& w, std::int64_t block) const {
    const std::int64_t tiles = (block + kColumns - 1) / kColumns;
    w.tile.staging_row = std::max(products_.staging_row(), row_length<T>(kKeys));
    products_.reserve(w.scratch, tiles, w.products);
    const auto output = w.scratch.template reserve<T>(tiles * dim_v_padded_ * kColumns);
    const auto max = w.scratch.template reserve<T>(tiles * kColumns);
    const auto sum = w.scratch.template reserve<T>(tiles * kColumns);
    const auto scores = w.scratch.template reserve<T>(kSlots * kKeys * kColumns);
    const auto extra = w.scratch.template reserve<T>(round_up(kKeys, kW));
    const auto staging = w.scratch.template reserve<T>(kColumns * w.tile.staging_row);
    const auto plain_row = w.scratch.template reserve<double>(p_.dim_v());
    w.scratch.acquire();
    products_.place(w.scratch, w.products);
    w.output = w.scratch.template at<T>(output);
    w.max = w.scratch.template at<T>(max);
    w.sum = w.scratch.template at<T>(sum);
    for (int n = 0; n < kSlots; ++n) w.scores[n] = w.scratch.template at<T>(scores) + n * kKeys * kColumns;
    w.tile.scores = w.scores[0];
    w.tile.extra = w.scratch.template at<T>(extra);
    w.tile.staging = w.scratch.template at<T>(staging);
    w.plain_row = w.scratch.template at<double>(plain_row);
  }

  T* output_of(const Buffers& w, std::int64_t index) const { return w.output + index * dim_v_padded_ * kColumns; }

  // The softmax's state before any key.
  void start_tile(Buffers& w, const TileOf& t, std::int64_t index) const {
    products_.read_queries(w.products, w.tile, t, index);
    std::fill_n(output_of(w, index), dim_v_padded_ * kColumns, T(0));
    const bool sink = p_.sinks.present();
    const T start = sink ? static_cast<T>(read<float>(p_.sinks.at(t.h))) : -kInfinity;
    std::fill_n(w.max + index * kColumns, kColumns, start);
    std::fill_n(w.sum + index * kColumns, kColumns, start > -kInfinity ? T(1) : T(0));
  }

  void run_tile(Buffers& w, const SequenceMask& sequence, const Step& n) const {
    tiles_.prefetch_edits(n.tile);
    products_.multiply_keys(w.products, w.tile, sequence, n.tile, n.index);
    tiles_.edit(w.tile, sequence, n.tile);
    V alpha[kVectors];
    softmax(w, n, alpha);
    if (p_.dropout.present()) tiles_.apply_dropout(w.tile, n.tile);
    products_.add_values(w.products, w.tile, sequence, n.tile, output_of(w, n.index), alpha);
  }

  // The same for all steps of a walk. While one's softmax runs, the matrix unit has the last one's weights times V, and the
  // next one's scores.
  template <class W> void run_overlapped(Buffers& w, const SequenceMask& sequence, W& walk) const {
    Step last;
    Step now;
    Step next;
    const auto multiply_keys = [&](const Step& n, int slot, std::int64_t piece) {
      products_.multiply_keys(w.products, w.scores[slot], n.tile, n.index, n.block, piece);
    };
    const auto add_values = [&](const Step& n, int slot, std::int64_t piece) {
      products_.add_values(w.products, n.tile, n.block, output_of(w, n.index), slot, piece);
    };
    if (!walk.next(now)) return;
    tiles_.prefetch_edits(now.tile);
    for (std::int64_t piece = 0; piece < products_.key_steps(now.tile); ++piece) multiply_keys(now, 0, piece);
    std::int64_t before = 0;
    bool more = true;
    for (int slot = 0; more; slot ^= 1) {
      w.tile.scores = w.scores[slot];
      tiles_.edit(w.tile, sequence, now.tile);
      more = walk.next(next);
      if (more) tiles_.prefetch_edits(next.tile);
      const std::int64_t after = more ? products_.key_steps(next.tile) : 0;
      Pieces pieces(before + after, products_.pauses(now.tile), [&](std::int64_t piece) {
        if (piece < before)
          add_values(last, slot ^ 1, piece);
        else
          multiply_keys(next, slot ^ 1, piece - before);
      });
      V alpha[kVectors];
      products_.weigh(w.products, w.tile, now.tile, w.max + now.index * kColumns, w.sum + now.index * kColumns, alpha, slot,
                      [&] { pieces.pause(); });
      pieces.finish();
      products_.rescale(now.tile, output_of(w, now.index), alpha);
      before = products_.value_steps(now.tile);
      last = now;
      now = next;
      if (!more)
        for (std::int64_t piece = 0; piece < before; ++piece) add_values(last, slot, piece);
    }
  }

  // One block of the online softmax, down the columns: scores become weights relative to the new max.
  void softmax(Buffers& w, const Step& n, V* alpha) const {
    const TileOf& t = n.tile;
    for (int v = 0; v < t.vectors; ++v) {
      T* const column = w.tile.scores + v * kW;
      T* const max_at = w.max + n.index * kColumns + v * kW;
      T* const sum_at = w.sum + n.index * kColumns + v * kW;
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
    T* const out = output_of(w, index);
    const T* const max = w.max + index * kColumns;
    const T* const sum = w.sum + index * kColumns;
    alignas(64) T bad[kColumns];
    for (int v = 0; v < t.vectors; ++v) {
      const V l = load<V>(sum + v * kW);
      const V inverse = broadcast<V>(1) / l;
      V finite = l > 0 ? V{} : broadcast<V>(1);
      for (std::int64_t d = 0; d < dim_v_padded_; ++d) {
        const V o = divided(load<V>(out + d * kColumns + v * kW), l, inverse);
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
  typename Products::Scores tiles_;
  Products products_;
  const AttentionOutput<T>& output_;
  std::int64_t most_;
  std::int64_t dim_v_padded_;
};

// Cuts the batch into items of both paths and runs them.
template <class T, class Products> class Forward {
 public:
  explicit Forward(const AttentionProblem& problem)
      : p_(problem), output_(problem), blocks_(problem, output_), rows_(problem, output_, Products::kOverlaps) {}

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
  Blocks<T, Products> blocks_;
  Rows<T> rows_;
  std::vector<std::int64_t> ends_;
  double work_ = 0;
  std::int64_t empty_rows_ = 0;
};

}  // namespace

void attention_forward(const AttentionProblem& problem) {
#ifdef REGARD_MATRIX_TILES
  if (with_matrix_products(problem, [&](auto split) { Forward<float, MatrixProducts<decltype(split)>>(problem).run(); })) return;
#endif
  with_compute(problem.query.dtype, [&](auto t) { Forward<decltype(t), VectorProducts<decltype(t)>>(problem).run(); });
}

}  // namespace regard::cpu
