// The DLPack structures that this binding reads and writes (the stable C ABI of dmlc/dlpack, version 0.8).
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cstdint>
#include <memory>
#include <vector>

#include "core/array.h"

namespace regard::bindings {

namespace py = pybind11;

constexpr std::int32_t kCpu = 1;
constexpr std::int32_t kCuda = 2;
constexpr std::int32_t kCudaManaged = 13;  // memory that the driver moves between host and device: read as a device's

struct DLDevice {
  std::int32_t type;
  std::int32_t id;
};
struct DLDataType {
  std::uint8_t code;  // 0 int, 1 uint, 2 float, 4 bfloat, 6 bool
  std::uint8_t bits;
  std::uint16_t lanes;
};
struct DLTensor {
  void* data;
  DLDevice device;
  std::int32_t ndim;
  DLDataType dtype;
  std::int64_t* shape;
  std::int64_t* strides;  // in elements; null: row-major
  std::uint64_t byte_offset;
};
struct DLManagedTensor {
  DLTensor tensor;
  void* context;
  void (*deleter)(DLManagedTensor*);
};

inline DType dtype_of_dlpack(DLDataType t) {
  if (t.lanes != 1) return DType::other;
  switch (t.code << 8 | t.bits) {
    case 2 << 8 | 32: return DType::float32;
    case 2 << 8 | 64: return DType::float64;
    case 2 << 8 | 16: return DType::float16;
    case 4 << 8 | 16: return DType::bfloat16;
    case 6 << 8 | 8: return DType::boolean;
    case 0 << 8 | 8: return DType::int8;
    case 0 << 8 | 32: return DType::int32;
    case 0 << 8 | 64: return DType::int64;
    default: return DType::other;
  }
}

// A view of a capsule that stays unconsumed: whoever holds it frees it, after the call.
inline Array view_of_capsule(py::handle capsule, std::int32_t device_type = kCpu) {
  const auto* managed = static_cast<DLManagedTensor*>(PyCapsule_GetPointer(capsule.ptr(), "dltensor"));
  const DLTensor& t = managed->tensor;
  Array a;
  if (t.device.type != device_type && (device_type != kCuda || t.device.type != kCudaManaged)) {
    a.kind = Array::Kind::not_an_array;
    return a;
  }
  a.kind = Array::Kind::array;
  a.data = static_cast<char*>(t.data) + t.byte_offset;
  a.rank = t.ndim;
  a.dtype = dtype_of_dlpack(t.dtype);
  const std::int64_t item = size_of(a.dtype);
  std::int64_t packed = item;
  for (int i = t.ndim - 1; i >= 0; --i) {
    if (i < kMaxRank) {
      a.shape[i] = t.shape[i];
      a.stride[i] = t.strides != nullptr ? t.strides[i] * item : packed;
    }
    packed *= t.shape[i];
  }
  a.writable = true;
  return a;
}

// A capsule over the memory of a 16-bit NumPy array, to be read as bfloat16; it keeps the array alive.
inline py::capsule bfloat16_capsule(py::array x) {
  struct Owner {
    DLManagedTensor managed;
    py::array array;
    std::vector<std::int64_t> shape;
    std::vector<std::int64_t> strides;
  };
  auto owner = std::make_unique<Owner>();
  owner->array = std::move(x);
  for (py::ssize_t i = 0; i < owner->array.ndim(); ++i) {
    owner->shape.push_back(owner->array.shape(i));
    owner->strides.push_back(owner->array.strides(i) / 2);
  }
  owner->managed.tensor = {const_cast<void*>(owner->array.data()),
                           {kCpu, 0},
                           static_cast<std::int32_t>(owner->shape.size()),
                           {4, 16, 1},
                           owner->shape.data(),
                           owner->strides.data(),
                           0};
  owner->managed.context = owner.get();
  owner->managed.deleter = [](DLManagedTensor* m) {
    const py::gil_scoped_acquire gil;
    delete static_cast<Owner*>(m->context);
  };
  PyObject* capsule = PyCapsule_New(&owner->managed, "dltensor", [](PyObject* c) {
    if (PyCapsule_IsValid(c, "dltensor") == 0) return;  // consumed: its new owner frees it
    auto* m = static_cast<DLManagedTensor*>(PyCapsule_GetPointer(c, "dltensor"));
    m->deleter(m);
  });
  if (capsule == nullptr) throw py::error_already_set();
  owner.release();
  return py::reinterpret_steal<py::capsule>(capsule);
}

// The memory of a CPU capsule of bfloat16 as 16-bit words, for NumPy to view; the array keeps the capsule alive.
inline py::array bfloat16_words(const py::capsule& capsule) {
  const Array a = view_of_capsule(capsule);
  if (a.dtype != DType::bfloat16 || a.rank > kMaxRank) throw py::type_error("expected bfloat16 on the CPU");
  return py::array(py::dtype("uint16"), std::vector<py::ssize_t>(a.shape, a.shape + a.rank),
                   std::vector<py::ssize_t>(a.stride, a.stride + a.rank), a.data, capsule);
}

}  // namespace regard::bindings
