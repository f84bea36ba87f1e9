// Dot-product attention, forward, on any GPU and for any element type, strides and head dimensions.
//
//   a block has 64 queries of one head and up to kColumns columns of the output; keys come in tiles
//     S = scale Q K^T, the head dimension in chunks through shared memory      (4 x kKeys / 8 scores a thread)
//     P = exp(S - max) through shared memory;  out = out * alpha + P V         (4 x kColumns / 8 outputs a thread)
//   wider outputs take several blocks, each of which computes the scores again
//
// The online softmax is Milakov & Gimelshein, "Online normalizer calculation for softmax" (2018).
#pragma once

#include "cuda/attention_scores.cuh"

namespace regard::cuda {

template <class T, int kColumns> struct Portable {
  using C = Compute<T>;
  static constexpr int kThreads = 128;
  static constexpr int kQueries = 64;
  static constexpr int kKeys = sizeof(C) == 8 ? 32 : 64;
  static constexpr int kDepth = sizeof(C) == 8 ? 16 : 32;
  static constexpr int kValues = kKeys / 2;  // rows of V in shared memory at a time
  static constexpr int kAcross = 8;          // threads beside each other
  static constexpr int kRows = kQueries / (kThreads / kAcross);
  static constexpr int kScores = kKeys / kAcross;
  static constexpr int kOutputs = kColumns / kAcross;

  // One more element a row: eight rows then start in eight different banks.
  struct Shared {
    C p[kQueries][kKeys + 1];
    union {
      struct {
        C q[kQueries][kDepth + 1];
        C k[kKeys][kDepth + 1];
      } in;
      C v[kValues][kColumns];
    };
  };

  // to[r][d] = factor * from[row r][d0 + d], zeros beyond `rows` and `columns`.
  template <int kHeight, int kWidth, int kPitch>
  static REGARD_DEVICE void load(C (&to)[kHeight][kPitch], const char* from, std::int64_t row, std::int64_t column, int rows, int columns,
                                 C factor) {
    for (int n = thread_index(); n < kHeight * kWidth; n += kThreads) {
      const int r = n / kWidth;
      const int d = n % kWidth;
      to[r][d] = r < rows && d < columns ? factor * value_at<T>(from + r * row + d * column) : C(0);
    }
  }
};

template <class T, int kColumns>
REGARD_KERNEL(128, 2)
attention_portable(const REGARD_GRID_CONSTANT AttentionArguments a, SplitScale scale, int column_blocks) {
  using P = Portable<T, kColumns>;
  using C = typename P::C;
  auto& shared = *reinterpret_cast<typename P::Shared*>(dynamic_shared());

  const int d0 = block_index() % column_blocks * kColumns;
  const int columns = a.dim_v - d0 < kColumns ? a.dim_v - d0 : kColumns;
  const auto [b, h, i0] = block_of(a, block_index() / column_blocks, P::kQueries);
  const SequenceMask sequence = sequence_of(a, b);
  const int across = thread_index() % P::kAcross;
  const int row0 = thread_index() / P::kAcross * P::kRows;
  const int queries = a.len_q - i0 < P::kQueries ? a.len_q - i0 : P::kQueries;
  const C slope = slope_of<C>(a, b, h);

  C o[P::kRows][P::kOutputs] = {};
  C m[P::kRows];
  C l[P::kRows];
  const C start = sink_of<C>(a, h);
  for (int r = 0; r < P::kRows; ++r) {
    m[r] = start;
    l[r] = start > -infinity<C>() ? C(1) : C(0);
  }

  const KeyRange seen = sequence.seen_by_any(i0, i0 + queries);
  const int last = static_cast<int>(seen.last);
  for (int j0 = static_cast<int>(seen.first) / P::kKeys * P::kKeys; j0 < last; j0 += P::kKeys) {
    const int keys = sequence.len_kv - j0 < P::kKeys ? static_cast<int>(sequence.len_kv) - j0 : P::kKeys;

    C s[P::kRows][P::kScores] = {};
    for (int d = 0; d < a.dim_qk; d += P::kDepth) {
      block_barrier();
      P::template load<P::kQueries, P::kDepth>(shared.in.q, a.query.at(b, h, i0, d), a.query.stride[2], a.query.stride[3], queries,
                                               a.dim_qk - d, static_cast<C>(scale.factor));
      P::template load<P::kKeys, P::kDepth>(shared.in.k, a.key.at(b, h / a.group, j0, d), a.key.stride[2], a.key.stride[3], keys,
                                            a.dim_qk - d, C(1));
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

#pragma unroll
    for (int r = 0; r < P::kRows; ++r) {
      const int i = i0 + row0 + r;
      const KeyRange range = sequence.keys_of(i);
      C most = m[r];
#pragma unroll
      for (int c = 0; c < P::kScores; ++c) {
        const int j = j0 + across + P::kAcross * c;
        C& score = s[r][c];
        if (j < range.first || j >= range.last)
          score = -infinity<C>();
        else
          score = finished_score<T, C>(a, score * static_cast<C>(scale.rest), b, h, i, j, slope, i + sequence.diagonal);
        most = score > most ? score : most;
      }
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
        const C kept = a.dropout.present() ? static_cast<C>(a.dropout.factor(b, h, i, j0 + across + P::kAcross * c)) : C(1);
        shared.p[row0 + r][across + P::kAcross * c] = weight * kept;
      }
      for (int step = 1; step < P::kAcross; step *= 2) sum += shuffle_xor(sum, step);
      m[r] = most;
      l[r] = l[r] * alpha + sum;
#pragma unroll
      for (int c = 0; c < P::kOutputs; ++c) o[r][c] *= alpha;
    }

    for (int v0 = 0; v0 < keys; v0 += P::kValues) {
      block_barrier();
      P::template load<P::kValues, kColumns>(shared.v, a.value.at(b, h / a.group, j0 + v0, d0), a.value.stride[2], a.value.stride[3],
                                             keys - v0, columns, C(1));
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

#pragma unroll
  for (int r = 0; r < P::kRows; ++r) {
    const int i = i0 + row0 + r;
    C rest = l[r] > C(0) ? C(0) : infinity<C>();
#pragma unroll
    for (int c = 0; c < P::kOutputs; ++c) {
      o[r][c] /= l[r];
      if (across + P::kAcross * c < columns) rest += o[r][c] - o[r][c];  // NaN where it is not finite
    }
    for (int step = 1; step < P::kAcross; step *= 2) rest += shuffle_xor(rest, step);
    const bool bad = !(rest == C(0)) || i >= sequence.len_q;
    if (row0 + r < queries && !bad) {
      for (int c = 0; c < P::kOutputs; ++c) {
        const int d = across + P::kAcross * c;
        if (d < columns) write<T>(a.out.at(b, h, i, d0 + d), o[r][c]);
      }
      if (a.lse.data != nullptr && across == 0 && d0 == 0) write<float>(a.lse.at(b, h, i), static_cast<float>(m[r] + log_of(l[r])));
    }
    for (int n = 0; n < kWarp; n += P::kAcross) {
      const int row = shuffle(row0, n) + r;
      if (shuffle(bad ? 1 : 0, n) != 0 && row < queries) plain_row<T>(a, b, h, i0 + row, d0, d0 + columns, d0 == 0);
    }
  }
}

}  // namespace regard::cuda
