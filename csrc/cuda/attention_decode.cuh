// Dot-product attention for few queries: the keys are split among blocks, and partial results merge in order.
//
//   attention_decode   a block has up to kRows rows of one key head (query heads of a group, and their queries) and one
//                      split of the keys: products into shared memory, their softmax, the weighted values
//                      (every key and value is read once, 16 bytes a lane, kTogether of them on their way at a time)
//   attention_merge    a block has one row: its splits by their maxima and sums, a column a thread
//
// Additive attention is this kernel with other scores, v . tanh(query + key), for any number of queries.
//
// Splits depend on the sequence's number of keys alone. Dao et al., "Flash-Decoding for long-context inference" (2023).
#pragma once

#include <bit>

#include "cuda/attention_launch.cuh"
#include "cuda/attention_scores.cuh"
#include "cuda/lane_sums.cuh"

namespace regard::cuda {

constexpr int kDecodeThreads = 128;
constexpr int kDecodeRows = 8;
constexpr int kMergeThreads = 128;

struct DecodeArguments {
  AttentionArguments a;
  SplitScale scale;
  int most_queries;  // sequences of more are other kernels'
  int rows;          // of a key head: group * queries, the most that a sequence has
  int row_tiles;
  int splits;        // likewise
  bool key_vectors;  // rows of keys are aligned vectors, with nothing left over
  bool value_vectors;
  void* shares;   // exponentials [batch, heads_kv, rows, len_kv], where additive attention returns its weights; or null
  void* maximum;  // [batch, heads_kv, splits, rows] in the compute type
  void* sum;
  void* out;  // [batch, heads_kv, splits, rows, dim_v]
};

// Keys a split: enough of them for merging to cost little, and some 64 splits of a long sequence.
template <class C> constexpr int keys_per_split(int len_kv) {
  constexpr int most = 4096 / static_cast<int>(sizeof(C));  // 32 KiB of scores
  const int wanted = (len_kv / 64 + 31) / 32 * 32;
  return wanted < 128 ? 128 : wanted > most ? most : wanted;
}
template <class C> constexpr int splits_of(int len_kv) {
  const int keys = keys_per_split<C>(len_kv);
  return len_kv <= keys ? 1 : (len_kv + keys - 1) / keys;
}
// The most that a sequence of up to len_kv keys has: one of a few keys less, where splits are shorter, may have more of them.
template <class C> constexpr int most_splits(int len_kv) {
  constexpr int kOfAnyLength = 65;  // 64 n + 63 keys in splits of n, as long as n may grow
  const int own = splits_of<C>(len_kv);
  return keys_per_split<C>(len_kv) > keys_per_split<C>(0) && own < kOfAnyLength ? kOfAnyLength : own;
}

// Host code: all but the memory that partial results go to. Sequences of more than `most_queries` are other kernels'.
template <class T, int kRows = kDecodeRows>
DecodeArguments decode_arguments(const AttentionProblem& problem, const AttentionArguments& a, int most_queries) {
  DecodeArguments p{};
  p.a = a;
  p.scale = split_scale(a.scale);
  p.most_queries = most_queries;
  p.rows = a.group * static_cast<int>(std::min<std::int64_t>(problem.len_q(), most_queries));
  p.row_tiles = (p.rows + kRows - 1) / kRows;
  p.splits = most_splits<Compute<T>>(static_cast<int>(problem.len_kv()));
  p.key_vectors = in_vectors(problem.key) && a.dim_qk % Vector<T>::kLength == 0;
  p.value_vectors = in_vectors(problem.value) && a.dim_v % Vector<T>::kLength == 0;
  return p;
}

// Host code: shared memory of a block whose splits have `keys` keys.
template <class T, bool kAdditive = false, int kRows = kDecodeRows>
std::int64_t decode_bytes(std::int64_t dim_qk, std::int64_t dim_v, int keys) {
  constexpr int kGrain = Vector<T>::kLength;
  constexpr int kSize = static_cast<int>(sizeof(Compute<T>));
  const std::int64_t queries = (dim_qk + kGrain) * (kRows + (kAdditive ? 1 : 0));
  const std::int64_t columns = std::min<std::int64_t>(kWarp * kGrain, 2 * std::max<std::int64_t>(dim_v, kGrain));
  return kSize * (kRows * keys + std::max(queries, kRows * (kDecodeThreads / kWarp) * columns));
}

// The lanes that share a row of `dim` elements: a power of two, and no fewer than `lanes`, which is one.
template <class T> REGARD_DEVICE int lanes_for(int dim, int lanes = 1) {
  while (lanes < kWarp && lanes * Vector<T>::kLength < dim) lanes *= 2;
  return lanes;
}

// Keys of a lane that are on their way together. An H200's memory gives 4.8 TB/s some 700 ns after it is asked: 25 KiB on their
// way to each SM. Three blocks of four keys a lane have 24, four of one had 8.
constexpr int kTogether = 4;

// A vector as words: taken apart where its elements are wanted. As elements, the compiler spread each over a register of its
// own, and waited for every load to do so.
template <class T> struct alignas(sizeof(Vector<T>)) Grain {
  std::uint32_t words[sizeof(Vector<T>) / 4];

  // All at once, before any branch: taken out row by row, each behind a branch of its own, the compiler converted them once more
  // for every row (of float8, 3,600 instructions of a kernel's 10,000).
  REGARD_DEVICE void values(Compute<T> (&to)[Vector<T>::kLength]) const {
#pragma unroll
    for (int e = 0; e < Vector<T>::kLength; ++e) to[e] = value(e);
  }

 private:
  REGARD_DEVICE Compute<T> value(int e) const {
    if constexpr (std::is_same_v<T, double>) {
      return std::bit_cast<double>(std::uint64_t{words[2 * e + 1]} << 32 | words[2 * e]);
    } else if constexpr (std::is_same_v<T, float>) {
      return float_of(words[e]);
    } else if constexpr (std::is_same_v<T, BFloat16>) {
      return float_of(e % 2 == 0 ? words[e / 2] << 16 : words[e / 2] & 0xffff0000u);
    } else {
      constexpr int kEach = 4 / sizeof(T);
      using Bits = std::conditional_t<sizeof(T) == 2, std::uint16_t, std::uint8_t>;
      return value_of(std::bit_cast<T>(static_cast<Bits>(words[e / kEach] >> e % kEach * 8 * sizeof(T))));
    }
  }
};

// Column d and on of the rows row_of(0), row_of(1), ... `whole`: rows are aligned vectors, with nothing left over. Then there is no
// branch between the loads, and none waits for the one before; lanes beyond the row's end read its beginning once more.
template <class T, class RowOf>
REGARD_DEVICE void fetch_grains(Grain<T> (&to)[kTogether], RowOf&& row_of, std::int64_t stride, int d, int dim, bool whole) {
  const char* row[kTogether];
#pragma unroll
  for (int n = 0; n < kTogether; ++n) row[n] = row_of(n);
  if (whole) {
    const int at = d < dim ? d * static_cast<int>(sizeof(T)) : 0;
#pragma unroll
    for (int n = 0; n < kTogether; ++n) to[n] = *reinterpret_cast<const Grain<T>*>(row[n] + at);
  } else {
#pragma unroll
    for (int n = 0; n < kTogether; ++n) to[n] = std::bit_cast<Grain<T>>(stored_grain<T>(row[n], stride, d, dim, false));
  }
}

// Shared memory: scores [kRows][keys], then queries [kRows][dim_qk up to whole grains],
// with additive scores one more row of v; or sums [warps][kRows][32 grains].
// T is the type of keys and values.
template <class T, bool kAdditive = false, int kRows = kDecodeRows>
REGARD_KERNEL(kDecodeThreads, sizeof(Compute<T>) == 8 ? 2 : 3)
attention_decode(const REGARD_GRID_CONSTANT DecodeArguments p) {
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
  const int row0 = tile * kRows;
  const int len_q = query_rows(a, b);
  if (len_q > p.most_queries || row0 >= a.group * len_q) return;
  const int rows = a.group * len_q - row0 < kRows ? a.group * len_q - row0 : kRows;
  const int lane = thread_index() % kWarp;
  const int warp = thread_index() / kWarp;
  const SequenceMask sequence = sequence_of(a, b);
  const int len_kv = static_cast<int>(sequence.len_kv);
  const int keys = keys_per_split<C>(len_kv);
  if (split >= splits_of<C>(len_kv)) return;
  const int j0 = split * keys;
  const int end = len_kv < j0 + keys ? len_kv : j0 + keys;
  const int pitch = (a.dim_qk + kGrain - 1) / kGrain * kGrain;

  C* const scores = reinterpret_cast<C*>(dynamic_shared());
  C* const queries = scores + kRows * keys;
  C* const sums = queries;  // when the scores are there
  for (int n = thread_index(); n < kRows * pitch; n += kDecodeThreads) {
    const int r = n / pitch;
    const int d = n % pitch;
    const int row = row0 + r;
    queries[n] = r < rows && d < a.dim_qk ? static_cast<C>(p.scale.factor) *
                                                load_as<C>(query_row(a, a.query, b, group * a.group + row / len_q, row % len_q, d), a.type)
                                          : C(0);
  }
  C* const v = queries + kRows * pitch;
  for (int d = thread_index(); kAdditive && d < pitch; d += kDecodeThreads)
    v[d] = d < a.dim_qk ? reinterpret_cast<const C*>(a.additive_v)[d] : C(0);
  block_barrier();

  // Products of queries and keys. A lane keeps its own columns of the queries in registers while the keys pass.
  {
    const int lanes = lanes_for<T>(a.dim_qk, kRows);  // a lane is left with one row's sum, at most
    const int beside = kWarp / lanes;                 // keys a warp
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
      for (int first = j0 + warp * beside * kTogether; first < end; first += kWarps * beside * kTogether) {
        const auto key_of = [&](int n) { return first + n * beside + lane / lanes; };
        const auto row_of = [&](int n) { return key_row(a, a.key, b, group, key_of(n) < end ? key_of(n) : end - 1); };
        Grain<T> key[kTogether];
        fetch_grains<T>(key, row_of, a.key.stride[3], d, a.dim_qk, p.key_vectors);
#pragma unroll
        for (int n = 0; n < kTogether; ++n) {
          C x[kGrain];
          key[n].values(x);
          C s[kRows] = {};
#pragma unroll
          for (int r = 0; r < kRows; ++r)
            if (r < rows) {
#pragma unroll
              for (int e = 0; e < kGrain; ++e) s[r] += kAdditive ? weight[kAdditive ? e : 0] * tanh_of(q[r][e] + x[e]) : q[r][e] * x[e];
            }
          sum_over<kRows>(s, lanes);
          if (!writes || kept >= rows || key_of(n) >= end) continue;
          C& score = scores[kept * keys + key_of(n) - j0];
          score = column > 0 ? score + s[0] : s[0];
        }
      }
    }
  }
  block_barrier();

  for (int r = warp; r < rows; r += kWarps) {
    const int h = group * a.group + (row0 + r) / len_q;
    const int i = (row0 + r) % len_q;
    const KeyRange range = sequence.keys_of(i);
    const C slope = slope_of<C>(a, b, h);
    C m = -infinity<C>();
    for (int n = lane; n < end - j0; n += kWarp) {
      const int j = j0 + n;
      C& s = scores[r * keys + n];
      if (j < range.first || j >= range.last) {
        s = -infinity<C>();
      } else {
        const C factor = static_cast<C>(p.scale.rest) * static_cast<C>(row_scale(a, a.key_scales, b, group, j));
        s = finished_score(a, s * factor, b, h, i, j, slope, i + sequence.diagonal);
      }
      m = s > m ? s : m;
    }
    for (int step = 1; step < kWarp; step *= 2) {
      const C other = shuffle_xor(m, step);
      m = other > m ? other : m;
    }
    const C base = m == -infinity<C>() ? C(0) : m;
    C sum = 0;
    for (int n = lane; n < end - j0; n += kWarp) {
      C& s = scores[r * keys + n];
      s = exp_of(s - base);
      sum += s;
      if (kAdditive && p.shares != nullptr)
        static_cast<C*>(p.shares)[(static_cast<std::int64_t>(head) * p.rows + row0 + r) * a.len_kv + j0 + n] = s;
      s *= static_cast<C>(row_scale(a, a.value_scales, b, group, j0 + n));
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
  const int beside = kWarp / lanes;
  const int width = lanes * kGrain;  // columns a sweep
  for (int column = 0; column < a.dim_v; column += width) {
    C o[kRows][kGrain] = {};
    const int d = column + lane % lanes * kGrain;
    for (int first = j0 + warp * beside * kTogether; first < end; first += kWarps * beside * kTogether) {
      const auto key_of = [&](int n) { return first + n * beside + lane / lanes; };
      const auto held_key = [&](int n) { return key_of(n) < end ? key_of(n) : end - 1; };
      Grain<T> value[kTogether];
      fetch_grains<T>(
          value, [&](int n) { return key_row(a, a.value, b, group, held_key(n)); }, a.value.stride[3], d, a.dim_v, p.value_vectors);
#pragma unroll
      for (int n = 0; n < kTogether; ++n) {
        C x[kGrain];
        value[n].values(x);
        const C* const score = scores + held_key(n) - j0;
#pragma unroll
        for (int r = 0; r < kRows; ++r)
          if (r < rows) {
            const C weight = key_of(n) < end ? score[r * keys] : C(0);
#pragma unroll
            for (int e = 0; e < kGrain; ++e) o[r][e] += weight * x[e];
          }
      }
    }
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
    block_barrier();
    for (int n = thread_index(); n < rows * width; n += kDecodeThreads) {
      const int r = n / width;
      const int c = column + n % width;
      C total = 0;
      for (int w = 0; w < kWarps; ++w) total += sums[(w * kRows + r) * width + n % width];
      const std::int64_t at = (static_cast<std::int64_t>(head) * p.splits + split) * p.rows + row0 + r;
      if (c < a.dim_v) static_cast<C*>(p.out)[at * a.dim_v + c] = total;
    }
    block_barrier();
  }
}

// Shared memory of a block that merges.
template <class C> struct MergeShared {
  C weights[kMergeThreads];  // of splits; kUnseen where a split has no key that is seen
  C parts[kMergeThreads / kWarp];
};

// One thread's value for each warp, in all threads of the block.
template <class C> REGARD_DEVICE void exchange(MergeShared<C>& shared, C x, C (&all)[kMergeThreads / kWarp]) {
  block_barrier();
  if (thread_index() % kWarp == 0) shared.parts[thread_index() / kWarp] = x;
  block_barrier();
#pragma unroll
  for (int w = 0; w < kMergeThreads / kWarp; ++w) all[w] = shared.parts[w];
}

template <class C> REGARD_KERNEL(kMergeThreads, 1) attention_merge(const REGARD_GRID_CONSTANT DecodeArguments p) {
  const AttentionArguments& a = p.a;
  const int heads_kv = a.heads / a.group;
  const int row = block_index() % p.rows;
  const int head = block_index() / p.rows;
  const int b = head / heads_kv;
  const int len_q = query_rows(a, b);
  if (len_q > p.most_queries || row >= a.group * len_q) return;
  const int h = head % heads_kv * a.group + row / len_q;
  const int i = row % len_q;
  const SequenceMask sequence = sequence_of(a, b);
  const int splits = splits_of<C>(static_cast<int>(sequence.len_kv));
  const std::int64_t first = static_cast<std::int64_t>(head) * p.splits * p.rows + row;
  const C* const maximum = static_cast<const C*>(p.maximum) + first;
  const C* const sums = static_cast<const C*>(p.sum) + first;

  auto& shared = *reinterpret_cast<MergeShared<C>*>(dynamic_shared());
  constexpr C kUnseen = -1;
  constexpr int kWarps = kMergeThreads / kWarp;
  const C sink = sink_of<C>(a, h);
  C all[kWarps];
  C m = sink;
  for (int s = thread_index(); s < splits; s += kMergeThreads) {
    const C other = maximum[static_cast<std::int64_t>(s) * p.rows];
    m = other > m ? other : m;
  }
  for (int step = 1; step < kWarp; step *= 2) {
    const C other = shuffle_xor(m, step);
    m = other > m ? other : m;
  }
  exchange(shared, m, all);
  for (int w = 0; w < kWarps; ++w) m = all[w] > m ? all[w] : m;

  // The splits' weights are a thread's each, and then every thread's: its loads of a column wait for nothing.
  C l = 0;
  C rest = 0;
  for (int d0 = 0; d0 == 0 || d0 < a.dim_v; d0 += kMergeThreads) {
    const int d = d0 + thread_index();
    C o = 0;
    C share = 0;
    for (int s0 = 0; s0 < splits; s0 += kMergeThreads) {
      const int count = splits - s0 < kMergeThreads ? splits - s0 : kMergeThreads;
      block_barrier();
      if (thread_index() < count) {
        const std::int64_t at = static_cast<std::int64_t>(s0 + thread_index()) * p.rows;
        const C weight = sums[at] != C(0) ? exp_of(maximum[at] - m) : kUnseen;
        share += sums[at] != C(0) ? sums[at] * weight : C(0);
        shared.weights[thread_index()] = weight;
      }
      block_barrier();
      const C* column = static_cast<const C*>(p.out) + (first + static_cast<std::int64_t>(s0) * p.rows) * a.dim_v + d;
      if (d < a.dim_v)
#pragma unroll 8
        for (int n = 0; n < count; ++n, column += static_cast<std::int64_t>(p.rows) * a.dim_v) {
          const C weight = shared.weights[n];
          o += weight == kUnseen ? C(0) : *column * weight;
        }
    }
    if (d0 == 0) {
      for (int step = 1; step < kWarp; step *= 2) share += shuffle_xor(share, step);
      exchange(shared, share, all);
      l = sink > -infinity<C>() ? exp_of(sink - m) : C(0);
      for (int w = 0; w < kWarps; ++w) l += all[w];
      rest = l > C(0) ? C(0) : infinity<C>();
    }
    o /= l;
    if (d >= a.dim_v) continue;
    rest += o - o;  // NaN where it is not finite
    store_as(query_row(a, a.out, b, h, i, d), a.out_type, o);
  }
  exchange(shared, any_lane(!(rest == C(0))) ? C(1) : C(0), all);
  bool bad = i >= sequence.len_q;
  for (int w = 0; w < kWarps; ++w) bad = bad || all[w] != C(0);
  if (bad) {
    if (thread_index() < kWarp) plain_row(a, b, h, i, 0, a.dim_v, true);
  } else if (a.weights.data != nullptr) {
    for (int j = thread_index(); j < a.weights_kv; j += kMergeThreads) {
      const std::int64_t split = j / keys_per_split<C>(static_cast<int>(sequence.len_kv));
      const C share =
          j < sequence.len_kv ? static_cast<const C*>(p.shares)[(static_cast<std::int64_t>(head) * p.rows + row) * a.len_kv + j] : C(0);
      store_as(a.weights.at(b, h, i, j), a.out_type, share != C(0) ? share * exp_of(maximum[split * p.rows] - m) / l : C(0));
    }
  } else if (a.lse.data != nullptr && thread_index() == 0) {
    write<float>(query_row(a, a.lse, b, h, i), static_cast<float>(m + log_of(l)));
  }
}

}  // namespace regard::cuda
