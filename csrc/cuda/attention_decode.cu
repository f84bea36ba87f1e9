#include "cuda/attention_decode.cuh"

#include "cuda/attention_launch.cuh"

namespace regard::cuda {
namespace {

// Keys a split: enough of them for merging to cost little, and some 64 splits of a long sequence.
int keys_per_split(int len_kv) { return std::clamp((len_kv / 64 + 31) / 32 * 32, 128, 1024); }

template <class T> void launch_type(const AttentionProblem& problem, const AttentionArguments& a, const Queue& queue) {
  using C = Compute<T>;
  constexpr int kItem = static_cast<int>(sizeof(C));
  constexpr int kGrain = Vector<T>::kLength;
  DecodeArguments p{};
  p.a = a;
  p.scale = split_scale(a.scale);
  p.rows = a.group * a.len_q;
  p.row_tiles = (p.rows + kDecodeRows - 1) / kDecodeRows;
  p.keys = keys_per_split(a.len_kv);
  p.splits = std::max(1, (a.len_kv + p.keys - 1) / p.keys);
  p.key_vectors = in_vectors(problem.key);
  p.value_vectors = in_vectors(problem.value);
  const std::int64_t heads = static_cast<std::int64_t>(a.batch) * (a.heads / a.group);
  const std::int64_t partials = heads * p.splits * p.rows;
  p.maximum = queue.scratch(partials * kItem);
  p.sum = queue.scratch(partials * kItem);
  p.out = queue.scratch(std::max<std::int64_t>(1, partials * a.dim_v) * kItem);
  const int bytes = kItem * (kDecodeRows * (a.dim_qk + kGrain) + kDecodeRows * p.keys +
                             kDecodeThreads / kWarp * kDecodeRows * std::min(kWarp * kGrain, 2 * std::max(a.dim_v, kGrain)));
  launch(attention_decode<T>, heads * p.row_tiles * p.splits, kDecodeThreads, bytes, queue.stream, p);
  launch(attention_merge<T>, heads * p.rows, kMergeThreads, 0, queue.stream, p);
}

}  // namespace

void launch_decode(const AttentionProblem& problem, const AttentionArguments& a, const Queue& queue) {
  with_type(problem.query.dtype, [&](auto t) { launch_type<decltype(t)>(problem, a, queue); });
}

}  // namespace regard::cuda
