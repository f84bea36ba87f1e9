// Host side of the attention kernels: which instantiation, how many blocks, how much shared memory.
#pragma once

#include <algorithm>
#include <cmath>

#include "cuda/attention_arguments.cuh"
#include "cuda/operations.h"

namespace regard::cuda {

constexpr int kTensorDim = 256;  // the widest head that the tensor-core kernels have registers for

#ifdef REGARD_HOPPER
constexpr bool kHasHopper = true;  // this build has code for sm_90a
#else
constexpr bool kHasHopper = false;
#endif

constexpr int kDecodeQueries = 8;  // the most that the splitting kernel takes

// Query, key and value as a tensor-core kernel fetches them, of the query's type: the problem's own or copies.
struct TileArrays {
  Array query;
  Array key;
  Array value;
};

// Whether mma.sync has the types of queries and keys, and scores by it are right.
inline bool fits_tensor_cores(const AttentionProblem& p, const Device& device) {
  if (p.query.dtype != DType::float16 && p.query.dtype != DType::bfloat16) return false;
  if (p.key.dtype != p.query.dtype && !is_scaled(p.key.dtype)) return false;
  // Unscaled products must not overflow where scaled scores do not.
  return device.capability >= 80 && (p.scale == 0 || std::abs(p.scale) >= 0x1p-64);
}

// One source an element type: they compile side by side. `shared_bytes` is what a block may have on the device.
void launch_tensor_half(AttentionArguments arguments, int shared_bytes, Stream stream);
void launch_tensor_bfloat16(AttentionArguments arguments, int shared_bytes, Stream stream);
void launch_hopper_half(const TileArrays& tiles, const AttentionArguments& arguments, const Device& device, Stream stream);
void launch_hopper_bfloat16(const TileArrays& tiles, const AttentionArguments& arguments, const Device& device, Stream stream);
void launch_portable(AttentionArguments arguments, Stream stream);

// Whether the splitting kernel has this problem's types, dimensions and options on the device. It says nothing of the number of
// queries.
bool decode_takes(const AttentionProblem& problem, const Device& device);
void launch_decode(const AttentionProblem& problem, const AttentionArguments& arguments, const Device& device, const Queue& queue);
void launch_decode_tensor(const AttentionProblem& problem, const AttentionArguments& arguments, const Queue& queue);

// Additive attention of one head; all arrays but out, weights and mask, v as well, in the compute type.
void launch_additive(const AttentionProblem& problem, const Array& v, const Queue& queue);

// Whether a score is nothing but a product with a positive scale, seen or not, and its weight stays: kernels then scale it in
// the exponent, and a sink is divided by the scale.
inline bool is_plain(const AttentionArguments& a) {
  return a.bias.data == nullptr && !a.blocks.present() && a.mask.data == nullptr && a.alibi_slopes.data == nullptr && a.softcap == 0 &&
         a.scale > 0 && !a.dropout.present();
}

inline std::int64_t blocks_of(AttentionArguments& a, int queries) {
  a.tiles = a.query_starts.present() ? a.len_q / queries + a.batch + 1 : (a.len_q + queries - 1) / queries;
  return static_cast<std::int64_t>(a.query_starts.present() ? 1 : a.batch) * a.heads * a.tiles;
}

}  // namespace regard::cuda
