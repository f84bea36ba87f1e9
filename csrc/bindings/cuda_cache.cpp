#include "bindings/cuda_arrays.h"
#include "bindings/cuda_operations.h"

namespace regard::bindings {
namespace {

RotaryAngles angles_of(DeviceCall& call, const py::object& cos, const py::object& sin, const py::object& positions, bool interleaved) {
  RotaryAngles a;
  a.cos = call.view(cos, "cos");
  a.sin = call.view(sin, "sin");
  a.positions = call.indices(positions, "positions");
  a.interleaved = interleaved;
  return a;
}

std::vector<std::int64_t> shape_of(const Array& x) { return {x.shape, x.shape + x.rank}; }

py::object rotary_embedding(const py::object& x, const py::object& cos, const py::object& sin, const py::object& positions,
                            const py::object& out, bool interleaved, bool sequence_first, std::uintptr_t stream,
                            const py::function& allocate) {
  DeviceCall call(stream, allocate);
  RotaryProblem p;
  p.x = call.view(x, "x");
  p.out = call.view(out, "out");
  p.angles = angles_of(call, cos, sin, positions, interleaved);
  if (call.refusal) return refused(call.refusal);
  const Array given = p.x;
  if (sequence_first) p.swap_sequence_and_heads();
  if (const Refusal r = p.check()) return refused(r);
  const bool made = !p.out.present();
  p.out = call.output(out, p.out, shape_of(given), "");
  if (made && sequence_first) p.out.swap_axes(1, 2);
  call.move(p.angles.positions, p.angles.rows);
  cuda::rotary(p, call.queue);
  return call.outputs;
}

// The parts' outs, as many lses, whether the sequence comes first, the stream, the function that allocates.
py::object merge_attention(const py::args& all) {
  const std::size_t parts = (all.size() - 3) / 2;
  DeviceCall call(all[2 * parts + 1].cast<std::uintptr_t>(), all[2 * parts + 2].cast<py::function>());
  MergeProblem p;
  for (std::size_t i = 0; i < parts; ++i) p.outs.push_back(call.view(all[i], "outs"));
  for (std::size_t i = 0; i < parts; ++i) p.lses.push_back(call.view(all[parts + i], "lses"));
  if (call.refusal) return refused(call.refusal);
  const bool sequence_first = all[2 * parts].cast<bool>();
  const Array given = p.outs[0];
  if (sequence_first) p.swap_sequence_and_heads();
  if (const Refusal r = p.check()) return refused(r);
  p.out = call.output(py::none(), {}, shape_of(given), "");
  if (sequence_first && p.out.rank == 4) p.out.swap_axes(1, 2);
  p.lse = call.output(py::none(), {}, shape_of(p.lses[0]), p.lses[0].dtype == DType::float64 ? "float64" : "float32");
  cuda::merge_attention(p, call.queue);
  return call.outputs;
}

py::object cache_append(const py::object& key, const py::object& value, const py::object& key_cache, const py::object& value_cache,
                        const py::object& key_scales, const py::object& value_scales, const py::object& slots, const py::object& cos,
                        const py::object& sin, const py::object& positions, bool interleaved, bool paged, bool sequence_first,
                        std::uintptr_t stream, const py::function& allocate) {
  DeviceCall call(stream, allocate);
  AppendProblem p;
  p.key = call.view(key, "key");
  p.value = call.view(value, "value");
  p.key_cache = call.view(key_cache, "key_cache");
  p.value_cache = call.view(value_cache, "value_cache");
  p.key_scales = call.view(key_scales, "key_scales");
  p.value_scales = call.view(value_scales, "value_scales");
  p.slots = call.indices(slots, "slots");
  p.angles = angles_of(call, cos, sin, positions, interleaved);
  p.paged = paged;
  if (call.refusal) return refused(call.refusal);
  if (sequence_first) p.swap_sequence_and_heads();
  if (const Refusal r = p.check()) return refused(r);
  call.move(p.slots, p.places);
  call.move(p.angles.positions, p.angles.rows);
  cuda::cache_append(p, call.queue);
  return call.outputs;
}

}  // namespace

void bind_cuda_cache(py::module_& m) {
  m.def("rotary_embedding", &rotary_embedding, py::arg("x"), py::arg("cos"), py::arg("sin"), py::arg("positions"), py::arg("out"),
        py::arg("interleaved"), py::arg("sequence_first"), py::arg("stream"), py::arg("allocate"));
  m.def("merge_attention", &merge_attention);
  m.def("cache_append", &cache_append, py::arg("key"), py::arg("value"), py::arg("key_cache"), py::arg("value_cache"),
        py::arg("key_scales"), py::arg("value_scales"), py::arg("slots"), py::arg("cos"), py::arg("sin"), py::arg("positions"),
        py::arg("interleaved"), py::arg("paged"), py::arg("sequence_first"), py::arg("stream"), py::arg("allocate"));
}

}  // namespace regard::bindings
