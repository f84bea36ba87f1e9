// Elementary functions on vectors that more than one operation needs. exp and exp2 live in simd.h.
#pragma once

#include <iterator>

#include "cpu/simd.h"

namespace regard::cpu {

// x / divisor, given 1 / divisor: one Newton step has a true division's rounding at a third of its cost, in a loop.
template <class V> inline V divided(V x, V divisor, V inverse) {
  const V quotient = x * inverse;
  return fma(fma(-quotient, divisor, x), inverse, quotient);
}

// tanh for 0 <= a < 0.625, float: x + x^3 p(x^2)
inline Vec<float> tanh_small(Vec<float> a) {
  using V = Vec<float>;
  const V z = a * a;
  V p = broadcast<V>(-5.70498872745e-3f);
  p = fma(p, z, broadcast<V>(2.06390887954e-2f));
  p = fma(p, z, broadcast<V>(-5.37397155531e-2f));
  p = fma(p, z, broadcast<V>(1.33314422036e-1f));
  p = fma(p, z, broadcast<V>(-3.33332819422e-1f));
  return fma(p * z, a, a);
}

// tanh, within 2 ulp (double: 4): an odd polynomial where 1 - 2 / (e^2x + 1) would cancel, that form elsewhere.
template <class V> inline V tanh(V x) {
  using T = LaneOf<V>;
  constexpr T one = sizeof(T) == 4 ? T(10) : T(20);  // beyond, tanh is 1 to the last place
  const V a = min(broadcast<V>(one), abs(x));
  const V large = 1 - 2 * reciprocal(exp_normal(a + a) + 1);
  V small;
  if constexpr (sizeof(T) == 4) {
    small = tanh_small(a);
  } else {
    // e^2a - 1 without cancellation: with t = tanh(a/2) by its continued fraction, tanh a = 2 t / (1 + t^2).
    const V h = a * T(0.5);
    const V z = h * h;
    V d = broadcast<V>(19);
    for (int n = 17; n >= 1; n -= 2) d = n + z / d;
    const V t = h / d;
    small = 2 * t / fma(t, t, broadcast<V>(1));
  }
  const V y = a < T(0.625) ? small : large;
  return x < 0 ? -y : x == x ? y : x;
}

// The same bits, sooner where whole vectors are small: capped scores mostly are.
inline Vec<double> tanh_of_small(Vec<double> x) { return tanh(x); }
inline Vec<float> tanh_of_small(Vec<float> x) {
  const Vec<float> a = abs(x);
  if (!all_below(a, broadcast<Vec<float>>(0.625f))) return tanh(x);
  const Vec<float> y = tanh_small(a);
  return x < 0 ? -y : y;
}

// P(t) = (a + 3) exp(a^2) erfc(a) / 2 for a >= 0 at t = (a - 3) / (a + 3): smooth and of one size over the whole range,
// so one polynomial serves it all. Highest power first; largest relative error 8.1e-9 (float), 2.0e-17 (double).
template <class T> constexpr T kErfcx[] = {T(0)};
template <>
constexpr float kErfcx<float>[] = {-0.00016593141047f, -0.00024681422508f, 0.0015410854589f, -0.00060897433076f, -0.013419397571f,
                                   0.059763452249f,    -0.15523316736f,    0.29511424043f,   -0.4416972348f,     0.53700345263f};
template <>
constexpr double kErfcx<double>[] = {-8.06592450016279867e-10, -3.19215223411721901e-9,  1.24147811326528728e-9,   2.44065089663048277e-8,
                                     2.00462970515252637e-8,   -1.16593596692047486e-7,  -2.01239710108680022e-7,  4.99750604431559253e-7,
                                     1.38116782677489485e-6,   -2.37489162291263502e-6,  -8.73474676595170573e-6,  0.0000151991955005028337,
                                     0.0000537806245557337877, -0.000138388949173561968, -0.000274154829788942484, 0.00151703100398666458,
                                     -0.000606208314852381219, -0.013413617312475098,    0.0597638806436939722,    -0.155233630950276338,
                                     0.295114178552050182,     -0.441697226584941882,    0.537003453544169853};

// The normal distribution function (1 + erf(x / sqrt 2)) / 2, by erfc of |x|: accurate relative to its own size on both
// sides, where 1 + erf would cancel left of 0.
template <class V> inline V normal_cdf(V x) {
  using T = LaneOf<V>;
  const V magnitude = min(broadcast<V>(60), abs(x));  // erfc is 0 beyond 39 in double; no inf - inf below
  const V square = magnitude * magnitude;
  const V lost = fma(magnitude, magnitude, -square);
  const V r = reciprocal(fma(magnitude, broadcast<V>(T(0.70710678118654752440)), broadcast<V>(3)));
  const V t = fma(r, broadcast<V>(-6), broadcast<V>(1));
  V p = broadcast<V>(kErfcx<T>[0]);
  for (std::size_t i = 1; i < std::size(kErfcx<T>); ++i) p = fma(p, t, broadcast<V>(kErfcx<T>[i]));
  // exp(-(square + lost) / 2): the rounding of the square would cost square / 2 epsilon.
  const V e = exp_nonpositive(square * T(-0.5));
  const V tail = fma(e * T(-0.5), lost, e) * (p * r);
  return x > 0 ? 1 - tail : tail;
}

// Hendrycks & Gimpel, "Gaussian Error Linear Units" (2016): the erf form.
template <class V> inline V gelu(V x) { return x * normal_cdf(x); }

// Its approximation x (1 + tanh u) / 2 with u = sqrt(2 / pi) (x + 0.044715 x^3), as x / (1 + e^-2u): 1 + tanh would cancel left of 0.
template <class V> inline V gelu_tanh(V x) {
  using T = LaneOf<V>;
  return x / (1 + exp(-x * fma(x * x, broadcast<V>(T(0.07135481627260025)), broadcast<V>(T(1.5957691216057308)))));
}

template <class V> inline V sigmoid(V x) { return 1 / (1 + exp(-x)); }

template <class V> inline V silu(V x) { return x / (1 + exp(-x)); }

template <class V> inline V relu(V x) { return x < 0 ? V{} : x; }

}  // namespace regard::cpu
