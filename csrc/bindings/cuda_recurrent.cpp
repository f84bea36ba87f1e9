#include "bindings/cuda_arrays.h"
#include "bindings/cuda_operations.h"

namespace regard::bindings {
namespace {

py::object recurrent(const py::object& x, const py::object& h0, const py::object& c0, const py::object& lengths, const py::object& w_input,
                     const py::object& w_hidden, const py::object& b_input, const py::object& b_hidden, const py::object& w_input_reverse,
                     const py::object& w_hidden_reverse, bool lstm, bool reverse, bool time_major, std::int64_t packed_hidden,
                     std::uintptr_t stream, const py::function& allocate) {
  require_kernel(packed_hidden < 0 && w_input_reverse.is_none() && w_hidden_reverse.is_none(),
                 "a recurrent layer with packed weights or two directions");
  DeviceCall call(stream, allocate);
  RecurrentProblem p;
  p.cell = lstm ? Cell::lstm : Cell::gru;
  p.x = call.view(x, "x");
  if (time_major && p.x.rank == 3) p.x.swap_axes(0, 1);
  p.h0 = call.view(h0, "h0");
  p.c0 = call.view(c0, "c0");
  p.lengths = call.indices(lengths, "lengths");
  p.weights[0] = {call.view(w_input, "w_input"), call.view(w_hidden, "w_hidden"), call.view(b_input, "b_input"),
                  call.view(b_hidden, "b_hidden")};
  p.reverse = reverse;
  if (call.refusal) return refused(call.refusal);
  if (const Refusal r = p.check()) return refused(r);

  if (time_major) {
    p.out = call.output(py::none(), {}, {p.len(), p.batch(), p.hidden()}, "");
    p.out.swap_axes(0, 1);
  } else {
    p.out = call.output(py::none(), {}, {p.batch(), p.len(), p.hidden()}, "");
  }
  const std::vector<std::int64_t> state{1, p.batch(), p.hidden()};
  p.h_n = call.output(py::none(), {}, state, "");
  if (lstm) p.c_n = call.output(py::none(), {}, state, "");
  call.move(p.lengths, p.ends);
  cuda::recurrent(p, call.queue);
  return call.outputs;
}

}  // namespace

void bind_cuda_recurrent(py::module_& m) {
  m.def("recurrent", &recurrent, py::arg("x"), py::arg("h0"), py::arg("c0"), py::arg("lengths"), py::arg("w_input"), py::arg("w_hidden"),
        py::arg("b_input"), py::arg("b_hidden"), py::arg("w_input_reverse"), py::arg("w_hidden_reverse"), py::arg("lstm"),
        py::arg("reverse"), py::arg("time_major"), py::arg("packed_hidden"), py::arg("stream"), py::arg("allocate"));
}

}  // namespace regard::bindings
