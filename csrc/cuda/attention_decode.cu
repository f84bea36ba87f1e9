#include "cuda/attention_decode_lanes.cuh"
#include "cuda/attention_decode_launch.cuh"
#include "cuda/attention_decode_tensor.cuh"

namespace regard::cuda {
namespace {

// f(Of<Products>{}) for what multiplies the problem's queries, keys and values by the lanes, if anything does: other types are rare
// enough to be left to the portable kernel.
template <class F> void with_lane_products(const AttentionProblem& p, F&& f) {
  if (p.query.dtype == DType::float64) {
    if (p.key.dtype == DType::float64) f(Of<LaneProducts<double>>{});
    return;
  }
  switch (p.key.dtype) {
    case DType::float32: return f(Of<LaneProducts<float>>{});
    case DType::float16: return f(Of<LaneProducts<Half>>{});
    case DType::bfloat16: return f(Of<LaneProducts<BFloat16>>{});
    case DType::int8: return f(Of<LaneProducts<Int8>>{});
    case DType::float8_e4m3fn: return f(Of<LaneProducts<Float8>>{});
    default: return;
  }
}

}  // namespace

bool decode_takes(const AttentionProblem& p, const Device& device) {
  if (p.dropout.present() || p.block_mask.present() || p.weights.present()) return false;
  if (p.heads() > p.heads_kv() * (kMostElements / kDecodeQueries)) return false;
  bool fits = false;
  const auto look = [&](auto of) {
    using Products = typename decltype(of)::type;
    // As if the sequence were as long as any: its length must not decide which kernel's bits it gets.
    constexpr int most = keys_per_split<Compute<typename Products::Stored>>(1 << 30);
    fits = decode_bytes<Products>(p.dim_qk(), p.dim_v(), most) <= device.shared_bytes;
  };
  if (fits_tensor_cores(p, device))
    with_tensor_products(p, look);
  else
    with_lane_products(p, look);
  return fits;
}

void launch_decode(const AttentionProblem& p, const AttentionArguments& a, const Device& device, const Queue& queue) {
  if (fits_tensor_cores(p, device)) return launch_decode_tensor(p, a, queue);
  with_lane_products(p, [&](auto of) { launch_products<typename decltype(of)::type>(p, a, kDecodeQueries, queue); });
}

void launch_additive(const AttentionProblem& p, const Array& v, const Queue& queue) {
  AttentionArguments a = arguments_of(p);
  a.additive_v = v.data;
  const auto len_q = static_cast<int>(p.len_q());
  with_compute(p.query.dtype, [&](auto t) {
    using T = decltype(t);
    if (decode_bytes<LaneProducts<T, true>>(p.dim_qk(), p.dim_v(), keys_per_split<T>(1 << 30)) > device(queue.device).shared_bytes)
      throw NoKernel("no CUDA kernel for so large a dim: a block's rows do not fit the shared memory");
    // A tanh is dear: the step of a decoder, one query, computes none for rows that are not there.
    len_q == 1 ? launch_products<LaneProducts<T, true, 1>>(p, a, len_q, queue) : launch_products<LaneProducts<T, true>>(p, a, len_q, queue);
  });
}

}  // namespace regard::cuda
