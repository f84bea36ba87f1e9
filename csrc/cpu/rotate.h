// Turning pairs of a row by their angles: what rotary_embedding and the appending to a cache share.
#pragma once

#include <algorithm>
#include <cstdint>

#include "core/rotary_problem.h"
#include "cpu/parallel.h"
#include "cpu/strided.h"

namespace regard::cpu {

template <class T> constexpr std::int64_t whole_vectors(std::int64_t n) { return (n + kWidth<T> - 1) / kWidth<T> * kWidth<T>; }

template <class V> inline void rotate(V& x, V& y, V c, V s) {
  const V turned = fma(x, c, -(y * s));
  y = fma(y, c, x * s);
  x = turned;
}

// The pairs (x[i], y[i]), i < n, n in whole vectors; x and y may be the outputs.
template <class S, class T>
inline void rotate_halves(const S* x, const S* y, S* x_out, S* y_out, const T* cos, const T* sin, std::int64_t n) {
  using V = Vec<T>;
  for (std::int64_t i = 0; i < n; i += kWidth<T>) {
    V a = load_as(x + i), b = load_as(y + i);
    rotate(a, b, load<V>(cos + i), load<V>(sin + i));
    store_as(x_out + i, a);
    store_as(y_out + i, b);
  }
}

template <class V, std::size_t... I> inline void split_neighbours(V& a, V& b, std::index_sequence<I...>) {
  const V even = __builtin_shufflevector(a, b, (2 * static_cast<int>(I))...);
  b = __builtin_shufflevector(a, b, (2 * static_cast<int>(I) + 1)...);
  a = even;
}
template <class V, std::size_t... I> inline void join_neighbours(V& a, V& b, std::index_sequence<I...>) {
  constexpr int n = sizeof...(I);
  const V low = __builtin_shufflevector(a, b, (static_cast<int>(I) / 2 + static_cast<int>(I) % 2 * n)...);
  b = __builtin_shufflevector(a, b, (n / 2 + static_cast<int>(I) / 2 + static_cast<int>(I) % 2 * n)...);
  a = low;
}

// The pairs (x[2 i], x[2 i + 1]), i < n, n in whole vectors; x may be the output.
template <class S, class T> inline void rotate_neighbours(const S* x, S* out, const T* cos, const T* sin, std::int64_t n) {
  using V = Vec<T>;
  constexpr int w = kWidth<T>;
  for (std::int64_t i = 0; i < n; i += w) {
    V a = load_as(x + 2 * i), b = load_as(x + 2 * i + w);
    split_neighbours(a, b, std::make_index_sequence<w>{});
    rotate(a, b, load<V>(cos + i), load<V>(sin + i));
    join_neighbours(a, b, std::make_index_sequence<w>{});
    store_as(out + 2 * i, a);
    store_as(out + 2 * i + w, b);
  }
}

// A contiguous row, in place. `spare` has room for two times the pairs, in whole vectors.
template <class T> inline void rotate_row(T* row, T* spare, const T* cos, const T* sin, std::int64_t pairs, bool interleaved) {
  const std::int64_t padded = whole_vectors<T>(pairs);
  if (pairs == padded)
    return interleaved ? rotate_neighbours(row, row, cos, sin, pairs) : rotate_halves(row, row + pairs, row, row + pairs, cos, sin, pairs);
  // Lanes beyond the pairs compute on whatever lies there, and are not copied back.
  if (interleaved) {
    std::copy(row, row + 2 * pairs, spare);
    rotate_neighbours(spare, spare, cos, sin, padded);
    std::copy(spare, spare + 2 * pairs, row);
  } else {
    std::copy(row, row + pairs, spare);
    std::copy(row + pairs, row + 2 * pairs, spare + padded);
    rotate_halves(spare, spare + padded, spare, spare + padded, cos, sin, padded);
    std::copy(spare, spare + pairs, row);
    std::copy(spare + padded, spare + padded + pairs, row + pairs);
  }
}

// The angles of some tokens as compute values, read once for all heads. Rows of cos and sin in whole vectors.
template <class T> class AngleRows {
 public:
  AngleRows(const RotaryAngles& angles, std::int64_t len, std::int64_t tokens) : angles_(angles), len_(len) {
    pairs_ = angles.present() ? angles.pairs() : 0;
    padded_ = whole_vectors<T>(pairs_);
    cos_ = scratch_.template reserve<T>(tokens * padded_);
    sin_ = scratch_.template reserve<T>(tokens * padded_);
    spare_ = scratch_.template reserve<T>(2 * padded_);
  }

  // More room in the same piece, before read_tokens().
  template <class U> std::size_t reserve(std::int64_t n) { return scratch_.template reserve<U>(n); }
  template <class U> U* at(std::size_t offset) const { return scratch_.template at<U>(offset); }

  void read_tokens(std::int64_t b, std::int64_t first, std::int64_t last) {
    scratch_.acquire();
    if (pairs_ == 0) return;
    const auto read_table = [&](const Array& table, const char* from, T* to) {
      const std::int64_t step = table.stride[table.rank - 1];
      if (std::is_same_v<T, double> && table.dtype == DType::float32) {
        for (std::int64_t k = 0; k < pairs_; ++k) to[k] = read<float>(from + k * step);
      } else {
        read_row(table.dtype, from, step, pairs_, to);
      }
      std::fill(to + pairs_, to + padded_, T(0));
    };
    for (std::int64_t i = first; i < last; ++i) {
      read_table(angles_.cos, angles_.cos_at(b, i, len_), cos(i - first));
      read_table(angles_.sin, angles_.sin_at(b, i, len_), sin(i - first));
    }
  }

  std::int64_t pairs() const { return pairs_; }
  T* cos(std::int64_t i) const { return at<T>(cos_) + i * padded_; }
  T* sin(std::int64_t i) const { return at<T>(sin_) + i * padded_; }
  T* spare() const { return at<T>(spare_); }
  void rotate(T* row, std::int64_t i) const {
    if (pairs_ > 0) rotate_row(row, spare(), cos(i), sin(i), pairs_, angles_.interleaved);
  }

 private:
  const RotaryAngles& angles_;
  Scratch scratch_;
  std::int64_t len_;
  std::int64_t pairs_;
  std::int64_t padded_;
  std::size_t cos_;
  std::size_t sin_;
  std::size_t spare_;
};

}  // namespace regard::cpu
