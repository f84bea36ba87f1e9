// The vector types' names: functions within their bounds over their whole ranges, and what special values give.

#include <limits>
#include <vector>

#include "check.h"
#include "cpu/math.h"
#include "cpu/simd.h"

namespace regard::test {
namespace {

using namespace cpu;

template <class T> constexpr T kInf = std::numeric_limits<T>::infinity();
template <class T> const T kNaN = std::numeric_limits<T>::quiet_NaN();

template <class T, class F> T one(F&& f, T x) { return f(broadcast<Vec<T>>(x))[0]; }

// The largest error in ulp over `n` samples of [low, high].
template <class T, class F, class R> double worst(F&& f, R&& reference, double low, double high, int n) {
  Random random(7);
  double most = 0;
  T x[kWidth<T>];
  for (int i = 0; i < n; i += kWidth<T>) {
    for (T& each : x) each = static_cast<T>(random.uniform(low, high));
    const Vec<T> y = f(load<Vec<T>>(x));
    for (int k = 0; k < kWidth<T>; ++k) most = std::fmax(most, ulps(static_cast<T>(y[k]), reference(static_cast<long double>(x[k]))));
  }
  return most;
}

bool within(const char* what, std::size_t bytes, double got, double bound) {
  if (!(got <= bound)) std::printf("%s, %zu bytes: %.3f ulp, bound %.3f\n", what, bytes, got, bound);
  return got <= bound;
}

constexpr int kSamples = 1 << 16;

// Measured: 1.14, 1.34; tanh 1.62 (float), 3.15 (double). The baseline has no fused multiply-add and is the worst.
constexpr double kExp2Ulps = 1.25;
constexpr double kExpUlps = 1.5;
template <class T> constexpr double kTanhUlps = sizeof(T) == 4 ? 2 : 4;

template <class T> void test_exp2() {
  const auto f = [](Vec<T> t) { return exp2_scaled(t, broadcast<Vec<T>>(1), Vec<T>{}); };
  const auto reference = [](long double t) { return std::exp2(t); };
  constexpr double lowest = sizeof(T) == 4 ? -126 : -1022;
  CHECK(within("exp2", sizeof(T), worst<T>(f, reference, -1, 0, kSamples), kExp2Ulps));
  CHECK(within("exp2", sizeof(T), worst<T>(f, reference, lowest, 0, kSamples), kExp2Ulps));
  // With log2(e) in two parts it is e^x, as the softmax takes it.
  const T high = static_cast<T>(1.44269504088896340736L);
  const T low = static_cast<T>(1.44269504088896340736L - static_cast<long double>(high));
  const auto e = [&](Vec<T> x) { return exp2_scaled(x, broadcast<Vec<T>>(high), broadcast<Vec<T>>(low)); };
  CHECK(within("e^x", sizeof(T), worst<T>(e, [](long double x) { return std::exp(x); }, lowest * 0.69, 0, kSamples), kExpUlps));
  CHECK(one<T>(f, 0) == 1 && one<T>(f, -0.0) == 1);
  for (int n = 0; n >= static_cast<int>(lowest); --n) CHECK(one<T>(f, static_cast<T>(n)) == std::ldexp(T(1), n));
  // Never a subnormal: exactly 0 below the smallest normal number.
  for (const double t : {std::nextafter(lowest, -1e9) - 1e-3, lowest - 1, lowest - 30, 20 * lowest, -1e30, -static_cast<double>(kInf<T>)})
    CHECK(one<T>(f, static_cast<T>(t)) == 0);
  CHECK(one<T>(f, std::numeric_limits<T>::lowest()) == 0);
  CHECK(std::isnan(one<T>(f, kNaN<T>)));
}

// 2.9e-6 is 24 to 49 ulp.
void test_short_exp2() {
  const auto four = [](Vec<float> t) { return exp2_short<4>(t); };
  const auto six = [](Vec<float> t) { return exp2_short<6>(t); };
  const auto reference = [](long double t) { return std::exp2(t); };
  CHECK(within("short exp2, degree 4", 4, worst<float>(four, reference, -126, 0, kSamples), 50));
  CHECK(within("short exp2, degree 6", 4, worst<float>(six, reference, -126, 0, kSamples), 1.5));
  for (int n = 0; n >= -126; --n) {
    CHECK(one<float>(four, static_cast<float>(n)) == std::ldexp(1.0f, n));
    CHECK(one<float>(six, static_cast<float>(n)) == std::ldexp(1.0f, n));
  }
  for (const float t : {-150.0f, -1e30f, -kInf<float>}) CHECK(one<float>(four, t) == 0 && one<float>(six, t) == 0);
  CHECK(std::isnan(one<float>(four, kNaN<float>)) && std::isnan(one<float>(six, kNaN<float>)));
}

template <class T> void test_exp() {
  const auto f = [](Vec<T> x) { return exp(x); };
  const auto reference = [](long double x) { return std::exp(x); };
  constexpr double top = sizeof(T) == 4 ? 88.72 : 709.78;
  constexpr double bottom = sizeof(T) == 4 ? -87.33 : -708.39;
  CHECK(within("exp", sizeof(T), worst<T>(f, reference, -1, 1, kSamples), kExpUlps));
  CHECK(within("exp", sizeof(T), worst<T>(f, reference, bottom, top, kSamples), kExpUlps));
  CHECK(one<T>(f, 0) == 1);
  CHECK(one<T>(f, kInf<T>) == kInf<T> && one<T>(f, static_cast<T>(top + 0.02)) == kInf<T>);
  CHECK(one<T>(f, -kInf<T>) == 0 && one<T>(f, static_cast<T>(bottom - 1)) == 0);
  CHECK(one<T>(f, std::numeric_limits<T>::max()) == kInf<T> && one<T>(f, std::numeric_limits<T>::lowest()) == 0);
  CHECK(std::isnan(one<T>(f, kNaN<T>)));
}

template <class T> void test_tanh() {
  const auto f = [](Vec<T> x) { return tanh(x); };
  const auto reference = [](long double x) { return std::tanh(x); };
  for (const double range : {1e-30, 1e-3, 0.55, 1.0, 10.0, 100.0})
    CHECK(within("tanh", sizeof(T), worst<T>(f, reference, -range, range, kSamples), kTanhUlps<T>));
  for (const double x : {0.1, 0.54999, 0.55, 0.55001, 3.0, 1e5}) CHECK(one<T>(f, static_cast<T>(-x)) == -one<T>(f, static_cast<T>(x)));
  CHECK(one<T>(f, kInf<T>) == 1 && one<T>(f, -kInf<T>) == -1);
  CHECK(one<T>(f, std::numeric_limits<T>::max()) == 1 && one<T>(f, std::numeric_limits<T>::lowest()) == -1);
  CHECK(one<T>(f, 0) == 0 && one<T>(f, T(-0.0)) == 0);
  CHECK(one<T>(f, std::numeric_limits<T>::denorm_min()) <= std::numeric_limits<T>::denorm_min());
  CHECK(std::isnan(one<T>(f, kNaN<T>)));
}

template <class T> void test_rounding_and_scaling() {
  const auto round = [](Vec<T> x) { return round_to_nearest(x); };
  for (const double x : {0.0, 0.25, 0.5, 0.75, 1.5, 2.5, 1e6 + 0.5, 3e6 + 0.5, 4194303.5, 8388607.0, 8388609.0, 1e15, 1e30})
    for (const double sign : {1.0, -1.0}) CHECK(one<T>(round, static_cast<T>(sign * x)) == std::nearbyint(static_cast<T>(sign * x)));
  CHECK(one<T>(round, kInf<T>) == kInf<T> && one<T>(round, -kInf<T>) == -kInf<T> && std::isnan(one<T>(round, kNaN<T>)));
  constexpr int lowest = std::numeric_limits<T>::min_exponent - 1;
  for (int n = lowest; n <= -lowest + 1; ++n)
    CHECK(one<T>([&](Vec<T> x) { return scale_by_power_of_two(x, broadcast<Vec<T>>(static_cast<T>(n))); }, T(1)) == std::ldexp(T(1), n));
}

template <class T> void test_lanes() {
  using V = Vec<T>;
  constexpr int w = kWidth<T>;
  T x[w];
  T sum = 0;
  for (int i = 0; i < w; ++i) sum += x[i] = static_cast<T>(i % 3 == 1 ? -i : i);
  CHECK(sum_lanes(load<V>(x)) == sum);
  for (int i = 0; i < w; ++i) {
    T y[w] = {};
    y[i] = 5;
    CHECK(max_lanes(load<V>(y)) == 5);
  }
  CHECK(std::signbit(broadcast<V>(T(-0.0))[w - 1]));
  CHECK(std::isnan(broadcast<V>(kNaN<T>)[0]) && broadcast<V>(kInf<T>)[w - 1] == kInf<T>);
  // NaN in the first operand is dropped, in the second it is kept.
  CHECK((max(broadcast<V>(kNaN<T>), broadcast<V>(1))[0] == 1) && std::isnan(max(broadcast<V>(1), broadcast<V>(kNaN<T>))[0]));
  CHECK((min(broadcast<V>(kNaN<T>), broadcast<V>(1))[0] == 1) && std::isnan(min(broadcast<V>(1), broadcast<V>(kNaN<T>))[0]));
  CHECK(select(broadcast<V>(2) > broadcast<V>(1), broadcast<V>(3), broadcast<V>(4))[0] == 3);
  CHECK(abs(broadcast<V>(-2))[0] == 2 && fma(broadcast<V>(2), broadcast<V>(3), broadcast<V>(4))[w - 1] == 10);
}

template <class T> void test_transpose() {
  using V = Vec<T>;
  constexpr int w = kWidth<T>;
  V rows[w];
  for (int r = 0; r < w; ++r)
    for (int c = 0; c < w; ++c) rows[r][c] = static_cast<T>(r * w + c);
  transpose(rows);
  for (int r = 0; r < w; ++r)
    for (int c = 0; c < w; ++c) CHECK(rows[r][c] == static_cast<T>(c * w + r));
}

template <class T> void test_all() {
  test_exp2<T>();
  if constexpr (sizeof(T) == 4) test_short_exp2();
  test_exp<T>();
  test_tanh<T>();
  test_rounding_and_scaling<T>();
  test_lanes<T>();
  test_transpose<T>();
}

}  // namespace

void test_simd() {
  test_all<float>();
  test_all<double>();
}

}  // namespace regard::test
