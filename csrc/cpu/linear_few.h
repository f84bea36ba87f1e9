// Linear layers of few rows with a weight as it lies: nothing is used twice, so the weight is read once, and not packed.
//
//   for each group of kWidth output features                          (parallel)
//     for each chain of the depth
//       for each square of kWidth features x kWidth depths: transpose in registers, multiply, add
//     out = activation(sums + bias), rounded
//
// Transposing is what holds it (Zen 4, 4096 x 4096: 3.2 ms of one thread, of which 0.9 to read and 1.7 to compute what
// lies in L2); fetching ahead, line by line or row by row, costs 10 to 30 %.
//
// Lanes are output features, and an element is a sum of the same chains as in linear.cpp: the same bits.
#pragma once

#include <algorithm>
#include <cstdint>

#include "core/rows.h"
#include "cpu/linear_panels.h"
#include "cpu/parallel.h"
#include "cpu/strided.h"

namespace regard::cpu {

template <class T, int Chain> class FewRows {
  using V = Vec<T>;
  static constexpr int kW = kWidth<T>;
  static_assert(Chain % kW == 0);

  // Above this many rows, packed panels that all rows use are faster.
  static constexpr int kMostRows = 4;
  // Groups an item.
  static constexpr std::int64_t kGroups = 4;

 public:
  static bool serves(const LinearProblem& p) {
    return !p.packed && Rows(p.x).count() <= kMostRows && p.weight.stride[1] == size_of(p.weight.dtype);
  }

  explicit FewRows(const LinearProblem& problem)
      : p_(problem), x_(problem.x), residual_(problem.residual.present() ? problem.residual : problem.out), out_(problem.out) {}

  void run() {
    const std::int64_t groups = divide_up(p_.out_features(), kW);
    if (x_.count() == 0 || groups == 0) return;
    const double work = static_cast<double>(p_.out_features()) * static_cast<double>(p_.in_features() + 8) * 4;
    parallel_for(divide_up(groups, kGroups), work, Rehearse::scratch, [this, groups](std::int64_t item) {
      Scratch scratch;
      const std::int64_t row = round_up(p_.in_features(), kW);
      const auto x = scratch.template reserve<T>(kMostRows * row);
      scratch.acquire();
      T* const copied = scratch.template at<T>(x);
      for (std::int64_t r = 0; r < x_.count(); ++r) read_row(p_.x.dtype, x_.at(r), x_.step(), p_.in_features(), copied + r * row);
      for (std::int64_t group = item * kGroups; group < std::min((item + 1) * kGroups, groups); ++group) {
        if (stop_requested()) return;
        with_storage<T>(p_.weight.dtype, [&](auto s) { with_rows<decltype(s)>(copied, row, group * kW); });
      }
    });
  }

 private:
  template <class S> void with_rows(const T* x, std::int64_t row, std::int64_t n0) const {
    switch (x_.count()) {
      case 1: return run_group<S, 1>(x, row, n0);
      case 2: return run_group<S, 2>(x, row, n0);
      case 3: return run_group<S, 3>(x, row, n0);
      default: return run_group<S, 4>(x, row, n0);
    }
  }

  template <class S, int R> void run_group(const T* x, std::int64_t row, std::int64_t n0) const {
    const std::int64_t n = p_.in_features();
    const int columns = static_cast<int>(std::min<std::int64_t>(kW, p_.out_features() - n0));
    // Features beyond the last are the last once more: read, and not written.
    const char* weight[kW];
    for (int j = 0; j < kW; ++j) weight[j] = p_.weight.at(n0 + std::min(j, columns - 1));
    V sums[R] = {};
    for (std::int64_t start = 0; start < n; start += Chain) {
      const std::int64_t end = std::min<std::int64_t>(n, start + Chain);
      V acc[R] = {};
      std::int64_t k = start;
      for (; k + kW <= end; k += kW) {
        V square[kW];
#pragma GCC unroll 16
        for (int j = 0; j < kW; ++j) {
          const char* const at = weight[j] + k * static_cast<std::int64_t>(sizeof(S));
          square[j] = load_as(reinterpret_cast<const S*>(at));
        }
        transpose(square);
#pragma GCC unroll 16
        for (int i = 0; i < kW; ++i)
          for (int r = 0; r < R; ++r) acc[r] = fma(broadcast<V>(x[r * row + k + i]), square[i], acc[r]);
      }
      for (; k < end; ++k) {
        S values[kW];
        for (int j = 0; j < kW; ++j) values[j] = read<S>(weight[j] + k * static_cast<std::int64_t>(sizeof(S)));
        const V column = load_as(values);
        for (int r = 0; r < R; ++r) acc[r] = fma(broadcast<V>(x[r * row + k]), column, acc[r]);
      }
      for (int r = 0; r < R; ++r) sums[r] = start > 0 ? sums[r] + acc[r] : acc[r];
    }
    finish(sums, R, n0, columns);
  }

  void finish(const V* sums, int rows, std::int64_t n0, int columns) const {
    T bias[kW];
    read_bias(p_.bias, n0, columns, bias, kW);
    for (int r = 0; r < rows; ++r) {
      T y[kW];
      store(y, sums[r] + load<V>(bias));
      activate(p_.activation, y, kW);
      T residual[kW];
      if (p_.residual.present()) add_residual(p_.residual, residual_.at(r) + n0 * residual_.step(), residual_.step(), columns, residual, y);
      write_row(p_.out.dtype, out_.at(r) + n0 * out_.step(), out_.step(), columns, y);
    }
  }

  const LinearProblem& p_;
  Rows x_;
  Rows residual_;
  Rows out_;
};

}  // namespace regard::cpu
