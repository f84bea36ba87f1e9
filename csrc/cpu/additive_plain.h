// The plain path of additive attention: one output row in float64, masked keys skipped one by one.
//
// A row whose fast result is not finite, or that saw no key at all, is computed again here.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#include "core/additive_problem.h"
#include "cpu/attention_plain.h"

namespace regard::cpu {

class PlainAdditive {
 public:
  explicit PlainAdditive(const AdditiveProblem& problem) : p_(problem) {}

  // Doubles that row() works in.
  std::int64_t workspace() const { return 2 * p_.dim() + (p_.needs_location ? p_.filters() : 0); }

  // Fills out[0..dim_v), and weights[0..len_kv) where given. `keys`: this sequence's projected keys, `ld` apart, or null.
  template <class T> void row(std::int64_t b, std::int64_t i, const T* keys, std::int64_t ld, double* work, double* out, T* weights) const {
    constexpr double none = -std::numeric_limits<double>::infinity();
    double* const q = work;
    double* const k = work + p_.dim();
    bool have_query = false;
    double m = none;
    double l = 0;
    for (std::int64_t d = 0; d < p_.dim_v(); ++d) out[d] = 0;
    if (weights != nullptr)
      for (std::int64_t j = 0; j < p_.len_kv(); ++j) weights[j] = -std::numeric_limits<T>::infinity();
    for (std::int64_t j = 0; j < p_.keys_of(b); ++j) {
      if (p_.mask.present() && *p_.mask.at(b, i, j) == 0) continue;
      if ((j & 63) == 0 && stop_requested()) return;
      if (!have_query) project(p_.query, b, i, p_.w_query, p_.bias, q);
      have_query = true;
      key_row(b, i, j, keys, ld, k);
      double s = 0;
      for (std::int64_t d = 0; d < p_.dim(); ++d) s += element(p_.v.dtype, p_.v.at(d)) * std::tanh(q[d] + k[d]);
      if (weights != nullptr) weights[j] = static_cast<T>(s);
      if (s == none) continue;
      const double larger = s > m || std::isnan(s) ? s : m;
      const double rescale = std::exp(m - larger);
      const double weight = std::exp(s - larger);
      l = l * rescale + weight;
      for (std::int64_t d = 0; d < p_.dim_v(); ++d) out[d] = out[d] * rescale + weight * element(p_.value.dtype, p_.value.at(b, j, d));
      m = larger;
    }
    if (m != none)
      for (std::int64_t d = 0; d < p_.dim_v(); ++d) out[d] /= l;
    if (weights != nullptr)
      for (std::int64_t j = 0; j < p_.len_kv(); ++j)
        weights[j] =
            m == none || weights[j] == static_cast<T>(none) ? T(0) : static_cast<T>(std::exp(static_cast<double>(weights[j]) - m) / l);
  }

 private:
  // y = w x + bias in float64, without w: x + bias.
  void project(const Array& x, std::int64_t b, std::int64_t r, const Array& w, const Array& bias, double* y) const {
    for (std::int64_t d = 0; d < p_.dim(); ++d) {
      double sum = bias.present() ? element(bias.dtype, bias.at(d)) : 0;
      if (w.present())
        for (std::int64_t c = 0; c < x.shape[2]; ++c) sum += element(w.dtype, w.at(d, c)) * element(x.dtype, x.at(b, r, c));
      else
        sum += element(x.dtype, x.at(b, r, d));
      y[d] = sum;
    }
  }

  template <class T> void key_row(std::int64_t b, std::int64_t i, std::int64_t j, const T* keys, std::int64_t ld, double* k) const {
    bool finite = keys != nullptr;
    for (std::int64_t d = 0; finite && d < p_.dim(); ++d) {
      k[d] = keys[j * ld + d];
      finite = std::isfinite(k[d]);
    }
    // A projection that left float32's range may be a number in float64's.
    if (!finite) project(p_.key, b, j, p_.w_key, Array{}, k);
    if (p_.needs_location) add_location(b, i, j, k);
  }

  void add_location(std::int64_t b, std::int64_t i, std::int64_t j, double* k) const {
    double* const features = k + p_.dim();
    const std::int64_t left = (p_.width() - 1) / 2;
    for (std::int64_t f = 0; f < p_.filters(); ++f) {
      double sum = p_.location_bias.present() ? element(p_.location_bias.dtype, p_.location_bias.at(f)) : 0;
      for (std::int64_t c = 0; c < p_.channels(); ++c)
        for (std::int64_t t = 0; t < p_.width(); ++t) {
          const std::int64_t at = j + t - left;
          if (at < 0 || at >= p_.len_kv()) continue;
          sum += element(p_.location_kernel.dtype, p_.location_kernel.at(f, c, t)) *
                 element(p_.previous_weights.dtype, p_.previous_weights.at(b, i, c, at));
        }
      features[f] = sum;
    }
    for (std::int64_t d = 0; d < p_.dim(); ++d)
      for (std::int64_t f = 0; f < p_.filters(); ++f) k[d] += features[f] * element(p_.w_location.dtype, p_.w_location.at(d, f));
  }

  const AdditiveProblem& p_;
};

}  // namespace regard::cpu
