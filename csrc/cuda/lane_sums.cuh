// Many sums over a warp at once, each left with a lane of its own.
#pragma once

#include "cuda/device.cuh"

namespace regard::cuda {

// Half of 2 kHalf values stay with this lane, their sums with a partner's `step` lanes away; the other half is the partner's.
// The number of values is the compiler's to know: they are in registers then.
template <int kHalf, class C, int kCount> REGARD_DEVICE void halve(C (&x)[kCount], int step = kHalf) {
  const bool upper = (thread_index() & step) != 0;
#pragma unroll
  for (int n = 0; n < kHalf; ++n) {
    const C kept = upper ? x[n + kHalf] : x[n];
    const C given = upper ? x[n] : x[n + kHalf];
    x[n] = kept + shuffle_xor(given, step);
  }
}

// The lanes' values n, summed over the warp, for the lanes that are n modulo kCount: 31 exchanges for 32 sums.
template <class C, int kCount> REGARD_DEVICE C sum_to_lanes(C (&x)[kCount]) {
  static_assert(kCount == 16 || kCount == 32);
  if constexpr (kCount == 32) halve<16>(x);
  halve<8>(x);
  halve<4>(x);
  halve<2>(x);
  halve<1>(x);
  if constexpr (kCount == 16) return x[0] + shuffle_xor(x[0], 16);
  return x[0];
}

// The lanes' values, summed over each `lanes` neighbours, a power of two: lane l of these is left with sums l * kCount / lanes
// and on, kCount / lanes of them; where there are more lanes than values, neighbours have the same.
template <int kLeft, class C, int kCount> REGARD_DEVICE void sum_over(C (&x)[kCount], int lanes) {
  if (lanes == 1) return;
  if constexpr (kLeft > 1) {
    halve<kLeft / 2>(x, lanes / 2);
    sum_over<kLeft / 2>(x, lanes / 2);
  } else {
    for (int step = lanes / 2; step > 0; step /= 2) x[0] += shuffle_xor(x[0], step);
  }
}

}  // namespace regard::cuda
