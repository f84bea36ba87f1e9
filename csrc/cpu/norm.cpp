// Normalisation over the last axis, with an optional residual: out = norm(x + residual) * weight + bias.
//
//   for each item: some rows                                          (parallel)
//     s = x + residual as compute values; statistics in two passes; out
//
// Ba, Kiros & Hinton, "Layer normalization" (2016); Zhang & Sennrich, "Root mean square layer normalization" (2019).

#include <algorithm>
#include <cmath>

#include "core/rows.h"
#include "cpu/operations.h"
#include "cpu/parallel.h"
#include "cpu/strided.h"

namespace regard::cpu {
namespace {

// Elements an item: some 10 us of work, well above the cost of claiming one.
constexpr std::int64_t kElementsPerItem = 1 << 15;

// Elements summed in the compute type before the sum moves to double: lanes then add at most 32 terms each.
constexpr std::int64_t kSummed = 2048;

template <class T> class Norm {
  using V = Vec<T>;
  static constexpr int kW = kWidth<T>;
  static constexpr int kChains = 4;  // sums in flight: the latency of an addition

 public:
  explicit Norm(const NormProblem& problem) : p_(problem), x_(problem.x), residual_(problem.residual.present() ? problem.residual : problem.x), out_(problem.out) {
    rows_per_item_ = std::max<std::int64_t>(1, kElementsPerItem / std::max<std::int64_t>(1, p_.features()));
  }

  void run() {
    if (p_.features() == 0) return;
    const double work = static_cast<double>(x_.count()) * static_cast<double>(p_.features()) * 2;
    parallel_for((x_.count() + rows_per_item_ - 1) / rows_per_item_, work, [this](std::int64_t item) {
      run_item(item * rows_per_item_, std::min((item + 1) * rows_per_item_, x_.count()));
    });
  }

 private:
  struct Buffers {
    Scratch scratch;
    T* row;  // [padded features]
    T* residual;
    T* weight;
    T* bias;
  };

  std::int64_t padded() const { return (p_.features() + kW - 1) / kW * kW; }

  void run_item(std::int64_t first, std::int64_t last) const {
    Buffers w;
    const std::int64_t n = p_.features();
    const auto row = w.scratch.template reserve<T>(padded());
    const auto residual = w.scratch.template reserve<T>(p_.residual.present() ? padded() : 0);
    const auto weight = w.scratch.template reserve<T>(p_.weight.present() ? padded() : 0);
    const auto bias = w.scratch.template reserve<T>(p_.bias.present() ? padded() : 0);
    w.scratch.acquire();
    w.row = w.scratch.template at<T>(row);
    w.residual = w.scratch.template at<T>(residual);
    w.weight = read_vector(p_.weight, w.scratch.template at<T>(weight));
    w.bias = read_vector(p_.bias, w.scratch.template at<T>(bias));
    // Beyond the end of a row: zeros, that no sum sees.
    std::fill(w.row + n, w.row + padded(), T(0));
    if (p_.residual.present()) std::fill(w.residual + n, w.residual + padded(), T(0));
    for (std::int64_t i = first; i < last; ++i) {
      if (stop_requested()) return;
      read_row(p_.x.dtype, x_.at(i), x_.step(), n, w.row);
      if (p_.residual.present()) {
        read_row(p_.residual.dtype, residual_.at(i), residual_.step(), n, w.residual);
        for (std::int64_t k = 0; k < n; k += kW) store(w.row + k, load<V>(w.row + k) + load<V>(w.residual + k));
      }
      normalise(w);
      write_row(p_.out.dtype, out_.at(i), out_.step(), n, w.row);
    }
  }

  T* read_vector(const Array& x, T* to) const {
    if (!x.present()) return nullptr;
    read_row(x.dtype, x.data, x.stride[0], p_.features(), to);
    std::fill(to + p_.features(), to + padded(), T(0));
    return to;
  }

  void normalise(Buffers& w) const {
    const std::int64_t n = p_.features();
    const double count = static_cast<double>(n);
    double shift = 0;
    double square;
    if (p_.kind == NormProblem::Kind::layer) {
      const double mean = sum(w.row, [](V v) { return v; }) / count;
      // The mean rounded, then what the rounding left: differences keep all digits, however large the mean.
      const V centre = broadcast<V>(static_cast<T>(mean));
      for (std::int64_t k = 0; k < n; k += kW) store(w.row + k, load<V>(w.row + k) - centre);
      std::fill(w.row + n, w.row + padded(), T(0));
      shift = sum(w.row, [](V v) { return v; }) / count;
      square = sum(w.row, [](V v) { return v * v; }) / count - shift * shift;
    } else {
      square = sum(w.row, [](V v) { return v * v; }) / count;
    }
    const double factor = 1 / std::sqrt(square + p_.eps);
    const V scale = broadcast<V>(static_cast<T>(factor));
    const V offset = broadcast<V>(static_cast<T>(-shift * factor));
    for (std::int64_t k = 0; k < n; k += kW) {
      V y = fma(load<V>(w.row + k), scale, offset);
      if (w.weight != nullptr) y = y * load<V>(w.weight + k);
      if (w.bias != nullptr) y = y + load<V>(w.bias + k);
      store(w.row + k, y);
    }
    std::fill(w.row + n, w.row + padded(), T(0));
  }

  template <class F> double sum(const T* row, F&& term) const {
    double total = 0;
    for (std::int64_t k0 = 0; k0 < padded(); k0 += kSummed) {
      const std::int64_t k1 = std::min(k0 + kSummed, padded());
      V chains[kChains] = {};
      std::int64_t k = k0;
      for (; k + kChains * kW <= k1; k += kChains * kW)
        for (int c = 0; c < kChains; ++c) chains[c] += term(load<V>(row + k + c * kW));
      for (; k < k1; k += kW) chains[0] += term(load<V>(row + k));
      total += static_cast<double>(sum_lanes((chains[0] + chains[1]) + (chains[2] + chains[3])));
    }
    return total;
  }

  const NormProblem& p_;
  Rows x_;
  Rows residual_;
  Rows out_;
  std::int64_t rows_per_item_;
};

}  // namespace

void norm(const NormProblem& problem) {
  with_compute(problem.x.dtype, [&](auto t) { Norm<decltype(t)>(problem).run(); });
}

}  // namespace regard::cpu
