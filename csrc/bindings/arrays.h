// Array views of Python objects: NumPy arrays, and DLPack capsules (bfloat16 from frameworks NumPy cannot read).
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cstring>
#include <string>
#include <vector>

#include "bindings/dlpack.h"
#include "core/array.h"

namespace regard::bindings {

namespace py = pybind11;

inline DType dtype_of_numpy(const py::dtype& t) {
  const char order = t.byteorder();
  if (order != '=' && order != '|' && order != (PY_BIG_ENDIAN ? '>' : '<')) return DType::other;
  switch (t.num()) {
    case py::detail::npy_api::NPY_FLOAT_: return DType::float32;
    case py::detail::npy_api::NPY_DOUBLE_: return DType::float64;
    case 23: return DType::float16;  // NPY_HALF, which pybind11 does not name
    case py::detail::npy_api::NPY_BOOL_: return DType::boolean;
    default: break;
  }
  if (t.kind() == 'i' && t.itemsize() == 1) return DType::int8;
  if (t.kind() == 'i' && t.itemsize() == 4) return DType::int32;
  if (t.kind() == 'i' && t.itemsize() == 8) return DType::int64;
  // ml_dtypes registers its types at run time: known by name only.
  if (t.itemsize() > 2) return DType::other;
  const char* const name = reinterpret_cast<PyTypeObject*>(t.attr("type").ptr())->tp_name;
  if (t.itemsize() == 2 && std::strstr(name, "bfloat16") != nullptr) return DType::bfloat16;
  if (t.itemsize() == 1 && std::strstr(name, "float8_e4m3fn") != nullptr && std::strstr(name, "fnuz") == nullptr)
    return DType::float8_e4m3fn;
  return DType::other;
}

inline Array view_of(const py::array& x) {
  Array a;
  a.kind = Array::Kind::array;
  a.data = static_cast<char*>(const_cast<void*>(x.data()));
  a.rank = static_cast<int>(x.ndim());
  for (int i = 0; i < a.rank && i < kMaxRank; ++i) {
    a.shape[i] = x.shape(i);
    a.stride[i] = x.strides(i);
  }
  a.dtype = dtype_of_numpy(x.dtype());
  a.writable = x.writeable();
  return a;
}

// A NumPy array, and of no subclass.
inline bool is_exactly_numpy(py::handle x) { return Py_TYPE(x.ptr()) == py::detail::npy_api::get().PyArray_Type_; }

// The NumPy dtype object for storage type `t`, where `like` is an array that has it.
inline py::array allocate(const py::dtype& dtype, const std::vector<py::ssize_t>& shape) { return py::array(dtype, shape); }

}  // namespace regard::bindings

namespace pybind11::detail {

// None becomes an absent array, anything unknown Kind::not_an_array: the problem's check() words both.
template <> struct type_caster<regard::Array> {
  PYBIND11_TYPE_CASTER(regard::Array, const_name("object"));

  bool load(handle source, bool) {
    if (source.is_none()) return true;
    if (isinstance<array>(source)) {
      value = regard::bindings::view_of(reinterpret_borrow<array>(source));
    } else if (PyCapsule_IsValid(source.ptr(), "dltensor") != 0) {
      value = regard::bindings::view_of_capsule(source);
    } else {
      value.kind = regard::Array::Kind::not_an_array;
    }
    return true;
  }
};

}  // namespace pybind11::detail
