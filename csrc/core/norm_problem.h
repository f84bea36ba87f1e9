// What layer_norm and rms_norm compute, their arguments and their checks.
#pragma once

#include <cmath>
#include <cstdint>

#include "core/refusal.h"

namespace regard {

// With s = x + residual over the last axis:
//   layer: out = (s - mean(s)) / sqrt(mean((s - mean(s))^2) + eps) * weight + bias
//   rms:   out = s / sqrt(mean(s^2) + eps) * weight
struct NormProblem {
  enum class Kind : std::uint8_t { layer, rms };

  Array x;         // [..., features]
  Array residual;  // [..., features]
  Array weight;    // [features]
  Array bias;      // [features]
  Array out;       // [..., features]
  double eps = 0;
  Kind kind = Kind::layer;

  std::int64_t features() const { return x.shape[x.rank - 1]; }

  Refusal check() const {
    Checker c;
    c.floats(x, x.rank, "x").require(x.rank >= 1 && x.rank <= kMaxRank, rules::kRank, "x");
    if (c.result()) return c.result();
    c.like(residual, x, x.rank, "residual");
    c.require(!residual.present() || residual.same_shape(x), rules::kShape, "residual");
    c.like(weight, x, 1, "weight").shape(weight, "weight", features());
    c.like(bias, x, 1, "bias").shape(bias, "bias", features());
    return c.require(std::isfinite(eps) && eps >= 0, rules::kValue, "eps").result();
  }

  Refusal check_outputs() const {
    Checker c;
    if (!out.present()) return {};
    c.floats(out, x.rank, "out").like(out, x, x.rank, "out");
    if (c.result()) return c.result();
    return c.require(out.same_shape(x), rules::kShape, "out").output(out, "out").result();
  }
};

}  // namespace regard
