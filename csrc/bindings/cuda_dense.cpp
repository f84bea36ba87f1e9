#include "bindings/cuda_arrays.h"
#include "bindings/cuda_operations.h"

namespace regard::bindings {
namespace {

py::object norm(const py::object& x, const py::object& residual, const py::object& weight, const py::object& bias, const py::object& out,
                double eps, bool rms, std::uintptr_t stream, const py::function& allocate) {
  DeviceCall call(stream, allocate);
  NormProblem p;
  p.x = call.view(x, "x");
  p.residual = call.view(residual, "residual");
  p.weight = call.view(weight, "weight");
  p.bias = call.view(bias, "bias");
  p.out = call.view(out, "out");
  p.eps = eps;
  p.kind = rms ? NormProblem::Kind::rms : NormProblem::Kind::layer;
  if (call.refusal) return refused(call.refusal);
  if (const Refusal r = p.check()) return refused(r);
  if (const Refusal r = p.check_outputs()) return refused(r);
  p.out = call.output(out, p.out, std::vector<std::int64_t>(p.x.shape, p.x.shape + p.x.rank), "");
  cuda::norm(p, call.queue);
  return call.outputs;
}

// What both kinds of linear call have. The bias of a packed weight goes by the weight's name.
LinearProblem linear_problem(DeviceCall& call, const py::object& x, const py::object& weight, const py::object& bias, const char* bias_name,
                             const py::object& residual, const py::object& out, int activation) {
  LinearProblem p;
  p.x = call.view(x, "x");
  p.weight = call.view(weight, "weight");
  p.bias = call.view(bias, bias_name);
  p.residual = call.view(residual, "residual");
  p.out = call.view(out, "out");
  p.activation = static_cast<LinearProblem::Activation>(activation);
  return p;
}

void allocate_linear(DeviceCall& call, LinearProblem& p, const py::object& out) {
  std::vector<std::int64_t> shape(p.x.shape, p.x.shape + p.x.rank);
  shape.back() = p.out_features();
  p.out = call.output(out, p.out, shape, "");
}

// The product itself is the framework's: multiply() gives it as an array and as this binding sees it.
py::object linear(const py::object& x, const py::object& weight, const py::object& bias, const py::object& residual, const py::object& out,
                  int activation, const py::function& multiply, std::uintptr_t stream, const py::function& allocate) {
  DeviceCall call(stream, allocate);
  LinearProblem p = linear_problem(call, x, weight, bias, "bias", residual, out, activation);
  if (call.refusal) return refused(call.refusal);
  if (const Refusal r = p.check()) return refused(r);
  if (const Refusal r = p.check_outputs()) return refused(r);
  if (cuda::rehearsal() != nullptr) {  // the framework's product is no launch of this module's: it would run
    allocate_linear(call, p, out);
    cuda::finish_linear(p, p.out, call.queue);
    return call.outputs;
  }
  const auto made = multiply().cast<py::tuple>();
  const Array product = view_of_device(made[1]);
  if (p.out.present()) {
    call.outputs.append(out);
  } else {
    p.out = product;
    call.outputs.append(made[0]);
  }
  cuda::finish_linear(p, product, call.queue);
  return call.outputs;
}

// A weight as pack_bytes gives it.
py::object linear_bytes(const py::object& x, const py::object& weight, const py::object& scale, const py::object& bias,
                        const py::object& residual, const py::object& out, int activation, std::uintptr_t stream,
                        const py::function& allocate) {
  DeviceCall call(stream, allocate);
  LinearProblem p = linear_problem(call, x, weight, bias, "weight", residual, out, activation);
  p.scale = call.view(scale, "weight");
  if (call.refusal) return refused(call.refusal);
  if (const Refusal r = p.check()) return refused(r);
  if (const Refusal r = p.check_outputs()) return refused(r);
  allocate_linear(call, p, out);
  cuda::linear_bytes(p, call.queue);
  return call.outputs;
}

// The weight's rows as int8, and their scales.
py::object pack_bytes(const py::object& weight, const py::object& bias, std::uintptr_t stream, const py::function& allocate) {
  DeviceCall call(stream, allocate);
  PackProblem p;
  p.weight = call.view(weight, "weight");
  p.bias = call.view(bias, "bias");
  p.held = Held::int8;
  if (call.refusal) return refused(call.refusal);
  if (const Refusal r = p.check()) return refused(r);
  const std::int64_t rows = p.weight.shape[0];
  const Array bytes = call.output(py::none(), {}, {rows, byte_row(p.weight.shape[1])}, "int8");
  const Array scales = call.output(py::none(), {}, {rows}, "float32");
  cuda::quantise_rows(p.weight, bytes.data, reinterpret_cast<float*>(scales.data), call.queue);
  return call.outputs;
}

}  // namespace

void bind_cuda_dense(py::module_& m) {
  m.def("linear", &linear, py::arg("x"), py::arg("weight"), py::arg("bias"), py::arg("residual"), py::arg("out"), py::arg("activation"),
        py::arg("multiply"), py::arg("stream"), py::arg("allocate"));
  m.def("linear_bytes", &linear_bytes, py::arg("x"), py::arg("weight"), py::arg("scale"), py::arg("bias"), py::arg("residual"),
        py::arg("out"), py::arg("activation"), py::arg("stream"), py::arg("allocate"));
  m.def("pack_bytes", &pack_bytes, py::arg("weight"), py::arg("bias"), py::arg("stream"), py::arg("allocate"));
  m.def("norm", &norm, py::arg("x"), py::arg("residual"), py::arg("weight"), py::arg("bias"), py::arg("out"), py::arg("eps"),
        py::arg("rms"), py::arg("stream"), py::arg("allocate"));
}

}  // namespace regard::bindings
