#include "cuda/attention_hopper_launch.cuh"

namespace regard::cuda {

void launch_hopper_half(const TileArrays& tiles, const AttentionArguments& arguments, const Device& device, Stream stream) {
  launch_hopper<Half>(tiles, arguments, device, stream);
}

}  // namespace regard::cuda
