#include "bindings/cuda_arrays.h"
#include "bindings/cuda_operations.h"

namespace regard::bindings {
namespace {

// Allocates out, and weights where wanted, like the query, and brings the lengths to the device.
template <class Problem> void complete(DeviceCall& call, Problem& p, bool return_weights) {
  p.out = call.output(py::none(), {}, {p.batch(), p.len_q(), p.dim_v()}, "");
  if (return_weights) p.weights = call.output(py::none(), {}, {p.batch(), p.len_q(), p.len_kv()}, "");
  call.move(p.key_lengths, p.key_ends);
}

// What an additive call and a location-sensitive one both have.
struct Scored {
  const py::object& query;
  const py::object& key;
  const py::object& value;
  const py::object& v;
  const py::object& w_query;
  const py::object& w_key;
  const py::object& bias;
  const py::object& mask;
};

void set_scored(DeviceCall& call, AdditiveProblem& p, const Scored& s) {
  p.query = call.view(s.query, "query");
  p.key = call.view(s.key, "key");
  p.value = call.view(s.value, "value");
  p.v = call.view(s.v, "v");
  p.w_query = call.view(s.w_query, "w_query");
  p.w_key = call.view(s.w_key, "w_key");
  p.bias = call.view(s.bias, "bias");
  p.mask = call.view(s.mask, "mask");
}

py::object run_additive(DeviceCall& call, AdditiveProblem& p, bool return_weights) {
  if (call.refusal) return refused(call.refusal);
  if (const Refusal r = p.check()) return refused(r);
  complete(call, p, return_weights);
  cuda::additive_attention(p, call.queue);
  return call.outputs;
}

py::object additive_attention(const py::object& query, const py::object& key, const py::object& value, const py::object& v,
                              const py::object& w_query, const py::object& w_key, const py::object& bias, const py::object& mask,
                              const py::object& key_lengths, bool return_weights, std::uintptr_t stream, const py::function& allocate) {
  DeviceCall call(stream, allocate);
  AdditiveProblem p;
  set_scored(call, p, {query, key, value, v, w_query, w_key, bias, mask});
  p.key_lengths = call.indices(key_lengths, "key_lengths");
  return run_additive(call, p, return_weights);
}

py::object location_sensitive_attention(const py::object& query, const py::object& key, const py::object& value,
                                        const py::object& previous_weights, const py::object& v, const py::object& w_query,
                                        const py::object& w_key, const py::object& w_location, const py::object& location_kernel,
                                        const py::object& location_bias, const py::object& bias, const py::object& mask,
                                        std::uintptr_t stream, const py::function& allocate) {
  DeviceCall call(stream, allocate);
  AdditiveProblem p;
  set_scored(call, p, {query, key, value, v, w_query, w_key, bias, mask});
  p.previous_weights = call.view(previous_weights, "previous_weights");
  p.w_location = call.view(w_location, "w_location");
  p.location_kernel = call.view(location_kernel, "location_kernel");
  p.location_bias = call.view(location_bias, "location_bias");
  p.needs_location = true;
  return run_additive(call, p, true);
}

py::object multiplicative_attention(const py::object& query, const py::object& key, const py::object& value, const py::object& w,
                                    const py::object& mask, const py::object& key_lengths, bool return_weights, std::uintptr_t stream,
                                    const py::function& allocate) {
  DeviceCall call(stream, allocate);
  MultiplicativeProblem p;
  p.query = call.view(query, "query");
  p.key = call.view(key, "key");
  p.value = call.view(value, "value");
  p.w = call.view(w, "w");
  p.mask = call.view(mask, "mask");
  p.key_lengths = call.indices(key_lengths, "key_lengths");
  if (call.refusal) return refused(call.refusal);
  if (const Refusal r = p.check()) return refused(r);
  complete(call, p, return_weights);
  cuda::multiplicative_attention(p, call.queue);
  return call.outputs;
}

}  // namespace

void bind_cuda_additive(py::module_& m) {
  m.def("additive_attention", &additive_attention, py::arg("query"), py::arg("key"), py::arg("value"), py::arg("v"), py::arg("w_query"),
        py::arg("w_key"), py::arg("bias"), py::arg("mask"), py::arg("key_lengths"), py::arg("return_weights"), py::arg("stream"),
        py::arg("allocate"));
  m.def("location_sensitive_attention", &location_sensitive_attention, py::arg("query"), py::arg("key"), py::arg("value"),
        py::arg("previous_weights"), py::arg("v"), py::arg("w_query"), py::arg("w_key"), py::arg("w_location"), py::arg("location_kernel"),
        py::arg("location_bias"), py::arg("bias"), py::arg("mask"), py::arg("stream"), py::arg("allocate"));
  m.def("multiplicative_attention", &multiplicative_attention, py::arg("query"), py::arg("key"), py::arg("value"), py::arg("w"),
        py::arg("mask"), py::arg("key_lengths"), py::arg("return_weights"), py::arg("stream"), py::arg("allocate"));
}

}  // namespace regard::bindings
