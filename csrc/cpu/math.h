// Elementary functions on vectors that more than one operation needs. exp and exp2 live in simd.h.
#pragma once

#include "cpu/simd.h"

namespace regard::cpu {

// tanh, within 2 ulp (double: 4): an odd polynomial where 1 - 2 / (e^2x + 1) would cancel, that form elsewhere.
template <class V> inline V tanh(V x) {
  using T = LaneOf<V>;
  const V a = abs(x);
  const V e = exp(a + a);
  const V large = 1 - 2 / (e + 1);
  V small;
  if constexpr (sizeof(T) == 4) {
    // x + x^3 p(x^2) for |x| < 0.55
    const V z = x * x;
    V p = broadcast<V>(-5.70498872745e-3f);
    p = fma(p, z, broadcast<V>(2.06390887954e-2f));
    p = fma(p, z, broadcast<V>(-5.37397155531e-2f));
    p = fma(p, z, broadcast<V>(1.33314422036e-1f));
    p = fma(p, z, broadcast<V>(-3.33332819422e-1f));
    small = fma(p * z, a, a);
  } else {
    // e^2a - 1 without cancellation: with t = tanh(a/2) by its continued fraction, tanh a = 2 t / (1 + t^2).
    const V h = a * T(0.5);
    const V z = h * h;
    V d = broadcast<V>(19);
    for (int n = 17; n >= 1; n -= 2) d = n + z / d;
    const V t = h / d;
    small = 2 * t / fma(t, t, broadcast<V>(1));
  }
  const V y = a < T(0.55) ? small : large;
  return x < 0 ? -y : x == x ? y : x;
}

}  // namespace regard::cpu
