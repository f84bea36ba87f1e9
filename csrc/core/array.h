// A strided view of an array somebody else owns. Strides are in bytes, of any sign; data may be misaligned.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <utility>
#include <vector>

#include "core/dtype.h"

namespace regard {

constexpr int kMaxRank = 8;

struct Array {
  enum class Kind : std::uint8_t { absent, array, not_an_array };

  char* data = nullptr;
  std::int64_t shape[kMaxRank] = {};
  std::int64_t stride[kMaxRank] = {};
  int rank = 0;  // may exceed kMaxRank: then shape and stride hold the first kMaxRank axes only
  DType dtype = DType::other;
  Kind kind = Kind::absent;
  bool writable = false;
  bool on_device = false;  // a GPU's memory: shapes and types are checked here, entries are not

  bool present() const { return kind != Kind::absent; }

  std::int64_t size() const {
    std::int64_t n = 1;
    for (int a = 0; a < rank; ++a) n *= shape[a];
    return n;
  }

  bool same_shape(const Array& other) const {
    if (rank != other.rank) return false;
    for (int a = 0; a < rank; ++a)
      if (shape[a] != other.shape[a]) return false;
    return true;
  }

  void swap_axes(int a, int b) {
    std::swap(shape[a], shape[b]);
    std::swap(stride[a], stride[b]);
  }

  // Moves axis `from` to place `to`, the others keeping their order.
  void move_axis(int from, int to) {
    const int step = from < to ? 1 : -1;
    for (int a = from; a != to; a += step) swap_axes(a, a + step);
  }

  // A new axis of length 1 at place `at`.
  void insert_axis(int at) {
    shape[rank] = 1;
    stride[rank] = 0;
    move_axis(rank++, at);
  }

  // Repeats axes of length 1, and new leading ones, by stride 0 (NumPy's rule). False when it does not fit.
  bool broadcast_to(const std::int64_t* wanted, int wanted_rank) {
    if (rank > wanted_rank || wanted_rank > kMaxRank) return false;
    const int added = wanted_rank - rank;
    for (int a = wanted_rank - 1; a >= 0; --a) {
      const std::int64_t n = a >= added ? shape[a - added] : 1;
      const std::int64_t s = a >= added ? stride[a - added] : 0;
      if (n != wanted[a] && n != 1) return false;
      stride[a] = n == wanted[a] && n != 1 ? s : 0;
    }
    for (int a = 0; a < wanted_rank; ++a) shape[a] = wanted[a];
    rank = wanted_rank;
    return true;
  }

  // Whether the bytes from the first element to the last cross the other array's.
  bool may_overlap(const Array& other) const {
    if (size() == 0 || other.size() == 0) return false;
    const auto [first, last] = extent();
    const auto [other_first, other_last] = other.extent();
    return first <= other_last && other_first <= last;
  }

  // Addresses of the lowest byte and of the highest.
  std::pair<std::intptr_t, std::intptr_t> extent() const {
    const auto at = reinterpret_cast<std::intptr_t>(data);
    std::pair<std::intptr_t, std::intptr_t> ends{at, at + size_of(dtype) - 1};
    for (int a = 0; a < rank; ++a) (stride[a] < 0 ? ends.first : ends.second) += (shape[a] - 1) * stride[a];
    return ends;
  }

  // Whether two elements share memory: such an array cannot be written.
  bool repeats() const {
    if (size() == 0) return false;
    const auto step = [&](int a) { return std::abs(stride[a]); };
    int axes[kMaxRank];  // by their steps
    int count = 0;
    for (int a = 0; a < rank; ++a) {
      if (shape[a] <= 1) continue;
      int at = count++;
      for (; at > 0 && step(axes[at - 1]) > step(a); --at) axes[at] = axes[at - 1];
      axes[at] = a;
    }
    // Where each axis steps over all that the finer ones span, none do.
    std::int64_t span = size_of(dtype);
    bool apart = true;
    for (int n = 0; n < count; ++n) {
      apart = apart && step(axes[n]) >= span;
      span += (shape[axes[n]] - 1) * step(axes[n]);
    }
    // More bytes than the span has cannot all be apart; nor are so many places looked at one by one as no caller has.
    constexpr std::int64_t most = std::int64_t{1} << 24;
    return !apart && (size() > most || size() * size_of(dtype) > span || elements_meet());
  }

  // The same of any strides, place by place: for what is no slice or transpose of an array.
  bool elements_meet() const {
    std::vector<std::int64_t> places{0};
    for (int a = 0; a < rank; ++a) {
      const std::size_t before = places.size();
      for (std::int64_t k = 1; k < shape[a]; ++k)
        for (std::size_t n = 0; n < before; ++n) places.push_back(places[n] + k * stride[a]);
    }
    std::sort(places.begin(), places.end());
    for (std::size_t n = 1; n < places.size(); ++n)
      if (places[n] - places[n - 1] < size_of(dtype)) return true;
    return false;
  }

  template <class... Index> char* at(Index... index) const {
    char* p = data;
    int a = 0;
    ((p += static_cast<std::int64_t>(index) * stride[a++]), ...);
    return p;
  }
};

}  // namespace regard
