// Tile shapes by head dimension, for either 16-bit type.
#pragma once

#include "cuda/attention_launch.cuh"
#include "cuda/attention_tensor.cuh"

namespace regard::cuda {

template <class T, int kDim, int kQueries, int kKeys> void launch_tensor_shape(AttentionArguments& a, Stream stream) {
  const bool plain = a.bias.data == nullptr && a.mask.data == nullptr && a.alibi_slopes.data == nullptr && a.sinks.data == nullptr &&
                     a.softcap == 0 && a.scale > 0;
  const std::int64_t blocks = blocks_of(a, kQueries);
  constexpr int bytes = TensorShape<kDim, kQueries, kKeys>::kSharedBytes;
  launch(plain ? attention_tensor<T, kDim, kQueries, kKeys, true> : attention_tensor<T, kDim, kQueries, kKeys, false>, blocks,
         kTensorThreads, bytes, stream, a);
}

template <class T> void launch_tensor(AttentionArguments a, int shared_bytes, Stream stream) {
  const int dim = std::max(a.dim_qk, a.dim_v);
  if (dim <= 64)
    launch_tensor_shape<T, 64, 128, 64>(a, stream);
  else if (dim <= 128)
    launch_tensor_shape<T, 128, 128, 64>(a, stream);
  else if (shared_bytes >= TensorShape<256, 64, 64>::kSharedBytes)
    launch_tensor_shape<T, 256, 64, 64>(a, stream);
  else
    launch_tensor_shape<T, 256, 64, 32>(a, stream);  // 96 KiB: consumer cards
}

}  // namespace regard::cuda
