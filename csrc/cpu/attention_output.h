// The end of every row of attention: written to out and lse in their own dtypes; by the plain path where it has to be.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "cpu/attention_plain.h"
#include "cpu/attention_scores.h"
#include "cpu/parallel.h"
#include "cpu/strided.h"

namespace regard::cpu {

template <class T> class AttentionOutput {
 public:
  explicit AttentionOutput(const AttentionProblem& problem) : p_(problem), plain_(problem) { unit_ = ScoreFactors<T>(problem).unit; }

  // A row of dim_v outputs; max and sum are its softmax's. `row` is overwritten where the row is not finite.
  void write(std::int64_t b, std::int64_t h, std::int64_t i, T* row, T max, T sum, bool finite, double* plain_row) const {
    const Place at = p_.query_place(b, i);
    PlainRow plain{static_cast<double>(max) * unit_, static_cast<double>(sum)};
    if (!finite && sum == 0 && max == -std::numeric_limits<T>::infinity() && plain_.hidden_by_bias(b, h, i)) {
      std::fill_n(row, p_.dim_v(), T(0));
    } else if (!finite) {
      plain = plain_.row(b, h, i, plain_row);
      for (std::int64_t d = 0; d < p_.dim_v(); ++d) row[d] = static_cast<T>(plain_row[d]);
    }
    write_row(p_.out.dtype, p_.out.at(at.outer, h, at.position), p_.out.stride[3], p_.dim_v(), row);
    if (p_.lse.present()) write_lse(at, h, plain.max + std::log(plain.sum));
  }

  // A query beyond its sequence's length sees no key: only the sink is left.
  void write_empty(std::int64_t b, std::int64_t h, std::int64_t i) const {
    write_empty_at(p_.query_place(b, i), h, p_.sinks.present() ? read<float>(p_.sinks.at(h)) : kNothing);
  }

  // Packed rows behind the last sequence belong to none.
  std::int64_t unowned() const { return p_.storage == Storage::packed ? p_.query.shape[2] - p_.query_starts.back() : 0; }
  void write_unowned(std::int64_t row) const {
    for (std::int64_t h = 0; h < p_.heads(); ++h) write_empty_at({0, p_.query_starts.back() + row}, h, kNothing);
  }

 private:
  static constexpr double kNothing = -std::numeric_limits<double>::infinity();

  void write_empty_at(Place at, std::int64_t h, double lse) const {
    char* p = p_.out.at(at.outer, h, at.position);
    const auto item = static_cast<std::size_t>(size_of(p_.out.dtype));
    if (p_.out.stride[3] == size_of(p_.out.dtype))
      std::memset(p, 0, static_cast<std::size_t>(p_.dim_v()) * item);
    else
      for (std::int64_t d = 0; d < p_.dim_v(); ++d, p += p_.out.stride[3]) std::memset(p, 0, item);
    write_lse(at, h, lse);
  }

  void write_lse(Place at, std::int64_t h, double lse) const {
    if (!p_.lse.present()) return;
    const float rounded = static_cast<float>(lse);
    std::memcpy(p_.lse.at(at.outer, h, at.position), &rounded, sizeof rounded);
  }

  const AttentionProblem& p_;
  PlainAttention plain_;
  double unit_;
};

}  // namespace regard::cpu
