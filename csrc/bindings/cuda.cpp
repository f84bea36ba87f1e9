// The Python face of the CUDA build: the functions of the CPU modules, with the stream and a function that allocates at
// the end. Calls only enqueue work, so that the GIL is kept.

#include <exception>

#include "bindings/cuda_arrays.h"
#include "bindings/cuda_operations.h"

namespace regard::bindings {
namespace {

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
  py::register_local_exception_translator([](std::exception_ptr thrown) {
    try {
      if (thrown) std::rethrow_exception(thrown);
    } catch (const cuda::NoKernel& missing) {
      py::set_error(PyExc_NotImplementedError, missing.what());
    }
  });
  m.def("why_not", &cuda::why_not);
  m.def("extent", &extent, py::arg("x"));
  bind_cuda_additive(m);
  bind_cuda_attention(m);
  bind_cuda_cache(m);
  bind_cuda_channel(m);
  bind_cuda_dense(m);
  bind_cuda_plan(m);
  bind_cuda_recurrent(m);
}

}  // namespace regard::bindings

#ifndef REGARD_EMULATED
PYBIND11_MODULE(_cuda, m, pybind11::mod_gil_not_used()) { regard::bindings::bind_cuda(m); }
#endif
