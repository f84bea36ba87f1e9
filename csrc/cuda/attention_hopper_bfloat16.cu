#include "cuda/attention_hopper_launch.cuh"

namespace regard::cuda {

void launch_hopper_bfloat16(const AttentionProblem& problem, const AttentionArguments& arguments, const Device& device, Stream stream) {
  launch_hopper<BFloat16>(problem, arguments, device, stream);
}

}  // namespace regard::cuda
