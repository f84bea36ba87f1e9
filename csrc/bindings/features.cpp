// The Python face of cpu/features.h. Built without any instruction-set flag, so it loads anywhere.

#include "cpu/features.h"

#include <pybind11/pybind11.h>

#include <string>

namespace py = pybind11;

namespace {

// {instruction set: None, or why it cannot run}, in order of preference, worst first.
py::typing::Dict<py::str, py::typing::Optional<py::str>> instruction_sets() {
  py::dict answer;
  for (const auto& set : regard::cpu::instruction_sets())
    answer[set.name] = set.lacks == nullptr ? py::object(py::none()) : py::object(py::str(set.lacks));
  return answer;
}

}  // namespace

PYBIND11_MODULE(_cpu_features, m, py::mod_gil_not_used()) {
  m.def("instruction_sets", &instruction_sets);
  m.attr("compiler") = __VERSION__;
}
