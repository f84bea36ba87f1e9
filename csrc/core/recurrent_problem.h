// What a layer of gated recurrent units or of long short-term memory computes: its arguments and their checks.
#pragma once

#include <cstdint>
#include <vector>

#include "core/linear_problem.h"
#include "core/refusal.h"

namespace regard {

enum class Cell : std::uint8_t { gru, lstm };
constexpr std::int64_t gates_of(Cell cell) { return cell == Cell::gru ? 3 : 4; }

// Hidden units of a block of a packed recurrent weight: a cache line of each gate, whole vectors of every instruction set.
constexpr std::int64_t units_per_block(DType compute) { return 64 / size_of(compute); }
constexpr std::int64_t unit_blocks(std::int64_t hidden, DType compute) {
  const std::int64_t units = units_per_block(compute);
  return hidden / units + (hidden % units != 0);
}

// Gates that lie side by side: as many as a tile of the engine is wide. An LSTM's four are two pairs.
constexpr std::int64_t gates_per_group(Cell cell) { return cell == Cell::gru ? 3 : 2; }

// A view of a packed recurrent weight, still without memory: with n gates a group,
// packed[b][group][k][g][u] = w_hidden[(group n + g) hidden + b units + u][k], packed[b][group][hidden] = b_hidden,
// zeros beyond the edges.
inline Array packed_recurrent_array(Cell cell, std::int64_t hidden, DType compute) {
  Array a;
  a.kind = Array::Kind::array;
  a.dtype = compute;
  a.writable = true;
  a.rank = 3;
  a.shape[0] = unit_blocks(hidden, compute) * (gates_of(cell) / gates_per_group(cell));
  a.shape[1] = hidden + 1;
  a.shape[2] = gates_per_group(cell) * units_per_block(compute);
  a.stride[2] = size_of(compute);
  a.stride[1] = a.shape[2] * a.stride[2];
  a.stride[0] = a.shape[1] * a.stride[1];
  return a;
}

struct PackRecurrentProblem {
  Cell cell = Cell::gru;
  Array w_hidden;  // [gates hidden, hidden]
  Array b_hidden;  // [gates hidden]
  Array packed;    // as above, row-major, set after check()

  std::int64_t hidden() const { return w_hidden.shape[1]; }

  Refusal check() const {
    Checker c;
    c.floats(w_hidden, 2, "w_hidden");
    if (c.result()) return c.result();
    c.require(w_hidden.shape[0] == gates_of(cell) * hidden(), rules::kShape, "w_hidden");
    return c.like(b_hidden, w_hidden, 1, "b_hidden").shape(b_hidden, "b_hidden", w_hidden.shape[0]).result();
  }
};

// For each step t, in order or against it, with s the sigmoid and (.) the product element by element:
//   gru:  r = s(W_ir x_t + b_ir + W_hr h + b_hr), z likewise, n = tanh(W_in x_t + b_in + r (.) (W_hn h + b_hn)),
//         h = (1 - z) (.) n + z (.) h
//   lstm: i, f, o = s(W_i x_t + b_i + W_h h + b_h), g = tanh(likewise), c = f (.) c + i (.) g, h = o (.) tanh(c)
// A sequence's steps from its length on are not its own: they leave h and c as they are and give 0.
struct RecurrentProblem {
  // One direction's. Packed ones are linear's (see core/linear_problem.h) and those above, and hold their biases.
  struct Weights {
    Array w_input;   // [gates hidden, in_features], the gates one under the other: r z n, or i f g o
    Array w_hidden;  // [gates hidden, hidden]
    Array b_input;   // [gates hidden]
    Array b_hidden;  // [gates hidden]
  };

  Cell cell = Cell::gru;
  Array x;        // [batch, len, in_features]
  Array h0;       // [directions, batch, hidden]; zeros where absent
  Array c0;       // [directions, batch, hidden], lstm only
  Array lengths;  // int32 or int64 [batch]
  Weights weights[2];
  int directions = 1;    // 2: the second one runs against time
  bool reverse = false;  // with one direction: it runs against time
  bool packed = false;
  std::int64_t packed_hidden = 0;
  Array out;  // [batch, len, directions hidden]
  Array h_n;  // [directions, batch, hidden]
  Array c_n;  // [directions, batch, hidden], lstm only

  std::vector<std::int64_t> ends;  // checked copy of lengths; empty: all full

  std::int64_t batch() const { return x.shape[0]; }
  std::int64_t len() const { return x.shape[1]; }
  std::int64_t in_features() const { return x.shape[2]; }
  std::int64_t gates() const { return gates_of(cell); }
  std::int64_t hidden() const { return packed ? packed_hidden : weights[0].w_hidden.shape[1]; }
  bool backwards(int direction) const { return directions == 2 ? direction == 1 : reverse; }
  std::int64_t end_of(std::int64_t b) const { return ends.empty() ? len() : ends[static_cast<std::size_t>(b)]; }

  Refusal check();

 private:
  void check_weights(const Weights& w, Checker& c) const;
};

inline Refusal RecurrentProblem::check() {
  Checker c;
  c.floats(x, 3, "x");
  if (c.result()) return c.result();
  for (int d = 0; d < directions; ++d) check_weights(weights[d], c);
  if (c.result()) return c.result();
  c.like(h0, x, 3, "h0").shape(h0, "h0", directions, batch(), hidden());
  c.like(c0, x, 3, "c0").shape(c0, "c0", directions, batch(), hidden());
  return c.lengths(lengths, batch(), len(), "lengths", ends).result();
}

inline void RecurrentProblem::check_weights(const Weights& w, Checker& c) const {
  if (packed) {
    const DType compute = compute_dtype(x.dtype);
    c.require(hidden() >= 0, rules::kShape, "w_hidden");
    if (c.result()) return;
    const auto like = [&](const Array& a, const Array& wanted, const char* argument) {
      c.require(a.kind == Array::Kind::array, rules::kType, argument);
      c.require(a.dtype == compute, rules::kSameDType, argument);
      c.require(a.same_shape(wanted), rules::kShape, argument);
      for (int i = 0; i < 3; ++i) c.require(a.stride[i] == wanted.stride[i], rules::kShape, argument);
    };
    like(w.w_input, packed_array(gates() * hidden(), in_features(), compute), "w_input");
    like(w.w_hidden, packed_recurrent_array(cell, hidden(), compute), "w_hidden");
    c.require(!w.b_input.present(), rules::kPacked, "b_input").require(!w.b_hidden.present(), rules::kPacked, "b_hidden");
    return;
  }
  c.require(w.w_input.present(), rules::kType, "w_input").like(w.w_input, x, 2, "w_input");
  c.require(w.w_hidden.present(), rules::kType, "w_hidden").like(w.w_hidden, x, 2, "w_hidden");
  if (c.result()) return;
  c.shape(w.w_hidden, "w_hidden", gates() * hidden(), hidden());
  c.shape(w.w_input, "w_input", gates() * hidden(), in_features());
  c.like(w.b_input, x, 1, "b_input").shape(w.b_input, "b_input", gates() * hidden());
  c.like(w.b_hidden, x, 1, "b_hidden").shape(w.b_hidden, "b_hidden", gates() * hidden());
}

}  // namespace regard
