// Multiplicative attention: out = softmax_j(q_i w . k_j) value_j, by attention_forward with one head and scale 1.
//
// The queries are projected, not the keys: q (W k) = (q W) k, and a decoding step has one query but many keys. Projected
// queries stay compute values (float for 16-bit types): rounding them to the input's type would be the largest error.
// Weights, where wanted, are a second pass over the keys: scores of a block of queries, then the softmax along each row.
//
// Luong, Pham & Manning, "Effective Approaches to Attention-based Neural Machine Translation" (2015), section 3.1.

#include <algorithm>
#include <cmath>
#include <limits>

#include "cpu/attention_plain.h"
#include "cpu/operations.h"
#include "cpu/parallel.h"
#include "cpu/projection.h"

namespace regard::cpu {
namespace {

constexpr int kKeys = 96;
constexpr std::int64_t kQueries = 48;
constexpr std::int64_t kScoreBytes = std::int64_t{512} << 10;  // scores an item holds at a time

template <class T> class Weights {
  using V = Vec<T>;
  static constexpr int kW = kWidth<T>;
  static constexpr T kInfinity = std::numeric_limits<T>::infinity();

 public:
  Weights(const MultiplicativeProblem& problem, const Array& query) : p_(problem), query_(query) {
    score_row_ = round_up(p_.len_kv(), kKeys);
    dim_row_ = row_length<T>(p_.dim_k());
    block_ =
        std::clamp<std::int64_t>(kScoreBytes / (std::max<std::int64_t>(score_row_, 1) * static_cast<std::int64_t>(sizeof(T))), 1, kQueries);
  }

  void run() const {
    const std::int64_t blocks = (p_.len_q() + block_ - 1) / block_;
    const double work = static_cast<double>(p_.batch() * p_.len_q()) * static_cast<double>(p_.len_kv()) * static_cast<double>(p_.dim_k());
    parallel_for(p_.batch() * blocks, work, Rehearse::scratch, [&](std::int64_t item) {
      const std::int64_t i0 = item % blocks * block_;
      run_item(item / blocks, i0, static_cast<int>(std::min(block_, p_.len_q() - i0)));
    });
  }

 private:
  void run_item(std::int64_t b, std::int64_t i0, int queries) const {
    const std::int64_t tiled = round_up(queries, Tile<T>::kRows);
    Scratch scratch;
    const auto query_at = scratch.template reserve<T>(tiled * dim_row_);
    const auto scores_at = scratch.template reserve<T>(tiled * score_row_);
    const auto rows_at = scratch.template reserve<T>(kKeys * dim_row_);
    const auto keys_at = scratch.template reserve<T>(p_.dim_k() * kKeys);
    scratch.acquire();
    T* const q = scratch.template at<T>(query_at);
    T* const s = scratch.template at<T>(scores_at);
    T* const rows = scratch.template at<T>(rows_at);
    T* const keys = scratch.template at<T>(keys_at);

    std::fill_n(q, tiled * dim_row_, T(0));
    for (int r = 0; r < queries; ++r) read_row(query_.dtype, query_.at(b, i0 + r), query_.stride[2], p_.dim_k(), q + r * dim_row_);
    const std::int64_t end = p_.keys_of(b);
    for (std::int64_t j0 = 0; j0 < end; j0 += kKeys) {
      if (stop_requested()) return;
      const int n = static_cast<int>(std::min<std::int64_t>(kKeys, end - j0));
      for (int r = 0; r < n; ++r) read_row(p_.key.dtype, p_.key.at(b, j0 + r), p_.key.stride[2], p_.dim_k(), rows + r * dim_row_);
      const int padded = static_cast<int>(round_up(n, kW));
      transpose_padded(rows, dim_row_, n, static_cast<int>(p_.dim_k()), keys, kKeys, padded);
      for (int c = 0; c < padded; c += Tile<T>::kColumns)
        multiply<T, Left::depth_contiguous>(q, dim_row_, keys + c, kKeys, s + j0 + c, score_row_, queries,
                                            std::min(Tile<T>::kColumns, padded - c) / kW, static_cast<int>(p_.dim_k()), nullptr);
    }
    for (int r = 0; r < queries; ++r) softmax(b, i0 + r, end, s + r * score_row_);
  }

  void softmax(std::int64_t b, std::int64_t i, std::int64_t end, T* s) const {
    std::fill(s + end, s + score_row_, -kInfinity);
    if (p_.mask.present())
      for (std::int64_t j = 0; j < end; ++j) s[j] = *p_.mask.at(b, i, j) != 0 ? s[j] : -kInfinity;
    V m = broadcast<V>(-kInfinity);
    for (std::int64_t j = 0; j < end; j += kW) m = max(load<V>(s + j), m);
    const T largest = max_lanes(m);
    const V base = broadcast<V>(largest);
    V sum{};
    for (std::int64_t j = 0; j < end; j += kW) {
      const V weight = exp_nonpositive(load<V>(s + j) - base);
      sum += weight;
      store(s + j, weight);
    }
    const T total = sum_lanes(sum);
    if (total > 0 && total < kInfinity) {
      for (std::int64_t j = 0; j < end; ++j) s[j] = s[j] / total;
      std::fill(s + end, s + p_.len_kv(), T(0));
    } else {
      plain(b, i, end, s);
    }
    write_row(p_.weights.dtype, p_.weights.at(b, i), p_.weights.stride[2], p_.len_kv(), s);
  }

  // A row with no key at all, or not finite: in float64, masked keys skipped.
  void plain(std::int64_t b, std::int64_t i, std::int64_t end, T* s) const {
    double m = -std::numeric_limits<double>::infinity();
    const auto for_each_score = [&](auto&& f) {
      for (std::int64_t j = 0; j < end; ++j) {
        if (p_.mask.present() && *p_.mask.at(b, i, j) == 0) continue;
        double score = 0;
        for (std::int64_t d = 0; d < p_.dim_k(); ++d)
          score += element(query_.dtype, query_.at(b, i, d)) * element(p_.key.dtype, p_.key.at(b, j, d));
        if (score != -std::numeric_limits<double>::infinity()) f(j, score);
      }
    };
    std::fill_n(s, p_.len_kv(), T(0));
    for_each_score([&](std::int64_t, double x) { m = x > m || std::isnan(x) ? x : m; });
    double sum = 0;
    for_each_score([&](std::int64_t, double x) { sum += std::exp(x - m); });
    for_each_score([&](std::int64_t j, double x) { s[j] = static_cast<T>(std::exp(x - m) / sum); });
  }

  const MultiplicativeProblem& p_;
  const Array& query_;  // [batch, len_q, dim_k], projected
  std::int64_t score_row_, dim_row_, block_;
};

template <class T> void run(const MultiplicativeProblem& p) {
  Array query = p.query;
  Shared<T> projected;
  if (p.w.present()) {
    Array transposed = p.w;
    transposed.swap_axes(0, 1);
    const std::int64_t row = round_up(p.dim_k(), kWidth<T>);
    projected = Shared<T>((p.batch() * p.len_q() + Tile<T>::kRows) * row);
    SequenceProjection<T>(transposed, p.query.dtype)(p.query, 0, p.batch(), projected.get(), row);
    constexpr std::int64_t item = sizeof(T);
    query.data = reinterpret_cast<char*>(projected.get());
    query.dtype = dtype_of<T>();
    query.shape[2] = p.dim_k();
    query.stride[0] = p.len_q() * row * item;
    query.stride[1] = row * item;
    query.stride[2] = item;
  }
  AttentionProblem a;
  a.query = query;
  a.key = p.key;
  a.value = p.value;
  a.mask = p.mask;
  a.out = p.out;
  for (Array* x : {&a.query, &a.key, &a.value, &a.mask, &a.out})
    if (x->present()) x->insert_axis(1);
  a.key_ends = p.key_ends;
  attention_forward(a);
  if (p.weights.present()) Weights<T>(p, query).run();
}

}  // namespace

void multiplicative_attention(const MultiplicativeProblem& problem) {
  with_compute(problem.query.dtype, [&](auto t) { run<decltype(t)>(problem); });
}

}  // namespace regard::cpu
