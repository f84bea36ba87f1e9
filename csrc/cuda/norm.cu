#include "cuda/norm.cuh"

#include <climits>

#include "cuda/operations.h"

namespace regard::cuda {
namespace {

// Whether each row starts at a multiple of 16 bytes and has no gaps.
bool in_vectors(const Array& x) {
  if (!x.present()) return true;
  std::int64_t odd = reinterpret_cast<std::intptr_t>(x.data) % 16;
  for (int axis = 0; axis < x.rank - 1; ++axis)
    if (x.shape[axis] > 1) odd |= x.stride[axis] % 16;
  return odd == 0 && x.stride[x.rank - 1] == size_of(x.dtype);
}

}  // namespace

void norm(const NormProblem& p, const Queue& queue) {
  const Rows rows(p.x);
  if (p.features() == 0 || rows.count() == 0) return;
  if (p.features() > INT_MAX - 1024) throw Error("no CUDA kernel for rows of 2^31 - 1024 elements or more");
  const OnDevice here(queue.device);
  const NormArguments a{rows,
                        Rows(p.residual.present() ? p.residual : p.x),
                        Rows(p.out),
                        p.residual.present(),
                        in_vectors(p.x) && in_vectors(p.residual) && in_vectors(p.out),
                        p.weight.data,
                        p.bias.data,
                        p.weight.stride[0],
                        p.bias.stride[0],
                        static_cast<int>(p.features()),
                        p.eps,
                        p.kind};
  with_type(p.x.dtype, [&](auto t) {
    using T = decltype(t);
    launch(normalise_rows<T>, rows.count(), kNormThreads, kNormThreads / kWarp * static_cast<int>(sizeof(Compute<T>)), queue.stream, a);
  });
}

}  // namespace regard::cuda
