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

// The element as float64, whatever its float type.
inline double element(DType t, const char* p) {
  switch (t) {
    case DType::float64: return read<double>(p);
    case DType::float32: return read<float>(p);
    case DType::float16: return to_float(read<Half>(p));
    default: return to_float(read<BFloat16>(p));
  }
}

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
    const SequenceMask sequence = p_.sequence(b);
    const std::int64_t group = h / (p_.heads() / p_.heads_kv());
    const KeyRange keys = sequence.keys_of(i);
    PlainRow r;
    if (p_.sinks.present()) r.max = element(DType::float32, p_.sinks.at(h));
    for_each_key(b, h, group, i, keys, sequence, [&](std::int64_t, double s) { r.max = s > r.max || std::isnan(s) ? s : r.max; });
    if (p_.sinks.present()) r.sum = std::exp(element(DType::float32, p_.sinks.at(h)) - r.max);
    for (std::int64_t d = 0; d < p_.dim_v(); ++d) out[d] = 0;
    for_each_key(b, h, group, i, keys, sequence, [&](std::int64_t, double s) { r.sum += std::exp(s - r.max); });
    for_each_key(b, h, group, i, keys, sequence, [&](std::int64_t j, double s) {
      const double weight = std::exp(s - r.max) / r.sum;
      for (std::int64_t d = 0; d < p_.dim_v(); ++d) out[d] += weight * element(p_.value.dtype, p_.value.at(b, group, j, d));
    });
    return r;
  }

 private:
  // Calls f(j, score) for each key that is neither masked nor of score -inf: those weigh exactly nothing.
  template <class F>
  void for_each_key(std::int64_t b, std::int64_t h, std::int64_t group, std::int64_t i, KeyRange keys, const SequenceMask& sequence,
                    F&& f) const {
    for (std::int64_t j = keys.first; j < keys.last; ++j) {
      if (p_.mask.present() && *p_.mask.at(b, h, i, j) == 0) continue;
      if ((j & 255) == 0 && stop_requested()) return;
      double s = 0;
      for (std::int64_t d = 0; d < p_.dim_qk(); ++d)
        s += element(p_.query.dtype, p_.query.at(b, h, i, d)) * element(p_.key.dtype, p_.key.at(b, group, j, d));
      s *= p_.scale;
      if (p_.softcap > 0) s = p_.softcap * std::tanh(s / p_.softcap);
      if (p_.bias.present()) s += element(p_.bias.dtype, p_.bias.at(b, h, i, j));
      if (p_.alibi_slopes.present()) {
        const double distance = static_cast<double>(std::abs(i + sequence.diagonal - j));
        s -= element(DType::float32, p_.alibi_slopes.at(b, h)) * distance;
      }
      if (s != -std::numeric_limits<double>::infinity()) f(j, s);
    }
  }

  const AttentionProblem& p_;
};

}  // namespace regard::cpu
