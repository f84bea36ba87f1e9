// The Python face of one instruction set's build, under the name that entry.cpp gives it. Each operation answers a list of
// outputs, or, where the problem's check() refuses, a tuple (rule, argument, entry) that python/regard/_checks.py turns into
// the error.

#include "bindings/call.h"
#include "bindings/operations.h"

PYBIND11_MODULE(_cpu, m, pybind11::mod_gil_not_used()) {
  using namespace regard;
  using namespace regard::bindings;
  cpu::initialise();
  cpu::set_interrupt_poll(signal_raised);
  m.def("set_num_threads", &cpu::set_num_threads, py::arg("n"));
  m.def("get_num_threads", &cpu::get_num_threads);
  m.def("bfloat16_capsule", &bfloat16_capsule, py::arg("words"));
  m.def("bfloat16_words", &bfloat16_words, py::arg("capsule"));
  bind_additive(m);
  bind_cache(m);
  bind_ceilings(m);
  bind_attention(m);
  bind_dense(m);
  bind_channel(m);
  bind_recurrent(m);
  bind_plan(m);
}
