// One function a family of operations: adds its m.def lines.
#pragma once

#include <pybind11/pybind11.h>

namespace regard::bindings {

void bind_additive(pybind11::module_& m);
void bind_cache(pybind11::module_& m);
void bind_ceilings(pybind11::module_& m);
void bind_attention(pybind11::module_& m);
void bind_dense(pybind11::module_& m);
void bind_channel(pybind11::module_& m);
void bind_recurrent(pybind11::module_& m);
void bind_plan(pybind11::module_& m);

}  // namespace regard::bindings
