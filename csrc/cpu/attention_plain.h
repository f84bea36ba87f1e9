// The plain path: one output row in float64, masked keys skipped one by one.
//
// Tiles cannot carry everything: 0 x inf behind a mask, products beyond the largest float. A row that came out
// non-finite, or that saw no key at all, is computed again here; all that is finite never comes this way.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#include "core/attention_problem.h"
#include "cpu/parallel.h"
#include "cpu/strided.h"

namespace regard::cpu {

// sum and max describe the row's softmax: the weights are exp(score - max) / sum.
struct PlainRow {
  double max = -std::numeric_limits<double>::infinity();
  double sum = 0;
};

class PlainAttention {
 public:
  explicit PlainAttention(const AttentionProblem& problem) : p_(problem) {}

  // Fills out[0..dim_v) and returns the softmax's max and sum.
  PlainRow row(std::int64_t b, std::int64_t h, std::int64_t i, double* out) const {
    const PlainRow r = statistics(b, h, i);
    for (std::int64_t d = 0; d < p_.dim_v(); ++d) out[d] = 0;
    for_each_weight(b, h, i, r, [&](std::int64_t j, double weight) {
      const Place at = p_.key_place(b, j);
      const std::int64_t group = group_of(h);
      const double unit = p_.value_scales.present() ? read<float>(p_.value_scales.at(at.outer, group, at.position)) : 1.0;
      for (std::int64_t d = 0; d < p_.dim_v(); ++d)
        out[d] += weight * (unit * element(p_.value.dtype, p_.value.at(at.outer, group, at.position, d)));
    });
    return r;
  }

  PlainRow statistics(std::int64_t b, std::int64_t h, std::int64_t i) const {
    PlainRow r;
    if (p_.sinks.present()) r.max = element(DType::float32, p_.sinks.at(h));
    for_each_key(b, h, i, [&](std::int64_t, double s) { r.max = s > r.max || std::isnan(s) ? s : r.max; });
    // A sink of -inf is none: exp(-inf + inf) would be NaN where the row sees no key.
    if (p_.sinks.present() && r.max != -std::numeric_limits<double>::infinity())
      r.sum = std::exp(element(DType::float32, p_.sinks.at(h)) - r.max);
    for_each_key(b, h, i, [&](std::int64_t, double s) { r.sum += std::exp(s - r.max); });
    return r;
  }

  // Calls f(j, weight) for each key seen, weights after dropout.
  template <class F> void for_each_weight(std::int64_t b, std::int64_t h, std::int64_t i, const PlainRow& r, F&& f) const {
    for_each_key(b, h, i, [&](std::int64_t j, double s) {
      const double kept = p_.dropout.present() ? p_.dropout.factor(b, h, i, j) : 1.0;
      f(j, kept == 0 ? 0.0 : kept * (std::exp(s - r.max) / r.sum));
    });
  }

 private:
  std::int64_t group_of(std::int64_t h) const { return h / (p_.heads() / p_.heads_kv()); }

  // Calls f(j, score) for each key that is neither masked nor of score -inf: those weigh exactly nothing.
  template <class F> void for_each_key(std::int64_t b, std::int64_t h, std::int64_t i, F&& f) const {
    const SequenceMask sequence = p_.sequence(b);
    const KeyRange seen = sequence.keys_of(i);
    if (seen.first >= seen.last) return;
    p_.for_each_run(b, h, i, seen, [&](KeyRange keys) {
      for (std::int64_t j = keys.first; j < keys.last; ++j) {
        if (p_.mask.present() && *p_.mask.at(b, h, i, j) == 0) continue;
        if ((j & 255) == 0 && stop_requested()) return;
        const double s = score(b, h, i, j, sequence.diagonal);
        if (s != -std::numeric_limits<double>::infinity()) f(j, s);
      }
    });
  }

  double score(std::int64_t b, std::int64_t h, std::int64_t i, std::int64_t j, std::int64_t diagonal) const {
    const Place q = p_.query_place(b, i);
    const Place k = p_.key_place(b, j);
    const std::int64_t group = group_of(h);
    double s = 0;
    for (std::int64_t d = 0; d < p_.dim_qk(); ++d)
      s +=
          element(p_.query.dtype, p_.query.at(q.outer, h, q.position, d)) * element(p_.key.dtype, p_.key.at(k.outer, group, k.position, d));
    if (p_.key_scales.present()) s *= read<float>(p_.key_scales.at(k.outer, group, k.position));
    s *= p_.scale;
    if (p_.softcap > 0) s = p_.softcap * std::tanh(s / p_.softcap);
    if (p_.bias.present()) s += element(p_.bias.dtype, p_.bias.at(b, h, i, j));
    if (p_.alibi_slopes.present()) s -= element(DType::float32, p_.alibi_slopes.at(b, h)) * static_cast<double>(std::abs(i + diagonal - j));
    return s;
  }

  const AttentionProblem& p_;
};

}  // namespace regard::cpu
