// Dot-product attention, forward: which kernel has a problem, and the copies that the tensor-core kernels ask for.
//
// The choice hangs on dtypes, number of queries, head dimensions, options and device alone, so that a result's bits never
// depend on strides or on other sequences of the batch. Packed sequences are shared among two kernels, each of which
// leaves the other's alone.

#include "cuda/attention_launch.cuh"
#include "cuda/pack.cuh"

namespace regard::cuda {
namespace {

bool takes_tensor_cores(const AttentionProblem& p, const Device& device) {
  return fits_tensor_cores(p, device) && !p.weights.present() && std::max(p.dim_qk(), p.dim_v()) <= kTensorDim;
}

// Where whole warpgroups multiply. Beyond the rule above, which holds: something to see, as there is no tensor map of an empty
// array, and pages of a multiple of eight rows, as a swizzle has eight, within which no box starts. Nothing is lost in short
// sequences: a tile of queries is as large as the other kernel's, but for heads above 128, where that has 64.
bool takes_warpgroups(const AttentionProblem& p, const Device& device) {
  const bool in_boxes = p.storage != Storage::paged || is_scaled(p.key.dtype) || p.page_size() % 8 == 0;
  return device.capability / 10 == 9 && in_boxes && p.key.size() > 0 && p.value.size() > 0 && p.len_kv() > 0;
}

// The arrays as a kernel fetches them: as they lie where `fits` says so, else copied. Of pages all are gathered or none.
template <class Fits> TileArrays tile_arrays(const AttentionProblem& p, AttentionArguments& a, const Queue& queue, Fits&& fits) {
  const auto fitting = [&](const Array& x) { return fits(x) ? x : packed(x, queue); };
  if (p.storage != Storage::paged || (p.key.dtype == p.query.dtype && fits(p.key) && fits(p.value)))
    return {fitting(p.query), fitting(p.key), fitting(p.value)};
  a.tiles_are_paged = false;
  return {fitting(p.query), gathered(a, p.key, a.key_scales, queue), gathered(a, p.value, a.value_scales, queue)};
}

void launch_tiles(const AttentionProblem& p, AttentionArguments a, const Device& device, const Queue& queue) {
  if (!takes_tensor_cores(p, device)) return launch_portable(a, queue.stream);
  const bool half = p.query.dtype == DType::float16;
  if constexpr (kHasHopper)
    if (takes_warpgroups(p, device)) {
      const TileArrays tiles = tile_arrays(p, a, queue, has_tensor_map);
      return (half ? launch_hopper_half : launch_hopper_bfloat16)(tiles, a, device, queue.stream);
    }
  const TileArrays tiles = tile_arrays(p, a, queue, fits_chunks);
  a.query = view_of(tiles.query);
  a.tile_key = view_of(tiles.key);
  a.tile_value = view_of(tiles.value);
  (half ? launch_tensor_half : launch_tensor_bfloat16)(a, device.shared_bytes, queue.stream);
}

// Whether any packed sequence has up to kDecodeQueries queries, and whether any rows are left for the other kernels.
// Lengths that are on the device are not known here: then both have some.
struct Shares {
  bool few = false;
  bool many = false;
};
Shares shares_of(const AttentionProblem& p) {
  if (p.query_starts.empty()) return {true, true};
  Shares s{false, p.query_starts.back() < p.query.shape[2]};
  for (std::size_t b = 1; b < p.query_starts.size(); ++b) {
    const std::int64_t rows = p.query_starts[b] - p.query_starts[b - 1];
    if (rows > 0) (rows <= kDecodeQueries ? s.few : s.many) = true;
  }
  return s;
}

}  // namespace

void attention_forward(const AttentionProblem& p, const Queue& queue) {
  const bool packed = p.storage == Storage::packed;
  if (p.heads() * p.query.shape[0] * p.query.shape[2] == 0) return;
  for (const Array* x : {&p.query, &p.key, &p.value})
    for (int axis = 0; axis < 4; ++axis)
      if (x->shape[axis] > kMostElements) throw NoKernel("no CUDA kernel for axes of 2^31 - 1024 elements or more");
  constexpr std::int64_t kTile = 128;  // queries, at most
  if (p.len_kv() > kMostElements || p.query.shape[2] + p.batch() * kTile > kMostElements)
    throw NoKernel("no CUDA kernel for 2^31 - 1024 queries or keys, with 128 more for each sequence");
  const OnDevice here(queue.device);
  const Device device = cuda::device(queue.device);
  AttentionArguments a = arguments_of(p);
  // Packed sequences differ in length: what lies beyond the shorter ones is no row's.
  if (packed && p.weights.present()) fill_zeros(p.weights, queue);
  a.few = -1;
  if (!decode_takes(p, device)) return launch_tiles(p, a, device, queue);
  if (!packed) return p.len_q() <= kDecodeQueries ? launch_decode(p, a, device, queue) : launch_tiles(p, a, device, queue);
  a.few = kDecodeQueries;
  const Shares shares = shares_of(p);
  if (shares.few) launch_decode(p, a, device, queue);
  if (shares.many) launch_tiles(p, a, device, queue);
}

}  // namespace regard::cuda
