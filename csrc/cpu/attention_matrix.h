// Attention's two products on the matrix unit: S = K Q^T and out += V^T P, by tile_matrix.h.
//
// K is the left operand, in rows along its dimensions; Q is packed once an item; S comes out keys down and queries across,
// as on vector units, so that the softmax and all that edits scores is the same code. P is then nearly a right operand:
// two rows of keys to a row of pairs. Only V has to be transposed.
//
// K and V of as many blocks of keys as fit a part of L2 are split and packed at once, for all queries of the item; each tile
// of 32 queries then meets them one after another. While the softmax of one step runs on the vector units, the matrix unit
// is given, pair of parts by pair of parts, the last step's V^T P and the next one's K Q^T.
//
// Measured (Emerald Rapids): a product of tiles takes 16 cycles, a load from L1 8 to 10 beside it, a store 12 to 20 in which
// little else happens. While a product is under way, port 5 takes no 512-bit multiply, maximum or exponential step, only
// additions and integer work: vectors then run at one such instruction a cycle. A matrix unit that was idle for some 600
// cycles takes 500 more to wake. So products are spread thinly over the softmax, its instructions on port 0 are what counts
// (7 a vector for bfloat16: the largest, scaling, a step of the exponential, 4 of its polynomial, its scaling), and the
// output is carried in tiles, joined by no vectors. For 32 queries x 96 keys of 64 dimensions in bfloat16, cycles: products
// 768, softmax alone 1,350, all of a step 3,600, where neither fewer keys a block nor fewer loads from L2 changed anything.
// float32 takes six times the products: 4,600, of 7,400 in all.
#pragma once

#include <algorithm>
#include <limits>

#include "cpu/attention_scores.h"
#include "cpu/parallel.h"
#include "cpu/tile_matrix.h"

namespace regard::cpu {

template <class Split> class MatrixProducts {
  using V = Vec<float>;
  static constexpr int kW = kWidth<float>;
  // Rows of the softmax whose weights are summed apart: rounding at the whole sum's size is then rare, where matrix tiles
  // round so little that it would show (90 weights beside one of 1 were wrong by 13 epsilon).
  static constexpr int kStep = 16;
  // Rows between two pauses. Fewer pauses leave the vector units waiting behind a longer run of products: a step of float32
  // took 9,700 cycles with 16 rows, 8,500 with 4.
  static constexpr int kBetweenPauses = 4;
  static constexpr int kParts = Split::kScores.kParts;           // of Q and K
  static constexpr int kValueParts = Split::kValues.kParts;      // of P and V
  static constexpr std::int64_t kKeySteps = kKeys / kTileDepth;  // of the depth that runs over keys
  static constexpr float kInfinity = std::numeric_limits<float>::infinity();
  static_assert(kKeys % kTileDepth == 0 && kTileDepth % kStep == 0 && kTileDepth % kChain == 0 && kTileColumns % kW == 0);

 public:
  // Queries of a tile: 2 x 2 tiles of sums use every loaded tile twice.
  static constexpr int kColumns = 2 * kTileColumns;
  static constexpr int kRows = kTileRows;
  static constexpr bool kOverlaps = true;
  // The largest items are of so many times the fewest queries: packing K and V of 96 keys of 64 bfloat16 takes 2,700 cycles, as
  // long as the softmax of 64 queries; items of 768 queries were 3 % faster than of 384 at 4,096.
  static constexpr int kShare = 4;
  // Blocks of keys are copied as many at once as fit a part of L2: then each tile of queries meets them one after another,
  // and its own part of Q and of the output stay in L1.
  static constexpr std::int64_t kBlockBytes = std::int64_t{768} << 10;
  static constexpr int kMostBlocks = 64;
  using Scores = ScoreTiles<float, kColumns>;
  using Buffers = Scores::Buffers;
  using Unit = MatrixTiles;

  struct Memory {
    std::size_t queries_at, keys_at, values_at, weights_at, pairs_at;
    float* queries;  // [tiles][2][kParts][steps] tiles of B
    float* keys;     // [blocks][kKeys / 16][kParts][steps] tiles of A
    float* values;   // [blocks][dim_v_padded / 16][kValueParts][kKeySteps] tiles of A: V^T
    float* weights;  // [2] of [2][kValueParts][kKeySteps] tiles of B: P of the tiles in flight
    float* pairs;    // [kValueParts][16][value_row]: pairs of rows of V
  };

  MatrixProducts(const AttentionProblem& problem, const Scores& scores) : p_(problem), scores_(scores) {
    steps_ = std::max<std::int64_t>(1, divide_up(p_.dim_qk(), kTileDepth));
    dim_v_padded_ = round_up(p_.dim_v(), kRows);
    value_row_ = row_length<float>(dim_v_padded_);
    const std::int64_t bytes = 4 * (keys_of_block() + values_of_block());
    blocks_ = std::clamp<std::int64_t>(std::min(kBlockBytes / bytes, divide_up(p_.len_kv(), kKeys)), 1, kMostBlocks);
  }

  int blocks_at_once() const { return static_cast<int>(blocks_); }
  std::int64_t staging_row() const { return std::max(row_length<float>(steps_ * kTileDepth), value_row_); }

  void reserve(Scratch& scratch, std::int64_t tiles, Memory& m) const {
    m.queries_at = scratch.reserve<float>(tiles * 2 * kParts * steps_ * kTileFloats);
    m.keys_at = scratch.reserve<float>(blocks_ * keys_of_block());
    m.values_at = scratch.reserve<float>(blocks_ * values_of_block());
    m.weights_at = scratch.reserve<float>(2 * 2 * kValuesTile);
    m.pairs_at = scratch.reserve<float>(std::max(kValueParts * value_row_, kParts * steps_ * kTileColumns) * kTileRows);
  }
  void place(const Scratch& scratch, Memory& m) const {
    m.queries = scratch.at<float>(m.queries_at);
    m.keys = scratch.at<float>(m.keys_at);
    m.values = scratch.at<float>(m.values_at);
    m.weights = scratch.at<float>(m.weights_at);
    m.pairs = scratch.at<float>(m.pairs_at);
  }

  // Q^T of one tile, scaled by a power of two.
  void read_queries(const Memory& m, const Buffers& w, const TileOf& t, std::int64_t index) const {
    const std::int64_t padded = steps_ * kTileDepth;
    const std::int64_t row = kParts * steps_ * kTileColumns;  // dwords: all parts of a query
    for (int c = 0; c < 2; ++c) {
      const int queries = std::clamp(t.queries - c * kTileColumns, 0, kTileColumns);
      for (int r = 0; r < queries; ++r) {
        scores_.read_query(t, c * kTileColumns + r, w.staging);
        std::fill(w.staging + p_.dim_qk(), w.staging + padded, 0.0f);
        split_row<kParts>(w.staging, padded, m.pairs + r * row, kTileColumns, steps_ * kTileColumns);
      }
      transpose_padded(m.pairs, row, queries, static_cast<int>(row), queries_of(m, index, c), kTileColumns, kTileColumns);
    }
  }

  // K and V of one block, padded with zeros to whole tiles.
  void read_block(const Memory& m, const Buffers& w, std::int64_t b, std::int64_t h, std::int64_t j0, int keys, int block) const {
    const std::int64_t padded = steps_ * kTileDepth;
    const bool copied = kParts == 1 && p_.key.dtype == DType::bfloat16 && p_.key.stride[3] == 2 && p_.dim_qk() == padded;
    const char* const first_key = stored_row(p_.key, b, h, j0);
    for (int r = 0; r < round_up(keys, kTileRows); ++r) {
      float* const tiles = m.keys + block * keys_of_block() + r / kTileRows * kParts * steps_ * kTileFloats + r % kTileRows * kTileColumns;
      if (copied && r < keys) {
        copy_row(row_of(p_.key, first_key, b, h, j0, r), padded, tiles, kTileFloats);
        continue;
      }
      split_row<kParts>(floats_of(p_.key, p_.key_scales, first_key, b, h, j0, r, keys, padded, w.staging), padded, tiles, kTileFloats,
                        steps_ * kTileFloats);
    }
    for (int first = 0; first < keys; first += kTileDepth)
      read_values(m, w, b, h, j0 + first, std::min(keys - first, kTileDepth), first, block);
  }

  // The two products come in steps of tile_matrix.h, each of at most 4 products of tiles for each pair of parts.
  std::int64_t key_steps(const TileOf& t) const { return divide_up(t.keys, 2 * kTileRows) * steps_ * Split::kScores.kCount; }
  std::int64_t value_steps(const TileOf& t) const {
    return divide_up(dim_v_padded_, 2 * kTileRows) * divide_up(t.keys, kTileDepth) * Split::kValues.kCount;
  }

  static std::int64_t pauses(const TileOf& t) { return t.vectors * round_up(t.keys, kTileDepth) / kBetweenPauses; }

  // S = K Q^T.
  void multiply_keys(const Memory& m, float* scores, const TileOf& t, std::int64_t index, int block, std::int64_t step) const {
    const std::int64_t tile = kParts * steps_ * kTileFloats;
    constexpr int count = Split::kScores.kCount;
    const int product = static_cast<int>(step % count);
    step /= count;
    const std::int64_t r = step / steps_ * 2 * kTileRows;
    multiply_step<Split::kScores>(
        {m.keys + block * keys_of_block() + (t.row + r) / kTileRows * tile, tile, steps_ * kTileFloats, queries_of(m, index, 0), tile,
         steps_ * kTileFloats, steps_, scores + r * kColumns, kColumns, t.keys - r > kTileRows, t.queries > kTileColumns, false},
        step % steps_, product);
  }

  // out += V^T P, P as weigh() left it in `slot`.
  void add_values(const Memory& m, const TileOf& t, int block, float* out, int slot, std::int64_t step) const {
    const std::int64_t steps = divide_up(t.keys, kTileDepth);
    constexpr int count = Split::kValues.kCount;
    const int product = static_cast<int>(step % count);
    step /= count;
    const std::int64_t d = step / steps * 2 * kTileRows;
    constexpr std::int64_t part = kKeySteps * kTileFloats;
    multiply_step<Split::kValues>({m.values + block * values_of_block() + d / kTileRows * kValuesTile + t.row / kTileDepth * kTileFloats,
                                   kValuesTile, part, weights_of(m, slot), kValuesTile, part, steps, out + d * kColumns, kColumns,
                                   dim_v_padded_ - d > kTileRows, t.queries > kTileColumns, true},
                                  step % steps, product);
  }

  // One block of the online softmax: scores become P, in pairs of keys, packed into `slot`. pause() is called every
  // kBetweenPauses rows.
  template <class F>
  void weigh(const Memory& m, const Buffers& w, const TileOf& t, float* max_at, float* sum_at, V* alpha, int slot, F&& pause) const {
    const int padded = static_cast<int>(round_up(t.keys, kTileDepth));
    std::fill(w.scores + t.keys * kColumns, w.scores + padded * kColumns, -kInfinity);
    if (p_.dropout.present()) {
      for (int v = 0; v < t.vectors; ++v)
        weigh_column(w, t, v, max_at, sum_at, alpha[v], pause, [&](int r, V even, V odd) {
          store(w.scores + r * kColumns + v * kW, even);
          store(w.scores + (r + 1) * kColumns + v * kW, odd);
        });
      scores_.apply_dropout(w, t);
      for (int v = 0; v < t.vectors; ++v)
        for (int r = 0; r < padded; r += 2)
          take_weights(m, slot, v, r, load<V>(w.scores + r * kColumns + v * kW), load<V>(w.scores + (r + 1) * kColumns + v * kW));
    } else {
      for (int v = 0; v < t.vectors; ++v)
        weigh_column(w, t, v, max_at, sum_at, alpha[v], pause, [&](int r, V even, V odd) { take_weights(m, slot, v, r, even, odd); });
    }
  }

  // out *= alpha, where a maximum grew.
  void rescale(const TileOf& t, float* out, const V* alpha) const {
    for (int v = 0; v < t.vectors; ++v)
      if (!all_equal(alpha[v], broadcast<V>(1)))
        for (std::int64_t d = 0; d < dim_v_padded_; ++d)
          store(out + d * kColumns + v * kW, load<V>(out + d * kColumns + v * kW) * alpha[v]);
  }

 private:
  // Floats of all parts of one tile of V^T's rows, or of P's columns.
  static constexpr std::int64_t kValuesTile = kValueParts * kKeySteps * kTileFloats;

  std::int64_t keys_of_block() const { return kKeys / kTileRows * kParts * steps_ * kTileFloats; }
  std::int64_t values_of_block() const { return dim_v_padded_ / kTileRows * kValuesTile; }

  const char* stored_row(const Array& x, std::int64_t b, std::int64_t h, std::int64_t j) const {
    const Place at = p_.key_place(b, j);
    return x.at(at.outer, h / scores_.per_group, at.position);
  }

  // Row j0 + r, where row j0 lies at `first`: only pages need be looked up one by one.
  const char* row_of(const Array& x, const char* first, std::int64_t b, std::int64_t h, std::int64_t j0, int r) const {
    return p_.storage == Storage::paged ? stored_row(x, b, h, j0 + r) : first + r * x.stride[2];
  }

  // That row up to `padded` floats, zeros beyond `keys` and its own length: where it lies, if that is how, or in `copy`.
  const float* floats_of(const Array& x, const Array& scales, const char* first, std::int64_t b, std::int64_t h, std::int64_t j0, int r,
                         int keys, std::int64_t padded, float* copy) const {
    const std::int64_t dim = x.shape[3];
    const bool there = r < keys;
    if (there && dim == padded && Scores::lies_in_vectors(x, dim)) return reinterpret_cast<const float*>(row_of(x, first, b, h, j0, r));
    if (there) scores_.read_stored(x, scales, b, h, j0 + r, dim, copy);
    std::fill(copy + (there ? dim : 0), copy + padded, 0.0f);
    return copy;
  }

  float* queries_of(const Memory& m, std::int64_t index, int column) const {
    return m.queries + (index * 2 + column) * kParts * steps_ * kTileFloats;
  }

  // Keys first .. first + keys of the block: one step of the depth of V^T P.
  void read_values(const Memory& m, const Buffers& w, std::int64_t b, std::int64_t h, std::int64_t j0, int keys, int first,
                   int block) const {
    const char* const first_value = stored_row(p_.value, b, h, j0);
    const bool copied = kValueParts == 1 && p_.value.dtype == DType::bfloat16 && p_.value.stride[3] == 2 && p_.dim_v() == dim_v_padded_;
    for (int r = 0; r < kTileDepth; r += 2) {
      if (copied && r + 1 < keys) {
        const char* const first_row = row_of(p_.value, first_value, b, h, j0, r);
        const char* const second_row = row_of(p_.value, first_value, b, h, j0, r + 1);
        for (std::int64_t d = 0; d < dim_v_padded_; d += kW)
          store(m.pairs + r / 2 * value_row_ + d, stored_pairs(first_row + 2 * d, second_row + 2 * d));
        continue;
      }
      const float* rows[2];
      for (int i = 0; i < 2; ++i)
        rows[i] = floats_of(p_.value, p_.value_scales, first_value, b, h, j0, r + i, keys, dim_v_padded_, w.staging + i * w.staging_row);
      for (std::int64_t d = 0; d < dim_v_padded_; d += kW) {
        Words words[kValueParts];
        split_pairs(load<V>(rows[0] + d), load<V>(rows[1] + d), words);
        for (int p = 0; p < kValueParts; ++p) store(m.pairs + (p * kTileRows + r / 2) * value_row_ + d, words[p]);
      }
    }
    for (std::int64_t d = 0; d < dim_v_padded_; d += kTileRows)
      for (int p = 0; p < kValueParts; ++p)
        transpose_padded(
            m.pairs + p * kTileRows * value_row_ + d, value_row_, kTileRows, kTileRows,
            m.values + block * values_of_block() + d / kTileRows * kValuesTile + (p * kKeySteps + first / kTileDepth) * kTileFloats,
            kTileColumns, kTileColumns);
  }

  // take(r, weights of key r, of key r + 1)
  template <class F, class Take>
  void weigh_column(const Buffers& w, const TileOf& t, int v, float* max_at, float* sum_at, V& alpha, F&& pause, Take&& take) const {
    const int padded = static_cast<int>(round_up(t.keys, kTileDepth));
    const float* const column = w.scores + v * kW;
    const V before = load<V>(max_at + v * kW);
    V most[4] = {before, before, before, before};  // one chain would wait for itself
    for (int r = 0; r < padded; r += 4)
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) most[i] = max(load<V>(column + (r + i) * kColumns), most[i]);
    const V m = max(max(most[0], most[1]), max(most[2], most[3]));
    store(max_at + v * kW, m);
    const Weights weights(scores_.factors, m == -kInfinity ? V{} : m);
    alpha = weights.of(before);
    V sum = load<V>(sum_at + v * kW) * alpha;
    for (int r = 0; r < padded; r += kStep) {
      V part{};
      for (int i = 0; i < kStep; i += kBetweenPauses) {
#pragma GCC unroll 8
        for (int k = i; k < i + kBetweenPauses; k += 2) {
          const V even = weights.of(load<V>(column + (r + k) * kColumns));
          const V odd = weights.of(load<V>(column + (r + k + 1) * kColumns));
          part += even + odd;
          take(r + k, even, odd);
        }
        pause();
      }
      sum += part;
    }
    store(sum_at + v * kW, sum);
  }

  // Weights relative to a maximum. Subtracting before scaling costs an instruction over one fused step, and gives the
  // largest weight as exactly 1 however large the scores.
  struct Weights {
    V factor, base;
    Weights(const ScoreFactors<float>& factors, V m) : factor(broadcast<V>(factors.exp)), base(m) {}
    V of(V score) const { return exp2_short<Split::kDegree>((score - base) * factor); }
  };

  void take_weights(const Memory& m, int slot, int v, int r, V even, V odd) const {
    Words words[kValueParts];
    split_weights(even, odd, words);
    const int column = v * kW;
    float* const to = weights_of(m, slot) + column / kTileColumns * kValuesTile + column % kTileColumns + r / 2 * kTileColumns;
#pragma GCC unroll 3
    for (int p = 0; p < kValueParts; ++p) store(to + p * kKeySteps * kTileFloats, words[p]);
  }

  static float* weights_of(const Memory& m, int slot) { return m.weights + slot * 2 * kValuesTile; }

  const AttentionProblem& p_;
  const Scores& scores_;
  std::int64_t steps_;  // of the depth that runs over dimensions
  std::int64_t dim_v_padded_;
  std::int64_t value_row_;
  std::int64_t blocks_;
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
