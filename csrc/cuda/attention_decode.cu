#include "cuda/attention_decode.cuh"

namespace regard::cuda {
namespace {

// f(T{}) for the type of keys and values that queries of `type` meet here; false where there is none. Others are rare
// enough to be left to the portable kernel.
template <class F> bool with_stored(DType type, DType stored, F&& f) {
  if (type == DType::float64) {
    if (stored == DType::float64) f(double{});
    return stored == DType::float64;
  }
  switch (stored) {
    case DType::float32: f(float{}); return true;
    case DType::float16: f(Half{}); return true;
    case DType::bfloat16: f(BFloat16{}); return true;
    case DType::int8: f(Int8{}); return true;
    case DType::float8_e4m3fn: f(Float8{}); return true;
    default: return false;
  }
}

template <class T, bool kAdditive = false, int kRows = kDecodeRows>
void launch_type(const AttentionProblem& problem, const AttentionArguments& a, const Queue& queue) {
  using C = Compute<T>;
  constexpr int kItem = static_cast<int>(sizeof(C));
  const int most_queries = kAdditive ? static_cast<int>(problem.len_q()) : kDecodeQueries;
  const auto len_kv = static_cast<int>(problem.len_kv());
  DecodeArguments p = decode_arguments<T, kRows>(problem, a, most_queries);
  const std::int64_t heads = static_cast<std::int64_t>(a.batch) * (a.heads / a.group);
  const std::int64_t partials = heads * p.splits * p.rows;
  p.maximum = queue.scratch(partials * kItem);
  p.sum = queue.scratch(partials * kItem);
  if (a.weights.data != nullptr) p.shares = queue.scratch(std::max<std::int64_t>(1, heads * p.rows * len_kv) * kItem);
  p.out = queue.scratch(std::max<std::int64_t>(1, partials * a.dim_v) * kItem);
  const int keys = keys_per_split<C>(len_kv);
  const auto bytes = static_cast<int>(decode_bytes<T, kAdditive, kRows>(a.dim_qk, a.dim_v, keys));
  chosen({"split keys", kRows, keys, false});
  launch(attention_decode<T, kAdditive, kRows>, heads * p.row_tiles * p.splits, kDecodeThreads, bytes, queue.stream, p);
  launch(attention_merge<C>, heads * p.rows, kMergeThreads, static_cast<int>(sizeof(MergeShared<C>)), queue.stream, p);
}

}  // namespace

bool decode_takes(const AttentionProblem& p, int shared_bytes) {
  if (p.dropout.present() || p.block_mask.present() || p.weights.present()) return false;
  bool fits = false;
  const bool known = with_stored(p.query.dtype, p.key.dtype, [&](auto t) {
    using T = decltype(t);
    // As if the sequence were as long as any: its length must not decide which kernel's bits it gets.
    constexpr int most = keys_per_split<Compute<T>>(1 << 30);
    fits = decode_bytes<T>(p.dim_qk(), p.dim_v(), most) <= shared_bytes;
  });
  return known && fits;
}

void launch_decode(const AttentionProblem& problem, AttentionArguments a, const Queue& queue) {
  with_stored(problem.query.dtype, problem.key.dtype, [&](auto t) { launch_type<decltype(t)>(problem, a, queue); });
}

void launch_additive(const AttentionProblem& p, const Array& v, const Queue& queue) {
  AttentionArguments a = arguments_of(p);
  a.additive_v = v.data;
  with_compute(p.query.dtype, [&](auto t) {
    using T = decltype(t);
    if (decode_bytes<T, true>(p.dim_qk(), p.dim_v(), keys_per_split<T>(1 << 30)) > device(queue.device).shared_bytes)
      throw NoKernel("no CUDA kernel for so large a dim: a block's rows do not fit the shared memory");
    // A tanh is dear: the step of a decoder, one query, computes none for rows that are not there.
    p.len_q() == 1 ? launch_type<T, true, 1>(p, a, queue) : launch_type<T, true>(p, a, queue);
  });
}

}  // namespace regard::cuda
