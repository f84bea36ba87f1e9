#include "cuda/attention_tensor_launch.cuh"

namespace regard::cuda {

void launch_tensor_half(AttentionArguments arguments, int shared_bytes, Stream stream) {
  launch_tensor<Half>(arguments, shared_bytes, stream);
}

}  // namespace regard::cuda
