// Attention against a naive float64 loop, on heap blocks of exactly the arrays' extent (so that AddressSanitizer sees
// any access past them), at sizes around tile and vector edges, and with strides of every kind.

#include <limits>
#include <vector>

#include "arrays.h"
#include "check.h"
#include "cpu/attention_plain.h"
#include "cpu/operations.h"

namespace regard::test {
namespace {

struct Case {
  DType dtype = DType::float32;
  std::int64_t batch = 1, heads = 1, heads_kv = 1, len_q = 1, len_kv = 1, dim_qk = 1, dim_v = 1;
  Strides strides = Strides::packed;
  bool mask = false, bias = false, causal = false;
  Alignment alignment = Alignment::lower_right;
};

// softmax(scale Q K^T + bias) V by its definition; keys that are masked or out of range do not exist.
void naive_row(const AttentionProblem& p, std::int64_t b, std::int64_t h, std::int64_t i, std::vector<double>& out, double& lse) {
  const std::int64_t group = h / (p.heads() / p.heads_kv());
  const std::int64_t diagonal = p.alignment == Alignment::lower_right ? p.len_kv() - p.len_q() : 0;
  std::vector<double> scores;
  std::vector<std::int64_t> keys;
  double most = -std::numeric_limits<double>::infinity();
  for (std::int64_t j = 0; j < p.len_kv(); ++j) {
    if (p.window_right == 0 && j > i + diagonal) continue;
    if (p.mask.present() && *p.mask.at(b, h, i, j) == 0) continue;
    double s = 0;
    for (std::int64_t d = 0; d < p.dim_qk(); ++d) s += value_at(p.query, b, h, i, d) * value_at(p.key, b, group, j, d);
    s *= p.scale;
    if (p.bias.present()) s += value_at(p.bias, b, h, i, j);
    scores.push_back(s);
    keys.push_back(j);
    most = std::max(most, s);
  }
  double sum = 0;
  for (const double s : scores) sum += std::exp(s - most);
  out.assign(static_cast<std::size_t>(p.dim_v()), 0);
  for (std::size_t k = 0; k < keys.size(); ++k)
    for (std::int64_t d = 0; d < p.dim_v(); ++d)
      out[static_cast<std::size_t>(d)] += std::exp(scores[k] - most) / sum * value_at(p.value, b, group, keys[k], d);
  lse = most + std::log(sum);
}

// Values lie in [-1, 1], so errors are absolute: the output's own rounding, and for sums in the compute type a few
// units of its last place.
double tolerance(DType t) {
  switch (t) {
    case DType::float64: return 1e-14;
    case DType::float32: return 2e-6;
    case DType::float16: return 6e-4;
    default: return 5e-3;
  }
}

void run(const Case& c) {
  Random random(static_cast<std::uint64_t>(c.len_q * 1000003 + c.len_kv * 1009 + c.dim_qk * 31 + c.dim_v));
  const Owned query = make(c.dtype, {c.batch, c.heads, c.len_q, c.dim_qk}, c.strides, random);
  const Owned key = make(c.dtype, {c.batch, c.heads_kv, c.len_kv, c.dim_qk}, c.strides, random);
  const Owned value = make(c.dtype, {c.batch, c.heads_kv, c.len_kv, c.dim_v}, c.strides, random);
  const Owned mask = make(DType::boolean, {c.batch, 1, c.len_q, c.len_kv}, c.strides, random);
  const Owned bias = make(DType::float32, {c.heads, c.len_q, c.len_kv}, c.strides, random);
  const Owned out = make(c.dtype, {c.batch, c.heads, c.len_q, c.dim_v}, c.strides, random);
  const Owned lse = make(DType::float32, {c.batch, c.heads, c.len_q}, c.strides, random);
  AttentionProblem p;
  p.query = query.view;
  p.key = key.view;
  p.value = value.view;
  if (c.mask) p.mask = mask.view;
  if (c.bias) p.bias = bias.view;
  if (c.causal) p.window_right = 0;
  p.alignment = c.alignment;
  p.scale = 1 / std::sqrt(static_cast<double>(c.dim_qk));
  p.out = out.view;
  p.lse = lse.view;
  if (!CHECK(!p.check() && !p.check_outputs())) return;
  cpu::attention_forward(p);

  double worst = 0, worst_lse = 0;
  std::vector<double> wanted;
  for (std::int64_t b = 0; b < c.batch; ++b)
    for (std::int64_t h = 0; h < c.heads; ++h)
      for (std::int64_t i = 0; i < c.len_q; ++i) {
        double wanted_lse = 0;
        naive_row(p, b, h, i, wanted, wanted_lse);
        for (std::int64_t d = 0; d < c.dim_v; ++d) {
          const double e = std::abs(value_at(p.out, b, h, i, d) - wanted[static_cast<std::size_t>(d)]);
          worst = e <= worst ? worst : e;
        }
        const double got = value_at(p.lse, b, h, i);
        const double e = got == wanted_lse ? 0 : std::abs(got - wanted_lse);
        worst_lse = e <= worst_lse ? worst_lse : e;
      }
  if (!CHECK(worst <= tolerance(c.dtype)) || !CHECK(worst_lse <= 1e-5))
    std::printf("  dtype %d, heads %lld/%lld, len %lld %lld, dim %lld %lld, strides %d, mask %d bias %d causal %d: %g, lse %g\n",
                static_cast<int>(c.dtype), static_cast<long long>(c.heads), static_cast<long long>(c.heads_kv),
                static_cast<long long>(c.len_q), static_cast<long long>(c.len_kv), static_cast<long long>(c.dim_qk),
                static_cast<long long>(c.dim_v), static_cast<int>(c.strides), c.mask, c.bias, c.causal, worst, worst_lse);
}

constexpr DType kFloats[] = {DType::float32, DType::float64, DType::float16, DType::bfloat16};
constexpr Strides kStrides[] = {Strides::packed, Strides::sequence_first, Strides::negative, Strides::gaps, Strides::misaligned};

void test_lengths() {
  // Around tiles of 8 to 48 queries, blocks of 96 keys and items of 192 queries.
  for (const DType t : {DType::float32, DType::float64})
    for (const std::int64_t len_q : {0, 1, 7, 8, 9, 23, 24, 25, 47, 48, 49, 192, 193})
      for (const std::int64_t len_kv : {0, 1, 2, 95, 96, 97, 193})
        for (const bool causal : {false, true}) {
          Case c;
          c.dtype = t;
          c.len_q = len_q;
          c.len_kv = len_kv;
          c.dim_qk = 5;
          c.dim_v = 3;
          c.causal = causal;
          run(c);
        }
}

void test_dimensions() {
  for (const DType t : kFloats)
    for (const std::int64_t dim_qk : {1, 3, 8, 15, 16, 17, 31, 33, 64, 130, 257})
      for (const std::int64_t dim_v : {0, 1, 7, 8, 9, 16, 33, 64, 129}) {
        Case c;
        c.dtype = t;
        c.len_q = 11;
        c.len_kv = 13;
        c.dim_qk = dim_qk;
        c.dim_v = dim_v;
        run(c);
      }
}

void test_strides_and_options() {
  for (const DType t : kFloats)
    for (const Strides s : kStrides)
      for (int options = 0; options < 8; ++options) {
        Case c;
        c.dtype = t;
        c.strides = s;
        c.batch = 2;
        c.heads = 6;
        c.heads_kv = options % 3 == 0 ? 6 : options % 3 == 1 ? 2 : 1;
        c.len_q = 29;
        c.len_kv = 101;
        c.dim_qk = 19;
        c.dim_v = 10;
        c.mask = (options & 1) != 0;
        c.bias = (options & 2) != 0;
        c.causal = (options & 4) != 0;
        c.alignment = options >= 6 ? Alignment::upper_left : Alignment::lower_right;
        run(c);
      }
}

void test_empty() {
  for (const std::int64_t batch : {0, 1})
    for (const std::int64_t heads : {0, 2}) {
      Case c;
      c.batch = batch;
      c.heads = heads;
      c.heads_kv = heads;
      c.len_q = 3;
      c.len_kv = 4;
      run(c);
    }
}

}  // namespace

void test_attention() {
  test_lengths();
  test_dimensions();
  test_strides_and_options();
  test_empty();
}

}  // namespace regard::test
