#include "bindings/call.h"
#include "bindings/operations.h"
#include "cpu/operations.h"

namespace regard::bindings {
namespace {

// A new array for x's result. Where x is channels-last memory seen as (batch, channels, height, width), as frameworks
// pass it, so is the result: the next operation then gets what this one got.
py::object like_map(const py::object& x, Array& view) {
  const Array& a = view;
  const std::int64_t item = size_of(a.dtype);
  const bool pixels = a.shape[1] > 1 && a.stride[1] == item && (a.shape[2] > 1 || a.shape[3] > 1) && a.stride[3] != item;
  if (pixels) {
    const std::int64_t batch = a.shape[0], channels = a.shape[1], height = a.shape[2], width = a.shape[3];
    const py::object made = output(py::none(), x, {batch, height, width, channels}, view);
    view.move_axis(3, 1);
    return made.attr("transpose")(0, 3, 1, 2);
  }
  return output(py::none(), x, {a.shape[0], a.shape[1], a.shape[2], a.shape[3]}, view);
}

py::object global_pool(const py::object& x, bool channels_last, bool maximum) {
  PoolProblem p;
  p.x = py::cast<Array>(x);
  p.maximum = maximum;
  if (channels_last) p.channels_second();
  if (const Refusal r = p.check()) return refused(r);
  py::list outputs;
  p.out.dtype = p.x.dtype;
  outputs.append(output(py::none(), x, {p.x.shape[0], p.x.shape[1]}, p.out));
  without_gil([&] { cpu::global_pool(p); });
  return outputs;
}

py::object rescaled(ChannelProblem& p, const py::object& x, const py::object& out, bool channels_last,
                    void (*kernel)(const ChannelProblem&)) {
  p.x = py::cast<Array>(x);
  p.out = py::cast<Array>(out);
  if (channels_last) p.channels_second();
  if (const Refusal r = p.check()) return refused(r);
  py::list outputs;
  if (p.out.present()) {
    outputs.append(out);
  } else if (channels_last) {
    p.out.dtype = p.x.dtype;
    outputs.append(output(out, x, {p.x.shape[0], p.x.shape[2], p.x.shape[3], p.x.shape[1]}, p.out));
    p.out.move_axis(3, 1);
  } else {
    p.out = p.x;
    outputs.append(like_map(x, p.out));
  }
  without_gil([&] { kernel(p); });
  return outputs;
}

void set_mlp(ChannelProblem& p, const Array& w_reduce, const Array& b_reduce, const Array& w_expand, const Array& b_expand) {
  p.w_reduce = w_reduce;
  p.b_reduce = b_reduce;
  p.w_expand = w_expand;
  p.b_expand = b_expand;
}

py::object squeeze_excitation(const py::object& x, const Array& w_reduce, const Array& b_reduce, const Array& w_expand,
                              const Array& b_expand, const py::object& out, int activation, int gate, double gate_alpha, double gate_beta,
                              bool channels_last) {
  ChannelProblem p = problem_of(Excitation::average, activation, gate, gate_alpha, gate_beta);
  set_mlp(p, w_reduce, b_reduce, w_expand, b_expand);
  return rescaled(p, x, out, channels_last, cpu::squeeze_excitation);
}

py::object channel_attention(const py::object& x, const Array& w_reduce, const Array& b_reduce, const Array& w_expand,
                             const Array& b_expand, const py::object& out, int activation, int gate, double gate_alpha, double gate_beta,
                             bool channels_last) {
  ChannelProblem p = problem_of(Excitation::average_and_maximum, activation, gate, gate_alpha, gate_beta);
  set_mlp(p, w_reduce, b_reduce, w_expand, b_expand);
  return rescaled(p, x, out, channels_last, cpu::channel_attention);
}

py::object efficient_channel_attention(const py::object& x, const Array& w, const py::object& out, int gate, double gate_alpha,
                                       double gate_beta, bool channels_last) {
  ChannelProblem p = problem_of(Excitation::convolution, 0, gate, gate_alpha, gate_beta);
  p.w_channel = w;
  return rescaled(p, x, out, channels_last, cpu::squeeze_excitation);
}

py::object spatial_attention(const py::object& x, const Array& w_spatial, const Array& b_spatial, const py::object& out, int gate,
                             double gate_alpha, double gate_beta, bool channels_last) {
  ChannelProblem p = problem_of(Excitation::none, 0, gate, gate_alpha, gate_beta);
  p.w_spatial = w_spatial;
  p.b_spatial = b_spatial;
  return rescaled(p, x, out, channels_last, cpu::spatial_attention);
}

py::object cbam(const py::object& x, const Array& w_reduce, const Array& b_reduce, const Array& w_expand, const Array& b_expand,
                const Array& w_spatial, const Array& b_spatial, const py::object& out, int activation, int gate, double gate_alpha,
                double gate_beta, bool channels_last) {
  ChannelProblem p = problem_of(Excitation::average_and_maximum, activation, gate, gate_alpha, gate_beta);
  set_mlp(p, w_reduce, b_reduce, w_expand, b_expand);
  p.w_spatial = w_spatial;
  p.b_spatial = b_spatial;
  p.needs_spatial = true;
  return rescaled(p, x, out, channels_last, cpu::cbam);
}

}  // namespace

void bind_channel(py::module_& m) {
  m.def("global_pool", &global_pool, py::arg("x"), py::arg("channels_last"), py::arg("maximum"));
  m.def("squeeze_excitation", &squeeze_excitation, py::arg("x"), py::arg("w_reduce"), py::arg("b_reduce"), py::arg("w_expand"),
        py::arg("b_expand"), py::arg("out"), py::arg("activation"), py::arg("gate"), py::arg("gate_alpha"), py::arg("gate_beta"),
        py::arg("channels_last"));
  m.def("channel_attention", &channel_attention, py::arg("x"), py::arg("w_reduce"), py::arg("b_reduce"), py::arg("w_expand"),
        py::arg("b_expand"), py::arg("out"), py::arg("activation"), py::arg("gate"), py::arg("gate_alpha"), py::arg("gate_beta"),
        py::arg("channels_last"));
  m.def("efficient_channel_attention", &efficient_channel_attention, py::arg("x"), py::arg("w"), py::arg("out"), py::arg("gate"),
        py::arg("gate_alpha"), py::arg("gate_beta"), py::arg("channels_last"));
  m.def("spatial_attention", &spatial_attention, py::arg("x"), py::arg("w_spatial"), py::arg("b_spatial"), py::arg("out"), py::arg("gate"),
        py::arg("gate_alpha"), py::arg("gate_beta"), py::arg("channels_last"));
  m.def("cbam", &cbam, py::arg("x"), py::arg("w_reduce"), py::arg("b_reduce"), py::arg("w_expand"), py::arg("b_expand"),
        py::arg("w_spatial"), py::arg("b_spatial"), py::arg("out"), py::arg("activation"), py::arg("gate"), py::arg("gate_alpha"),
        py::arg("gate_beta"), py::arg("channels_last"));
}

}  // namespace regard::bindings
