// What regard.explain asks of a GPU: rehearsals of calls, and how fast the device says it is.

#include "bindings/cuda_arrays.h"
#include "bindings/cuda_operations.h"
#include "bindings/sources.h"
#include "cuda/rehearsal.h"

namespace regard::bindings {
namespace {

cuda::Rehearsal& own() {
  static thread_local cuda::Rehearsal r;
  return r;
}

void start_rehearsal() {
  own() = {};
  cuda::rehearsal() = &own();
}

// ([(file, name, queries, keys, whether matrix units multiply, blocks, threads, bytes of shared memory), ...], bytes of scratch)
py::tuple end_rehearsal() {
  cuda::rehearsal() = nullptr;
  py::list launches;
  for (const cuda::Launch& l : own().launches)
    launches.append(py::make_tuple(within_sources(l.file), l.choice.name, l.choice.queries, l.choice.keys, l.choice.matrix_units, l.blocks,
                                   l.threads, l.shared_bytes));
  return py::make_tuple(launches, own().scratch);
}

// (compute capability as major * 10 + minor, multiprocessors, highest clock in Hz, bytes a second of its memory); of the
// last two, 0 where the driver does not say.
py::tuple speeds(int id) {
  const cuda::Device d = cuda::device(id);
  const cuda::Clocks c = cuda::clocks(id);
  return py::make_tuple(d.capability, d.processors, c.core_hz, c.bytes_per_second);
}

}  // namespace

void bind_cuda_plan(py::module_& m) {
  m.def("start_rehearsal", &start_rehearsal);
  m.def("end_rehearsal", &end_rehearsal);
  m.def("speeds", &speeds, py::arg("device"));
}

}  // namespace regard::bindings
