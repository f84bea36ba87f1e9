// An array of any rank seen as rows of its last axis: what operations on features need, whatever comes before them.
#pragma once

#include <cstdint>

#include "core/array.h"

namespace regard {

class Rows {
 public:
  // `x` has rank >= 1. Leading axes that lie evenly in memory are merged, so that most arrays need no division.
  explicit Rows(const Array& x) : data_(x.data), length_(x.shape[x.rank - 1]), step_(x.stride[x.rank - 1]) {
    for (int a = 0; a < x.rank - 1; ++a) {
      count_ *= x.shape[a];
      if (x.shape[a] == 1) continue;
      if (axes_ > 0 && stride_[axes_ - 1] == x.shape[a] * x.stride[a]) {
        shape_[axes_ - 1] *= x.shape[a];
        stride_[axes_ - 1] = x.stride[a];
      } else {
        shape_[axes_] = x.shape[a];
        stride_[axes_++] = x.stride[a];
      }
    }
  }

  constexpr std::int64_t count() const { return count_; }
  constexpr std::int64_t length() const { return length_; }
  constexpr std::int64_t step() const { return step_; }  // bytes between neighbours in a row

  constexpr char* at(std::int64_t row) const {
    char* p = data_;
    for (int a = axes_ - 1; a > 0; --a) {
      p += row % shape_[a] * stride_[a];
      row /= shape_[a];
    }
    return axes_ > 0 ? p + row * stride_[0] : p;
  }

 private:
  char* data_;
  std::int64_t length_;
  std::int64_t step_;
  std::int64_t count_ = 1;
  int axes_ = 0;
  std::int64_t shape_[kMaxRank] = {};
  std::int64_t stride_[kMaxRank] = {};
};

}  // namespace regard
