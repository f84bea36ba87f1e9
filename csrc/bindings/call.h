// What every CPU binding does: refuse, allocate outputs, run without the GIL.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <new>
#include <optional>
#include <vector>

#include "bindings/arrays.h"
#include "bindings/problems.h"
#include "cpu/parallel.h"

namespace regard::bindings {

// Runs a kernel without the GIL, unless it is over sooner than others could make use of it: giving it up and taking it back costs
// 0.16 us. Ctrl-C during it becomes the exception that the signal handler raised.
template <class F> void without_gil(F&& f, bool brief = false) {
  try {
    std::optional<py::gil_scoped_release> release;
    if (!brief) release.emplace();
    f();
  } catch (const cpu::Interrupted&) {
    throw py::error_already_set();
  }
}

inline bool signal_raised() {
  const py::gil_scoped_acquire gil;
  return PyErr_CheckSignals() != 0;
}

// The output given, or a new array like `like`; seen as `view` either way.
inline py::object output(const py::object& given, const py::handle& like, const std::vector<py::ssize_t>& shape, Array& view) {
  if (!given.is_none()) return given;
  // 16-bit words stand for the bfloat16 of frameworks whose arrays came as capsules.
  const bool numpy = py::isinstance<py::array>(like);
  py::array x = allocate(numpy ? py::reinterpret_borrow<py::array>(like).dtype() : py::dtype("uint16"), shape);
  const DType dtype = view.dtype;
  view = view_of(x);
  if (!numpy) view.dtype = dtype;
  return x;
}

// Cache-line aligned, so that no vector of a panel lies across two lines (NumPy promises 16 bytes only).
inline py::array aligned(const py::dtype& dtype, const std::vector<py::ssize_t>& shape) {
  py::ssize_t bytes = dtype.itemsize();
  for (const py::ssize_t n : shape)
    if (__builtin_mul_overflow(bytes, n, &bytes)) throw std::bad_alloc();
  py::array memory(py::dtype::of<std::uint8_t>(), std::vector<py::ssize_t>{bytes + 64});
  auto* p = static_cast<char*>(memory.mutable_data());
  p += -reinterpret_cast<std::uintptr_t>(p) & 63;
  return py::array(dtype, shape, p, memory);
}

}  // namespace regard::bindings
