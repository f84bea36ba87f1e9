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

inline EpilogueArguments epilogue_of(const LinearProblem& p) {
  using Of = LinearProblem::Activation;
  const bool activates = p.activation != Of::none;
  const Activation kind = p.activation == Of::gelu ? Activation::gelu : p.activation == Of::silu ? Activation::silu : Activation::relu;
  const Array& residual = p.residual.present() ? p.residual : p.out;
  return {Rows(residual), Rows(p.out), p.residual.present(), activates, kind, view_of(p.bias), p.bias.dtype, p.out.dtype};
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
