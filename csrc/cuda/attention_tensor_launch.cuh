// Tile shapes by head dimension, for either 16-bit type.
#pragma once

#include "cuda/attention_launch.cuh"
#include "cuda/attention_tensor.cuh"

namespace regard::cuda {

template <class T, int kDim, int kQueries, int kKeys, bool kPlain> void launch_tensor_shape(AttentionArguments& a, Stream stream) {
  const std::int64_t blocks = blocks_of(a, kQueries);
  constexpr int bytes = TensorShape<kDim, kQueries, kKeys>::kSharedBytes;
  chosen({"tensor cores", kQueries, kKeys, true});
  launch(attention_tensor<T, kDim, kQueries, kKeys, kPlain>, blocks, kTensorThreads, bytes, stream, a);
}

// Tiles as large as registers allow without a spill: kPlain false needs some for addresses.
template <class T> void launch_tensor(AttentionArguments a, int shared_bytes, Stream stream) {
  const bool plain = is_plain(a);
  const int dim = std::max(a.dim_qk, a.dim_v);
  if (dim <= 64)
    return plain ? launch_tensor_shape<T, 64, 128, 96, true>(a, stream) : launch_tensor_shape<T, 64, 128, 64, false>(a, stream);
  if (dim <= 128)
    return plain ? launch_tensor_shape<T, 128, 128, 32, true>(a, stream) : launch_tensor_shape<T, 128, 128, 32, false>(a, stream);
  if (shared_bytes >= TensorShape<256, 64, 64>::kSharedBytes)
    return plain ? launch_tensor_shape<T, 256, 64, 64, true>(a, stream) : launch_tensor_shape<T, 256, 64, 64, false>(a, stream);
  // Consumer cards have 99 KiB.
  return plain ? launch_tensor_shape<T, 256, 64, 32, true>(a, stream) : launch_tensor_shape<T, 256, 64, 32, false>(a, stream);
}

}  // namespace regard::cuda
