// What the bindings of CPU and GPU do alike: refuse, and put the plain numbers that Python passes into a problem.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>

#include "core/attention_problem.h"
#include "core/channel_problem.h"
#include "core/refusal.h"

namespace regard::bindings {

namespace py = pybind11;

inline py::object refused(const Refusal& r) { return py::make_tuple(r.rule, r.argument, r.entry); }

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
