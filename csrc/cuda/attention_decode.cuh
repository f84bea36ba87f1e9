// Dot-product attention for few queries: the keys are split among blocks, and partial results merge in order.
//
//   attention_decode   a block has up to kRows rows of one key head (query heads of a group, and their queries) and one
//                      split of the keys: products into shared memory, their softmax, the weighted values
//                      (every key and value is read once: attention_decode_tensor.cuh by tensor cores, where types allow it,
//                      attention_decode_lanes.cuh by the lanes)
//   attention_merge    a block has one row: its splits by their maxima and sums, a column a thread
//
// Splits depend on the sequence's number of keys alone. Dao et al., "Flash-Decoding for long-context inference" (2023).
#pragma once

#include "cuda/attention_launch.cuh"
#include "cuda/attention_scores.cuh"

namespace regard::cuda {

constexpr int kDecodeThreads = 128;
constexpr int kDecodeWarps = kDecodeThreads / kWarp;
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

// From one row of scores to the next in shared memory: rows start in different banks.
constexpr int score_pitch(int keys) { return keys + 4; }

// Host code: all but the memory that partial results go to. Sequences of more than `most_queries` are other kernels'.
template <class Products> DecodeArguments decode_arguments(const AttentionProblem& problem, const AttentionArguments& a, int most_queries) {
  using T = typename Products::Stored;
  DecodeArguments p{};
  p.a = a;
  p.scale = Products::kScaledQueries ? split_scale(a.scale) : SplitScale{1, a.scale};
  p.most_queries = most_queries;
  p.rows = a.group * static_cast<int>(std::min<std::int64_t>(problem.len_q(), most_queries));
  p.row_tiles = (p.rows + Products::kRows - 1) / Products::kRows;
  p.splits = most_splits<Compute<T>>(static_cast<int>(problem.len_kv()));
  p.key_vectors = in_vectors(problem.key) && a.dim_qk % Vector<T>::kLength == 0;
  p.value_vectors = in_vectors(problem.value) && a.dim_v % Vector<T>::kLength == 0;
  return p;
}

// Host code: shared memory of a block whose splits have `keys` keys.
template <class Products> std::int64_t decode_bytes(std::int64_t dim_qk, std::int64_t dim_v, int keys) {
  const std::int64_t scores = static_cast<std::int64_t>(sizeof(Compute<typename Products::Stored>)) * Products::kRows * score_pitch(keys);
  return scores + std::max(Products::query_bytes(dim_qk), Products::sum_bytes(dim_v));
}

// What a block has, and where its scores and what follows them lie in shared memory.
template <class C> struct DecodeBlock {
  const DecodeArguments& p;
  int b;
  int group;  // the key head
  int row0;   // of `rows` rows of the key head: head by head, each with its queries
  int rows;
  int len_q;
  int j0;  // of the split's keys
  int end;
  int pitch;
  std::int64_t partial;  // row0's place in the partial results
  C* scores;             // [kRows][pitch]
  char* rest;            // queries, and when the scores are there sums of values

  REGARD_DEVICE int head_of(int r) const { return group * p.a.group + (row0 + r) / len_q; }
  REGARD_DEVICE int query_of(int r) const { return (row0 + r) % len_q; }
  REGARD_DEVICE int held_key(int j) const { return j < end ? j : end - 1; }
  // What a row's weights are counted in, behind its scores: with Products::kUnits, whose weights are rounded to 16 bits, a power of
  // two near the largest. In float16 the weights of small values would have few digits.
  REGARD_DEVICE C& unit_of(int r) const { return scores[(r + 1) * pitch - 1]; }
};

// The largest power of two up to x that is a normal number, or the smallest; 1 for nothing.
REGARD_DEVICE float power_below(float x) {
  const std::uint32_t exponent = bits_of(x) & 0x7f800000u;
  return x == 0 ? 1.0f : exponent == 0 ? 0x1p-126f : float_of(exponent);
}

// Columns column.. of one sweep: the warps' sums in shared memory, [warps][kRows][pitch], added up into the partial results.
// All threads call it.
template <class Products, class C> REGARD_DEVICE void add_warps(const DecodeBlock<C>& x, const C* sums, int pitch, int column, int width) {
  const int dim_v = x.p.a.dim_v;
  block_barrier();
  for (int n = thread_index(); n < x.rows * width; n += kDecodeThreads) {
    const int r = n / width;
    const int c = n % width;
    C total = 0;
    for (int w = 0; w < kDecodeWarps; ++w) total += sums[(w * Products::kRows + r) * pitch + c];
    if constexpr (Products::kUnits) total *= x.unit_of(r);
    if (column + c < dim_v) static_cast<C*>(x.p.out)[(x.partial + r) * dim_v + column + c] = total;
  }
  block_barrier();
}

// Scores become exponentials against the row's maximum in the split, times what a value of a key is worth: a warp a row. Up to the
// next multiple of a warp there are zeros behind them.
template <class Products, class C> REGARD_DEVICE void weigh_scores(const DecodeBlock<C>& x, const SequenceMask& sequence) {
  const DecodeArguments& p = x.p;
  const AttentionArguments& a = p.a;
  const int lane = thread_index() % kWarp;
  const int count = x.end - x.j0;
  for (int r = thread_index() / kWarp; r < x.rows; r += kDecodeWarps) {
    C* const row = x.scores + r * x.pitch;
    const int h = x.head_of(r);
    const int i = x.query_of(r);
    const KeyRange range = sequence.keys_of(i);
    const C slope = slope_of<C>(a, x.b, h);
    C m = -infinity<C>();
    for (int n = lane; n < count; n += kWarp) {
      const int j = x.j0 + n;
      C& s = row[n];
      if (j < range.first || j >= range.last) {
        s = -infinity<C>();
      } else {
        const C factor = static_cast<C>(p.scale.rest) * static_cast<C>(row_scale(a, a.key_scales, x.b, x.group, j));
        // Beyond the largest number only before the key's scale: for the plain path.
        if (Products::kUnits && s == -infinity<C>()) s = NAN;
        s = finished_score(a, s * factor, x.b, h, i, j, slope, i + sequence.diagonal);
      }
      m = s > m ? s : m;
    }
    for (int step = 1; step < kWarp; step *= 2) {
      const C other = shuffle_xor(m, step);
      m = other > m ? other : m;
    }
    const C base = m == -infinity<C>() ? C(0) : m;
    C sum = 0;
    C largest = 0;
    int n = lane;
    for (; n < count; n += kWarp) {
      C& s = row[n];
      s = exp_of(s - base);
      sum += s;
      if (p.shares != nullptr) {
        const std::int64_t head = static_cast<std::int64_t>(x.b) * (a.heads / a.group) + x.group;
        static_cast<C*>(p.shares)[(head * p.rows + x.row0 + r) * a.len_kv + x.j0 + n] = s;
      }
      s *= static_cast<C>(row_scale(a, a.value_scales, x.b, x.group, x.j0 + n));
      if constexpr (Products::kUnits) largest = fmaxf(largest, fabsf(s));
    }
    if (n - lane < count) row[n] = C(0);
    if constexpr (Products::kUnits) {
      for (int step = 1; step < kWarp; step *= 2) largest = fmaxf(largest, shuffle_xor(largest, step));
      const C unit = power_below(largest);
      for (int k = lane; k < count; k += kWarp) row[k] /= unit;
      if (lane == 0) x.unit_of(r) = unit;
    }
    for (int step = 1; step < kWarp; step *= 2) sum += shuffle_xor(sum, step);
    if (lane == 0) {
      static_cast<C*>(p.maximum)[x.partial + r] = m;
      static_cast<C*>(p.sum)[x.partial + r] = sum;
    }
  }
}

// Products::Stored is the type of keys and values.
template <class Products> REGARD_KERNEL(kDecodeThreads, Products::kBlocks) attention_decode(const REGARD_GRID_CONSTANT DecodeArguments p) {
  using C = Compute<typename Products::Stored>;
  constexpr int kRows = Products::kRows;
  const AttentionArguments& a = p.a;
  const int heads_kv = a.heads / a.group;
  const int split = block_index() % p.splits;
  const int row0 = block_index() / p.splits % p.row_tiles * kRows;
  const int head = block_index() / p.splits / p.row_tiles;  // b * heads_kv + key head
  const int b = head / heads_kv;
  const int len_q = query_rows(a, b);
  if (len_q > p.most_queries || row0 >= a.group * len_q) return;
  const int rows = a.group * len_q - row0 < kRows ? a.group * len_q - row0 : kRows;
  const SequenceMask sequence = sequence_of(a, b);
  const int len_kv = static_cast<int>(sequence.len_kv);
  const int keys = keys_per_split<C>(len_kv);
  if (split >= splits_of<C>(len_kv)) return;
  const int j0 = split * keys;
  const int end = len_kv < j0 + keys ? len_kv : j0 + keys;
  const int pitch = score_pitch(keys);
  C* const scores = reinterpret_cast<C*>(dynamic_shared());
  const std::int64_t partial = (static_cast<std::int64_t>(head) * p.splits + split) * p.rows + row0;
  const DecodeBlock<C> x{p,  b,   head % heads_kv, row0,    rows,   len_q,
                         j0, end, pitch,           partial, scores, dynamic_shared() + sizeof(C) * kRows * pitch};

  Products::take_queries(x);
  block_barrier();
  Products::score_keys(x);
  block_barrier();
  weigh_scores<Products>(x, sequence);
  block_barrier();
  Products::add_values(x);
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
