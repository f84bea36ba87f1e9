// Rotary embedding, merging and appending to a cache against plain loops, in heap blocks of exactly the arrays' size, so
// that AddressSanitizer sees any access past them.

#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "arrays.h"
#include "check.h"
#include "cpu/operations.h"
#include "cpu/quantise.h"
#include "cpu/strided.h"

namespace regard::test {
namespace {

double precision(DType t) { return t == DType::float16 ? 0x1p-10 : t == DType::bfloat16 ? 0x1p-7 : 0x1p-21; }

void test_rotary(DType t, std::int64_t dim, std::int64_t pairs, bool interleaved, bool table, Random& numbers) {
  const Owned x = make(t, {2, 3, 5, dim}, numbers), out = make(t, {2, 3, 5, dim}, numbers);
  const Owned cos = table ? make(DType::float32, {9, pairs}, numbers) : make(DType::float32, {2, 5, pairs}, numbers);
  const Owned sin = table ? make(DType::float32, {9, pairs}, numbers) : make(DType::float32, {2, 5, pairs}, numbers);
  const Owned positions = make(DType::int32, {2, 5}, numbers);
  for (int i = 0; i < 10; ++i) {
    const std::int32_t row = static_cast<std::int32_t>(numbers.bits() % 9);
    std::memcpy(positions.view.data + i * 4, &row, 4);
  }
  RotaryProblem p;
  p.x = x.view;
  p.out = out.view;
  p.angles.cos = cos.view;
  p.angles.sin = sin.view;
  p.angles.interleaved = interleaved;
  if (table) p.angles.positions = positions.view;
  if (!CHECK(!p.check())) return;
  cpu::rotary(p);
  const std::int64_t step = interleaved ? 1 : pairs;
  for (std::int64_t b = 0; b < 2; ++b)
    for (std::int64_t h = 0; h < 3; ++h)
      for (std::int64_t i = 0; i < 5; ++i) {
        const char *c = p.angles.cos_at(b, i, 5), *s = p.angles.sin_at(b, i, 5);
        for (std::int64_t k = 0; k < pairs; ++k) {
          const std::int64_t first = interleaved ? 2 * k : k;
          const double u = value_at(x.view, b, h, i, first), v = value_at(x.view, b, h, i, first + step);
          const double cosine = cpu::read<float>(c + 4 * k), sine = cpu::read<float>(s + 4 * k);
          const double near = 2 * precision(t);
          CHECK(std::abs(value_at(out.view, b, h, i, first) - (u * cosine - v * sine)) <= near);
          CHECK(std::abs(value_at(out.view, b, h, i, first + step) - (v * cosine + u * sine)) <= near);
        }
        for (std::int64_t k = 2 * pairs; k < dim; ++k)
          CHECK(std::memcmp(out.view.at(b, h, i, k), x.view.at(b, h, i, k), static_cast<std::size_t>(size_of(t))) == 0);
      }
}

void test_merge(DType t, std::int64_t rows, std::int64_t dim, int parts, Random& numbers) {
  MergeProblem p;
  std::vector<Owned> kept;
  for (int i = 0; i < parts; ++i) {
    kept.push_back(make(t, {rows, dim}, numbers));
    p.outs.push_back(kept.back().view);
    kept.push_back(make(DType::float32, {rows}, numbers));
    p.lses.push_back(kept.back().view);
    const float nothing = -std::numeric_limits<float>::infinity();
    for (std::int64_t r = i % 3; r < rows; r += 3) std::memcpy(kept.back().view.at(r), &nothing, 4);
  }
  const Owned out = make(t, {rows, dim}, numbers), lse = make(DType::float32, {rows}, numbers);
  p.out = out.view;
  p.lse = lse.view;
  if (!CHECK(!p.check())) return;
  cpu::merge_attention(p);
  for (std::int64_t r = 0; r < rows; ++r) {
    double sum = 0;
    for (const Array& x : p.lses) sum += std::exp(value_at(x, r));
    const double got = value_at(lse.view, r);
    CHECK(sum == 0 ? std::isinf(got) && got < 0 : std::abs(got - std::log(sum)) <= 1e-6);
    for (std::int64_t k = 0; k < dim; ++k) {
      double wanted = 0;
      for (int i = 0; i < parts && sum > 0; ++i) {
        const auto at = static_cast<std::size_t>(i);
        wanted += std::exp(value_at(p.lses[at], r)) / sum * value_at(p.outs[at], r, k);
      }
      CHECK(std::abs(value_at(out.view, r, k) - wanted) <= 4 * precision(t));
    }
  }
}

void test_append(DType from, DType to, std::int64_t dim, bool paged, Random& numbers) {
  const Owned key = make(from, {2, 3, 5, dim}, numbers), val = make(from, {2, 3, 5, dim + 1}, numbers);
  const std::int64_t rows = paged ? 1 : 2, slots = 10;
  const Owned keys = make(to, {rows, 3, slots, dim}, numbers), values = make(to, {rows, 3, slots, dim + 1}, numbers);
  const Owned key_scales = make(DType::float32, {rows, 3, slots}, numbers), value_scales = make(DType::float32, {rows, 3, slots}, numbers);
  const Owned places = make(DType::int64, {2, 5}, numbers);
  for (std::int64_t b = 0; b < 2; ++b)
    for (std::int64_t i = 0; i < 5; ++i) {
      const std::int64_t slot = i == 3 ? -1 : paged ? 9 - (5 * b + i) : 2 * i;
      std::memcpy(places.view.at(b, i), &slot, 8);
    }
  AppendProblem p;
  p.key = key.view;
  p.value = val.view;
  p.key_cache = keys.view;
  p.value_cache = values.view;
  if (is_scaled(to)) {
    p.key_scales = key_scales.view;
    p.value_scales = value_scales.view;
  }
  p.slots = places.view;
  p.paged = paged;
  if (!CHECK(!p.check())) return;
  cpu::cache_append(p);
  for (std::int64_t b = 0; b < 2; ++b)
    for (std::int64_t h = 0; h < 3; ++h)
      for (std::int64_t i = 0; i < 5; ++i) {
        if (i == 3) continue;
        const std::int64_t slot = p.place(b, i), row = paged ? 0 : b;
        double top = 0;
        for (std::int64_t k = 0; k < dim; ++k) top = std::max(top, std::abs(value_at(key.view, b, h, i, k)));
        for (std::int64_t k = 0; k < dim; ++k) {
          const double wanted = value_at(key.view, b, h, i, k);
          const double got = value_at(keys.view, row, h, slot, k);
          if (is_scaled(to))
            CHECK(std::abs(value_at(key_scales.view, row, h, slot) * got - wanted) <= (to == DType::int8 ? top / 253 : top / 15));
          else
            CHECK(std::abs(got - wanted) <= precision(to));
        }
      }
}

// Every float8 number, and the middle between it and the next one, which goes to the even one of the two.
void test_float8() {
  for (int bits = 0; bits < 0x7e; ++bits) {
    const Float8 a{static_cast<std::uint8_t>(bits)}, b{static_cast<std::uint8_t>(bits + 1)};
    const float middle = (to_float(a) + to_float(b)) / 2;
    const float samples[] = {to_float(a), std::nextafter(middle, 0.0f), middle, std::nextafter(middle, 1e9f)};
    const int wanted[] = {bits, bits, bits % 2 == 0 ? bits : bits + 1, bits + 1};
    for (int i = 0; i < 4; ++i)
      for (const float sign : {1.0f, -1.0f}) {
        std::vector<float> row(static_cast<std::size_t>(cpu::kWidth<float>), 0.0f);
        row[0] = sign * samples[i];
        row[1] = 448;
        std::vector<char> got(2);
        CHECK(cpu::quantise<Float8>(row.data(), got.data(), 1, 2) == 1);
        CHECK(static_cast<std::uint8_t>(got[0]) == (wanted[i] | (sign < 0 ? 0x80 : 0)));
      }
  }
}

}  // namespace

void test_cache() {
  Random numbers(5);
  for (const DType t : {DType::float32, DType::float64, DType::float16, DType::bfloat16}) {
    for (std::int64_t pairs = 0; pairs <= 34; ++pairs)
      for (const bool interleaved : {false, true}) test_rotary(t, 2 * pairs + pairs % 3, pairs, interleaved, pairs % 2 == 0, numbers);
    for (std::int64_t dim = 1; dim <= 70; dim += dim < 34 ? 1 : 9) test_merge(t, dim % 20, dim, 1 + static_cast<int>(dim % 4), numbers);
    for (const DType to : {DType::float32, DType::float64, DType::float16, DType::bfloat16, DType::int8, DType::float8_e4m3fn})
      for (std::int64_t dim = 1; dim <= 35; dim += 3) test_append(t, to, dim, dim % 2 == 0, numbers);
  }
  test_float8();
}

}  // namespace regard::test
