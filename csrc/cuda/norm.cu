#include "cuda/norm.cuh"

#include "cuda/operations.h"
#include "cuda/view.cuh"

namespace regard::cuda {

void norm(const NormProblem& p, const Queue& queue) {
  const Rows rows(p.x);
  if (p.features() == 0 || rows.count() == 0) return;
  if (p.features() > kMostElements) throw NoKernel("no CUDA kernel for rows of 2^31 - 1024 elements or more");
  const OnDevice here(queue.device);
  const NormArguments a{rows,
                        Rows(p.residual.present() ? p.residual : p.x),
                        Rows(p.out),
                        p.residual.present(),
                        in_vectors(p.x) && (!p.residual.present() || in_vectors(p.residual)) && in_vectors(p.out),
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
