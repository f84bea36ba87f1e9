// Host side of attention for few queries: memory for partial results, and both launches.
#pragma once

#include "cuda/attention_decode.cuh"

namespace regard::cuda {

// For arguments that are nothing but a type.
template <class Products> struct Of {
  using type = Products;
};

template <class Products>
void launch_products(const AttentionProblem& problem, const AttentionArguments& a, int most_queries, const Queue& queue) {
  using C = Compute<typename Products::Stored>;
  constexpr int kItem = static_cast<int>(sizeof(C));
  const auto len_kv = static_cast<int>(problem.len_kv());
  DecodeArguments p = decode_arguments<Products>(problem, a, most_queries);
  const std::int64_t heads = static_cast<std::int64_t>(a.batch) * (a.heads / a.group);
  const std::int64_t partials = heads * p.splits * p.rows;
  p.maximum = queue.scratch(partials * kItem);
  p.sum = queue.scratch(partials * kItem);
  if (a.weights.data != nullptr) p.shares = queue.scratch(std::max<std::int64_t>(1, heads * p.rows * len_kv) * kItem);
  p.out = queue.scratch(std::max<std::int64_t>(1, partials * a.dim_v) * kItem);
  const int keys = keys_per_split<C>(len_kv);
  const auto bytes = static_cast<int>(decode_bytes<Products>(a.dim_qk, a.dim_v, keys));
  chosen({"split keys", Products::kRows, keys, Products::kTensor});
  launch(attention_decode<Products>, heads * p.row_tiles * p.splits, kDecodeThreads, bytes, queue.stream, p);
  launch(attention_merge<C>, heads * p.rows, kMergeThreads, static_cast<int>(sizeof(MergeShared<C>)), queue.stream, p);
}

}  // namespace regard::cuda
