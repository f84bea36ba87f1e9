// Rotary position embedding: a thread has one element of the output, and reads the pair that it comes from.
//
// Su et al., "RoFormer: Enhanced transformer with rotary position embedding" (2021).

#include "cuda/operations.h"
#include "cuda/rotate.cuh"

namespace regard::cuda {
namespace {

constexpr int kThreads = 256;

struct RotaryArguments {
  View x;    // [batch, heads, len, dim]
  View out;  // likewise
  AngleArguments angles;
  DType type;
  std::int64_t elements;
  std::int64_t heads;
  std::int64_t len;
  std::int64_t dim;
};

template <class C> REGARD_KERNEL(kThreads, 1) turn_pairs(const REGARD_GRID_CONSTANT RotaryArguments a) {
  const std::int64_t n = static_cast<std::int64_t>(block_index()) * kThreads + thread_index();
  if (n >= a.elements) return;
  const int d = static_cast<int>(n % a.dim);
  const int i = static_cast<int>(n / a.dim % a.len);
  const std::int64_t head = n / a.dim / a.len;
  const int b = static_cast<int>(head / a.heads);
  const C y = turned<C>(a.angles, a.x.at(b, head % a.heads, i), a.x.stride[3], a.type, b, i, d);
  store_as(a.out.at(b, head % a.heads, i, d), a.type, y);
}

}  // namespace

void rotary(const RotaryProblem& p, const Queue& queue) {
  if (p.x.size() == 0) return;
  const OnDevice here(queue.device);
  const RotaryArguments a{view_of(p.x), view_of(p.out), angles_of(p.angles), p.x.dtype, p.x.size(), p.heads(), p.len(), p.dim()};
  with_compute(p.x.dtype,
               [&](auto t) { launch(turn_pairs<decltype(t)>, (a.elements + kThreads - 1) / kThreads, kThreads, 0, queue.stream, a); });
}

}  // namespace regard::cuda
