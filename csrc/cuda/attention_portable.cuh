// Dot-product attention, forward, on any GPU and for any element types, strides and head dimensions.
//
//   a block has 64 queries of one head and up to kColumns columns of the output; keys come in tiles
//     S = scale Q K^T, the head dimension in chunks through shared memory      (4 x kKeys / 8 scores a thread)
//     P = exp(S - max) through shared memory;  out = out * alpha + P V         (4 x kColumns / 8 outputs a thread)
//   wider outputs take several blocks, each of which computes the scores again
//   returned weights take the scores once more, when maxima and sums are known
//
// The online softmax is Milakov & Gimelshein, "Online normalizer calculation for softmax" (2018).
#pragma once

#include "cuda/attention_scores.cuh"

namespace regard::cuda {

template <class C, int kColumns> struct Portable {
  static constexpr int kThreads = 128;
  static constexpr int kQueries = 64;
  static constexpr int kKeys = sizeof(C) == 8 ? 32 : 64;
  static constexpr int kDepth = sizeof(C) == 8 ? 16 : 32;
  static constexpr int kValues = kKeys / 2;  // rows of V in shared memory at a time
  static constexpr int kAcross = 8;          // threads beside each other
  static constexpr int kRows = kQueries / (kThreads / kAcross);
  static constexpr int kScores = kKeys / kAcross;
  static constexpr int kOutputs = kColumns / kAcross;

  // Where the tile's keys and values lie, and what 1 in them is worth.
  struct Rows {
    const char* key[kKeys];
    const char* value[kKeys];
    C key_scale[kKeys];
    C value_scale[kKeys];
  };

  // One more element a row: eight rows then start in eight different banks.
  struct Shared {
    Rows rows;
    C p[kQueries][kKeys + 1];
    union {
      struct {
        C q[kQueries][kDepth + 1];
        C k[kKeys][kDepth + 1];
      } in;
      C v[kValues][kColumns];
    };
  };

  // to[r][d] = element d of row r, times its factor, zeros beyond `rows` and `columns`.
  template <int kHeight, int kWidth, int kPitch, class Row, class Factor>
  static REGARD_DEVICE void load(C (&to)[kHeight][kPitch], Row&& row, std::int64_t column, int rows, int columns, DType type,
                                 Factor&& factor) {
    for (int n = thread_index(); n < kHeight * kWidth; n += kThreads) {
      const int r = n / kWidth;
      const int d = n % kWidth;
      to[r][d] = r < rows && d < columns ? factor(r) * load_as<C>(row(r) + d * column, type) : C(0);
    }
  }
};

template <class C, int kColumns>
REGARD_KERNEL(128, 2)
attention_portable(const REGARD_GRID_CONSTANT AttentionArguments a, SplitScale scale, int column_blocks) {
  using P = Portable<C, kColumns>;
  auto& shared = *reinterpret_cast<typename P::Shared*>(dynamic_shared());

  const int d0 = block_index() % column_blocks * kColumns;
  const int columns = a.dim_v - d0 < kColumns ? a.dim_v - d0 : kColumns;
  const auto [b, h, i0, rows] = block_of(a, block_index() / column_blocks, P::kQueries);
  if (i0 >= rows) return;
  const SequenceMask sequence = sequence_of(a, b);
  const int across = thread_index() % P::kAcross;
  const int row0 = thread_index() / P::kAcross * P::kRows;
  const int queries = rows - i0 < P::kQueries ? rows - i0 : P::kQueries;
  const int end = sequence.len_q < i0 + queries ? static_cast<int>(sequence.len_q) : i0 + queries;
  const C slope = slope_of<C>(a, b, h);
  const char* const query = query_row(a, a.query, b, h, i0);

  C o[P::kRows][P::kOutputs] = {};
  C m[P::kRows];
  C l[P::kRows];
  const C start = sink_of<C>(a, h);
  for (int r = 0; r < P::kRows; ++r) {
    m[r] = start;
    l[r] = start > -infinity<C>() ? C(1) : C(0);
  }

  // Where this thread's scores and weights are in shared memory.
  const auto own = [&](int r, int c) -> C& { return shared.p[row0 + r][across + P::kAcross * c]; };

  // The scores of the tile from key j0 on: -inf for what a query does not see.
  const auto score_tile = [&](C(&s)[P::kRows][P::kScores], int j0, int keys) {
    block_barrier();
    for (int n = thread_index(); n < keys; n += P::kThreads) {
      shared.rows.key[n] = key_row(a, a.key, b, h / a.group, j0 + n);
      shared.rows.value[n] = key_row(a, a.value, b, h / a.group, j0 + n);
      shared.rows.key_scale[n] = static_cast<C>(row_scale(a, a.key_scales, b, h / a.group, j0 + n));
      shared.rows.value_scale[n] = static_cast<C>(row_scale(a, a.value_scales, b, h / a.group, j0 + n));
    }
    for (int d = 0; d < a.dim_qk; d += P::kDepth) {
      block_barrier();
      P::template load<P::kQueries, P::kDepth>(
          shared.in.q, [&](int r) { return query + r * a.query.stride[2] + d * a.query.stride[3]; }, a.query.stride[3], queries,
          a.dim_qk - d, a.type, [&](int) { return static_cast<C>(scale.factor); });
      P::template load<P::kKeys, P::kDepth>(
          shared.in.k, [&](int r) { return shared.rows.key[r] + d * a.key.stride[3]; }, a.key.stride[3], keys, a.dim_qk - d, a.stored,
          [&](int r) { return shared.rows.key_scale[r]; });
      block_barrier();
      for (int k = 0; k < P::kDepth; ++k) {
        C q[P::kRows];
#pragma unroll
        for (int r = 0; r < P::kRows; ++r) q[r] = shared.in.q[row0 + r][k];
#pragma unroll
        for (int c = 0; c < P::kScores; ++c) {
          const C key = shared.in.k[across + P::kAcross * c][k];
#pragma unroll
          for (int r = 0; r < P::kRows; ++r) s[r][c] += q[r] * key;
        }
      }
    }
    const auto key = [&](int c) { return j0 + across + P::kAcross * c; };
#pragma unroll
    for (int r = 0; r < P::kRows; ++r) {
      const KeyRange range = sequence.keys_of(i0 + row0 + r);
#pragma unroll
      for (int c = 0; c < P::kScores; ++c)
        s[r][c] = key(c) >= range.first && key(c) < range.last ? s[r][c] * static_cast<C>(scale.rest) : -infinity<C>();
    }
    const bool blocked = a.blocks.present() && i0 < end && keys > 0 && !a.blocks.all(b, h, i0, end, j0, j0 + keys);
    if (a.softcap == 0 && a.bias.data == nullptr && a.alibi_slopes.data == nullptr && a.mask.data == nullptr && !blocked) return;
    // Row by row through shared memory: what options do stands in the code once.
#pragma unroll
    for (int r = 0; r < P::kRows; ++r)
#pragma unroll
      for (int c = 0; c < P::kScores; ++c) own(r, c) = s[r][c];
#pragma unroll 1
    for (int r = 0; r < P::kRows; ++r) {
      const int i = i0 + row0 + r;
      const KeyRange range = sequence.keys_of(i);
      C row[P::kScores];
#pragma unroll
      for (int c = 0; c < P::kScores; ++c) row[c] = own(r, c);
      finish_scores<P::kScores>(
          a, b, h, i, static_cast<int>(range.first), static_cast<int>(range.last), slope, static_cast<int>(i + sequence.diagonal), blocked,
          [&](int c) -> C& { return row[c]; }, key);
#pragma unroll
      for (int c = 0; c < P::kScores; ++c) own(r, c) = row[c];
    }
#pragma unroll
    for (int r = 0; r < P::kRows; ++r)
#pragma unroll
      for (int c = 0; c < P::kScores; ++c) s[r][c] = own(r, c);
  };

  // Dropout of this thread's own weights in shared memory. A loop, so that the random numbers stand in the code once.
  const auto drop = [&](int j0) {
    if (!a.dropout.present()) return;
#pragma unroll 1
    for (int n = 0; n < P::kRows * P::kScores; ++n) {
      const int r = row0 + n / P::kScores;
      const int j = across + P::kAcross * (n % P::kScores);
      shared.p[r][j] *= static_cast<C>(a.dropout.factor(b, h, i0 + r, j0 + j));
    }
  };

  // The tiles that the block's queries see; then, where weights are asked for, all tiles. One loop: its body, the scores
  // above all, is the larger part of what the compiler has to do here.
  const KeyRange seen = sequence.seen_by_any(i0, i0 + queries);
  const int seen_last = static_cast<int>(seen.last);
  const int weights_last = a.weights.data != nullptr && d0 == 0 && b < a.batch ? a.weights_kv : 0;
  bool weighing = false;
  for (int j0 = static_cast<int>(seen.first) / P::kKeys * P::kKeys;; j0 += P::kKeys) {
    if (!weighing && a.blocks.present() && j0 < seen_last) j0 = a.blocks.next(b, h, i0, end, j0) / P::kKeys * P::kKeys;
    if (!weighing && j0 >= seen_last) {
      weighing = true;
      j0 = 0;
    }
    if (weighing && j0 >= weights_last) break;
    const int keys = static_cast<int>(held(sequence.len_kv - j0, 0, P::kKeys));
    C s[P::kRows][P::kScores] = {};
    score_tile(s, j0, keys);
    if (weighing) {
#pragma unroll
      for (int r = 0; r < P::kRows; ++r) {
        const C inverse = C(1) / l[r];
#pragma unroll
        for (int c = 0; c < P::kScores; ++c) own(r, c) = exp_of(s[r][c] - m[r]) * inverse;
      }
      drop(j0);
#pragma unroll 1
      for (int n = 0; n < P::kRows * P::kScores; ++n) {
        const int r = row0 + n / P::kScores;
        const int j = across + P::kAcross * (n % P::kScores);
        if (r < queries && j0 + j < weights_last) store_as(a.weights.at(b, h, i0 + r, j0 + j), a.out_type, shared.p[r][j]);
      }
      continue;
    }

#pragma unroll
    for (int r = 0; r < P::kRows; ++r) {
      C most = m[r];
#pragma unroll
      for (int c = 0; c < P::kScores; ++c) most = s[r][c] > most ? s[r][c] : most;
      for (int step = 1; step < P::kAcross; step *= 2) {
        const C other = shuffle_xor(most, step);
        most = other > most ? other : most;
      }
      const C base = most == -infinity<C>() ? C(0) : most;
      const C alpha = exp_of(m[r] - base);
      C sum = 0;
#pragma unroll
      for (int c = 0; c < P::kScores; ++c) {
        const C weight = exp_of(s[r][c] - base);
        sum += weight;
        own(r, c) = weight;
      }
      for (int step = 1; step < P::kAcross; step *= 2) sum += shuffle_xor(sum, step);
      m[r] = most;
      l[r] = l[r] * alpha + sum;
#pragma unroll
      for (int c = 0; c < P::kOutputs; ++c) o[r][c] *= alpha;
    }
    drop(j0);

    for (int v0 = 0; v0 < keys; v0 += P::kValues) {
      block_barrier();
      P::template load<P::kValues, kColumns>(
          shared.v, [&](int r) { return shared.rows.value[v0 + r] + d0 * a.value.stride[3]; }, a.value.stride[3], keys - v0, columns,
          a.stored, [&](int r) { return shared.rows.value_scale[v0 + r]; });
      block_barrier();
      for (int j = 0; j < P::kValues; ++j) {
        C weight[P::kRows];
#pragma unroll
        for (int r = 0; r < P::kRows; ++r) weight[r] = shared.p[row0 + r][v0 + j];
#pragma unroll
        for (int c = 0; c < P::kOutputs; ++c) {
          const C value = shared.v[j][across + P::kAcross * c];
#pragma unroll
          for (int r = 0; r < P::kRows; ++r) o[r][c] += weight[r] * value;
        }
      }
    }
  }

  // Outputs go to memory from shared memory, a row of a thread at a time: their types and addresses then stand in the code once.
  block_barrier();
  static_assert(P::kOutputs * P::kThreads <= P::kValues * kColumns);
  C* const row = &shared.v[0][0] + thread_index();
  unsigned bad_rows = 0;  // one bit for each row of this thread
#pragma unroll
  for (int r = 0; r < P::kRows; ++r) {
    const int i = i0 + row0 + r;
    const C inverse = C(1) / l[r];
    C rest = l[r] > C(0) ? C(0) : infinity<C>();
#pragma unroll
    for (int c = 0; c < P::kOutputs; ++c) {
      const C y = o[r][c] * inverse;
      if (across + P::kAcross * c < columns) rest += y - y;  // NaN where it is not finite
      row[c * P::kThreads] = y;
    }
    for (int step = 1; step < P::kAcross; step *= 2) rest += shuffle_xor(rest, step);
    if (!(rest == C(0)) || i >= sequence.len_q) bad_rows |= 1u << r;
    if (row0 + r >= queries || (bad_rows >> r & 1) != 0) continue;
    char* to = query_row(a, a.out, b, h, i, d0 + across);
#pragma unroll 1
    for (int c = 0; across + P::kAcross * c < columns; ++c, to += P::kAcross * a.out.stride[3])
      store_as(to, a.out_type, row[c * P::kThreads]);
    if (a.lse.data != nullptr && across == 0 && d0 == 0)
      write<float>(query_row(a, a.lse, b, h, i), static_cast<float>(m[r] + log_of(l[r])));
  }

  warp_barrier();  // weights of a row that is not finite are written again
#pragma unroll 1
  for (int r = 0; r < P::kRows; ++r)
#pragma unroll 1
    for (int n = 0; n < kWarp; n += P::kAcross) {
      const int at = shuffle(row0, n) + r;
      if ((shuffle(bad_rows, n) >> r & 1) != 0 && at < queries) plain_row(a, b, h, i0 + at, d0, d0 + columns, d0 == 0);
    }
}

}  // namespace regard::cuda
