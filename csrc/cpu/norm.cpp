// Normalisation over the last axis, with an optional residual: out = norm(x + residual) * weight + bias.
//
//   for each item: some rows                                          (parallel)
//     for each few rows:
//       s = x + residual as compute values, where x does not lie so already
//       mean; mean square of s - mean; out                            (three passes over rows in L1)
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

// Elements an item: some 2 us of work, well above the cost of claiming one, and 128 x 768 still has 12 to share out.
constexpr std::int64_t kElementsPerItem = 1 << 13;

// What an element costs, in parallel_for's operations of some 20 ps: 128 x 768 takes 20 us on one thread, 12.6 on two.
constexpr double kWorkAnElement = 11;

// Rows whose totals are made one after another before any is used: a row's sums across lanes, division and root take as
// long as its additions, and overlap the next row's. Within kTogetherBytes, so that all stay in L1. One thread,
// Zen 4: 1024 x 768 takes 163 us by fours, 173 one by one; 512 x 128 20.6 and 23.9; by eights as by fours.
constexpr int kRowsTogether = 4;
constexpr std::int64_t kTogetherBytes = 16 << 10;

// Elements summed in the compute type before the sum moves to double: lanes then add at most 32 terms each.
constexpr std::int64_t kSummed = 2048;

template <class T> class Norm {
  using V = Vec<T>;
  static constexpr int kW = kWidth<T>;
  static constexpr int kChains = 4;  // sums in flight: the latency of an addition

 public:
  explicit Norm(const NormProblem& problem)
      : p_(problem), x_(problem.x), residual_(problem.residual.present() ? problem.residual : problem.x), out_(problem.out) {
    const std::int64_t n = std::max<std::int64_t>(1, p_.features());
    rows_per_item_ = std::max<std::int64_t>(1, kElementsPerItem / n);
    together_ = std::clamp<std::int64_t>(kTogetherBytes / (n * static_cast<std::int64_t>(sizeof(T))), 1, kRowsTogether);
  }

  void run() {
    if (p_.features() == 0) return;
    const double work = static_cast<double>(x_.count()) * static_cast<double>(p_.features()) * kWorkAnElement;
    parallel_for((x_.count() + rows_per_item_ - 1) / rows_per_item_, work, Rehearse::scratch,
                 [this](std::int64_t item) { run_item(item * rows_per_item_, std::min((item + 1) * rows_per_item_, x_.count())); });
  }

 private:
  struct Buffers {
    Scratch scratch;
    T* rows;  // [together][padded features]
    T* residual;
    const T* weight;
    const T* bias;
  };

  std::int64_t padded() const { return (p_.features() + kW - 1) / kW * kW; }

  // Whether rows can be read or written where they lie, in whole vectors.
  bool in_place(const Array& x) const {
    return x.dtype == dtype_of<T>() && x.stride[x.rank - 1] == static_cast<std::int64_t>(sizeof(T)) && p_.features() == padded();
  }

  void run_item(std::int64_t first, std::int64_t last) const {
    Buffers w;
    const auto rows = w.scratch.template reserve<T>(together_ * padded());
    const auto residual = w.scratch.template reserve<T>(padded());
    const auto weight = w.scratch.template reserve<T>(padded());
    const auto bias = w.scratch.template reserve<T>(padded());
    w.scratch.acquire();
    w.rows = w.scratch.template at<T>(rows);
    w.residual = w.scratch.template at<T>(residual);
    w.weight = read_vector(p_.weight, w.scratch.template at<T>(weight));
    w.bias = read_vector(p_.bias, w.scratch.template at<T>(bias));
    for (std::int64_t i = first; i < last; i += together_) some_rows(w, i, static_cast<int>(std::min(together_, last - i)));
  }

  const T* read_vector(const Array& x, T* to) const {
    if (!x.present()) return nullptr;
    if (in_place(x)) return reinterpret_cast<const T*>(x.data);
    read_row(x.dtype, x.data, x.stride[0], p_.features(), to);
    std::fill(to + p_.features(), to + padded(), T(0));
    return to;
  }

  // to = x + residual, with zeros beyond its end.
  void read_sum(Buffers& w, std::int64_t i, T* to) const {
    const std::int64_t n = p_.features();
    read_row(p_.x.dtype, x_.at(i), x_.step(), n, to);
    if (p_.residual.present()) {
      read_row(p_.residual.dtype, residual_.at(i), residual_.step(), n, w.residual);
      for (std::int64_t k = 0; k < n; k += kW) store(to + k, load<V>(to + k) + load<V>(w.residual + k));
    }
    std::fill(to + n, to + padded(), T(0));
  }

  // Up to kRowsTogether rows, from row i.
  void some_rows(Buffers& w, std::int64_t i, int count) const {
    const std::int64_t n = p_.features();
    const bool x_in_place = in_place(p_.x) && !p_.residual.present();
    const bool out_in_place = in_place(p_.out);
    const T* from[kRowsTogether];
    T* to[kRowsTogether];
    for (int r = 0; r < count; ++r) {
      T* const row = w.rows + r * padded();
      if (!x_in_place) read_sum(w, i + r, row);
      from[r] = x_in_place ? reinterpret_cast<const T*>(x_.at(i + r)) : row;
      to[r] = out_in_place ? reinterpret_cast<T*>(out_.at(i + r)) : row;
    }
    if (p_.kind == NormProblem::Kind::rms)
      root_mean_squares(w, from, to, count);
    else
      mean_and_variance(w, from, to, count);
    if (!out_in_place)
      for (int r = 0; r < count; ++r) write_row(p_.out.dtype, out_.at(i + r), out_.step(), n, to[r]);
  }

  void root_mean_squares(const Buffers& w, const T* const* from, T* const* to, int count) const {
    double factor[kRowsTogether];
    for (int r = 0; r < count; ++r) factor[r] = 1 / std::sqrt(sums(from[r], V{}).squares / static_cast<double>(p_.features()) + p_.eps);
    for (int r = 0; r < count; ++r) scale_row(w, from[r], to[r], V{}, 0, factor[r]);
  }

  // The mean rounded, then what the rounding left: differences keep all their digits, however large the mean.
  void mean_and_variance(const Buffers& w, const T* const* from, T* const* to, int count) const {
    const std::int64_t n = p_.features();
    const double size = static_cast<double>(n);
    T mean[kRowsTogether];
    double rest[kRowsTogether];
    double factor[kRowsTogether];
    for (int r = 0; r < count; ++r) mean[r] = static_cast<T>(sum(from[r]) / size);
    // Beyond the end the differences are 0 (a row in place has no beyond).
    if (n != padded())
      for (int r = 0; r < count; ++r) std::fill(w.rows + r * padded() + n, w.rows + (r + 1) * padded(), mean[r]);
    for (int r = 0; r < count; ++r) {
      const Sums s = sums(from[r], broadcast<V>(mean[r]));
      rest[r] = s.values / size;
      factor[r] = 1 / std::sqrt(s.squares / size - rest[r] * rest[r] + p_.eps);
    }
    for (int r = 0; r < count; ++r) scale_row(w, from[r], to[r], broadcast<V>(mean[r]), rest[r], factor[r]);
  }

  // to = ((from - centre) - rest) factor weight + bias
  void scale_row(const Buffers& w, const T* from, T* to, V centre, double rest, double factor) const {
    const V scale = broadcast<V>(static_cast<T>(factor));
    const V offset = broadcast<V>(static_cast<T>(-rest * factor));
    const std::int64_t n = padded();
    const auto each = [&](auto&& affine) {
      for (std::int64_t k = 0; k < n; k += kW) store(to + k, affine(fma(load<V>(from + k) - centre, scale, offset), k));
    };
    const T* const weight = w.weight;
    const T* const bias = w.bias;
    if (weight != nullptr && bias != nullptr)
      return each([=](V y, std::int64_t k) { return fma(y, load<V>(weight + k), load<V>(bias + k)); });
    if (weight != nullptr) return each([=](V y, std::int64_t k) { return y * load<V>(weight + k); });
    if (bias != nullptr) return each([=](V y, std::int64_t k) { return y + load<V>(bias + k); });
    each([](V y, std::int64_t) { return y; });
  }

  struct Sums {
    double values;
    double squares;
  };

  double sum(const T* row) const {
    double total = 0;
    for_pieces([&](std::int64_t k, std::int64_t k1) {
      V chains[kChains] = {};
      for (; k + kChains * kW <= k1; k += kChains * kW)
#pragma GCC unroll 4
        for (int c = 0; c < kChains; ++c) chains[c] += load<V>(row + k + c * kW);
      for (; k < k1; k += kW) chains[0] += load<V>(row + k);
      total += together(chains);
    });
    return total;
  }

  // Of row - centre.
  Sums sums(const T* row, V centre) const {
    Sums total = {};
    for_pieces([&](std::int64_t k, std::int64_t k1) {
      V values[kChains] = {};
      V squares[kChains] = {};
      const auto add = [&](int c, std::int64_t at) {
        const V d = load<V>(row + at) - centre;
        values[c] += d;
        squares[c] = fma(d, d, squares[c]);
      };
      for (; k + kChains * kW <= k1; k += kChains * kW)
#pragma GCC unroll 4
        for (int c = 0; c < kChains; ++c) add(c, k + c * kW);
      for (; k < k1; k += kW) add(0, k);
      total.values += together(values);
      total.squares += together(squares);
    });
    return total;
  }

  template <class F> void for_pieces(F&& f) const {
    for (std::int64_t k = 0; k < padded(); k += kSummed) f(k, std::min(k + kSummed, padded()));
  }

  static double together(const V* chains) { return static_cast<double>(sum_lanes((chains[0] + chains[1]) + (chains[2] + chains[3]))); }

  const NormProblem& p_;
  Rows x_;
  Rows residual_;
  Rows out_;
  std::int64_t rows_per_item_;
  std::int64_t together_;
};

}  // namespace

void norm(const NormProblem& problem) {
  with_compute(problem.x.dtype, [&](auto t) { Norm<decltype(t)>(problem).run(); });
}

}  // namespace regard::cpu
