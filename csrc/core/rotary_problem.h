// What rotary_embedding computes: its arguments and their checks.
#pragma once

#include <cstdint>
#include <vector>

#include "core/refusal.h"

namespace regard {

// The angles of rotary embeddings: one row of cosines and sines for each position, and which row serves which token.
struct RotaryAngles {
  Array cos;        // with positions [max_positions, rotary / 2]; after check() without them [batch, len, rotary / 2]
  Array sin;        // likewise
  Array positions;  // int32 or int64 [len] or [batch, len]
  bool interleaved = false;

  std::vector<std::int64_t> rows;  // checked copy of positions, [batch, len]; empty: cos and sin are by batch and token

  bool present() const { return cos.present() || sin.present(); }
  std::int64_t pairs() const { return cos.shape[cos.rank - 1]; }

  const char* cos_at(std::int64_t b, std::int64_t i, std::int64_t len) const { return row(cos, b, i, len); }
  const char* sin_at(std::int64_t b, std::int64_t i, std::int64_t len) const { return row(sin, b, i, len); }

  // For x of `dtype` with `batch`, `len` and `dim`. Broadcasts cos, sin and positions over the batch in place.
  Refusal check(DType dtype, std::int64_t batch, std::int64_t len, std::int64_t dim);

 private:
  const char* row(const Array& table, std::int64_t b, std::int64_t i, std::int64_t len) const {
    return rows.empty() ? table.at(b, i) : table.at(rows[static_cast<std::size_t>(b * len + i)]);
  }
};

// Each pair (x_i, x_j) of a token turned by that token's angle: (x_i cos - x_j sin, x_j cos + x_i sin).
// j = i + rotary / 2, or pairs are neighbours (interleaved); dimensions from `rotary` on pass through.
struct RotaryProblem {
  Array x;    // [batch, heads, len, dim]
  Array out;  // like x; may be x itself, but not overlap it otherwise
  RotaryAngles angles;

  std::int64_t batch() const { return x.shape[0]; }
  std::int64_t heads() const { return x.shape[1]; }
  std::int64_t len() const { return x.shape[2]; }
  std::int64_t dim() const { return x.shape[3]; }

  // From layout (batch, len, heads, dim): views with heads before lengths.
  void swap_sequence_and_heads() {
    for (Array* a : {&x, &out})
      if (a->rank == 4) a->swap_axes(1, 2);
  }

  Refusal check() {
    Checker c;
    c.floats(x, 4, "x");
    if (c.result()) return c.result();
    if (const Refusal r = angles.check(x.dtype, batch(), len(), dim())) return r;
    c.like(out, x, 4, "out").shape(out, "out", batch(), heads(), len(), dim()).output(out, "out");
    return c.result();
  }
};

inline Refusal RotaryAngles::check(DType dtype, std::int64_t batch, std::int64_t len, std::int64_t dim) {
  Checker c;
  const bool table = positions.present();
  for (const auto& [x, name] : {std::pair<Array*, const char*>{&cos, "cos"}, {&sin, "sin"}}) {
    c.require(x->kind == Array::Kind::array, rules::kType, name);
    c.require(x->dtype == DType::float32 || x->dtype == dtype, rules::kDType, name);
    c.require(x->rank == 2 || (x->rank == 3 && !table), rules::kRank, name);
    if (c.result()) return c.result();
    c.require(x->shape[x->rank - 1] <= dim / 2, rules::kShape, name);
  }
  c.require(sin.same_shape(cos), rules::kShape, "sin").require(sin.dtype == cos.dtype, rules::kDType, "sin");
  if (c.result()) return c.result();
  if (!table) {
    const std::int64_t full[] = {batch, len, pairs()};
    for (const auto& [x, name] : {std::pair<Array*, const char*>{&cos, "cos"}, {&sin, "sin"}}) {
      // The first `len` rows of a longer table; only the batch repeats.
      if (x->rank == 2) c.require(x->shape[0] >= len, rules::kShape, name);
      if (x->rank == 2 && x->shape[0] > len) x->shape[0] = len;
      c.require(x->shape[x->rank - 2] == len, rules::kShape, name);
      c.require(x->broadcast_to(full, 3), rules::kShape, name);
    }
    return c.result();
  }
  const std::int64_t full[] = {batch, len};
  c.require(positions.kind == Array::Kind::array, rules::kType, "positions");
  c.require(positions.dtype == DType::int32 || positions.dtype == DType::int64, rules::kDType, "positions");
  c.require(positions.rank == 1 || positions.rank == 2, rules::kRank, "positions");
  if (c.result()) return c.result();
  const int rank = positions.rank;
  c.require(positions.shape[rank - 1] == len, rules::kShape, "positions");
  const bool each = rank == 2 && positions.shape[0] == batch;
  c.require(positions.broadcast_to(full, 2), rules::kShape, "positions");
  if (c.result() || positions.on_device) return c.result();
  rows.resize(static_cast<std::size_t>(batch * len));
  for (std::int64_t i = 0; i < batch * len; ++i) {
    const std::int64_t row = read_index(positions, positions.at(i / len, i % len));
    if (row < 0 || row >= cos.shape[0]) return {rules::kEntry, "positions", each ? i : i % len};
    rows[static_cast<std::size_t>(i)] = row;
  }
  return c.result();
}

}  // namespace regard
