// What the bindings of CPU and GPU do alike: refuse, and put the plain numbers that Python passes into a problem.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>

#include "bindings/arrays.h"
#include "core/attention_problem.h"
#include "core/channel_problem.h"
#include "core/refusal.h"

namespace regard::bindings {

namespace py = pybind11;

inline py::object refused(const Refusal& r) { return py::make_tuple(r.rule, r.argument, r.entry); }

// (row_offsets, columns, block_q, block_kv, batch, heads, len_q, len_kv), or None.
inline BlockMask block_mask_of(const py::object& x) {
  BlockMask m;
  if (x.is_none()) return m;
  const auto t = py::cast<py::tuple>(x);
  m.offsets = py::cast<Array>(t[0]);
  m.columns = py::cast<Array>(t[1]);
  std::int64_t* const sizes[] = {&m.block_q, &m.block_kv, &m.batch, &m.heads, &m.len_q, &m.len_kv};
  for (std::size_t i = 0; i < 6; ++i) *sizes[i] = py::cast<std::int64_t>(t[i + 2]);
  return m;
}

inline void set_numbers(AttentionProblem& p, std::int64_t window_left, std::int64_t window_right, int alignment, double scale,
                        double softcap, double dropout_p, std::uint64_t seed, int precision) {
  p.window_left = window_left;
  p.window_right = window_right;
  p.alignment = static_cast<Alignment>(alignment);
  p.scale = scale;
  p.softcap = softcap;
  p.dropout = {dropout_p, seed};
  p.precision = static_cast<Precision>(precision);
}

// Excitation, activation and gate as Python counts them.
inline ChannelProblem problem_of(Excitation excitation, int activation, int gate, double gate_alpha, double gate_beta) {
  ChannelProblem p;
  p.excitation = excitation;
  p.activation = static_cast<Activation>(activation);
  p.gate = static_cast<Gate>(gate);
  p.gate_alpha = gate_alpha;
  p.gate_beta = gate_beta;
  return p;
}

}  // namespace regard::bindings
