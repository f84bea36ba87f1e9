#include "bindings/cuda_arrays.h"
#include "bindings/cuda_operations.h"

namespace regard::bindings {
namespace {

py::object global_pool(const py::object& x, bool channels_last, bool maximum, std::uintptr_t stream, const py::function& allocate) {
  DeviceCall call(stream, allocate);
  PoolProblem p;
  p.x = call.view(x, "x");
  p.maximum = maximum;
  if (call.refusal) return refused(call.refusal);
  if (channels_last) p.channels_second();
  if (const Refusal r = p.check()) return refused(r);
  p.out = call.output(py::none(), {}, {p.x.shape[0], p.x.shape[1]}, "");
  cuda::global_pool(p, call.queue);
  return call.outputs;
}

// What every rescaling of a map ends with, once the problem has its other arrays.
py::object rescaled(DeviceCall& call, ChannelProblem& p, const py::object& out, bool channels_last) {
  p.out = call.view(out, "out");
  if (call.refusal) return refused(call.refusal);
  if (channels_last) p.channels_second();
  if (const Refusal r = p.check()) return refused(r);
  const std::int64_t* const n = p.x.shape;
  const bool given = p.out.present();
  if (channels_last)
    p.out = call.output(out, p.out, {n[0], n[2], n[3], n[1]}, "");
  else
    p.out = call.output(out, p.out, {n[0], n[1], n[2], n[3]}, "");
  if (channels_last && !given) p.out.move_axis(3, 1);
  cuda::weigh_map(p, call.queue);
  return call.outputs;
}

void set_mlp(DeviceCall& call, ChannelProblem& p, const py::object& w_reduce, const py::object& b_reduce, const py::object& w_expand,
             const py::object& b_expand) {
  p.w_reduce = call.view(w_reduce, "w_reduce");
  p.b_reduce = call.view(b_reduce, "b_reduce");
  p.w_expand = call.view(w_expand, "w_expand");
  p.b_expand = call.view(b_expand, "b_expand");
}

// squeeze_excitation and channel_attention differ in what is pooled.
template <Excitation kPools>
py::object excitation(const py::object& x, const py::object& w_reduce, const py::object& b_reduce, const py::object& w_expand,
                      const py::object& b_expand, const py::object& out, int activation, int gate, double gate_alpha, double gate_beta,
                      bool channels_last, std::uintptr_t stream, const py::function& allocate) {
  DeviceCall call(stream, allocate);
  ChannelProblem p = problem_of(kPools, activation, gate, gate_alpha, gate_beta);
  p.x = call.view(x, "x");
  set_mlp(call, p, w_reduce, b_reduce, w_expand, b_expand);
  return rescaled(call, p, out, channels_last);
}

py::object efficient_channel_attention(const py::object& x, const py::object& w, const py::object& out, int gate, double gate_alpha,
                                       double gate_beta, bool channels_last, std::uintptr_t stream, const py::function& allocate) {
  DeviceCall call(stream, allocate);
  ChannelProblem p = problem_of(Excitation::convolution, 0, gate, gate_alpha, gate_beta);
  p.x = call.view(x, "x");
  p.w_channel = call.view(w, "w");
  return rescaled(call, p, out, channels_last);
}

py::object spatial_attention(const py::object& x, const py::object& w_spatial, const py::object& b_spatial, const py::object& out, int gate,
                             double gate_alpha, double gate_beta, bool channels_last, std::uintptr_t stream, const py::function& allocate) {
  DeviceCall call(stream, allocate);
  ChannelProblem p = problem_of(Excitation::none, 0, gate, gate_alpha, gate_beta);
  p.x = call.view(x, "x");
  p.w_spatial = call.view(w_spatial, "w_spatial");
  p.b_spatial = call.view(b_spatial, "b_spatial");
  return rescaled(call, p, out, channels_last);
}

py::object cbam(const py::object& x, const py::object& w_reduce, const py::object& b_reduce, const py::object& w_expand,
                const py::object& b_expand, const py::object& w_spatial, const py::object& b_spatial, const py::object& out, int activation,
                int gate, double gate_alpha, double gate_beta, bool channels_last, std::uintptr_t stream, const py::function& allocate) {
  DeviceCall call(stream, allocate);
  ChannelProblem p = problem_of(Excitation::average_and_maximum, activation, gate, gate_alpha, gate_beta);
  p.x = call.view(x, "x");
  set_mlp(call, p, w_reduce, b_reduce, w_expand, b_expand);
  p.w_spatial = call.view(w_spatial, "w_spatial");
  p.b_spatial = call.view(b_spatial, "b_spatial");
  p.needs_spatial = true;
  return rescaled(call, p, out, channels_last);
}

}  // namespace

void bind_cuda_channel(py::module_& m) {
  m.def("global_pool", &global_pool, py::arg("x"), py::arg("channels_last"), py::arg("maximum"), py::arg("stream"), py::arg("allocate"));
  m.def("squeeze_excitation", &excitation<Excitation::average>, py::arg("x"), py::arg("w_reduce"), py::arg("b_reduce"), py::arg("w_expand"),
        py::arg("b_expand"), py::arg("out"), py::arg("activation"), py::arg("gate"), py::arg("gate_alpha"), py::arg("gate_beta"),
        py::arg("channels_last"), py::arg("stream"), py::arg("allocate"));
  m.def("channel_attention", &excitation<Excitation::average_and_maximum>, py::arg("x"), py::arg("w_reduce"), py::arg("b_reduce"),
        py::arg("w_expand"), py::arg("b_expand"), py::arg("out"), py::arg("activation"), py::arg("gate"), py::arg("gate_alpha"),
        py::arg("gate_beta"), py::arg("channels_last"), py::arg("stream"), py::arg("allocate"));
  m.def("efficient_channel_attention", &efficient_channel_attention, py::arg("x"), py::arg("w"), py::arg("out"), py::arg("gate"),
        py::arg("gate_alpha"), py::arg("gate_beta"), py::arg("channels_last"), py::arg("stream"), py::arg("allocate"));
  m.def("spatial_attention", &spatial_attention, py::arg("x"), py::arg("w_spatial"), py::arg("b_spatial"), py::arg("out"), py::arg("gate"),
        py::arg("gate_alpha"), py::arg("gate_beta"), py::arg("channels_last"), py::arg("stream"), py::arg("allocate"));
  m.def("cbam", &cbam, py::arg("x"), py::arg("w_reduce"), py::arg("b_reduce"), py::arg("w_expand"), py::arg("b_expand"),
        py::arg("w_spatial"), py::arg("b_spatial"), py::arg("out"), py::arg("activation"), py::arg("gate"), py::arg("gate_alpha"),
        py::arg("gate_beta"), py::arg("channels_last"), py::arg("stream"), py::arg("allocate"));
}

}  // namespace regard::bindings
