// Dot-product attention, forward: which kernel has a problem, and the copies that the tensor-core kernel asks for.
//
// The choice hangs on dtype, lengths, head dimensions, options and device alone, so that a result's bits never depend on strides.

#include <cmath>

#include "cuda/attention_launch.cuh"
#include "cuda/pack.cuh"

namespace regard::cuda {
namespace {

bool takes_tensor_cores(const AttentionProblem& p, const Device& device) {
  if (p.query.dtype != DType::float16 && p.query.dtype != DType::bfloat16) return false;
  if (p.dropout.present()) return false;
  if (device.capability < 80 || std::max(p.dim_qk(), p.dim_v()) > kTensorDim) return false;
  // Unscaled products must not overflow where scaled scores do not.
  return p.scale == 0 || std::abs(p.scale) >= 0x1p-64;
}

}  // namespace

void attention_forward(const AttentionProblem& p, const Queue& queue) {
  if (p.batch() * p.heads() * p.len_q() == 0) return;
  for (const std::int64_t n : {p.batch(), p.heads(), p.len_q(), p.len_kv(), p.dim_qk(), p.dim_v()})
    if (n > kMostElements) throw Error("attention: no CUDA kernel for axes of 2^31 - 1024 elements or more");
  const OnDevice here(queue.device);
  const Device device = cuda::device(queue.device);
  AttentionArguments a = arguments_of(p);
  if (p.len_q() <= kDecodeQueries && std::max(p.dim_qk(), p.dim_v()) <= kDecodeDim && !p.dropout.present())
    return launch_decode(p, a, queue);
  if (!takes_tensor_cores(p, device)) return launch_portable(a, p.query.dtype, queue.stream);

  a.query = view_of(in_chunks(p.query, queue));
  a.key = view_of(in_chunks(p.key, queue));
  a.value = view_of(in_chunks(p.value, queue));
  if (p.query.dtype == DType::float16)
    launch_tensor_half(a, device.shared_bytes, queue.stream);
  else
    launch_tensor_bfloat16(a, device.shared_bytes, queue.stream);
}

}  // namespace regard::cuda
