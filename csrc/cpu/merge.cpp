// Merging partial attention: lse = log sum_i exp(lse_i), out = sum_i exp(lse_i - lse) out_i.
//
//   for each item: some rows                                          (parallel)
//     for each block of rows, a vector's width of them
//       the parts' weights, a row a lane: maximum, exponentials, sum, quotient
//       for each row: the weighted sum of the parts' rows, in their order
//
// A part whose lse is -inf saw no key: it is skipped, whatever its out holds.

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "core/rows.h"
#include "cpu/operations.h"
#include "cpu/parallel.h"
#include "cpu/strided.h"

namespace regard::cpu {
namespace {

// Elements an item: some 10 us of work, well above the cost of claiming one.
constexpr std::int64_t kElementsPerItem = 1 << 15;

// An array of row scalars, [...], seen as rows of length 1.
Rows scalars(Array x) {
  x.insert_axis(x.rank);
  return Rows(x);
}

template <class T> class Merge {
  using V = Vec<T>;
  static constexpr int kW = kWidth<T>;
  static constexpr int kChains = 4;  // sums in flight: the latency of a multiply-add
  static constexpr T kNothing = -std::numeric_limits<T>::infinity();

 public:
  explicit Merge(const MergeProblem& problem) : p_(problem), out_(problem.out), lse_(scalars(problem.lse)) {
    for (const Array& x : p_.outs) outs_.emplace_back(x);
    for (const Array& x : p_.lses) lses_.push_back(scalars(x));
    direct_ = out_.length() % kW == 0 && out_.step() == size_of(p_.out.dtype);
    for (const Rows& x : outs_) direct_ = direct_ && x.step() == size_of(p_.out.dtype);
    const std::int64_t row = std::max<std::int64_t>(1, out_.length() * (p_.parts() + 1));
    rows_per_item_ = std::max<std::int64_t>(1, kElementsPerItem / row / kW) * kW;
  }

  void run() {
    const double work = static_cast<double>(out_.count()) * static_cast<double>((out_.length() + 16) * p_.parts());
    parallel_for((out_.count() + rows_per_item_ - 1) / rows_per_item_, work, Rehearse::scratch,
                 [this](std::int64_t item) { run_item(item * rows_per_item_, std::min((item + 1) * rows_per_item_, out_.count())); });
  }

 private:
  // A part that saw keys, and its weight in the row at hand.
  struct Seen {
    const char* data;
    T weight;
    std::int64_t part;
  };

  struct Buffers {
    Scratch scratch;
    T* lses;     // [parts][kW]
    T* weights;  // [parts][kW]
    Seen* rows;  // [parts]
    T* sum;      // [padded dim_v]
    T* row;      // [padded dim_v]
  };

  std::int64_t padded() const { return (out_.length() + kW - 1) / kW * kW; }

  void run_item(std::int64_t first, std::int64_t last) const {
    Buffers w;
    const auto lses = w.scratch.template reserve<T>(p_.parts() * kW);
    const auto weights = w.scratch.template reserve<T>(p_.parts() * kW);
    const auto parts = w.scratch.template reserve<Seen>(p_.parts());
    const auto sum = w.scratch.template reserve<T>(padded());
    const auto row = w.scratch.template reserve<T>(padded());
    w.scratch.acquire();
    w.lses = w.scratch.template at<T>(lses);
    w.weights = w.scratch.template at<T>(weights);
    w.rows = w.scratch.template at<Seen>(parts);
    w.sum = w.scratch.template at<T>(sum);
    w.row = w.scratch.template at<T>(row);
    for (std::int64_t r = first; r < last; r += kW) {
      const int rows = static_cast<int>(std::min<std::int64_t>(kW, last - r));
      weigh(w, r, rows);
      for (int i = 0; i < rows; ++i) add_rows(w, r + i, i);
    }
  }

  T read_lse(std::int64_t part, std::int64_t row) const {
    const char* p = lses_[static_cast<std::size_t>(part)].at(row);
    return p_.lse.dtype == DType::float64 ? static_cast<T>(read<double>(p)) : static_cast<T>(read<float>(p));
  }

  // weights = exp(lse_i - lse), exactly 0 for a part that saw nothing; writes lse.
  void weigh(const Buffers& w, std::int64_t r, int rows) const {
    V top = broadcast<V>(kNothing);
    for (std::int64_t part = 0; part < p_.parts(); ++part) {
      T* lane = w.lses + part * kW;
      std::fill(lane, lane + kW, kNothing);
      for (int i = 0; i < rows; ++i) lane[i] = read_lse(part, r + i);
      top = max(load<V>(lane), top);  // NaN is dropped here and comes back with its own difference
    }
    const V shift = top == kNothing ? V{} : top;
    V sum{};
    for (std::int64_t part = 0; part < p_.parts(); ++part) {
      const V weight = exp_nonpositive(load<V>(w.lses + part * kW) - shift);
      store(w.weights + part * kW, weight);
      sum = sum + weight;
    }
    for (std::int64_t part = 0; part < p_.parts(); ++part) store(w.weights + part * kW, load<V>(w.weights + part * kW) / sum);
    T tops[kW], sums[kW];
    store(tops, shift);
    store(sums, sum);
    for (int i = 0; i < rows; ++i) {
      const double lse = static_cast<double>(tops[i]) + std::log(static_cast<double>(sums[i]));
      const float narrow = static_cast<float>(lse);
      if (p_.lse.dtype == DType::float64)
        std::memcpy(lse_.at(r + i), &lse, sizeof lse);
      else
        std::memcpy(lse_.at(r + i), &narrow, sizeof narrow);
    }
  }

  // out = sum_i weight_i out_i; row r, whose weights are in lane i.
  void add_rows(const Buffers& w, std::int64_t r, int i) const {
    std::int64_t seen = 0;
    for (std::int64_t part = 0; part < p_.parts(); ++part) {
      if (w.lses[part * kW + i] == kNothing) continue;
      w.rows[seen] = {outs_[static_cast<std::size_t>(part)].at(r), w.weights[part * kW + i], part};
      ++seen;
    }
    if (direct_)
      with_storage<T>(p_.out.dtype, [&](auto s) { add_direct(w, seen, reinterpret_cast<decltype(s)*>(out_.at(r))); });
    else
      add_copied(w, seen, out_.at(r));
  }

  // Where whole vectors lie in place: sums of some vectors stay in registers while the parts pass.
  template <class S> void add_direct(const Buffers& w, std::int64_t seen, S* out) const {
    const std::int64_t n = out_.length();
    std::int64_t k = 0;
    for (; k + kChains * kW <= n; k += kChains * kW) add_vectors<kChains>(w, seen, out, k);
    for (; k < n; k += kW) add_vectors<1>(w, seen, out, k);
  }
  template <int N, class S> void add_vectors(const Buffers& w, std::int64_t seen, S* out, std::int64_t k) const {
    V sum[N] = {};
    for (std::int64_t part = 0; part < seen; ++part) {
      const S* x = reinterpret_cast<const S*>(w.rows[part].data) + k;
      const V weight = broadcast<V>(w.rows[part].weight);
#pragma GCC unroll 4
      for (int j = 0; j < N; ++j) sum[j] = fma(weight, load_as(x + j * kW), sum[j]);
    }
#pragma GCC unroll 4
    for (int j = 0; j < N; ++j) store_as(out + k + j * kW, sum[j]);
  }

  void add_copied(const Buffers& w, std::int64_t seen, char* out) const {
    const std::int64_t n = out_.length();
    std::fill(w.sum, w.sum + padded(), T(0));
    for (std::int64_t part = 0; part < seen; ++part) {
      read_row(p_.out.dtype, w.rows[part].data, outs_[static_cast<std::size_t>(w.rows[part].part)].step(), n, w.row);
      const V weight = broadcast<V>(w.rows[part].weight);
      for (std::int64_t k = 0; k < padded(); k += kW) store(w.sum + k, fma(weight, load<V>(w.row + k), load<V>(w.sum + k)));
    }
    write_row(p_.out.dtype, out, out_.step(), n, w.sum);
  }

  const MergeProblem& p_;
  std::vector<Rows> outs_;
  std::vector<Rows> lses_;
  Rows out_;
  Rows lse_;
  bool direct_;
  std::int64_t rows_per_item_;
};

}  // namespace

void merge_attention(const MergeProblem& problem) {
  with_compute(problem.out.dtype, [&](auto t) { Merge<decltype(t)>(problem).run(); });
}

}  // namespace regard::cpu
