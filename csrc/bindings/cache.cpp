#include "bindings/call.h"
#include "bindings/operations.h"
#include "cpu/operations.h"

namespace regard::bindings {
namespace {

RotaryAngles angles_of(const Array& cos, const Array& sin, const Array& positions, bool interleaved) {
  RotaryAngles a;
  a.cos = cos;
  a.sin = sin;
  a.positions = positions;
  a.interleaved = interleaved;
  return a;
}

std::vector<py::ssize_t> shape_of(const Array& x) { return {x.shape, x.shape + x.rank}; }

py::object rotary_embedding(const py::object& x, const Array& cos, const Array& sin, const Array& positions, const py::object& out,
                            bool interleaved, bool sequence_first) {
  RotaryProblem p;
  p.x = py::cast<Array>(x);
  p.out = py::cast<Array>(out);
  p.angles = angles_of(cos, sin, positions, interleaved);
  const Array given = p.x;
  if (sequence_first) p.swap_sequence_and_heads();
  if (const Refusal r = p.check()) return refused(r);
  py::list outputs;
  if (p.out.present()) {
    outputs.append(out);
  } else {
    p.out.dtype = given.dtype;
    outputs.append(output(out, x, shape_of(given), p.out));
    if (sequence_first) p.out.swap_axes(1, 2);
  }
  without_gil([&] { cpu::rotary(p); });
  return outputs;
}

py::object merge_attention(const py::list& outs, const py::list& lses, bool sequence_first) {
  MergeProblem p;
  for (const py::handle x : outs) p.outs.push_back(py::cast<Array>(x));
  for (const py::handle x : lses) p.lses.push_back(py::cast<Array>(x));
  const Array given = p.outs.empty() ? Array{} : p.outs[0];
  if (sequence_first) p.swap_sequence_and_heads();
  if (const Refusal r = p.check()) return refused(r);
  py::list outputs;
  p.out.dtype = given.dtype;
  outputs.append(output(py::none(), outs[0], shape_of(given), p.out));
  if (sequence_first && p.out.rank == 4) p.out.swap_axes(1, 2);
  py::array lse = allocate(p.lses[0].dtype == DType::float64 ? py::dtype::of<double>() : py::dtype::of<float>(), shape_of(p.lses[0]));
  p.lse = view_of(lse);
  outputs.append(lse);
  without_gil([&] { cpu::merge_attention(p); });
  return outputs;
}

py::object cache_append(const Array& key, const Array& value, const Array& key_cache, const Array& value_cache, const Array& key_scales,
                        const Array& value_scales, const Array& slots, const Array& cos, const Array& sin, const Array& positions,
                        bool interleaved, bool paged, bool sequence_first) {
  AppendProblem p;
  p.key = key;
  p.value = value;
  p.key_cache = key_cache;
  p.value_cache = value_cache;
  p.key_scales = key_scales;
  p.value_scales = value_scales;
  p.slots = slots;
  p.angles = angles_of(cos, sin, positions, interleaved);
  p.paged = paged;
  if (sequence_first) p.swap_sequence_and_heads();
  if (const Refusal r = p.check()) return refused(r);
  without_gil([&] { cpu::cache_append(p); });
  return py::list();
}

}  // namespace

void bind_cache(py::module_& m) {
  m.def("rotary_embedding", &rotary_embedding, py::arg("x"), py::arg("cos"), py::arg("sin"), py::arg("positions"), py::arg("out"),
        py::arg("interleaved"), py::arg("sequence_first"));
  m.def("merge_attention", &merge_attention, py::arg("outs"), py::arg("lses"), py::arg("sequence_first"));
  m.def("cache_append", &cache_append, py::arg("key"), py::arg("value"), py::arg("key_cache"), py::arg("value_cache"),
        py::arg("key_scales"), py::arg("value_scales"), py::arg("slots"), py::arg("cos"), py::arg("sin"), py::arg("positions"),
        py::arg("interleaved"), py::arg("paged"), py::arg("sequence_first"));
}

}  // namespace regard::bindings
