// The CUDA bindings over the emulator, as a Python module: what a GPU's memory and settings are there.

#include <cstdlib>
#include <cstring>

#include "bindings/arrays.h"
#include "emulation.h"
#include "runtime_model.h"

namespace regard::bindings {
void bind_cuda(pybind11::module_& m);
}

namespace py = pybind11;

namespace {

// Exactly that many bytes on the heap, so that AddressSanitizer sees what goes beyond; NaN patterns.
py::array device_memory(py::ssize_t bytes) {
  void* memory = nullptr;
  if (posix_memalign(&memory, 256, static_cast<std::size_t>(bytes)) != 0) throw std::bad_alloc();
  std::memset(memory, 0xff, static_cast<std::size_t>(bytes));
  const py::capsule owner(memory, [](void* p) { std::free(p); });
  return py::array(py::dtype("uint8"), {bytes}, {1}, memory, owner);
}

}  // namespace

PYBIND11_MODULE(regard_cuda_emulated, m) {
  using namespace regard;
  bindings::bind_cuda(m);
  m.def("device_memory", &device_memory);
  m.def("set_device", [](int capability, int shared_bytes) {
    cuda::model::device() = {capability, shared_bytes, 2};
    emulation::settings().shared_bytes = shared_bytes;
  });
  m.def("set_clocks", [](double core_hz, double bytes_per_second) { cuda::model::clocks() = {core_hz, bytes_per_second}; });
  m.def("set_order", [](bool random, std::uint64_t seed) {
    emulation::settings().random = random;
    emulation::settings().seed = seed;
  });
  m.def("counters", [] {
    const auto& c = emulation::counters();
    return py::make_tuple(c.launches, c.products, c.matrix_loads, c.bank_conflicts, c.group_products);
  });
}
