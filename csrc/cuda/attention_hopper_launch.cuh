// Instantiations by head dimension, for either 16-bit type; the grid and the order of its work.
#pragma once

#include <numeric>

#include "cuda/attention_hopper.cuh"
#include "cuda/attention_launch.cuh"

namespace regard::cuda {

// The arrays have tensor maps. A box of keys lies in one page.
inline HopperArguments hopper_arguments(const TileArrays& tiles, AttentionArguments a, int keys) {
  HopperArguments p{};
  const std::int64_t items = blocks_of(a, kHopperQueries);
  if (items > kMostElements) throw NoKernel("no CUDA kernel for so many heads and queries");
  p.items = static_cast<int>(items);
  p.a = a;
  p.query = tensor_map_of(tiles.query, kHopperQueries);
  p.box = a.tiles_are_paged && a.len_kv > a.page_size ? std::gcd(keys, a.page_size) : keys;
  p.key = tensor_map_of(tiles.key, p.box);
  p.value = tensor_map_of(tiles.value, p.box);
  // Keys and values of a section may take half of an H100's L2 cache of 50 MiB.
  constexpr std::int64_t kSectionBytes = 25 << 20;
  const std::int64_t bytes = static_cast<std::int64_t>(a.len_kv) * (a.dim_qk + a.dim_v) * 2;
  const std::int64_t heads = std::max<std::int64_t>(1, kSectionBytes / bytes) * a.group;
  p.section = static_cast<int>(std::min(heads, items / a.tiles));
  return p;
}

template <class T, int kDim, int kDimV, bool kPlain>
void launch_hopper_shape(const TileArrays& tiles, const AttentionArguments& a, int processors, Stream stream) {
  using Shared = HopperShared<kDim, kDimV, kPlain>;
  const HopperArguments p = hopper_arguments(tiles, a, Shared::kKeys);
  chosen({"warpgroups", kHopperQueries, Shared::kKeys, true});
  launch(attention_hopper<T, kDim, kDimV, kPlain>, std::min(p.items, processors), kHopperThreads, Shared::kSharedBytes, stream, p);
}

template <class T, int kDim, int kDimV = kDim>
void launch_hopper_dim(const TileArrays& tiles, const AttentionArguments& a, int processors, Stream stream) {
  (is_plain(a) ? launch_hopper_shape<T, kDim, kDimV, true> : launch_hopper_shape<T, kDim, kDimV, false>)(tiles, a, processors, stream);
}

template <class T> void launch_hopper(const TileArrays& tiles, const AttentionArguments& a, const Device& device, Stream stream) {
  const int dim = std::max(a.dim_qk, a.dim_v);
  if (dim <= 64)
    launch_hopper_dim<T, 64>(tiles, a, device.processors, stream);
  else if (dim <= 128)
    launch_hopper_dim<T, 128>(tiles, a, device.processors, stream);
  else if (a.dim_qk <= 192 && a.dim_v <= 128)
    launch_hopper_dim<T, 192, 128>(tiles, a, device.processors, stream);  // DeepSeek's multi-head latent attention, before its cache
  else
    launch_hopper_dim<T, 256>(tiles, a, device.processors, stream);
}

}  // namespace regard::cuda
