// What follows the product of a linear layer, in one pass over it: out = activation(product + bias) + residual.

#include "cuda/linear_epilogue.cuh"
#include "cuda/operations.h"

namespace regard::cuda {
namespace {

constexpr int kThreads = 256;

template <class C>
REGARD_KERNEL(kThreads, 1)
finish_linear(const REGARD_GRID_CONSTANT EpilogueArguments a, const REGARD_GRID_CONSTANT Rows product) {
  const std::int64_t n = static_cast<std::int64_t>(block_index()) * kThreads + thread_index();
  const std::int64_t features = a.out.length();
  if (n >= a.out.count() * features) return;
  const std::int64_t row = n / features;
  const std::int64_t d = n % features;
  C y = load_as<C>(product.at(row) + d * product.step(), a.type);
  if (a.bias.data != nullptr) y += bias_of<C>(a, d);
  finish_element(a, row, d, y);
}

}  // namespace

void finish_linear(const LinearProblem& p, const Array& product, const Queue& queue) {
  const Rows out(p.out);
  if (out.count() * out.length() == 0) return;
  const bool follows = p.bias.present() || p.residual.present() || p.activation != LinearProblem::Activation::none;
  if (!follows && p.out.data == product.data) return;
  const OnDevice here(queue.device);
  with_compute(p.out.dtype, [&](auto t) {
    launch(finish_linear<decltype(t)>, (out.count() * out.length() + kThreads - 1) / kThreads, kThreads, 0, queue.stream, epilogue_of(p),
           Rows(product));
  });
}

}  // namespace regard::cuda
