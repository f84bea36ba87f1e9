// What merge_attention computes: its arguments and their checks.
#pragma once

#include <cstdint>
#include <vector>

#include "core/refusal.h"

namespace regard {

// Attention over several disjoint sets of keys as one: lse = log sum_i exp(lse_i), out = sum_i exp(lse_i - lse) out_i.
struct MergeProblem {
  std::vector<Array> outs;  // each [..., dim_v], of one dtype and shape
  std::vector<Array> lses;  // each float32, or float64 where outs are, [...]
  Array out;                // [..., dim_v]
  Array lse;                // [...], of the lses' dtype

  std::int64_t parts() const { return static_cast<std::int64_t>(outs.size()); }

  // From layout (batch, len, heads, dim): views with heads before lengths, as lse has them.
  void swap_sequence_and_heads() {
    for (Array& x : outs)
      if (x.rank == 4) x.swap_axes(1, 2);
  }

  Refusal check() const {
    Checker c;
    c.require(!outs.empty(), rules::kValue, "outs").require(outs.size() == lses.size(), rules::kValue, "lses");
    if (c.result()) return c.result();
    const Array& first = outs[0];
    for (const Array& x : outs) {
      c.floats(x, first.rank, "outs").require(x.rank >= 1 && x.rank < kMaxRank, rules::kRank, "outs");
      c.require(x.dtype == first.dtype, rules::kSameDType, "outs");
      if (c.result()) return c.result();
      c.require(x.same_shape(first), rules::kShape, "outs");
    }
    for (const Array& x : lses) {
      c.require(x.kind == Array::Kind::array, rules::kType, "lses");
      c.require(x.dtype == DType::float32 || (x.dtype == DType::float64 && first.dtype == DType::float64), rules::kDType, "lses");
      c.require(x.dtype == lses[0].dtype, rules::kDType, "lses").require(x.rank == first.rank - 1, rules::kRank, "lses");
      for (int a = 0; !c.result() && a < x.rank; ++a) c.require(x.shape[a] == first.shape[a], rules::kShape, "lses");
    }
    return c.result();
  }
};

}  // namespace regard
