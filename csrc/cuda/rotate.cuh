// Pairs turned by their angles: what rotary_embedding and appending to a cache share.
#pragma once

#include "core/rotary_problem.h"
#include "cuda/view.cuh"

namespace regard::cuda {

struct AngleArguments {
  View cos;        // with positions [max_positions, pairs], else [batch, len, pairs]
  View sin;        // likewise
  Indices rows;    // [batch, len]; absent: by batch and token
  DType type;      // of cos and sin
  int table_rows;  // max_positions
  int pairs;       // 0: nothing is turned
  bool interleaved;
};

// Positions, if any, must be the device's.
inline AngleArguments angles_of(const RotaryAngles& angles) {
  AngleArguments a{};
  if (!angles.present()) return a;
  a.cos = view_of(angles.cos);
  a.sin = view_of(angles.sin);
  a.rows = indices_of(angles.positions);
  a.type = angles.cos.dtype;
  a.table_rows = static_cast<int>(angles.cos.shape[0]);
  a.pairs = static_cast<int>(angles.pairs());
  a.interleaved = angles.interleaved;
  if (a.rows.present() && a.table_rows == 0) throw NoKernel("no CUDA kernel for positions in an empty table of rotary angles");
  return a;
}

template <class C> REGARD_DEVICE C angle_at(const AngleArguments& a, const View& table, int b, int i, int pair) {
  if (!a.rows.present()) return load_as<C>(table.at(b, i, pair), a.type);
  return load_as<C>(table.at(held(a.rows.at(b, i), 0, a.table_rows - 1), pair), a.type);
}

// Element d of token i once it is turned; `row` holds elements of `type`, `step` bytes apart.
template <class C> REGARD_DEVICE C turned(const AngleArguments& a, const char* row, std::int64_t step, DType type, int b, int i, int d) {
  if (d >= 2 * a.pairs) return load_as<C>(row + d * step, type);
  const int pair = a.interleaved ? d / 2 : d % a.pairs;
  const int first = a.interleaved ? 2 * pair : pair;
  const int second = a.interleaved ? first + 1 : first + a.pairs;
  const C x = load_as<C>(row + first * step, type);
  const C y = load_as<C>(row + second * step, type);
  const C c = angle_at<C>(a, a.cos, b, i, pair);
  const C s = angle_at<C>(a, a.sin, b, i, pair);
  return d == first ? x * c - y * s : y * c + x * s;
}

}  // namespace regard::cuda
