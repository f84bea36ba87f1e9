// Packed and paged sequences have the bits of each sequence alone; 8-bit pages those of the same values as floats.

#include <cstring>
#include <vector>

#include "arrays.h"
#include "check.h"
#include "cpu/operations.h"
#include "cpu/strided.h"

namespace regard::test {
namespace {

// Rows [start, start + n) of (total, heads, dim) as (1, heads, n, dim).
Array rows_of(Array x, std::int64_t start, std::int64_t n) {
  x.data += start * x.stride[0];
  x.shape[0] = n;
  x.swap_axes(0, 1);
  x.insert_axis(0);
  return x;
}

bool same_rows(const Array& x, const Array& y) {
  bool same = true;
  for (std::int64_t h = 0; h < y.shape[1]; ++h)
    for (std::int64_t i = 0; i < y.shape[2]; ++i)
      for (std::int64_t d = 0; d < y.shape[3]; ++d)
        same = same && std::memcmp(x.at(0, h, i, d), y.at(0, h, i, d), static_cast<std::size_t>(size_of(y.dtype))) == 0;
  return same;
}

void test_packed(DType t) {
  Random random(5);
  std::vector<std::int64_t> starts_q = {0, 5, 5, 6, 60};
  std::vector<std::int64_t> starts_kv = {0, 9, 10, 140, 190};
  const Owned query = make(t, {60, 4, 19}, random);
  const Owned key = make(t, {190, 2, 19}, random);
  const Owned value = make(t, {190, 2, 33}, random);
  const Owned out = make(t, {60, 4, 33}, random);
  AttentionProblem p;
  p.storage = Storage::packed;
  p.query = query.view;
  p.key = key.view;
  p.value = value.view;
  p.out = out.view;
  p.cu_seqlens_q = view_of(starts_q, DType::int64, {5});
  p.cu_seqlens_kv = view_of(starts_kv, DType::int64, {5});
  p.window_right = 0;
  p.alignment = Alignment::lower_right;
  if (!CHECK(!p.check() && !p.check_outputs())) return;
  cpu::attention_forward(p);
  for (std::size_t b = 0; b + 1 < starts_q.size(); ++b) {
    const std::int64_t n = starts_q[b + 1] - starts_q[b];
    const std::int64_t m = starts_kv[b + 1] - starts_kv[b];
    const Owned alone = make(t, {1, 4, n, 33}, random);
    AttentionProblem one;
    one.query = rows_of(query.view, starts_q[b], n);
    one.key = rows_of(key.view, starts_kv[b], m);
    one.value = rows_of(value.view, starts_kv[b], m);
    one.out = alone.view;
    one.window_right = 0;
    one.alignment = Alignment::lower_right;
    if (!CHECK(!one.check() && !one.check_outputs())) return;
    cpu::attention_forward(one);
    CHECK(same_rows(rows_of(out.view, starts_q[b], n), alone.view));
  }
}

// Keys in pages, and the same gathered: float32, since 8-bit values times their scales are.
void test_paged(DType stored, std::int64_t len_q, std::int64_t page_size) {
  Random random(static_cast<std::uint64_t>(len_q * 100 + page_size));
  constexpr std::int64_t batch = 2, pages = 30, heads = 4, groups = 2, dim = 19;
  std::vector<std::int32_t> lengths = {static_cast<std::int32_t>(10 * page_size), static_cast<std::int32_t>(7 * page_size - 1)};
  std::vector<std::int32_t> table(batch * 11, -1);
  for (std::size_t k = 0; k < 10; ++k) table[k] = static_cast<std::int32_t>(29 - 2 * k);
  for (std::size_t k = 0; k < 7; ++k) table[11 + k] = static_cast<std::int32_t>(4 * k);
  const Owned query = make(DType::float32, {batch, heads, len_q, dim}, random);
  const Owned key = make(stored, {pages, page_size, groups, dim}, random);
  const Owned value = make(stored, {pages, page_size, groups, dim}, random);
  const Owned scales = make(DType::float32, {pages, page_size, groups}, random);
  const Owned out = make(DType::float32, {batch, heads, len_q, dim}, random);
  AttentionProblem p;
  p.storage = Storage::paged;
  p.query = query.view;
  p.key = key.view;
  p.value = value.view;
  if (is_scaled(stored)) p.key_scales = p.value_scales = scales.view;
  p.page_table = view_of(table, DType::int32, {batch, 11});
  p.key_lengths = view_of(lengths, DType::int32, {batch});
  p.out = out.view;
  if (!CHECK(!p.check() && !p.check_outputs())) return;
  cpu::attention_forward(p);

  const Owned gathered_key = make(DType::float32, {batch, groups, p.len_kv(), dim}, random);
  const Owned gathered_value = make(DType::float32, {batch, groups, p.len_kv(), dim}, random);
  for (std::int64_t b = 0; b < batch; ++b)
    for (std::int64_t g = 0; g < groups; ++g)
      for (std::int64_t j = 0; j < lengths[static_cast<std::size_t>(b)]; ++j)
        for (std::int64_t d = 0; d < dim; ++d) {
          const std::int64_t page = table[static_cast<std::size_t>(b * 11 + j / page_size)];
          const double unit = is_scaled(stored) ? value_at(scales.view, page, j % page_size, g) : 1.0;
          put(DType::float32, gathered_key.view.at(b, g, j, d), unit * value_at(key.view, page, j % page_size, g, d));
          put(DType::float32, gathered_value.view.at(b, g, j, d), unit * value_at(value.view, page, j % page_size, g, d));
        }
  const Owned wanted = make(DType::float32, {batch, heads, len_q, dim}, random);
  AttentionProblem plain;
  plain.query = query.view;
  plain.key = gathered_key.view;
  plain.value = gathered_value.view;
  plain.key_lengths = p.key_lengths;
  plain.out = wanted.view;
  if (!CHECK(!plain.check() && !plain.check_outputs())) return;
  cpu::attention_forward(plain);
  double worst = 0, largest = 0;
  for_each_element(wanted.view, [&](char* at) {
    const double e = cpu::element(DType::float32, at);
    worst = std::max(worst, std::abs(e - cpu::element(DType::float32, out.view.data + (at - wanted.view.data))));
    largest = std::max(largest, std::abs(e));
  });
  // Scales enter before the products here and after them there: a few roundings of scores of some hundreds at most.
  CHECK(worst <= (is_scaled(stored) ? 1e-4 * largest : 0));
}

void test_bad_indices() {
  Random random(3);
  const Owned x = make(DType::float32, {8, 2, 4}, random);
  for (const std::vector<std::int64_t>& bad :
       {std::vector<std::int64_t>{1, 8}, {0, 9}, {0, 5, 4}, {0, -1, 3}, {0, INT64_MAX}, {0, INT64_MIN}}) {
    std::vector<std::int64_t> starts = bad;
    AttentionProblem p;
    p.storage = Storage::packed;
    p.query = p.key = p.value = x.view;
    p.cu_seqlens_q = p.cu_seqlens_kv = view_of(starts, DType::int64, {static_cast<std::int64_t>(bad.size())});
    const Refusal r = p.check();
    CHECK(r && std::strcmp(r.rule, rules::kEntry) == 0);
  }
}

}  // namespace

void test_sequences() {
  for (const DType t : {DType::float32, DType::float64, DType::float16, DType::bfloat16}) test_packed(t);
  for (const DType t : {DType::float32, DType::int8, DType::float8_e4m3fn})
    for (const std::int64_t len_q : {1, 3, 20})
      for (const std::int64_t page_size : {1, 5, 16}) test_paged(t, len_q, page_size);
  test_bad_indices();
}

}  // namespace regard::test
