// What the attention of convolutional networks computes: pooling a map, weighing its channels and its positions.
//
//   channel weights   gate(MLP(average))                 Hu et al., "Squeeze-and-Excitation Networks" (2018)
//                     gate(MLP(average) + MLP(maximum))  Woo et al., "CBAM" (2018)
//                     gate(average convolved)            Wang et al., "ECA-Net" (2020)
//   position weights  gate(k x k convolution of the channels' mean and maximum)       CBAM again
#pragma once

#include <cmath>
#include <cstdint>

#include "core/refusal.h"

namespace regard {

enum class Activation : std::uint8_t { relu, silu, gelu, hard_swish, gelu_tanh };
enum class Gate : std::uint8_t { sigmoid, tanh, hard_sigmoid };
enum class Excitation : std::uint8_t { none, average, average_and_maximum, convolution };

struct PoolProblem {
  Array x;    // [batch, channels, height, width]
  Array out;  // [batch, channels]
  bool maximum = false;

  // From layout (batch, height, width, channels) to a view with channels second.
  void channels_second() {
    if (x.rank == 4) x.move_axis(3, 1);
  }

  Refusal check() const {
    Checker c;
    return c.floats(x, 4, "x").result();
  }
};

struct ChannelProblem {
  Array x;          // [batch, channels, height, width]
  Array w_reduce;   // [reduced, channels]
  Array b_reduce;   // [reduced], or absent
  Array w_expand;   // [channels, reduced]
  Array b_expand;   // [channels], or absent
  Array w_channel;  // [kernel], odd: ECA's convolution over channels
  Array w_spatial;  // [1, 2, kernel, kernel], odd: plane 0 for the mean, plane 1 for the maximum
  Array b_spatial;  // [1], or absent
  Array out;        // [batch, channels, height, width]: may be x itself

  Excitation excitation = Excitation::none;
  bool needs_spatial = false;
  Activation activation = Activation::relu;
  Gate gate = Gate::sigmoid;
  double gate_alpha = 1.0 / 6;  // hard_sigmoid: clamp(alpha x + beta, 0, 1)
  double gate_beta = 0.5;

  std::int64_t batch() const { return x.shape[0]; }
  std::int64_t channels() const { return x.shape[1]; }
  std::int64_t positions() const { return x.shape[2] * x.shape[3]; }
  std::int64_t reduced() const { return w_reduce.shape[0]; }
  bool through_mlp() const { return excitation == Excitation::average || excitation == Excitation::average_and_maximum; }
  bool spatial() const { return w_spatial.present(); }

  void channels_second() {
    for (Array* a : {&x, &out})
      if (a->rank == 4) a->move_axis(3, 1);
  }

  Refusal check() const;
};

inline Refusal ChannelProblem::check() const {
  Checker c;
  c.floats(x, 4, "x");
  if (through_mlp()) {
    c.require(w_reduce.present(), rules::kType, "w_reduce").like(w_reduce, x, 2, "w_reduce");
    c.shape(w_reduce, "w_reduce", reduced(), channels());
    c.like(b_reduce, x, 1, "b_reduce").shape(b_reduce, "b_reduce", reduced());
    c.require(w_expand.present(), rules::kType, "w_expand").like(w_expand, x, 2, "w_expand");
    c.shape(w_expand, "w_expand", channels(), reduced());
    c.like(b_expand, x, 1, "b_expand").shape(b_expand, "b_expand", channels());
  }
  if (excitation == Excitation::convolution) {
    c.require(w_channel.present(), rules::kType, "w").like(w_channel, x, 1, "w");
    c.require(w_channel.shape[0] % 2 == 1, rules::kShape, "w");
  }
  if (needs_spatial || excitation == Excitation::none) c.require(w_spatial.present(), rules::kType, "w_spatial");
  if (spatial()) {
    c.like(w_spatial, x, 4, "w_spatial");
    c.shape(w_spatial, "w_spatial", 1, 2, w_spatial.shape[2], w_spatial.shape[2]);
    c.require(w_spatial.shape[2] % 2 == 1, rules::kShape, "w_spatial");
    c.like(b_spatial, x, 1, "b_spatial").shape(b_spatial, "b_spatial", 1);
  }
  c.require(std::isfinite(gate_alpha) && std::isfinite(gate_beta), rules::kValue, "gate");
  c.like(out, x, 4, "out").shape(out, "out", x.shape[0], x.shape[1], x.shape[2], x.shape[3]).output(out, "out");
  return c.result();
}

}  // namespace regard
