// Sums (or maxima) across the lanes of many vectors, a vector's width of them at a time: one transposition and a tree
// of whole-vector additions cost about five instructions a result, a tree inside each vector some fifteen.
#pragma once

#include "cpu/simd.h"

namespace regard::cpu {

struct Add {
  template <class V> static V combine(V a, V b) { return a + b; }
};
struct Maximum {
  template <class V> static V combine(V a, V b) { return max(a, b); }
};

// rows[0] = the rows combined: i with i + half, for half = N / 2, ..., 1. Every sum across lanes in this family is made
// in this order, so that memory order makes no difference.
template <class Op, class V, int N> inline V combine_tree(V (&rows)[N]) {
#pragma GCC unroll 8
  for (int half = N / 2; half > 0; half /= 2)
#pragma GCC unroll 8
    for (int i = 0; i < half; ++i) rows[i] = Op::combine(rows[i], rows[i + half]);
  return rows[0];
}

// Takes vectors one by one; writes their reductions to consecutive places.
template <class T, class Op> class LaneReducer {
 public:
  using V = Vec<T>;
  explicit LaneReducer(T* to) : to_(to) {}

  void push(V v) {
    rows_[count_++] = v;
    if (count_ == kWidth<T>) {
      store(to_, reduce());
      to_ += count_;
      count_ = 0;
    }
  }

  void finish() {
    if (count_ == 0) return;
    for (int i = count_; i < kWidth<T>; ++i) rows_[i] = V{};
    alignas(64) T results[kWidth<T>];
    store(results, reduce());
    for (int i = 0; i < count_; ++i) to_[i] = results[i];
    to_ += count_;
    count_ = 0;
  }

 private:
  V reduce() {
    V square[kWidth<T>];
    for (int i = 0; i < kWidth<T>; ++i) square[i] = rows_[i];
    transpose(square);
    return combine_tree<Op>(square);
  }

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
