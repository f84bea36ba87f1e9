// From pooled channels to a weight for each channel: the small network between pooling and rescaling.
#pragma once

#include "core/channel_problem.h"
#include "cpu/lanes.h"
#include "cpu/math.h"
#include "cpu/parallel.h"
#include "cpu/strided.h"

namespace regard::cpu {

inline std::int64_t whole_vectors(std::int64_t n, std::int64_t width) { return (n + width - 1) / width * width; }

template <class T> class GateFunction {
  using V = Vec<T>;

 public:
  explicit GateFunction(const ChannelProblem& p)
      : gate_(p.gate), alpha_(broadcast<V>(static_cast<T>(p.gate_alpha))), beta_(broadcast<V>(static_cast<T>(p.gate_beta))) {}

  V operator()(V x) const {
    switch (gate_) {
      case Gate::tanh: return tanh(x);
      case Gate::hard_sigmoid: return min(broadcast<V>(1), max(V{}, x * alpha_ + beta_));  // in this order NaN stays NaN
      default: return sigmoid(x);
    }
  }
  void apply(T* x, std::int64_t n) const {
    for (std::int64_t i = 0; i < n; i += kWidth<T>) store(x + i, (*this)(load<V>(x + i)));
  }

 private:
  Gate gate_;
  V alpha_;
  V beta_;
};

// In place on whole vectors: x has room for them.
template <class T> inline void activate(Activation activation, T* x, std::int64_t n) {
  using V = Vec<T>;
  const auto each = [&](auto&& f) {
    for (std::int64_t i = 0; i < n; i += kWidth<T>) store(x + i, f(load<V>(x + i)));
  };
  switch (activation) {
    case Activation::relu: return each([](V v) { return relu(v); });
    case Activation::silu: return each([](V v) { return silu(v); });
    case Activation::hard_swish:
      return each([](V v) { return v * min(broadcast<V>(1), max(V{}, v * broadcast<V>(static_cast<T>(1.0 / 6)) + broadcast<V>(T(0.5)))); });
    case Activation::gelu: return each([](V v) { return gelu(v); });
    case Activation::gelu_tanh: return each([](V v) { return gelu_tanh(v); });
  }
}

// A matrix of parameters, rows contiguous (copied where they are not).
struct Matrix {
  const char* data;
  DType dtype;
  std::int64_t rows;
  std::int64_t columns;
  std::int64_t row;  // elements from one row to the next
};

// Rows of a matrix, or channels, between two looks at whether the call is being stopped: as many of usual size take some us,
// and a look 25 ns.
constexpr std::int64_t kBetweenPolls = 1024;

// y = W x: x is zero beyond its columns up to whole vectors, y has room for whole vectors. A row's products are one
// chain over vectors of columns; a vector's width of rows at a time keeps as many chains in flight.
template <class S, class T> class MatrixByVector {
  using V = Vec<T>;
  static constexpr int kW = kWidth<T>;

 public:
  explicit MatrixByVector(const Matrix& w)
      : w_(w), data_(reinterpret_cast<const S*>(w.data)), rest_(w.columns % kW), whole_(w.columns - rest_) {}

  void operator()(const T* x, T* y) const {
    for (std::int64_t r = 0; r < w_.rows; r += kW) {
      if (r > 0 && r % kBetweenPolls == 0 && stop_requested()) return;
      // Beyond a row's end lie other rows, except at the matrix's end: what is loaded of them is masked out again.
      const bool rows_follow = r + kW < w_.rows && (w_.rows - r - kW) * w_.row >= kW;
      const V dots = rows_follow ? group<true>(r, x) : group<false>(r, x);
      store(y + r, dots);
    }
  }

 private:
  template <bool RowsFollow> V group(std::int64_t first, const T* x) const {
    const S* rows[kW];
    V acc[kW] = {};
    for (int i = 0; i < kW; ++i) rows[i] = data_ + (RowsFollow ? first + i : std::min(first + i, w_.rows - 1)) * w_.row;
    for (std::int64_t k = 0; k < whole_; k += kW) {
      const V v = load<V>(x + k);
#pragma GCC unroll 16
      for (int i = 0; i < kW; ++i) acc[i] = fma(load_as(rows[i] + k), v, acc[i]);
    }
    if (rest_ > 0) {
      const V v = load<V>(x + whole_);
      const auto counted = lane_numbers<T>() < broadcast<V>(static_cast<T>(rest_));
#pragma GCC unroll 16
      for (int i = 0; i < kW; ++i) {
        const V w = RowsFollow ? (counted ? load_as(rows[i] + whole_) : V{}) : load_few(rows[i] + whole_, rest_);
        acc[i] = fma(w, v, acc[i]);
      }
    }
    return combine_lanes<Add, kW / 2>(acc);
  }

  const Matrix& w_;
  const S* data_;
  std::int64_t rest_;
  std::int64_t whole_;
};

// The parameters of one call, shared by its images, and the network itself.
template <class T> class ExcitationNetwork {
  using V = Vec<T>;
  static constexpr int kW = kWidth<T>;

 public:
  explicit ExcitationNetwork(const ChannelProblem& p) : p_(p), gate_(p) {
    const std::int64_t channels = whole_vectors(p.channels(), kW);
    const bool mlp = p.through_mlp();
    const std::int64_t hidden = mlp ? whole_vectors(p.reduced(), kW) : 0;
    const std::int64_t kernel = p.excitation == Excitation::convolution ? p.w_channel.shape[0] : 0;
    const auto reduce = scratch_.template reserve<T>(mlp ? copied_size(p.w_reduce) : 0);
    const auto expand = scratch_.template reserve<T>(mlp ? copied_size(p.w_expand) : 0);
    const auto b_reduce = scratch_.template reserve<T>(hidden);
    const auto b_expand = scratch_.template reserve<T>(mlp ? channels : 0);
    const auto taps = scratch_.template reserve<T>(kernel);
    scratch_.acquire();
    if (mlp) {
      reduce_ = matrix(p.w_reduce, scratch_.template at<T>(reduce));
      expand_ = matrix(p.w_expand, scratch_.template at<T>(expand));
      b_reduce_ = vector(p.b_reduce, scratch_.template at<T>(b_reduce), hidden);
      b_expand_ = vector(p.b_expand, scratch_.template at<T>(b_expand), channels);
    }
    if (kernel > 0) taps_ = vector(p.w_channel, scratch_.template at<T>(taps), kernel);
  }

  // Room that weigh() needs beside the pooled values, and the room that those need around them.
  std::int64_t room() const { return whole_vectors(p_.channels(), kW) + (p_.through_mlp() ? 2 * whole_vectors(p_.reduced(), kW) : 0); }
  std::int64_t margin() const { return p_.excitation == Excitation::convolution ? whole_vectors(p_.w_channel.shape[0] / 2, kW) + kW : 0; }

  // weights[channels, whole vectors] from means and maxima (zero beyond the channels, margin() zeros around them).
  void weigh(const T* means, const T* maxima, T* room, T* weights) const {
    const std::int64_t channels = p_.channels();
    if (p_.excitation == Excitation::convolution) {
      convolve(means, weights);
    } else {
      through_mlp(means, room, weights);
      if (maxima != nullptr) {
        T* const other = room + 2 * whole_vectors(p_.reduced(), kW);
        through_mlp(maxima, room, other);
        for (std::int64_t c = 0; c < channels; c += kW) store(weights + c, load<V>(weights + c) + load<V>(other + c));
      }
    }
    gate_.apply(weights, channels);
  }

  const GateFunction<T>& gate() const { return gate_; }

 private:
  void through_mlp(const T* x, T* hidden, T* to) const {
    const std::int64_t padded = whole_vectors(p_.reduced(), kW);
    multiply(reduce_, x, hidden);
    for (std::int64_t r = 0; r < padded; r += kW) store(hidden + r, load<V>(hidden + r) + load<V>(b_reduce_ + r));
    activate(p_.activation, hidden, p_.reduced());
    std::fill(hidden + p_.reduced(), hidden + padded, T(0));
    multiply(expand_, hidden, to);
    for (std::int64_t c = 0; c < p_.channels(); c += kW) store(to + c, load<V>(to + c) + load<V>(b_expand_ + c));
  }

  void convolve(const T* x, T* to) const {
    const std::int64_t kernel = p_.w_channel.shape[0];
    for (std::int64_t c = 0; c < p_.channels(); c += kW) {
      if (c > 0 && c % kBetweenPolls == 0 && stop_requested()) return;
      V acc{};
      for (std::int64_t k = 0; k < kernel; ++k) acc = fma(broadcast<V>(taps_[k]), load<V>(x + c + k - kernel / 2), acc);
      store(to + c, acc);
    }
  }

  static void multiply(const Matrix& w, const T* x, T* y) {
    with_storage<T>(w.dtype, [&](auto s) { MatrixByVector<decltype(s), T>{w}(x, y); });
  }

  static bool rows_contiguous(const Array& w) {
    const std::int64_t size = size_of(w.dtype);
    return (w.shape[1] <= 1 || w.stride[1] == size) && w.stride[0] >= w.shape[1] * size && w.stride[0] % size == 0;
  }
  static std::int64_t copied_size(const Array& w) { return rows_contiguous(w) ? 0 : w.size(); }
  static Matrix matrix(const Array& w, T* copy) {
    const std::int64_t rows = w.shape[0];
    const std::int64_t columns = w.shape[1];
    if (rows_contiguous(w)) return {w.data, w.dtype, rows, columns, w.stride[0] / size_of(w.dtype)};
    // Some columns at a time: of a transposed matrix, rows that follow read the same lines.
    constexpr std::int64_t kTogether = 64;
    for (std::int64_t c = 0; c < columns; c += kTogether)
      for (std::int64_t r = 0; r < rows; ++r)
        read_row(w.dtype, w.at(r, c), w.stride[1], std::min(kTogether, columns - c), copy + r * columns + c);
    return {reinterpret_cast<const char*>(copy), dtype_of<T>(), rows, columns, columns};
  }
  static const T* vector(const Array& x, T* copy, std::int64_t padded) {
    std::fill_n(copy, padded, T(0));
    if (x.present()) read_row(x.dtype, x.data, x.stride[0], x.shape[0], copy);
    return copy;
  }

  const ChannelProblem& p_;
  GateFunction<T> gate_;
  Scratch scratch_;
  Matrix reduce_{};
  Matrix expand_{};
  const T* b_reduce_ = nullptr;
  const T* b_expand_ = nullptr;
  const T* taps_ = nullptr;
};

}  // namespace regard::cpu
