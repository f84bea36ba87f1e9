// What follows the product of a linear layer, element by element: out = activation(y + bias) + residual.
#pragma once

#include "core/linear_problem.h"
#include "core/rows.h"
#include "cuda/excitation.cuh"

namespace regard::cuda {

struct EpilogueArguments {
  Rows residual;
  Rows out;
  bool has_residual;
  bool activates;
  Activation activation;
  View bias;  // [features], or absent
  DType bias_type;
  DType type;  // of residual and out
};

// Of those that there are; `none` is for the caller to see.
inline Activation activation_of(LinearProblem::Activation a) {
  switch (a) {
    case LinearProblem::Activation::gelu: return Activation::gelu;
    case LinearProblem::Activation::silu: return Activation::silu;
    case LinearProblem::Activation::gelu_tanh: return Activation::gelu_tanh;
    default: return Activation::relu;
  }
}

inline EpilogueArguments epilogue_of(const LinearProblem& p) {
  const bool activates = p.activation != LinearProblem::Activation::none;
  const Array& residual = p.residual.present() ? p.residual : p.out;
  return {Rows(residual),  Rows(p.out),  p.residual.present(), activates, activation_of(p.activation),
          view_of(p.bias), p.bias.dtype, p.out.dtype};
}

template <class C> REGARD_DEVICE C bias_of(const EpilogueArguments& a, std::int64_t d) {
  return a.bias.data != nullptr ? load_as<C>(a.bias.at(d), a.bias_type) : C(0);
}

// y with its bias.
template <class C> REGARD_DEVICE void finish_element(const EpilogueArguments& a, std::int64_t row, std::int64_t d, C y) {
  if (a.activates) y = activated(a.activation, y);
  if (a.has_residual) y += load_as<C>(a.residual.at(row) + d * a.residual.step(), a.type);
  store_as(a.out.at(row) + d * a.out.step(), a.type, y);
}

}  // namespace regard::cuda
