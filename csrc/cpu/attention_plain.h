// The plain path: one output row in float64, masked keys skipped one by one.
//
// Tiles cannot carry everything: 0 x inf behind a mask, products beyond the largest float. A row that came out
// non-finite, or that saw no key at all, is computed again here; all that is finite never comes this way. Yet memory
// that nobody wrote may hold NaN behind every row's mask, so a key of 64 dimensions takes some 90 ns, not a microsecond.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "core/attention_problem.h"
#include "cpu/blocks.h"
#include "cpu/parallel.h"
#include "cpu/simd.h"
#include "cpu/strided.h"

namespace regard::cpu {

// sum and max describe the row's softmax: the weights are exp(score - max) / sum.
struct PlainRow {
  double max = -std::numeric_limits<double>::infinity();
  double sum = 0;
};

class PlainAttention {
  using V = Vec<double>;
  static constexpr int kW = kWidth<double>;

 public:
  // The keys that a query gives something to, and their weights after dropout.
  struct Weights {
    PlainRow softmax;
    std::vector<std::int64_t> keys;
    std::vector<double> weights;
  };

  explicit PlainAttention(const AttentionProblem& problem) : p_(problem) {}

  // Fills out[0..dim_v) and returns the softmax's max and sum.
  PlainRow row(std::int64_t b, std::int64_t h, std::int64_t i, double* out) const {
    const Weights found = weights(b, h, i);
    const std::int64_t n = p_.dim_v();
    std::vector<double> value(static_cast<std::size_t>(n));
    std::fill_n(out, n, 0.0);
    for (std::size_t k = 0; k < found.keys.size(); ++k) {
      const Place at = p_.key_place(b, found.keys[k]);
      const std::int64_t group = group_of(h);
      const double unit = p_.value_scales.present() ? read<float>(p_.value_scales.at(at.outer, group, at.position)) : 1.0;
      read_row(p_.value.dtype, p_.value.at(at.outer, group, at.position), p_.value.stride[3], n, value.data());
      for (std::int64_t d = 0; d < n; ++d) out[d] += found.weights[k] * (unit * value[static_cast<std::size_t>(d)]);
    }
    return found.softmax;
  }

  Weights weights(std::int64_t b, std::int64_t h, std::int64_t i) const {
    Weights found;
    PlainRow& r = found.softmax;
    const double sink = p_.sinks.present() ? read<float>(p_.sinks.at(h)) : r.max;
    r.max = sink;
    const Query query(*this, b, h, i);
    for_each_key(b, h, i, [&](std::int64_t j) {
      const double s = query.score(j);
      if (s == -std::numeric_limits<double>::infinity()) return true;  // weighs exactly nothing
      found.keys.push_back(j);
      found.weights.push_back(s);
      r.max = s > r.max || std::isnan(s) ? s : r.max;
      return true;
    });
    // A sink of -inf is none: exp(-inf + inf) would be NaN where the row sees no key.
    if (p_.sinks.present() && r.max != -std::numeric_limits<double>::infinity()) r.sum = std::exp(sink - r.max);
    for (double& s : found.weights) r.sum += s = std::exp(s - r.max);
    for (std::size_t k = 0; k < found.keys.size(); ++k) {
      const double kept = p_.dropout.present() ? p_.dropout.factor(b, h, i, found.keys[k]) : 1.0;
      found.weights[k] = kept == 0 ? 0.0 : kept * (found.weights[k] / r.sum);
    }
    return found;
  }

  // Whether a bias of -inf lies upon every key that nothing else hides: where no score was NaN, the query sees nothing then.
  bool hidden_by_bias(std::int64_t b, std::int64_t h, std::int64_t i) const {
    if (!p_.bias.present()) return false;
    return for_each_key(b, h, i, [&](std::int64_t j) {
      return element(p_.bias.dtype, p_.bias.at(b, h, i, j)) == -std::numeric_limits<double>::infinity();
    });
  }

 private:
  std::int64_t group_of(std::int64_t h) const { return h / (p_.heads() / p_.heads_kv()); }

  // f(j) for each key that is not masked, until it answers false; whether it never did.
  template <class F> bool for_each_key(std::int64_t b, std::int64_t h, std::int64_t i, F&& f) const {
    const KeyRange seen = p_.sequence(b).keys_of(i);
    bool all = true;
    if (seen.first >= seen.last) return all;
    p_.for_each_run(b, h, i, seen, [&](KeyRange keys) {
      for (std::int64_t j = keys.first; all && j < keys.last; ++j) {
        if (p_.mask.present() && *p_.mask.at(b, h, i, j) == 0) continue;
        if ((j & 255) == 0 && stop_requested()) return;
        all = f(j);
      }
    });
    return all;
  }

  // One query's scores. Rows of Q and K are read into float64, padded with zeros to whole vectors.
  class Query {
   public:
    Query(const PlainAttention& plain, std::int64_t b, std::int64_t h, std::int64_t i)
        : p_(plain.p_), b_(b), h_(h), i_(i), group_(plain.group_of(h)), diagonal_(p_.sequence(b).diagonal) {
      query_.resize(static_cast<std::size_t>(round_up(p_.dim_qk(), kW)));
      key_ = query_;
      const Place at = p_.query_place(b, i);
      read_row(p_.query.dtype, p_.query.at(at.outer, h, at.position), p_.query.stride[3], p_.dim_qk(), query_.data());
    }

    double score(std::int64_t j) const {
      const Place at = p_.key_place(b_, j);
      read_row(p_.key.dtype, p_.key.at(at.outer, group_, at.position), p_.key.stride[3], p_.dim_qk(), key_.data());
      V sums{};
      for (std::size_t d = 0; d < query_.size(); d += kW) sums = fma(load<V>(&query_[d]), load<V>(&key_[d]), sums);
      double s = sum_lanes(sums);
      if (p_.key_scales.present()) s *= read<float>(p_.key_scales.at(at.outer, group_, at.position));
      s *= p_.scale;
      if (p_.softcap > 0) s = p_.softcap * std::tanh(s / p_.softcap);
      if (p_.bias.present()) s += element(p_.bias.dtype, p_.bias.at(b_, h_, i_, j));
      if (p_.alibi_slopes.present()) s -= read<float>(p_.alibi_slopes.at(b_, h_)) * static_cast<double>(std::abs(i_ + diagonal_ - j));
      return s;
    }

   private:
    const AttentionProblem& p_;
    std::int64_t b_, h_, i_, group_, diagonal_;
    std::vector<double> query_;
    mutable std::vector<double> key_;
  };

  const AttentionProblem& p_;
};

}  // namespace regard::cpu
