// Appending to a cache: a warp has the row of one token and head, turns and measures it, and writes what the cache stores.

#include "core/append_problem.h"
#include "cuda/operations.h"
#include "cuda/rotate.cuh"

namespace regard::cuda {
namespace {

constexpr int kThreads = 128;

struct AppendArguments {
  View x;          // [batch, heads_kv, len, dim]
  View cache;      // [batch, heads_kv, slots, dim]
  View scales;     // float [batch, heads_kv, slots], of int8 and float8
  Indices places;  // [batch, len]; -1 leaves a token out
  AngleArguments angles;
  DType type;    // of x
  DType stored;  // of cache
  std::int64_t rows;
  int heads;
  int len;
  int dim;
};

// |y| is at most 448, give or take a rounding: to nearest, ties to even.
REGARD_DEVICE std::uint8_t float8_of(float y) {
  const std::uint32_t u = bits_of(y);
  const std::uint32_t magnitude = u & 0x7fffffffu;
  // From 2^-6 on: rounded at the third bit of the mantissa, and the exponent's bias changed from 127 to 7. Below it steps
  // are 2^-9, the last bit of numbers near 2^14.
  const std::uint32_t normal = (magnitude + 0x7ffffu + (magnitude >> 20 & 1u) - (120u << 23)) >> 20;
  const std::uint32_t subnormal = bits_of(float_of(magnitude) + 0x1p14f) - 0x46800000u;
  return static_cast<std::uint8_t>((float_of(magnitude) < 0x1p-6f ? subnormal : normal) | (u >> 24 & 0x80u));
}

template <class C> REGARD_KERNEL(kThreads, 1) append_rows(const REGARD_GRID_CONSTANT AppendArguments a) {
  const std::int64_t row = static_cast<std::int64_t>(block_index()) * (kThreads / kWarp) + thread_index() / kWarp;
  if (row >= a.rows) return;  // whole warps, and no barrier follows
  const int lane = thread_index() % kWarp;
  const int i = static_cast<int>(row % a.len);
  const auto h = static_cast<int>(row / a.len % a.heads);
  const auto b = static_cast<int>(row / a.len / a.heads);
  const std::int64_t place = a.places.at(b, i);
  if (place < 0) return;
  const char* const from = a.x.at(b, h, i);
  char* const to = a.cache.at(b, h, place);
  if (!is_scaled(a.stored)) {
    for (int d = lane; d < a.dim; d += kWarp)
      store_as(to + d * a.cache.stride[3], a.stored, turned<C>(a.angles, from, a.x.stride[3], a.type, b, i, d));
    return;
  }

  float top = 0;
  float rest = 0;
  for (int d = lane; d < a.dim; d += kWarp) {
    const auto x = static_cast<float>(turned<C>(a.angles, from, a.x.stride[3], a.type, b, i, d));
    rest += x - x;  // NaN where it is not finite
    top = fmaxf(top, fabsf(x));
  }
  for (int step = 1; step < kWarp; step *= 2) {
    rest += shuffle_xor(rest, step);
    top = fmaxf(top, shuffle_xor(top, step));
  }
  const float largest = a.stored == DType::int8 ? 127.0f : 448.0f;
  const float scale = rest == 0.0f ? top / largest : NAN;
  for (int d = lane; d < a.dim; d += kWarp) {
    std::uint8_t number = 0;
    if (scale > 0) {
      // A subnormal scale is rounded so coarsely that quotients may exceed the largest number.
      const float y = static_cast<float>(turned<C>(a.angles, from, a.x.stride[3], a.type, b, i, d)) / scale;
      const float within = fminf(fmaxf(y, -largest), largest);
      number = a.stored == DType::int8 ? static_cast<std::uint8_t>(static_cast<int>(rintf(within))) : float8_of(within);
    }
    to[d * a.cache.stride[3]] = static_cast<char>(number);
  }
  if (lane == 0) write<float>(a.scales.at(b, h, place), scale);
}

void append(const AppendProblem& p, const Array& x, const Array& cache, const Array& scales, const RotaryAngles& angles,
            const Queue& queue) {
  const AppendArguments a{view_of(x),
                          view_of(cache),
                          view_of(scales),
                          indices_of(p.slots),
                          angles_of(angles),
                          x.dtype,
                          cache.dtype,
                          p.batch() * p.heads_kv() * p.len(),
                          static_cast<int>(p.heads_kv()),
                          static_cast<int>(p.len()),
                          static_cast<int>(x.shape[3])};
  constexpr int kRows = kThreads / kWarp;
  with_compute(x.dtype, [&](auto t) { launch(append_rows<decltype(t)>, (a.rows + kRows - 1) / kRows, kThreads, 0, queue.stream, a); });
}

}  // namespace

void cache_append(const AppendProblem& p, const Queue& queue) {
  const OnDevice here(queue.device);
  append(p, p.key, p.key_cache, p.key_scales, p.angles, queue);
  append(p, p.value, p.value_cache, p.value_scales, {}, queue);
}

}  // namespace regard::cuda
