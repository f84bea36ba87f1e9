#include "cuda/attention_hopper_launch.cuh"

namespace regard::cuda {

void launch_hopper_half(const AttentionProblem& problem, const AttentionArguments& arguments, const Device& device, Stream stream) {
  launch_hopper<Half>(problem, arguments, device, stream);
}

}  // namespace regard::cuda
