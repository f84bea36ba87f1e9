// What the kernels of linear layers share: rows of a copied block, biases, activations.
#pragma once

#include <algorithm>
#include <cstdint>

#include "core/linear_problem.h"
#include "cpu/blocks.h"
#include "cpu/math.h"
#include "cpu/strided.h"

namespace regard::cpu {

template <class T> constexpr int kPanel = static_cast<int>(kPanelBytes / sizeof(T));

template <class T> void read_bias(const Array& bias, std::int64_t n0, std::int64_t columns, T* to, std::int64_t padded) {
  if (bias.present()) read_row(bias.dtype, bias.at(n0), bias.stride[0], columns, to);
  std::fill(to + (bias.present() ? columns : 0), to + padded, T(0));
}

// y += residual[i, n0..n0 + columns) for `columns` values; y has room for whole vectors, and so has `staging`.
template <class T> void add_residual(const Array& residual, const char* from, std::int64_t step, std::int64_t columns, T* staging, T* y) {
  using V = Vec<T>;
  read_row(residual.dtype, from, step, columns, staging);
  for (std::int64_t n = 0; n < columns; n += kWidth<T>) store(y + n, load<V>(y + n) + load<V>(staging + n));
}

// Calls f with the function on vectors.
template <class F> void with_activation(LinearProblem::Activation a, F&& f) {
  using Activation = LinearProblem::Activation;
  switch (a) {
    case Activation::none: return f([](auto v) { return v; });
    case Activation::relu: return f([](auto v) { return relu(v); });
    case Activation::gelu: return f([](auto v) { return gelu(v); });
    case Activation::silu: return f([](auto v) { return silu(v); });
  }
}

}  // namespace regard::cpu
