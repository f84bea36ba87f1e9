#include "bindings/call.h"
#include "bindings/operations.h"
#include "cpu/operations.h"

namespace regard::bindings {
namespace {

// The output given, or a new one like `x` with `features` on its last axis.
void add_output(py::list& outputs, const py::object& out, const py::object& x, const Array& like, std::int64_t features, Array& view) {
  if (!view.present()) {
    view.dtype = like.dtype;
    std::vector<py::ssize_t> shape(like.shape, like.shape + like.rank);
    shape.back() = features;
    outputs.append(output(out, x, shape, view));
  } else {
    outputs.append(out);
  }
}

py::object linear(const py::object& x, const Array& weight, const Array& bias, const Array& residual, const py::object& out,
                  std::int64_t packed_out_features, int activation, int held) {
  LinearProblem p;
  p.x = py::cast<Array>(x);
  p.weight = weight;
  p.bias = bias;
  p.residual = residual;
  p.out = py::cast<Array>(out);
  p.activation = static_cast<LinearProblem::Activation>(activation);
  p.packed = packed_out_features >= 0;
  p.packed_out_features = packed_out_features;
  p.held = static_cast<Held>(held);
  if (const Refusal r = p.check()) return refused(r);
  if (const Refusal r = p.check_outputs()) return refused(r);
  py::list outputs;
  add_output(outputs, out, x, p.x, p.out_features(), p.out);
  without_gil([&] { cpu::linear(p); });
  return outputs;
}

py::object pack_linear(const Array& weight, const Array& bias, int held) {
  PackProblem p;
  p.weight = weight;
  p.bias = bias;
  p.held = static_cast<Held>(held);
  if (const Refusal r = p.check()) return refused(r);
  const DType compute = compute_dtype(weight.dtype);
  py::array packed = aligned(compute == DType::float64 ? py::dtype::of<double>() : py::dtype::of<float>(),
                             {panel_count(weight.shape[0], compute), packed_rows(weight.shape[1], p.held), panel_columns(compute)});
  p.packed = view_of(packed);
  without_gil([&] { cpu::pack_linear(p); });
  py::list outputs;
  outputs.append(packed);
  return outputs;
}

py::object norm(const py::object& x, const Array& residual, const Array& weight, const Array& bias, const py::object& out, double eps,
                bool rms) {
  NormProblem p;
  p.x = py::cast<Array>(x);
  p.residual = residual;
  p.weight = weight;
  p.bias = bias;
  p.out = py::cast<Array>(out);
  p.eps = eps;
  p.kind = rms ? NormProblem::Kind::rms : NormProblem::Kind::layer;
  if (const Refusal r = p.check()) return refused(r);
  if (const Refusal r = p.check_outputs()) return refused(r);
  py::list outputs;
  add_output(outputs, out, x, p.x, p.features(), p.out);
  without_gil([&] { cpu::norm(p); });
  return outputs;
}

}  // namespace

void bind_dense(py::module_& m) {
  m.def("linear", &linear, py::arg("x"), py::arg("weight"), py::arg("bias"), py::arg("residual"), py::arg("out"),
        py::arg("packed_out_features"), py::arg("activation"), py::arg("held"));
  m.def("pack_linear", &pack_linear, py::arg("weight"), py::arg("bias"), py::arg("held"));
  m.def("norm", &norm, py::arg("x"), py::arg("residual"), py::arg("weight"), py::arg("bias"), py::arg("out"), py::arg("eps"),
        py::arg("rms"));
}

}  // namespace regard::bindings
