#include "cuda/attention_portable.cuh"

#include "cuda/attention_launch.cuh"

namespace regard::cuda {
namespace {

template <class T, int kColumns> void launch_columns(AttentionArguments& a, Stream stream) {
  using P = Portable<T, kColumns>;
  const int column_blocks = std::max(1, (a.dim_v + kColumns - 1) / kColumns);
  const std::int64_t blocks = blocks_of(a, P::kQueries) * column_blocks;
  launch(attention_portable<T, kColumns>, blocks, P::kThreads, static_cast<int>(sizeof(typename P::Shared)), stream, a,
         split_scale(a.scale), column_blocks);
}

template <class T> void launch_type(AttentionArguments& a, Stream stream) {
  if (sizeof(T) == 8 || a.dim_v <= 64)
    launch_columns<T, 64>(a, stream);
  else if constexpr (sizeof(T) != 8)
    launch_columns<T, 128>(a, stream);
}

}  // namespace

void launch_portable(AttentionArguments a, DType dtype, Stream stream) {
  with_type(dtype, [&](auto t) { launch_type<decltype(t)>(a, stream); });
}

}  // namespace regard::cuda
