// Normalisation over the last axis, with an optional residual: out = norm(x + residual) * weight + bias.
//
//   for each item: some rows                                          (parallel)
//     s = x + residual as compute values, where x does not lie so already
//     mean; mean square of s - mean; out                              (three passes over a row in L1)
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
  explicit Norm(const NormProblem& problem)
      : p_(problem), x_(problem.x), residual_(problem.residual.present() ? problem.residual : problem.x), out_(problem.out) {
    rows_per_item_ = std::max<std::int64_t>(1, kElementsPerItem / std::max<std::int64_t>(1, p_.features()));
  }

  void run() {
    if (p_.features() == 0) return;
    const double work = static_cast<double>(x_.count()) * static_cast<double>(p_.features()) * 2;
    parallel_for((x_.count() + rows_per_item_ - 1) / rows_per_item_, work, Rehearse::scratch,
                 [this](std::int64_t item) { run_item(item * rows_per_item_, std::min((item + 1) * rows_per_item_, x_.count())); });
  }

 private:
  struct Buffers {
    Scratch scratch;
    T* row;  // [padded features]
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
    const std::int64_t n = p_.features();
    const auto row = w.scratch.template reserve<T>(padded());
    const auto residual = w.scratch.template reserve<T>(padded());
    const auto weight = w.scratch.template reserve<T>(padded());
    const auto bias = w.scratch.template reserve<T>(padded());
    w.scratch.acquire();
    w.row = w.scratch.template at<T>(row);
    w.residual = w.scratch.template at<T>(residual);
    w.weight = read_vector(p_.weight, w.scratch.template at<T>(weight));
    w.bias = read_vector(p_.bias, w.scratch.template at<T>(bias));
    const bool x_in_place = in_place(p_.x) && !p_.residual.present();
    const bool out_in_place = in_place(p_.out);
    for (std::int64_t i = first; i < last; ++i) {
      const T* from = reinterpret_cast<const T*>(x_.at(i));
      if (!x_in_place) {
        read_sum(w, i);
        from = w.row;
      }
      T* const to = out_in_place ? reinterpret_cast<T*>(out_.at(i)) : w.row;
      normalise(w, from, to);
      if (!out_in_place) write_row(p_.out.dtype, out_.at(i), out_.step(), n, w.row);
    }
  }

  const T* read_vector(const Array& x, T* to) const {
    if (!x.present()) return nullptr;
    read_row(x.dtype, x.data, x.stride[0], p_.features(), to);
    std::fill(to + p_.features(), to + padded(), T(0));
    return to;
  }

  // row = x + residual, with zeros beyond its end.
  void read_sum(Buffers& w, std::int64_t i) const {
    const std::int64_t n = p_.features();
    read_row(p_.x.dtype, x_.at(i), x_.step(), n, w.row);
    if (p_.residual.present()) {
      read_row(p_.residual.dtype, residual_.at(i), residual_.step(), n, w.residual);
      for (std::int64_t k = 0; k < n; k += kW) store(w.row + k, load<V>(w.row + k) + load<V>(w.residual + k));
    }
    std::fill(w.row + n, w.row + padded(), T(0));
  }

  void normalise(Buffers& w, const T* from, T* to) const {
    const std::int64_t n = p_.features();
    const double count = static_cast<double>(n);
    if (p_.kind == NormProblem::Kind::rms) {
      const double square = sums(from, V{}).squares / count;
      return scale_row(w, from, to, V{}, 0, 1 / std::sqrt(square + p_.eps));
    }
    // The mean rounded, then what the rounding left: differences keep all their digits, however large the mean.
    const T mean = static_cast<T>(sum(from) / count);
    std::fill(w.row + n, w.row + padded(), mean);  // beyond the end the differences are 0 (a row in place has no beyond)
    const V centre = broadcast<V>(mean);
    const Sums s = sums(from, centre);
    const double rest = s.values / count;
    scale_row(w, from, to, centre, rest, 1 / std::sqrt(s.squares / count - rest * rest + p_.eps));
  }

  // to = ((from - centre) - rest) factor weight + bias
  void scale_row(const Buffers& w, const T* from, T* to, V centre, double rest, double factor) const {
    const V scale = broadcast<V>(static_cast<T>(factor));
    const V offset = broadcast<V>(static_cast<T>(-rest * factor));
    const auto each = [&](auto&& affine) {
      for (std::int64_t k = 0; k < padded(); k += kW) store(to + k, affine(fma(load<V>(from + k) - centre, scale, offset), k));
    };
    if (w.weight != nullptr && w.bias != nullptr)
      return each([&](V y, std::int64_t k) { return fma(y, load<V>(w.weight + k), load<V>(w.bias + k)); });
    if (w.weight != nullptr) return each([&](V y, std::int64_t k) { return y * load<V>(w.weight + k); });
    if (w.bias != nullptr) return each([&](V y, std::int64_t k) { return y + load<V>(w.bias + k); });
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
};

}  // namespace

void norm(const NormProblem& problem) {
  with_compute(problem.x.dtype, [&](auto t) { Norm<decltype(t)>(problem).run(); });
}

}  // namespace regard::cpu
