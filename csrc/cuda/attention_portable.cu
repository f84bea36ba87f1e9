#include "cuda/attention_portable.cuh"

#include "cuda/attention_launch.cuh"

namespace regard::cuda {
namespace {

template <class C, int kColumns> void launch_columns(AttentionArguments& a, Stream stream) {
  using P = Portable<C, kColumns>;
  const int column_blocks = std::max(1, (a.dim_v + kColumns - 1) / kColumns);
  const std::int64_t blocks = blocks_of(a, P::kQueries) * column_blocks;
  chosen({"portable", P::kQueries, P::kKeys, false});
  launch(attention_portable<C, kColumns>, blocks, P::kThreads, static_cast<int>(sizeof(typename P::Shared)), stream, a,
         split_scale(a.scale), column_blocks);
}

}  // namespace

void launch_portable(AttentionArguments a, Stream stream) {
  if (a.type == DType::float64) return launch_columns<double, 64>(a, stream);
  return a.dim_v <= 64 ? launch_columns<float, 64>(a, stream) : launch_columns<float, 128>(a, stream);
}

}  // namespace regard::cuda
