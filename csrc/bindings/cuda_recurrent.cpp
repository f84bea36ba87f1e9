#include "bindings/cuda_arrays.h"
#include "bindings/cuda_operations.h"

namespace regard::bindings {
namespace {

// x comes first: it says which device the call is on. p has its options.
py::object run(DeviceCall& call, RecurrentProblem& p, const py::object& x, const py::object& h0, const py::object& c0,
               const py::object& lengths, const py::object (&weights)[2][4], bool time_major) {
  p.x = call.view(x, "x");
  if (time_major && p.x.rank == 3) p.x.swap_axes(0, 1);
  p.h0 = call.view(h0, "h0");
  p.c0 = call.view(c0, "c0");
  p.lengths = call.indices(lengths, "lengths");
  for (int d = 0; d < 2; ++d)
    p.weights[d] = {call.view(weights[d][0], "w_input"), call.view(weights[d][1], "w_hidden"), call.view(weights[d][2], "b_input"),
                    call.view(weights[d][3], "b_hidden")};
  p.directions = p.weights[1].w_input.present() ? 2 : 1;
  if (call.refusal) return refused(call.refusal);
  if (const Refusal r = p.check()) return refused(r);

  const std::int64_t width = p.directions * p.hidden();
  if (time_major) {
    p.out = call.output(py::none(), {}, {p.len(), p.batch(), width}, "");
    p.out.swap_axes(0, 1);
  } else {
    p.out = call.output(py::none(), {}, {p.batch(), p.len(), width}, "");
  }
  const std::vector<std::int64_t> state{p.directions, p.batch(), p.hidden()};
  p.h_n = call.output(py::none(), {}, state, "");
  if (p.cell == Cell::lstm) p.c_n = call.output(py::none(), {}, state, "");
  call.move(p.lengths, p.ends);
  cuda::recurrent(p, call.queue);
  return call.outputs;
}

// As the CPU's, which gru and lstm call.
py::object recurrent(const py::object& x, const py::object& h0, const py::object& c0, const py::object& lengths, const py::object& w_input,
                     const py::object& w_hidden, const py::object& b_input, const py::object& b_hidden, const py::object& w_input_reverse,
                     const py::object& w_hidden_reverse, bool lstm, bool reverse, bool time_major, std::int64_t packed_hidden,
                     std::uintptr_t stream, const py::function& allocate) {
  require_kernel(packed_hidden < 0 && w_input_reverse.is_none() && w_hidden_reverse.is_none(), "a recurrent layer with packed weights");
  DeviceCall call(stream, allocate);
  RecurrentProblem p;
  p.cell = lstm ? Cell::lstm : Cell::gru;
  p.reverse = reverse;
  const py::none none;
  return run(call, p, x, h0, c0, lengths, {{w_input, w_hidden, b_input, b_hidden}, {none, none, none, none}}, time_major);
}

// A layer of one direction or two, whose weights are not packed: what a module runs where the CPU packs.
py::object recurrent_layer(const py::object& x, const py::object& h0, const py::object& c0, const py::object& lengths,
                           const py::object& w_input, const py::object& w_hidden, const py::object& b_input, const py::object& b_hidden,
                           const py::object& w_input_reverse, const py::object& w_hidden_reverse, const py::object& b_input_reverse,
                           const py::object& b_hidden_reverse, bool lstm, bool time_major, std::uintptr_t stream,
                           const py::function& allocate) {
  DeviceCall call(stream, allocate);
  RecurrentProblem p;
  p.cell = lstm ? Cell::lstm : Cell::gru;
  return run(call, p, x, h0, c0, lengths,
             {{w_input, w_hidden, b_input, b_hidden}, {w_input_reverse, w_hidden_reverse, b_input_reverse, b_hidden_reverse}}, time_major);
}

}  // namespace

void bind_cuda_recurrent(py::module_& m) {
  m.def("recurrent", &recurrent, py::arg("x"), py::arg("h0"), py::arg("c0"), py::arg("lengths"), py::arg("w_input"), py::arg("w_hidden"),
        py::arg("b_input"), py::arg("b_hidden"), py::arg("w_input_reverse"), py::arg("w_hidden_reverse"), py::arg("lstm"),
        py::arg("reverse"), py::arg("time_major"), py::arg("packed_hidden"), py::arg("stream"), py::arg("allocate"));
  m.def("recurrent_layer", &recurrent_layer, py::arg("x"), py::arg("h0"), py::arg("c0"), py::arg("lengths"), py::arg("w_input"),
        py::arg("w_hidden"), py::arg("b_input"), py::arg("b_hidden"), py::arg("w_input_reverse"), py::arg("w_hidden_reverse"),
        py::arg("b_input_reverse"), py::arg("b_hidden_reverse"), py::arg("lstm"), py::arg("time_major"), py::arg("stream"),
        py::arg("allocate"));
}

}  // namespace regard::bindings
