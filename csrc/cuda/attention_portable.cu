#include "cuda/attention_portable.cuh"

#include <cmath>

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
  switch (dtype) {
    case DType::float64: return launch_type<double>(a, stream);
    case DType::float32: return launch_type<float>(a, stream);
    case DType::float16: return launch_type<Half>(a, stream);
    default: return launch_type<BFloat16>(a, stream);
  }
}

}  // namespace regard::cuda
