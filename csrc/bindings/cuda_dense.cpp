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

}  // namespace

void bind_cuda_dense(py::module_& m) {
  m.def("norm", &norm, py::arg("x"), py::arg("residual"), py::arg("weight"), py::arg("bias"), py::arg("out"), py::arg("eps"),
        py::arg("rms"), py::arg("stream"), py::arg("allocate"));
}

}  // namespace regard::bindings
