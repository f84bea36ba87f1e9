#include "cuda/attention_decode_tensor.cuh"

#include "cuda/attention_decode_launch.cuh"

namespace regard::cuda {

void launch_decode_tensor(const AttentionProblem& p, const AttentionArguments& a, const Queue& queue) {
  with_tensor_products(p, [&](auto of) { launch_products<typename decltype(of)::type>(p, a, kDecodeQueries, queue); });
}

}  // namespace regard::cuda
