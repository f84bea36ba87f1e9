// Attention for few queries by the lanes' own multiply-adds: for every type, and for additive attention, which is this with
// other scores, v . tanh(query + key), for any number of queries. Its v lies behind the queries, as one more row.
#pragma once

#include "cuda/attention_decode.cuh"
#include "cuda/decode_grains.cuh"
#include "cuda/lane_sums.cuh"

namespace regard::cuda {

// The lanes that share a row of `dim` elements: a power of two, and no fewer than `lanes`, which is one.
template <class T> REGARD_DEVICE int lanes_for(int dim, int lanes = 1) {
  while (lanes < kWarp && lanes * Vector<T>::kLength < dim) lanes *= 2;
  return lanes;
}

// T is the type of keys and values.
template <class T, bool kAdditive = false, int kRowsOfBlock = kDecodeRows> struct LaneProducts {
  using Stored = T;
  using C = Compute<T>;
  static constexpr int kRows = kRowsOfBlock;
  static constexpr int kBlocks = sizeof(C) == 8 ? 2 : 3;
  static constexpr bool kTensor = false;
  static constexpr bool kScaledQueries = true;
  static constexpr bool kUnits = false;
  static constexpr int kGrain = Vector<T>::kLength;

  // [kRows][dim_qk up to whole grains]
  static std::int64_t query_bytes(std::int64_t dim_qk) {
    return static_cast<std::int64_t>(sizeof(C)) * (dim_qk + kGrain) * (kRows + (kAdditive ? 1 : 0));
  }
  // [warps][kRows][32 grains]
  static std::int64_t sum_bytes(std::int64_t dim_v) {
    const std::int64_t columns = std::min<std::int64_t>(kWarp * kGrain, 2 * std::max<std::int64_t>(dim_v, kGrain));
    return static_cast<std::int64_t>(sizeof(C)) * kRows * kDecodeWarps * columns;
  }
  static REGARD_DEVICE int query_pitch(const AttentionArguments& a) { return (a.dim_qk + kGrain - 1) / kGrain * kGrain; }

  static REGARD_DEVICE void take_queries(const DecodeBlock<C>& x) {
    const AttentionArguments& a = x.p.a;
    C* const queries = reinterpret_cast<C*>(x.rest);
    const int pitch = query_pitch(a);
    for (int n = thread_index(); n < kRows * pitch; n += kDecodeThreads) {
      const int r = n / pitch;
      const int d = n % pitch;
      queries[n] = r < x.rows && d < a.dim_qk
                       ? static_cast<C>(x.p.scale.factor) * load_as<C>(query_row(a, a.query, x.b, x.head_of(r), x.query_of(r), d), a.type)
                       : C(0);
    }
    C* const v = queries + kRows * pitch;
    for (int d = thread_index(); kAdditive && d < pitch; d += kDecodeThreads)
      v[d] = d < a.dim_qk ? reinterpret_cast<const C*>(a.additive_v)[d] : C(0);
  }

  // f(key, its row's columns d and on) for the keys of this lane, `lanes` of which share a row; keys of the split's end and beyond come
  // with the last one's row.
  template <class F>
  static REGARD_DEVICE void for_grains(const DecodeBlock<C>& x, const StoredRows& rows, int lanes, int d, int dim, bool whole, F&& f) {
    const int lane = thread_index() % kWarp;
    const int warp = thread_index() / kWarp;
    const int beside = kWarp / lanes;  // keys a warp
    for (int first = x.j0 + warp * beside * kTogether; first < x.end; first += kDecodeWarps * beside * kTogether) {
      const auto key_of = [&](int n) { return first + n * beside + lane / lanes; };
      const char* row[kTogether];
      rows.find(row, x, key_of);
      Grain<T> grain[kTogether];
      fetch_grains(grain, row, rows.view.stride[3], d, dim, whole);
#pragma unroll
      for (int n = 0; n < kTogether; ++n) {
        C values[kGrain];
        grain[n].values(values);
        f(key_of(n), values);
      }
    }
  }

  // A lane keeps its own columns of the queries in registers while the keys pass.
  static REGARD_DEVICE void score_keys(const DecodeBlock<C>& x) {
    const AttentionArguments& a = x.p.a;
    const C* const queries = reinterpret_cast<const C*>(x.rest);
    const int pitch = query_pitch(a);
    const C* const v = queries + kRows * pitch;
    const StoredRows keys(x, a.key);
    const int lane = thread_index() % kWarp;
    const int lanes = lanes_for<T>(a.dim_qk, kRows);  // a lane is left with one row's sum, at most
    const int kept = lane % lanes * kRows / lanes;    // the row whose sum this lane is left with, and its neighbours
    const bool writes = lane % (lanes / kRows) == 0;
    for (int column = 0; column < a.dim_qk; column += lanes * kGrain) {
      const int d = column + lane % lanes * kGrain;
      C q[kRows][kGrain];
      C weight[kAdditive ? kGrain : 1];
#pragma unroll
      for (int e = 0; e < kGrain; ++e) {
#pragma unroll
        for (int r = 0; r < kRows; ++r) q[r][e] = d < pitch ? queries[r * pitch + d + e] : C(0);
        if constexpr (kAdditive) weight[e] = d < pitch ? v[d + e] : C(0);
      }
      for_grains(x, keys, lanes, d, a.dim_qk, x.p.key_vectors, [&](int j, const C(&k)[kGrain]) {
        C s[kRows] = {};
#pragma unroll
        for (int r = 0; r < kRows; ++r)
          if (r < x.rows) {
#pragma unroll
            for (int e = 0; e < kGrain; ++e) s[r] += kAdditive ? weight[kAdditive ? e : 0] * tanh_of(q[r][e] + k[e]) : q[r][e] * k[e];
          }
        sum_over<kRows>(s, lanes);
        if (!writes || kept >= x.rows || j >= x.end) return;
        C& score = x.scores[kept * x.pitch + j - x.j0];
        score = column > 0 ? score + s[0] : s[0];
      });
    }
  }

  static REGARD_DEVICE void add_values(const DecodeBlock<C>& x) {
    const AttentionArguments& a = x.p.a;
    C* const sums = reinterpret_cast<C*>(x.rest);
    const StoredRows values(x, a.value);
    const int lane = thread_index() % kWarp;
    const int warp = thread_index() / kWarp;
    const int lanes = lanes_for<T>(a.dim_v);
    const int width = lanes * kGrain;  // columns a sweep
    for (int column = 0; column < a.dim_v; column += width) {
      C o[kRows][kGrain] = {};
      const int d = column + lane % lanes * kGrain;
      for_grains(x, values, lanes, d, a.dim_v, x.p.value_vectors, [&](int j, const C(&v)[kGrain]) {
        const C* const score = x.scores + x.held_key(j) - x.j0;
#pragma unroll
        for (int r = 0; r < kRows; ++r)
          if (r < x.rows) {
            const C weight = j < x.end ? score[r * x.pitch] : C(0);
#pragma unroll
            for (int e = 0; e < kGrain; ++e) o[r][e] += weight * v[e];
          }
      });
#pragma unroll 1
      for (int step = lanes; step < kWarp; step *= 2)
#pragma unroll
        for (int r = 0; r < kRows; ++r)
#pragma unroll
          for (int e = 0; e < kGrain; ++e) o[r][e] += shuffle_xor(o[r][e], step);
      if (lane < lanes)
#pragma unroll
        for (int r = 0; r < kRows; ++r)
#pragma unroll
          for (int e = 0; e < kGrain; ++e) sums[(warp * kRows + r) * width + lane * kGrain + e] = o[r][e];
      add_warps<LaneProducts>(x, sums, width, column, width);
    }
  }
};

}  // namespace regard::cuda
