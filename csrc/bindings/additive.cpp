#include "bindings/call.h"
#include "bindings/operations.h"
#include "cpu/operations.h"

namespace regard::bindings {
namespace {

// Allocates out, and weights where wanted, like the query; returns them as a list.
template <class Problem> py::list allocate_outputs(Problem& p, const py::object& query, bool return_weights) {
  py::list outputs;
  p.out.dtype = p.query.dtype;
  outputs.append(output(py::none(), query, {p.batch(), p.len_q(), p.dim_v()}, p.out));
  if (return_weights) {
    p.weights.dtype = p.query.dtype;
    outputs.append(output(py::none(), query, {p.batch(), p.len_q(), p.len_kv()}, p.weights));
  }
  return outputs;
}

py::object run_additive(AdditiveProblem& p, const py::object& query, bool return_weights) {
  if (const Refusal r = p.check()) return refused(r);
  py::list outputs = allocate_outputs(p, query, return_weights);
  without_gil([&] { cpu::additive_attention(p); });
  return outputs;
}

py::object additive_attention(const py::object& query, const Array& key, const Array& value, const Array& v, const Array& w_query,
                              const Array& w_key, const Array& bias, const Array& mask, const Array& key_lengths, bool return_weights) {
  AdditiveProblem p;
  p.query = py::cast<Array>(query);
  p.key = key;
  p.value = value;
  p.v = v;
  p.w_query = w_query;
  p.w_key = w_key;
  p.bias = bias;
  p.mask = mask;
  p.key_lengths = key_lengths;
  return run_additive(p, query, return_weights);
}

py::object location_sensitive_attention(const py::object& query, const Array& key, const Array& value, const Array& previous_weights,
                                        const Array& v, const Array& w_query, const Array& w_key, const Array& w_location,
                                        const Array& location_kernel, const Array& location_bias, const Array& bias, const Array& mask) {
  AdditiveProblem p;
  p.query = py::cast<Array>(query);
  p.key = key;
  p.value = value;
  p.previous_weights = previous_weights;
  p.v = v;
  p.w_query = w_query;
  p.w_key = w_key;
  p.w_location = w_location;
  p.location_kernel = location_kernel;
  p.location_bias = location_bias;
  p.bias = bias;
  p.mask = mask;
  p.needs_location = true;
  return run_additive(p, query, true);
}

py::object multiplicative_attention(const py::object& query, const Array& key, const Array& value, const Array& w, const Array& mask,
                                    const Array& key_lengths, bool return_weights) {
  MultiplicativeProblem p;
  p.query = py::cast<Array>(query);
  p.key = key;
  p.value = value;
  p.w = w;
  p.mask = mask;
  p.key_lengths = key_lengths;
  if (const Refusal r = p.check()) return refused(r);
  py::list outputs = allocate_outputs(p, query, return_weights);
  without_gil([&] { cpu::multiplicative_attention(p); });
  return outputs;
}

}  // namespace

void bind_additive(py::module_& m) {
  m.def("additive_attention", &additive_attention, py::arg("query"), py::arg("key"), py::arg("value"), py::arg("v"), py::arg("w_query"),
        py::arg("w_key"), py::arg("bias"), py::arg("mask"), py::arg("key_lengths"), py::arg("return_weights"));
  m.def("location_sensitive_attention", &location_sensitive_attention, py::arg("query"), py::arg("key"), py::arg("value"),
        py::arg("previous_weights"), py::arg("v"), py::arg("w_query"), py::arg("w_key"), py::arg("w_location"), py::arg("location_kernel"),
        py::arg("location_bias"), py::arg("bias"), py::arg("mask"));
  m.def("multiplicative_attention", &multiplicative_attention, py::arg("query"), py::arg("key"), py::arg("value"), py::arg("w"),
        py::arg("mask"), py::arg("key_lengths"), py::arg("return_weights"));
}

}  // namespace regard::bindings
