// Sums (or maxima) across the lanes of many vectors, a vector's width of them at a time: merging rows while
// halving them costs about three instructions a result, a tree inside each vector some fifteen.
#pragma once

#include "cpu/simd.h"

namespace regard::cpu {

// rows[0] = the rows combined: i with i + half, for half = N / 2, ..., 1. Every sum across lanes in this family is made
// in this order, so that memory order makes no difference.
template <class Op, class V, int N> inline V combine_tree(V (&rows)[N]) {
#pragma GCC unroll 8
  for (int half = N / 2; half > 0; half /= 2)
#pragma GCC unroll 8
    for (int i = 0; i < half; ++i) rows[i] = Op::combine(rows[i], rows[i + half]);
  return rows[0];
}

// One round of the tree for pairs of vectors at once: groups of 2 * Half lanes are halved, those of a before those of b.
template <class Op, int Half, class V, std::size_t... I> inline V halve_groups(V a, V b, std::index_sequence<I...>) {
  const V low = __builtin_shufflevector(a, b, (static_cast<int>(I) / Half * 2 * Half + static_cast<int>(I) % Half)...);
  const V high = __builtin_shufflevector(a, b, (static_cast<int>(I) / Half * 2 * Half + static_cast<int>(I) % Half + Half)...);
  return Op::combine(low, high);
}

// Lane i of the result = the lanes of rows[i], combined as combine_tree() combines rows. Two shuffles for each addition,
// and no more of either than there are rows.
template <class Op, int Half, class V, int N> inline V combine_lanes(V (&rows)[N]) {
#pragma GCC unroll 16
  for (int i = 0; i < Half; ++i) rows[i] = halve_groups<Op, Half>(rows[2 * i], rows[2 * i + 1], std::make_index_sequence<N>{});
  if constexpr (Half > 1) return combine_lanes<Op, Half / 2>(rows);
  return rows[0];
}

// Each two vectors of a row of n numbers: those at even places, then those at odd ones, as lower_of_pairs() and
// upper_of_pairs() give them; and back. A last single vector stays as it is.
template <class V, std::size_t... I> inline void split_by_parity(LaneOf<V>* row, std::int64_t n, std::index_sequence<I...>) {
  constexpr int w = sizeof...(I);
  for (std::int64_t k = 0; k + 2 * w <= n; k += 2 * w) {
    const V a = load<V>(row + k), b = load<V>(row + k + w);
    store(row + k, V(__builtin_shufflevector(a, b, (2 * static_cast<int>(I))...)));
    store(row + k + w, V(__builtin_shufflevector(a, b, (2 * static_cast<int>(I) + 1)...)));
  }
}
template <class V, std::size_t... I> inline void join_by_parity(LaneOf<V>* row, std::int64_t n, std::index_sequence<I...>) {
  constexpr int w = sizeof...(I);
  for (std::int64_t k = 0; k + 2 * w <= n; k += 2 * w) {
    const V even = load<V>(row + k), odd = load<V>(row + k + w);
    store(row + k, V(__builtin_shufflevector(even, odd, (static_cast<int>(I) / 2 + static_cast<int>(I) % 2 * w)...)));
    store(row + k + w, V(__builtin_shufflevector(even, odd, (w / 2 + static_cast<int>(I) / 2 + static_cast<int>(I) % 2 * w)...)));
  }
}

// Takes vectors one by one; writes their reductions to consecutive places.
template <class T, class Op> class LaneReducer {
 public:
  using V = Vec<T>;
  explicit LaneReducer(T* to) : to_(to) {}

  void push(V v) {
    rows_[count_++] = v;
    if (count_ == kWidth<T>) {
      store(to_, combine_lanes<Op, kWidth<T> / 2>(rows_));
      to_ += count_;
      count_ = 0;
    }
  }

  void finish() {
    if (count_ == 0) return;
    for (int i = count_; i < kWidth<T>; ++i) rows_[i] = V{};
    alignas(64) T results[kWidth<T>];
    store(results, combine_lanes<Op, kWidth<T> / 2>(rows_));
    for (int i = 0; i < count_; ++i) to_[i] = results[i];
    to_ += count_;
    count_ = 0;
  }

 private:
  V rows_[kWidth<T>];
  int count_ = 0;
  T* to_;
};

// 0, 1, 2, ...
template <class T> inline Vec<T> lane_numbers() {
  Vec<T> v{};
  for (int i = 0; i < kWidth<T>; ++i) v[i] = static_cast<T>(i);
  return v;
}

}  // namespace regard::cpu
