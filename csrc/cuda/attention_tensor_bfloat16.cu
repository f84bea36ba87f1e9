#include "cuda/attention_tensor_launch.cuh"

namespace regard::cuda {

void launch_tensor_bfloat16(AttentionArguments arguments, int shared_bytes, Stream stream) {
  launch_tensor<BFloat16>(arguments, shared_bytes, stream);
}

}  // namespace regard::cuda
