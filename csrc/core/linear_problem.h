// What a linear layer computes, its arguments and their checks.
#pragma once

#include <cstdint>

#include "core/refusal.h"

namespace regard {

// Bytes of a row of a packed panel: whole tiles of every instruction set, so that one packed weight serves them all.
constexpr std::int64_t kPanelBytes = 192;
constexpr std::int64_t panel_columns(DType compute) { return kPanelBytes / size_of(compute); }
constexpr std::int64_t panel_count(std::int64_t out_features, DType compute) {
  const std::int64_t columns = panel_columns(compute);
  return out_features / columns + (out_features % columns != 0);
}

// How a packed weight holds its numbers. A panel is rows of kPanelBytes, one entry a column:
//   compute:   in_features rows of compute values, a row of biases
//   bfloat16:  in_features / 2 rows of pairs (rounded up; the even one in the lower half), a row of float32 biases
//   int8:      in_features / 4 rows of four bytes, the lowest first; a row of float32 scales, one of float32 biases, and
//              one of int32: -128 times the column's sum, for activations that are stored with 128 added
enum class Held : std::uint8_t { compute, bfloat16, int8 };
constexpr std::int64_t held_rows(std::int64_t in_features, Held held) {
  const std::int64_t each = held == Held::int8 ? 4 : held == Held::bfloat16 ? 2 : 1;
  return in_features / each + (in_features % each != 0);
}
constexpr std::int64_t packed_rows(std::int64_t in_features, Held held) {
  return held_rows(in_features, held) + (held == Held::int8 ? 3 : 1);
}

// Sums of so many products of an unsigned byte and one from -127 to 127 fit 32 bits.
constexpr std::int64_t kMostInt8Features = std::int64_t{1} << 16;

// Of rows that are held as int8: smaller ones are taken for zeros, since 127 / x would overflow.
constexpr float kSmallestScaled = 1e-30f;

// A GPU holds a weight of int8 as its rows, each padded with zeros to whole chunks of 16 bytes, beside their scales.
constexpr std::int64_t byte_row(std::int64_t in_features) { return (in_features + 15) / 16 * 16; }

// A view of a packed weight, still without memory.
inline Array packed_array(std::int64_t out_features, std::int64_t in_features, DType compute, Held held = Held::compute) {
  Array a;
  a.kind = Array::Kind::array;
  a.dtype = compute;
  a.writable = true;
  a.rank = 3;
  a.shape[0] = panel_count(out_features, compute);
  a.shape[1] = packed_rows(in_features, held);
  a.shape[2] = panel_columns(compute);
  a.stride[0] = a.shape[1] * kPanelBytes;
  a.stride[1] = kPanelBytes;
  a.stride[2] = size_of(compute);
  return a;
}

// 16-bit floats are computed in float32.
constexpr DType compute_dtype(DType t) { return t == DType::float64 ? DType::float64 : DType::float32; }

// out = activation(x weight^T + bias) + residual
struct LinearProblem {
  enum class Activation : std::uint8_t { none, relu, gelu, silu, gelu_tanh };

  Array x;         // [..., in_features]
  Array weight;    // [out_features, in_features]; or, when packed, [panels, packed_rows, columns] from PackProblem
  Array scale;     // [out_features], float32; where there, weight is int8, [out_features, byte_row(in_features)]: a GPU's
  Array bias;      // [out_features]
  Array residual;  // [..., out_features]; may be out itself, but not overlap it otherwise
  Array out;       // [..., out_features]
  Activation activation = Activation::none;
  bool packed = false;
  std::int64_t packed_out_features = 0;
  Held held = Held::compute;  // when packed

  std::int64_t in_features() const { return x.shape[x.rank - 1]; }
  std::int64_t out_features() const { return packed ? packed_out_features : weight.shape[0]; }

  Refusal check() const;
  Refusal check_outputs() const;
};

inline Refusal LinearProblem::check() const {
  Checker c;
  c.floats(x, x.rank, "x").require(x.rank >= 1 && x.rank <= kMaxRank, rules::kRank, "x");
  if (c.result()) return c.result();
  if (packed) {
    const DType compute = compute_dtype(x.dtype);
    c.require(weight.kind == Array::Kind::array, rules::kType, "weight");
    c.require(weight.dtype == compute, rules::kSameDType, "weight");
    c.require(out_features() >= 0, rules::kShape, "weight");
    c.require(held <= Held::int8 && (held == Held::compute || compute == DType::float32), rules::kSameDType, "weight");
    c.shape(weight, "weight", panel_count(out_features(), compute), packed_rows(in_features(), held), panel_columns(compute));
    if (c.result()) return c.result();
    const std::int64_t item = size_of(compute);
    c.require(weight.stride[2] == item && weight.stride[1] == kPanelBytes && weight.stride[0] == kPanelBytes * weight.shape[1],
              rules::kShape, "weight");
    c.require(!bias.present(), rules::kPacked, "bias");
  } else if (scale.present()) {
    c.require(x.dtype != DType::float64, rules::kSameDType, "weight");
    c.require(weight.dtype == DType::int8 && scale.dtype == DType::float32, rules::kDType, "weight");
    c.require(weight.rank == 2 && scale.rank == 1, rules::kRank, "weight");
    c.shape(weight, "weight", scale.shape[0], byte_row(in_features()));
    if (c.result()) return c.result();
    const bool chunks = reinterpret_cast<std::uintptr_t>(weight.data) % 16 == 0 && weight.stride[0] == weight.shape[1];
    c.require((chunks && weight.stride[1] == 1 && scale.stride[0] == 4) || weight.size() == 0, rules::kShape, "weight");
    if (bias.present()) c.floats(bias, 1, "bias").shape(bias, "bias", out_features());
  } else {
    c.floats(weight, 2, "weight").like(weight, x, 2, "weight");
    if (c.result()) return c.result();
    c.shape(weight, "weight", out_features(), in_features());
    c.like(bias, x, 1, "bias").shape(bias, "bias", out_features());
  }
  return c.result();
}

inline Refusal LinearProblem::check_outputs() const {
  Checker c;
  c.like(residual, x, x.rank, "residual");
  if (residual.present() && !c.result()) {
    for (int a = 0; a < x.rank - 1; ++a) c.require(residual.shape[a] == x.shape[a], rules::kShape, "residual");
    c.require(residual.shape[x.rank - 1] == out_features(), rules::kShape, "residual");
  }
  if (c.result() || !out.present()) return c.result();
  c.floats(out, x.rank, "out").like(out, x, x.rank, "out");
  if (c.result()) return c.result();
  for (int a = 0; a < x.rank - 1; ++a) c.require(out.shape[a] == x.shape[a], rules::kShape, "out");
  c.require(out.shape[x.rank - 1] == out_features(), rules::kShape, "out");
  return c.output(out, "out").result();
}

// Weight and bias in the order in which the tile engine reads them, as compute values:
// packed[p][k][j] = weight[p columns + j][k], packed[p][in_features][j] = bias[p columns + j], zeros beyond the edges; or
// those numbers as Held says: rounded to bfloat16, or to whole multiples of scale[j] = max |weight[j]| / 127.
struct PackProblem {
  Array weight;  // [out_features, in_features]
  Array bias;    // [out_features]
  Array packed;  // [panels, packed_rows, columns], row-major, set after check()
  Held held = Held::compute;

  Refusal check() const {
    Checker c;
    c.floats(weight, 2, "weight");
    c.require(held == Held::compute || compute_dtype(weight.dtype) == DType::float32, rules::kHeld, "weight");
    c.require(held != Held::int8 || weight.shape[1] <= kMostInt8Features, rules::kHeld, "weight");
    if (c.result()) return c.result();
    return c.like(bias, weight, 1, "bias").shape(bias, "bias", weight.shape[0]).result();
  }
};

}  // namespace regard
