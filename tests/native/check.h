// The whole test framework: CHECK, a seeded generator, and the list of tests.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>

namespace regard::test {

inline int checks = 0;
inline int failures = 0;

inline bool report(bool ok, const char* file, int line, const char* what) {
  ++checks;
  if (!ok && ++failures <= 20) std::printf("%s:%d: failed: %s\n", file, line, what);
  return ok;
}

// splitmix64: the same numbers on every machine.
class Random {
 public:
  explicit Random(std::uint64_t seed) : state_(seed) {}
  std::uint64_t bits() {
    std::uint64_t z = state_ += 0x9e3779b97f4a7c15u;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return z ^ z >> 31;
  }
  double uniform(double low, double high) { return low + (high - low) * static_cast<double>(bits() >> 11) * 0x1p-53; }

 private:
  std::uint64_t state_;
};

// The distance of `got` from `wanted` in units of the last place of T at `wanted` (subnormals: of the smallest normal).
template <class T> double ulps(T got, long double wanted) {
  constexpr int digits = sizeof(T) == 4 ? 24 : 53;
  constexpr int lowest = sizeof(T) == 4 ? -125 : -1021;
  if (static_cast<long double>(got) == wanted) return 0;
  int exponent = 0;
  std::frexp(wanted, &exponent);
  const long double unit = std::ldexp(1.0L, (exponent < lowest ? lowest : exponent) - digits);
  return static_cast<double>(std::abs((static_cast<long double>(got) - wanted) / unit));
}

void test_attention();
void test_cache();
void test_dtype();
void test_parallel();
void test_recurrent();
void test_sequences();
void test_simd();
void test_strided();
void test_tiles();

}  // namespace regard::test

#define CHECK(condition) ::regard::test::report(static_cast<bool>(condition), __FILE__, __LINE__, #condition)
