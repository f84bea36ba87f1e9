// Views of device arrays, as python/regard/_arrays.py hands them over, and memory from the framework that owns them.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <string>
#include <vector>

#include "bindings/arrays.h"
#include "bindings/problems.h"
#include "cuda/operations.h"
#include "cuda/rehearsal.h"

namespace regard::bindings {

namespace rules {
constexpr const char* kDevice = "device";    // not on the device of the first array
constexpr const char* kAligned = "aligned";  // an element at an address that is no multiple of its size
}  // namespace rules

inline void require_kernel(bool there, const char* what) {
  if (!there) throw cuda::NoKernel(std::string(what) + " is not available on CUDA yet");
}

inline DType dtype_of_name(const std::string& name) {
  constexpr const char* names[] = {"float32", "float64", "float16", "bfloat16", "bool", "int32", "int64", "int8", "float8_e4m3fn"};
  for (int t = 0; t < 9; ++t)
    if (name == names[t]) return static_cast<DType>(t);
  return DType::other;
}

// A device array as a tuple (device, pointer, shape, strides in bytes, dtype's name).
inline Array view_of_tuple(const py::tuple& x) {
  Array a;
  a.kind = Array::Kind::array;
  a.data = reinterpret_cast<char*>(x[1].cast<std::uintptr_t>());
  const auto shape = x[2].cast<std::vector<std::int64_t>>();
  const auto strides = x[3].cast<std::vector<std::int64_t>>();
  a.rank = static_cast<int>(shape.size());
  for (int i = 0; i < a.rank && i < kMaxRank; ++i) {
    a.shape[i] = shape[static_cast<std::size_t>(i)];
    a.stride[i] = strides[static_cast<std::size_t>(i)];
  }
  a.dtype = dtype_of_name(x[4].cast<std::string>());
  a.writable = true;
  return a;
}

// A device array either way: a tuple, or a capsule from __dlpack__.
inline Array view_of_device(const py::object& x) {
  Array a = py::isinstance<py::tuple>(x) ? view_of_tuple(x.cast<py::tuple>()) : view_of_capsule(x, kCuda);
  a.on_device = true;
  return a;
}

// Whether each element lies at a multiple of its size: a GPU reads no others, and a fault is the whole process's.
inline bool aligned(const Array& a) {
  const std::int64_t size = size_of(a.dtype);
  auto odd = static_cast<std::int64_t>(reinterpret_cast<std::uintptr_t>(a.data) % static_cast<std::uintptr_t>(size));
  for (int i = 0; i < a.rank && i < kMaxRank; ++i)
    if (a.shape[i] > 1) odd |= a.stride[i] % size;
  return odd == 0;
}

// One call on a device: its arrays, all of which must be there, and its stream.
class DeviceCall {
 public:
  DeviceCall(std::uintptr_t stream, py::function allocator) : allocate_(std::move(allocator)) {
    queue.stream = reinterpret_cast<cuda::Stream>(stream);
    queue.scratch = [this](std::int64_t bytes) {
      if (cuda::Rehearsal* r = cuda::rehearsal()) r->scratch += bytes;
      return allocate(py::make_tuple(bytes), "uint8").data;
    };
  }

  // The view of an argument; what is neither a tuple nor a capsule is not on the device. The first array fixes which it is.
  Array view(const py::object& x, const char* argument) {
    if (x.is_none() || refusal) return {};
    int device = 0;
    if (py::isinstance<py::tuple>(x)) {
      device = x.cast<py::tuple>()[0].cast<int>();
    } else if (PyCapsule_IsValid(x.ptr(), "dltensor") != 0) {
      device = static_cast<DLManagedTensor*>(PyCapsule_GetPointer(x.ptr(), "dltensor"))->tensor.device.id;
    } else {
      refusal = {rules::kDevice, argument};
      return {};
    }
    const Array a = view_of_device(x);
    if (first_) queue.device = device;
    if (a.kind != Array::Kind::array || device != queue.device) refusal = {rules::kDevice, argument};
    if (!aligned(a)) refusal = {rules::kAligned, argument};
    first_ = false;
    return a;
  }

  // An index array, which may be on the host or on the device.
  Array indices(const py::object& x, const char* argument) { return py::isinstance<py::array>(x) ? py::cast<Array>(x) : view(x, argument); }

  // The array given, or a new one; `dtype` is a name, or "" for the query's.
  Array output(const py::object& given, const Array& view, const std::vector<std::int64_t>& shape, const char* dtype) {
    if (view.present()) {
      outputs.append(given);
      return view;
    }
    const Array made = allocate(py::cast(shape), dtype);
    outputs.append(kept_.back());
    return made;
  }

  // An index array where kernels read it: as it is if it is on the device, else the checked copy of it.
  void move(Array& x, const std::vector<std::int64_t>& checked) {
    if (!x.present() || x.on_device) return;
    x.dtype = DType::int64;
    x.on_device = true;
    std::int64_t stride = 8;
    for (int axis = x.rank - 1; axis >= 0; --axis) {
      x.stride[axis] = stride;
      stride *= x.shape[axis];
    }
    const auto bytes = static_cast<std::int64_t>(checked.size()) * 8;
    x.data = nullptr;
    if (bytes == 0) return;
    x.data = queue.scratch(bytes);
    cuda::copy_to_device(x.data, checked.data(), bytes, queue.stream);
  }

  cuda::Queue queue;
  Refusal refusal;
  py::list outputs;

 private:
  Array allocate(const py::object& shape, const char* dtype) {
    const auto made = allocate_(shape, dtype).cast<py::tuple>();
    kept_.push_back(made[0]);
    return view_of_device(made[1]);
  }

  py::function allocate_;
  std::vector<py::object> kept_;  // until the call returns: frameworks reuse memory in the order of the stream
  bool first_ = true;
};

}  // namespace regard::bindings
