// One function a family of CUDA operations: adds its m.def lines.
#pragma once

#include <pybind11/pybind11.h>

namespace regard::bindings {

void bind_cuda(pybind11::module_& m);  // all of them
void bind_cuda_additive(pybind11::module_& m);
void bind_cuda_attention(pybind11::module_& m);
void bind_cuda_cache(pybind11::module_& m);
void bind_cuda_channel(pybind11::module_& m);
void bind_cuda_dense(pybind11::module_& m);
void bind_cuda_plan(pybind11::module_& m);
void bind_cuda_recurrent(pybind11::module_& m);

}  // namespace regard::bindings
