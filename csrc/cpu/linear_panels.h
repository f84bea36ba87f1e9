// What the kernels of linear layers share: rows of a copied block, biases, activations.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "core/linear_problem.h"
#include "cpu/blocks.h"
#include "cpu/math.h"
#include "cpu/operations.h"
#include "cpu/projection.h"
#include "cpu/strided.h"

namespace regard::cpu {

// What parallel_for counts, of so many multiply-adds: few rows are bound by reading the weight, and a byte of it, from L3 or memory,
// takes as long as two of these or more.
inline double work_of(const LinearProblem& p, double products) {
  return std::max(products, 2.0 * static_cast<double>(p.weight.size() * size_of(p.weight.dtype)));
}

// to[k] = the k-th of n numbers of two bytes, `step` bytes apart.
inline void copy_halves(const char* from, std::int64_t step, std::int64_t n, char* to) {
  if (step == 2) {
    std::memcpy(to, from, static_cast<std::size_t>(2 * n));
    return;
  }
  for (std::int64_t k = 0; k < n; ++k) std::memcpy(to + 2 * k, from + k * step, 2);
}

template <class T> constexpr int kPanel = static_cast<int>(kPanelBytes / sizeof(T));

// A part of a panel of bfloat16 pairs: to[k][j] = weight[n0 + j][k0 + 2 k], and the next in the upper half, for
// j < columns <= kPanel, k < (depth + 1) / 2; zeros beyond the columns and the depth. The weight is of bfloat16. `staging`
// has room for [kPanel][row_length((depth + 1) / 2)].
void pack_pairs_panel(const Array& weight, std::int64_t n0, int columns, std::int64_t k0, int depth, std::int32_t* to, float* staging);

template <class T> void read_bias(const Array& bias, std::int64_t n0, std::int64_t columns, T* to, std::int64_t padded) {
  if (bias.present()) read_row(bias.dtype, bias.at(n0), bias.stride[0], columns, to);
  std::fill(to + (bias.present() ? columns : 0), to + padded, T(0));
}

// y += residual[i, n0..n0 + columns) for `columns` values; y has room for whole vectors, and so has `staging`. For T = float
// and double, as below.
template <class T> void add_residual(const Array& residual, const char* from, std::int64_t step, std::int64_t columns, T* staging, T* y);

// y[0..n) = activation of each; n is made up to whole vectors.
template <class T> void activate(LinearProblem::Activation a, T* y, std::int64_t n);

// Calls f with the function on vectors.
template <class F> void with_activation(LinearProblem::Activation a, F&& f) {
  using Activation = LinearProblem::Activation;
  switch (a) {
    case Activation::none: return f([](auto v) { return v; });
    case Activation::relu: return f([](auto v) { return relu(v); });
    case Activation::gelu: return f([](auto v) { return gelu(v); });
    case Activation::silu: return f([](auto v) { return silu(v); });
    case Activation::gelu_tanh: return f([](auto v) { return gelu_tanh(v); });
  }
}

// Calls f(problem) with the weight packed for this one call: blocks of rows need not each pack for themselves. T is what
// panels are of.
template <class T, class F> void with_packed(const LinearProblem& problem, Held held, F&& f) {
  PackProblem p{problem.weight, problem.bias, packed_array(problem.out_features(), problem.in_features(), dtype_of<T>(), held), held};
  const Shared<T> memory(p.packed.size());
  p.packed.data = reinterpret_cast<char*>(memory.get());
  pack_linear(p);
  LinearProblem packed = problem;
  packed.packed_out_features = problem.out_features();
  packed.packed = true;
  packed.held = held;
  packed.weight = p.packed;
  packed.bias = Array{};
  f(packed);
}

}  // namespace regard::cpu
