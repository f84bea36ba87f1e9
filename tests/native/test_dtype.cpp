// Conversions of the 16-bit floats: every one of the 65,536 patterns, and every rounding decision between two of them.

#include <algorithm>
#include <cstring>
#include <vector>

#include "check.h"
#include "core/dtype.h"
#include "cpu/simd.h"

namespace regard::test {
namespace {

using cpu::kWidth;

// The value of a pattern with `fraction` fraction bits, from the format's definition.
template <int Fraction> double value_of(std::uint16_t bits) {
  constexpr int bias = (1 << (14 - Fraction)) - 1;
  const int exponent = bits >> Fraction & ((1 << (15 - Fraction)) - 1);
  const int fraction = bits & ((1 << Fraction) - 1);
  const double sign = bits & 0x8000 ? -1 : 1;
  if (exponent == (1 << (15 - Fraction)) - 1) return fraction != 0 ? std::nan("") : sign * HUGE_VAL;
  if (exponent == 0) return sign * std::ldexp(fraction, 1 - bias - Fraction);
  return sign * std::ldexp((1 << Fraction) + fraction, exponent - bias - Fraction);
}

bool same(double a, double b) { return std::isnan(a) ? std::isnan(b) : a == b && std::signbit(a) == std::signbit(b); }

// Converts as the kernels do: kWidth elements at a time. `x.size()` is a multiple of every width.
template <class S> std::vector<float> widen(const std::vector<S>& x) {
  std::vector<float> y(x.size());
  for (std::size_t i = 0; i < x.size(); i += kWidth<float>) cpu::store(y.data() + i, cpu::load_as(x.data() + i));
  return y;
}
template <class S> std::vector<S> narrow(const std::vector<float>& x) {
  std::vector<S> y(x.size());
  for (std::size_t i = 0; i < x.size(); i += kWidth<float>) cpu::store_as(y.data() + i, cpu::load<cpu::Vec<float>>(x.data() + i));
  return y;
}

template <class S, int Fraction> void test_every_pattern() {
  std::vector<S> all(65536);
  for (int i = 0; i < 65536; ++i) all[static_cast<std::size_t>(i)].bits = static_cast<std::uint16_t>(i);
  const std::vector<float> wide = widen(all);
  const std::vector<S> back = narrow<S>(wide);
  for (std::size_t i = 0; i < all.size(); ++i) {
    const double wanted = value_of<Fraction>(all[i].bits);
    CHECK(same(to_float(all[i]), wanted));
    CHECK(same(wide[i], wanted));
    if (std::isnan(wanted)) {
      CHECK(std::isnan(to_float(from_float<S>(wide[i]))) && std::isnan(to_float(back[i])));
    } else {
      CHECK(from_float<S>(wide[i]).bits == all[i].bits && back[i].bits == all[i].bits);
    }
  }
}

// All 256 patterns of the 8-bit storage types.
void test_eight_bits() {
  std::vector<Int8> whole(256);
  std::vector<Float8> eighths(256);
  for (int i = 0; i < 256; ++i) {
    whole[static_cast<std::size_t>(i)].value = static_cast<std::int8_t>(i - 128);
    eighths[static_cast<std::size_t>(i)].bits = static_cast<std::uint8_t>(i);
  }
  const std::vector<float> wide = widen(whole);
  const std::vector<float> wide_eighths = widen(eighths);
  for (int i = 0; i < 256; ++i) {
    const auto at = static_cast<std::size_t>(i);
    CHECK(wide[at] == static_cast<float>(i - 128) && to_float(whole[at]) == wide[at]);
    // 1 sign, 4 exponent (bias 7) and 3 fraction bits; all ones is NaN.
    const int exponent = i >> 3 & 15;
    const double magnitude = exponent == 0 ? std::ldexp(i & 7, -9) : std::ldexp(8 + (i & 7), exponent - 10);
    const double wanted = (i & 127) == 127 ? std::nan("") : i & 128 ? -magnitude : magnitude;
    CHECK(same(wide_eighths[at], wanted) && same(to_float(eighths[at]), wanted));
  }
}

// Between neighbours a < b: the middle goes to the even one, the floats beside the middle to the nearer one. After the
// largest finite value comes inf, at the place where the next value would be.
template <class S, int Fraction> void test_every_rounding() {
  constexpr int infinity = ((1 << (15 - Fraction)) - 1) << Fraction;
  std::vector<float> x;
  std::vector<std::uint16_t> wanted;
  for (int sign = 0; sign <= 0x8000; sign += 0x8000)
    for (int i = 0; i < infinity; ++i) {
      const double a = value_of<Fraction>(static_cast<std::uint16_t>(i));
      const double gap = i + 1 < infinity ? value_of<Fraction>(static_cast<std::uint16_t>(i + 1)) - a
                                          : a - value_of<Fraction>(static_cast<std::uint16_t>(i - 1));
      const auto middle = static_cast<float>(a + gap / 2);
      const float around[] = {std::nextafter(middle, 0.0f), middle, std::nextafter(middle, HUGE_VALF)};
      const int rounded[] = {i, i + (i & 1), i + 1};
      for (int k = 0; k < 3; ++k) {
        x.push_back(sign != 0 ? -around[k] : around[k]);
        wanted.push_back(static_cast<std::uint16_t>(rounded[k] | sign));
      }
    }
  for (const float special : {0x1p-149f, 0x1p-126f, 1e-30f, 3e38f, 65519.996f, 65520.0f, 65536.0f}) {
    x.push_back(special);
    wanted.push_back(from_float<S>(special).bits);
  }
  const std::size_t n = x.size();
  while (x.size() % 16 != 0) x.push_back(0);
  const std::vector<S> y = narrow<S>(x);
  for (std::size_t i = 0; i < n; ++i) {
    CHECK(from_float<S>(x[i]).bits == wanted[i]);
    CHECK(y[i].bits == wanted[i]);
  }
}

// NaNs of every payload stay NaNs, also those whose payload lies in the bits that are cut off.
template <class S> void test_nan() {
  for (std::uint32_t payload = 1; payload < 0x800000u; payload = payload * 2 + 1)
    for (const std::uint32_t sign : {0u, 0x80000000u}) {
      const std::vector<float> x(16, float_of(sign | 0x7f800000u | payload));
      CHECK(std::isnan(to_float(from_float<S>(x[0]))));
      CHECK(std::isnan(to_float(narrow<S>(x)[0])));
    }
}

}  // namespace

void test_dtype() {
  test_every_pattern<Half, 10>();
  test_every_pattern<BFloat16, 7>();
  test_every_rounding<Half, 10>();
  test_every_rounding<BFloat16, 7>();
  test_nan<Half>();
  test_nan<BFloat16>();
  test_eight_bits();
}

}  // namespace regard::test
