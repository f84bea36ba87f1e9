// The Python face of the CUDA build: the functions of the CPU modules, with the stream and a function that allocates at
// the end. Calls only enqueue work, so that the GIL is kept.

#include "bindings/cuda_arrays.h"
#include "bindings/cuda_operations.h"

namespace regard::bindings {
namespace {

// Lengths come on the host, and are checked, or on the device, and are held to their range there, without waiting.
struct Lengths {
  Array host;
  Array device;

  Lengths(DeviceCall& call, const py::object& x, const char* argument) {
    if (py::isinstance<py::array>(x))
      host = py::cast<Array>(x);
    else
      device = call.view(x, argument);
  }
  void check(Checker& c, std::int64_t n, const char* argument) const {
    if (!device.present()) return;
    c.require(device.dtype == DType::int32 || device.dtype == DType::int64, regard::rules::kDType, argument);
    c.require(device.rank == 1, regard::rules::kRank, argument).shape(device, argument, n);
  }
  Array on_device(DeviceCall& call, const std::vector<std::int64_t>& checked) const {
    if (host.present()) return call.on_device(checked);
    return device;
  }
};

py::object attention(const py::object& query, const py::object& key, const py::object& value, const py::object& mask,
                     const py::object& bias, const py::object& alibi_slopes, const py::object& sinks, const py::object& query_lengths,
                     const py::object& key_lengths, const py::object& out, const py::object& block_mask, std::int64_t window_left,
                     std::int64_t window_right, int alignment, double scale, double softcap, double dropout_p, std::uint64_t seed,
                     int precision, bool sequence_first, bool return_lse, bool return_weights, std::uintptr_t stream,
                     const py::function& allocate) {
  require_kernel(block_mask.is_none(), "attention: a BlockMask as mask");
  require_kernel(!return_weights, "attention: return_weights");
  DeviceCall call(stream, allocate);
  AttentionProblem p;
  p.query = call.view(query, "query");
  p.key = call.view(key, "key");
  p.value = call.view(value, "value");
  p.mask = call.view(mask, "mask");
  p.bias = call.view(bias, "bias");
  p.alibi_slopes = call.view(alibi_slopes, "alibi_slopes");
  p.sinks = call.view(sinks, "sinks");
  p.out = call.view(out, "out");
  const Lengths queries(call, query_lengths, "query_lengths");
  const Lengths keys(call, key_lengths, "key_lengths");
  if (call.refusal) return refused(call.refusal);
  p.query_lengths = queries.host;
  p.key_lengths = keys.host;
  set_numbers(p, window_left, window_right, alignment, scale, softcap, dropout_p, seed, precision);
  if (sequence_first) p.swap_sequence_and_heads();
  if (const Refusal r = p.check()) return refused(r);
  if (const Refusal r = p.check_outputs()) return refused(r);
  Checker c;
  queries.check(c, p.batch(), "query_lengths");
  keys.check(c, p.batch(), "key_lengths");
  if (c.result()) return refused(c.result());
  p.query_lengths = queries.on_device(call, p.query_ends);
  p.key_lengths = keys.on_device(call, p.key_ends);

  if (sequence_first) {
    const bool given = p.out.present();
    p.out = call.output(out, p.out, {p.batch(), p.len_q(), p.heads(), p.dim_v()}, "");
    if (!given) p.out.swap_axes(1, 2);
  } else {
    p.out = call.output(out, p.out, {p.batch(), p.heads(), p.len_q(), p.dim_v()}, "");
  }
  if (return_lse) p.lse = call.output(py::none(), {}, {p.batch(), p.heads(), p.len_q()}, "float32");
  cuda::attention_forward(p, call.queue);
  return call.outputs;
}

// The bytes [first, last) that an array's elements lie in.
py::object extent(const py::object& x) {
  const Array a = view_of_device(x);
  auto first = reinterpret_cast<std::intptr_t>(a.data);
  auto last = first + size_of(a.dtype);
  for (int i = 0; i < a.rank; ++i) {
    if (a.shape[i] == 0) return py::make_tuple(0, 0);
    (a.stride[i] < 0 ? first : last) += (a.shape[i] - 1) * a.stride[i];
  }
  return py::make_tuple(first, last);
}

}  // namespace

void bind_cuda(py::module_& m) {
  m.def("why_not", &cuda::why_not);
  m.def("extent", &extent, py::arg("x"));
  m.def("attention", &attention, py::arg("query"), py::arg("key"), py::arg("value"), py::arg("mask"), py::arg("bias"),
        py::arg("alibi_slopes"), py::arg("sinks"), py::arg("query_lengths"), py::arg("key_lengths"), py::arg("out"), py::arg("block_mask"),
        py::arg("window_left"), py::arg("window_right"), py::arg("alignment"), py::arg("scale"), py::arg("softcap"), py::arg("dropout_p"),
        py::arg("seed"), py::arg("precision"), py::arg("sequence_first"), py::arg("return_lse"), py::arg("return_weights"),
        py::arg("stream"), py::arg("allocate"));
  bind_cuda_channel(m);
  bind_cuda_dense(m);
}

}  // namespace regard::bindings

#ifndef REGARD_EMULATED
PYBIND11_MODULE(_cuda, m, pybind11::mod_gil_not_used()) { regard::bindings::bind_cuda(m); }
#endif
