// What follows the product of a linear layer, in one pass over it: out = activation(product + bias) + residual.

#include "core/linear_problem.h"
#include "core/rows.h"
#include "cuda/excitation.cuh"
#include "cuda/operations.h"

namespace regard::cuda {
namespace {

constexpr int kThreads = 256;

struct EpilogueArguments {
  Rows product;
  Rows residual;
  Rows out;
  bool has_residual;
  bool activates;
  Activation activation;
  View bias;  // [features], or absent
  DType type;
};

template <class C> REGARD_KERNEL(kThreads, 1) finish_linear(const REGARD_GRID_CONSTANT EpilogueArguments a) {
  const std::int64_t n = static_cast<std::int64_t>(block_index()) * kThreads + thread_index();
  const std::int64_t features = a.out.length();
  if (n >= a.out.count() * features) return;
  const std::int64_t row = n / features;
  const std::int64_t d = n % features;
  C y = load_as<C>(a.product.at(row) + d * a.product.step(), a.type);
  if (a.bias.data != nullptr) y += load_as<C>(a.bias.at(d), a.type);
  if (a.activates) y = activated(a.activation, y);
  if (a.has_residual) y += load_as<C>(a.residual.at(row) + d * a.residual.step(), a.type);
  store_as(a.out.at(row) + d * a.out.step(), a.type, y);
}

Activation kind_of(LinearProblem::Activation a) {
  switch (a) {
    case LinearProblem::Activation::gelu: return Activation::gelu;
    case LinearProblem::Activation::silu: return Activation::silu;
    default: return Activation::relu;
  }
}

}  // namespace

void finish_linear(const LinearProblem& p, const Array& product, const Queue& queue) {
  const Rows out(p.out);
  if (out.count() * out.length() == 0) return;
  const bool follows = p.bias.present() || p.residual.present() || p.activation != LinearProblem::Activation::none;
  if (!follows && p.out.data == product.data) return;
  const OnDevice here(queue.device);
  const EpilogueArguments a{Rows(product),
                            Rows(p.residual.present() ? p.residual : product),
                            out,
                            p.residual.present(),
                            p.activation != LinearProblem::Activation::none,
                            kind_of(p.activation),
                            view_of(p.bias),
                            p.out.dtype};
  with_compute(p.out.dtype, [&](auto t) {
    launch(finish_linear<decltype(t)>, (out.count() * out.length() + kThreads - 1) / kThreads, kThreads, 0, queue.stream, a);
  });
}

}  // namespace regard::cuda
