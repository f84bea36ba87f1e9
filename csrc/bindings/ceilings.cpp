#include "cpu/ceilings.h"

#include <stdexcept>
#include <string>

#include "bindings/call.h"
#include "bindings/operations.h"

namespace regard::bindings {
namespace {

void check_seconds(double seconds) {
  if (!(seconds > 0 && seconds <= 60))
    throw py::value_error("seconds: expected a number above 0, at most 60, got " + std::to_string(seconds));
}

double measure_fma(double seconds) {
  check_seconds(seconds);
  double rate = 0;
  without_gil([&] { rate = cpu::measure_fma(seconds); });
  return rate;
}

double measure_tiles(double seconds) {
  check_seconds(seconds);
  if (!cpu::has_tiles()) throw std::runtime_error("measure_tiles: this instruction set has no matrix tiles (only amx has them)");
  double rate = 0;
  without_gil([&] { rate = cpu::measure_tiles(seconds); });
  return rate;
}

double measure_exp(double seconds) {
  check_seconds(seconds);
  double rate = 0;
  without_gil([&] { rate = cpu::measure_exp(seconds); });
  return rate;
}

double measure_read(std::int64_t bytes, double seconds) {
  check_seconds(seconds);
  if (bytes < 1) throw py::value_error("bytes: expected a count of at least 1, got " + std::to_string(bytes));
  double rate = 0;
  without_gil([&] { rate = cpu::measure_read(bytes, seconds); });
  return rate;
}

}  // namespace

void bind_ceilings(py::module_& m) {
  m.attr("openmp") = cpu::openmp_date();
  m.attr("tiles") = cpu::has_tiles();
  m.def("measure_tiles", &measure_tiles, py::arg("seconds"));
  m.def("measure_fma", &measure_fma, py::arg("seconds"));
  m.def("measure_exp", &measure_exp, py::arg("seconds"));
  m.def("measure_read", &measure_read, py::arg("bytes"), py::arg("seconds"));
}

}  // namespace regard::bindings
