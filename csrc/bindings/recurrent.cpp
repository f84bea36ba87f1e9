#include "bindings/call.h"
#include "bindings/operations.h"
#include "cpu/operations.h"

namespace regard::bindings {
namespace {

py::array allocate_packed(Array& view) {
  const py::dtype dtype = view.dtype == DType::float64 ? py::dtype::of<double>() : py::dtype::of<float>();
  py::array packed = aligned(dtype, {view.shape[0], view.shape[1], view.shape[2]});
  view = view_of(packed);
  return packed;
}

py::object pack_recurrent(const Array& w_hidden, const Array& b_hidden, bool lstm) {
  PackRecurrentProblem p;
  p.cell = lstm ? Cell::lstm : Cell::gru;
  p.w_hidden = w_hidden;
  p.b_hidden = b_hidden;
  if (const Refusal r = p.check()) return refused(r);
  p.packed = packed_recurrent_array(p.cell, p.hidden(), compute_dtype(w_hidden.dtype));
  py::list outputs;
  outputs.append(allocate_packed(p.packed));
  without_gil([&] { cpu::pack_recurrent(p); });
  return outputs;
}

// The weights are one direction's, or, packed, those of one or two: the second's are None where there is one.
py::object recurrent(const py::object& x, const Array& h0, const Array& c0, const Array& lengths, const Array& w_input,
                     const Array& w_hidden, const Array& b_input, const Array& b_hidden, const Array& w_input_reverse,
                     const Array& w_hidden_reverse, bool lstm, bool reverse, bool time_major, std::int64_t packed_hidden) {
  RecurrentProblem p;
  p.cell = lstm ? Cell::lstm : Cell::gru;
  p.x = py::cast<Array>(x);
  if (time_major && p.x.rank == 3) p.x.swap_axes(0, 1);
  p.h0 = h0;
  p.c0 = c0;
  p.lengths = lengths;
  p.weights[0] = {w_input, w_hidden, b_input, b_hidden};
  p.weights[1] = {w_input_reverse, w_hidden_reverse, {}, {}};
  p.packed = packed_hidden >= 0;
  p.packed_hidden = packed_hidden;
  p.directions = p.packed && w_input_reverse.present() ? 2 : 1;
  p.reverse = reverse;
  if (const Refusal r = p.check()) return refused(r);

  py::list outputs;
  p.out.dtype = p.h_n.dtype = p.c_n.dtype = p.x.dtype;
  const std::int64_t width = p.directions * p.hidden();
  const auto shape = time_major ? std::vector<py::ssize_t>{p.len(), p.batch(), width} : std::vector<py::ssize_t>{p.batch(), p.len(), width};
  outputs.append(output(py::none(), x, shape, p.out));
  if (time_major) p.out.swap_axes(0, 1);
  const std::vector<py::ssize_t> state{p.directions, p.batch(), p.hidden()};
  outputs.append(output(py::none(), x, state, p.h_n));
  if (lstm) outputs.append(output(py::none(), x, state, p.c_n));
  without_gil([&] { cpu::recurrent(p); });
  return outputs;
}

}  // namespace

void bind_recurrent(py::module_& m) {
  m.def("pack_recurrent", &pack_recurrent, py::arg("w_hidden"), py::arg("b_hidden"), py::arg("lstm"));
  m.def("recurrent", &recurrent, py::arg("x"), py::arg("h0"), py::arg("c0"), py::arg("lengths"), py::arg("w_input"), py::arg("w_hidden"),
        py::arg("b_input"), py::arg("b_hidden"), py::arg("w_input_reverse"), py::arg("w_hidden_reverse"), py::arg("lstm"),
        py::arg("reverse"), py::arg("time_major"), py::arg("packed_hidden"));
}

}  // namespace regard::bindings
