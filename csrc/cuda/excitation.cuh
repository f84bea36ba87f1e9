// From pooled maps to weights: the small network between pooling and rescaling, and CBAM's convolution over positions.
#pragma once

#include "core/channel_problem.h"
#include "cuda/map.cuh"
#include "cuda/view.cuh"

namespace regard::cuda {

struct GateArguments {
  Gate kind;
  double alpha;
  double beta;
};

template <class C> REGARD_DEVICE C gated(const GateArguments& g, C x) {
  if (g.kind == Gate::tanh) return tanh_of(x);
  if (g.kind == Gate::sigmoid) return sigmoid_of(x);
  const C y = x * static_cast<C>(g.alpha) + static_cast<C>(g.beta);
  return y < C(0) ? C(0) : y > C(1) ? C(1) : y;  // NaN stays NaN
}

template <class C> REGARD_DEVICE C activated(Activation kind, C x) {
  switch (kind) {
    case Activation::relu: return x < C(0) ? C(0) : x;
    case Activation::silu: return x / (C(1) + exp_of(-x));
    case Activation::gelu: return x * (C(0.5) * erfc_of(x * C(-0.70710678118654752440)));
    case Activation::gelu_tanh: return x / (C(1) + exp_of(-x * (C(1.5957691216057308) + C(0.07135481627260025) * x * x)));
    default: {
      const C y = x * C(1.0 / 6) + C(0.5);
      return x * (y < C(0) ? C(0) : y > C(1) ? C(1) : y);
    }
  }
}

struct ExcitationArguments {
  Excitation kind;
  Activation activation;
  GateArguments gate;
  int channels;
  int reduced;
  int kernel;   // of the convolution over channels
  View reduce;  // [reduced, channels]
  View b_reduce;
  View expand;  // [channels, reduced]
  View b_expand;
  View taps;            // [kernel]
  const void* mean;     // [batch, channels] in the compute type
  const void* maximum;  // likewise, with Excitation::average_and_maximum
  void* weights;        // [batch, channels]
};

// w[row] . x by one warp: lanes take every 32nd column; all get the sum.
template <class T> REGARD_DEVICE Compute<T> dot(const View& w, int row, const Compute<T>* x, int columns) {
  Compute<T> sum = 0;
  for (int c = thread_index() % kWarp; c < columns; c += kWarp) sum += value_at<T>(w.at(row, c)) * x[c];
  for (int step = 1; step < kWarp; step *= 2) sum += shuffle_xor(sum, step);
  return sum;
}

template <class T> REGARD_DEVICE Compute<T> biased(const View& bias, int n, Compute<T> x) {
  return bias.data != nullptr ? x + value_at<T>(bias.at(n)) : x;
}

// A block has one batch entry; shared memory holds the hidden units, [1 or 2][reduced].
template <class T> REGARD_KERNEL(kMapThreads, 1) excite(const REGARD_GRID_CONSTANT ExcitationArguments a) {
  using C = Compute<T>;
  constexpr int kWarps = kMapThreads / kWarp;
  const C* const mean = entry<C>(a.mean, block_index(), a.channels);
  C* const weights = static_cast<C*>(a.weights) + static_cast<std::int64_t>(block_index()) * a.channels;

  if (a.kind == Excitation::convolution) {
    for (int c = thread_index(); c < a.channels; c += kMapThreads) {
      C sum = 0;
      for (int k = 0; k < a.kernel; ++k) {
        const int from = c + k - a.kernel / 2;
        if (from >= 0 && from < a.channels) sum += value_at<T>(a.taps.at(k)) * mean[from];
      }
      weights[c] = gated(a.gate, sum);
    }
    return;
  }

  C* const hidden = reinterpret_cast<C*>(dynamic_shared());
  const int pools = a.kind == Excitation::average_and_maximum ? 2 : 1;
  const C* const maximum = entry<C>(a.maximum, block_index(), a.channels);
  for (int n = thread_index() / kWarp; n < pools * a.reduced; n += kWarps) {
    const int unit = n % a.reduced;
    const C sum = dot<T>(a.reduce, unit, n < a.reduced ? mean : maximum, a.channels);
    if (thread_index() % kWarp == 0) hidden[n] = activated(a.activation, biased<T>(a.b_reduce, unit, sum));
  }
  block_barrier();
  for (int c = thread_index() / kWarp; c < a.channels; c += kWarps) {
    C sum = biased<T>(a.b_expand, c, dot<T>(a.expand, c, hidden, a.reduced));
    if (pools == 2) sum += biased<T>(a.b_expand, c, dot<T>(a.expand, c, hidden + a.reduced, a.reduced));
    if (thread_index() % kWarp == 0) weights[c] = gated(a.gate, sum);
  }
}

struct ConvolutionArguments {
  GateArguments gate;
  int height;
  int width;
  int kernel;
  int blocks;  // a batch entry
  View taps;   // [1, 2 planes, kernel, kernel]
  View bias;
  const void* mean;  // [batch, positions]
  const void* maximum;
  void* weights;
};

// weights = gate(mean and maximum, convolved, plus bias), zeros around the map.
template <class T> REGARD_KERNEL(kMapThreads, 1) convolve_positions(const REGARD_GRID_CONSTANT ConvolutionArguments a) {
  using C = Compute<T>;
  const int b = block_index() / a.blocks;
  const int n = block_index() % a.blocks * kMapThreads + thread_index();
  const int positions = a.height * a.width;
  if (n >= positions) return;
  const int y0 = n / a.width - a.kernel / 2;
  const int x0 = n % a.width - a.kernel / 2;
  C sum = 0;
  for (int plane = 0; plane < 2; ++plane) {
    const C* const from = entry<C>(plane == 0 ? a.mean : a.maximum, b, positions);
    for (int i = 0; i < a.kernel; ++i)
      for (int j = 0; j < a.kernel; ++j) {
        const int y = y0 + i;
        const int x = x0 + j;
        if (y < 0 || y >= a.height || x < 0 || x >= a.width) continue;
        sum += value_at<T>(a.taps.at(0, plane, i, j)) * from[y * a.width + x];
      }
  }
  static_cast<C*>(a.weights)[static_cast<std::int64_t>(b) * positions + n] = gated(a.gate, biased<T>(a.bias, 0, sum));
}

}  // namespace regard::cuda
