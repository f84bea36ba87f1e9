// Dot-product attention for few queries: the keys are split among blocks, and partial results merge in order.
//
//   attention_decode   a block has up to kRows rows of one key head (query heads of a group, and their queries) and one
//                      split of the keys: scores into shared memory, their softmax, the weighted values
//                      (every key and value is read once, 16 bytes a lane)
//   attention_merge    a warp has one row: its splits by their maxima and sums
//
// Splits depend on the number of keys alone. Dao et al., "Flash-Decoding for long-context inference" (2023).
#pragma once

#include "cuda/attention_scores.cuh"

namespace regard::cuda {

constexpr int kDecodeThreads = 128;
constexpr int kDecodeRows = 8;
constexpr int kMergeThreads = 32;

struct DecodeArguments {
  AttentionArguments a;
  SplitScale scale;
  int rows;  // of a key head: group * len_q
  int row_tiles;
  int splits;
  int keys;          // a split
  bool key_vectors;  // rows of keys lie in aligned chunks of 16 bytes
  bool value_vectors;
  void* maximum;  // [batch, heads_kv, splits, rows] in the compute type
  void* sum;
  void* out;  // [batch, heads_kv, splits, rows, dim_v]
};

// The lanes that share a row of `dim` elements: a power of two.
template <class T> REGARD_DEVICE int lanes_for(int dim) {
  int lanes = 1;
  while (lanes < kWarp && lanes * Vector<T>::kLength < dim) lanes *= 2;
  return lanes;
}

// Up to one vector of a row from column d on; zeros beyond its end.
template <class T>
REGARD_DEVICE void load_grain(Compute<T> (&to)[Vector<T>::kLength], const char* row, std::int64_t stride, int d, int dim, bool vectors) {
  constexpr int kGrain = Vector<T>::kLength;
  if (vectors && d + kGrain <= dim) {
    const auto v = *reinterpret_cast<const Vector<T>*>(row + d * static_cast<int>(sizeof(T)));
    for (int e = 0; e < kGrain; ++e) to[e] = to_float(v.x[e]);
  } else {
    for (int e = 0; e < kGrain; ++e) to[e] = d + e < dim ? value_at<T>(row + (d + e) * stride) : Compute<T>(0);
  }
}

// Shared memory: queries [kRows][dim_qk up to whole grains], scores [kRows][keys], sums [warps][kRows][32 grains].
template <class T> REGARD_KERNEL(kDecodeThreads, 1) attention_decode(const REGARD_GRID_CONSTANT DecodeArguments p) {
  using C = Compute<T>;
  constexpr int kGrain = Vector<T>::kLength;
  constexpr int kWarps = kDecodeThreads / kWarp;
  const AttentionArguments& a = p.a;
  const int heads_kv = a.heads / a.group;
  const int split = block_index() % p.splits;
  const int tile = block_index() / p.splits % p.row_tiles;
  const int head = block_index() / p.splits / p.row_tiles;  // b * heads_kv + key head
  const int b = head / heads_kv;
  const int group = head % heads_kv;
  const int row0 = tile * kDecodeRows;
  const int rows = p.rows - row0 < kDecodeRows ? p.rows - row0 : kDecodeRows;
  const int lane = thread_index() % kWarp;
  const int warp = thread_index() / kWarp;
  const SequenceMask sequence = sequence_of(a, b);
  const int j0 = split * p.keys;
  const int end = static_cast<int>(sequence.len_kv) < j0 + p.keys ? static_cast<int>(sequence.len_kv) : j0 + p.keys;
  const int pitch = (a.dim_qk + kGrain - 1) / kGrain * kGrain;

  C* const queries = reinterpret_cast<C*>(dynamic_shared());
  C* const scores = queries + kDecodeRows * pitch;
  C* const sums = scores + kDecodeRows * p.keys;
  for (int n = thread_index(); n < kDecodeRows * pitch; n += kDecodeThreads) {
    const int r = n / pitch;
    const int d = n % pitch;
    const int row = row0 + r;
    queries[n] = r < rows && d < a.dim_qk
                     ? static_cast<C>(p.scale.factor) * value_at<T>(a.query.at(b, group * a.group + row / a.len_q, row % a.len_q, d))
                     : C(0);
  }
  block_barrier();

  {
    const int lanes = lanes_for<T>(a.dim_qk);
    const int together = kWarp / lanes;  // keys a warp
    for (int first = j0 + warp * together; first < end; first += kWarps * together) {
      const int j = first + lane / lanes;
      C s[kDecodeRows] = {};
      for (int d = lane % lanes * kGrain; d < a.dim_qk && j < end; d += lanes * kGrain) {
        C key[kGrain];
        load_grain<T>(key, a.key.at(b, group, j), a.key.stride[3], d, a.dim_qk, p.key_vectors);
#pragma unroll
        for (int r = 0; r < kDecodeRows; ++r)
#pragma unroll
          for (int e = 0; e < kGrain; ++e) s[r] += queries[r * pitch + d + e] * key[e];
      }
#pragma unroll
      for (int r = 0; r < kDecodeRows; ++r) {
        for (int step = 1; step < lanes; step *= 2) s[r] += shuffle_xor(s[r], step);
        if (r % lanes != lane % lanes || j >= end) continue;
        C score = -infinity<C>();
        if (r < rows) {
          const int h = group * a.group + (row0 + r) / a.len_q;
          const int i = (row0 + r) % a.len_q;
          const KeyRange range = sequence.keys_of(i);
          if (j >= range.first && j < range.last)
            score = finished_score<T, C>(a, s[r] * static_cast<C>(p.scale.rest), b, h, i, j, slope_of<C>(a, b, h), i + sequence.diagonal);
        }
        scores[r * p.keys + j - j0] = score;
      }
    }
  }
  block_barrier();

  for (int r = warp; r < rows; r += kWarps) {
    C m = -infinity<C>();
    for (int n = lane; n < end - j0; n += kWarp) {
      const C s = scores[r * p.keys + n];
      m = s > m ? s : m;
    }
    for (int step = 1; step < kWarp; step *= 2) {
      const C other = shuffle_xor(m, step);
      m = other > m ? other : m;
    }
    const C base = m == -infinity<C>() ? C(0) : m;
    C sum = 0;
    for (int n = lane; n < end - j0; n += kWarp) {
      C& s = scores[r * p.keys + n];
      s = exp_of(s - base);
      sum += s;
    }
    for (int step = 1; step < kWarp; step *= 2) sum += shuffle_xor(sum, step);
    const std::int64_t at = (static_cast<std::int64_t>(head) * p.splits + split) * p.rows + row0 + r;
    if (lane == 0) {
      static_cast<C*>(p.maximum)[at] = m;
      static_cast<C*>(p.sum)[at] = sum;
    }
  }
  block_barrier();

  const int lanes = lanes_for<T>(a.dim_v);
  const int together = kWarp / lanes;
  const int width = lanes * kGrain;  // columns a sweep
  for (int column = 0; column < a.dim_v; column += width) {
    C o[kDecodeRows][kGrain] = {};
    const int d = column + lane % lanes * kGrain;
    for (int j = j0 + warp * together + lane / lanes; j < end; j += kWarps * together) {
      C value[kGrain];
      load_grain<T>(value, a.value.at(b, group, j), a.value.stride[3], d, a.dim_v, p.value_vectors);
#pragma unroll
      for (int r = 0; r < kDecodeRows; ++r) {
        const C weight = r < rows ? scores[r * p.keys + j - j0] : C(0);
#pragma unroll
        for (int e = 0; e < kGrain; ++e) o[r][e] += weight * value[e];
      }
    }
#pragma unroll
    for (int r = 0; r < kDecodeRows; ++r)
#pragma unroll
      for (int e = 0; e < kGrain; ++e) {
        for (int step = lanes; step < kWarp; step *= 2) o[r][e] += shuffle_xor(o[r][e], step);
        if (lane < lanes) sums[(warp * kDecodeRows + r) * width + lane * kGrain + e] = o[r][e];
      }
    block_barrier();
    for (int n = thread_index(); n < rows * width; n += kDecodeThreads) {
      const int r = n / width;
      const int c = column + n % width;
      C total = 0;
      for (int w = 0; w < kWarps; ++w) total += sums[(w * kDecodeRows + r) * width + n % width];
      const std::int64_t at = (static_cast<std::int64_t>(head) * p.splits + split) * p.rows + row0 + r;
      if (c < a.dim_v) static_cast<C*>(p.out)[at * a.dim_v + c] = total;
    }
    block_barrier();
  }
}

template <class T> REGARD_KERNEL(kMergeThreads, 1) attention_merge(const REGARD_GRID_CONSTANT DecodeArguments p) {
  using C = Compute<T>;
  const AttentionArguments& a = p.a;
  const int heads_kv = a.heads / a.group;
  const int row = block_index() % p.rows;
  const int head = block_index() / p.rows;
  const int b = head / heads_kv;
  const int h = head % heads_kv * a.group + row / a.len_q;
  const int i = row % a.len_q;
  const std::int64_t first = static_cast<std::int64_t>(head) * p.splits * p.rows + row;
  const C* const maximum = static_cast<const C*>(p.maximum) + first;
  const C* const sums = static_cast<const C*>(p.sum) + first;

  const C sink = sink_of<C>(a, h);
  C m = sink;
  for (int s = 0; s < p.splits; ++s)
    m = maximum[static_cast<std::int64_t>(s) * p.rows] > m ? maximum[static_cast<std::int64_t>(s) * p.rows] : m;
  C l = sink > -infinity<C>() ? exp_of(sink - m) : C(0);
  for (int s = 0; s < p.splits; ++s) {
    const std::int64_t at = static_cast<std::int64_t>(s) * p.rows;
    if (sums[at] != C(0)) l += sums[at] * exp_of(maximum[at] - m);
  }
  C rest = l > C(0) ? C(0) : infinity<C>();
  for (int d = thread_index(); d < a.dim_v; d += kMergeThreads) {
    C o = 0;
    for (int s = 0; s < p.splits; ++s) {
      const std::int64_t at = static_cast<std::int64_t>(s) * p.rows;
      if (sums[at] != C(0)) o += static_cast<const C*>(p.out)[(first + at) * a.dim_v + d] * exp_of(maximum[at] - m);
    }
    o /= l;
    rest += o - o;  // NaN where it is not finite
    write<T>(a.out.at(b, h, i, d), o);
  }
  const bool bad = any_lane(!(rest == C(0))) || i >= sequence_of(a, b).len_q;
  if (bad)
    plain_row<T>(a, b, h, i, 0, a.dim_v, true);
  else if (a.lse.data != nullptr && thread_index() == 0)
    write<float>(a.lse.at(b, h, i), static_cast<float>(m + log_of(l)));
}

}  // namespace regard::cuda
