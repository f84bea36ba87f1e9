// What regard.explain asks: the sizes that kernels were built with, and rehearsals of calls.

#include "cpu/plan.h"

#include "bindings/call.h"
#include "bindings/operations.h"
#include "bindings/sources.h"

namespace regard::bindings {
namespace {

py::dict tile_sizes(const Array& like) {
  const cpu::TileSizes t = cpu::tile_sizes(like.dtype);
  py::dict d;
  d["vector_bytes"] = t.vector_bytes;
  d["vector_registers"] = t.vector_registers;
  d["rows"] = t.rows;
  d["columns"] = t.columns;
  d["chain"] = t.chain;
  return d;
}

// Arrays of any rank, dimensions last.
py::dict attention_sizes(const Array& query, const Array& key, const Array& value, int precision) {
  AttentionProblem p;
  p.query.dtype = query.dtype;
  p.key.dtype = key.dtype;
  p.query.shape[0] = p.query.shape[1] = p.query.shape[2] = 1;
  for (int axis = 0; axis + 1 < query.rank; ++axis) p.query.shape[2] *= query.shape[axis];
  p.query.shape[3] = query.rank > 0 ? query.shape[query.rank - 1] : 0;
  p.value.shape[3] = value.rank > 0 ? value.shape[value.rank - 1] : 0;
  p.precision = static_cast<Precision>(precision);
  const cpu::AttentionSizes s = cpu::attention_sizes(p);
  py::dict d;
  d["queries_per_item"] = s.queries_per_item;
  d["keys_per_block"] = s.keys_per_block;
  d["few_queries"] = s.few_queries;
  d["keys_per_split"] = s.keys_per_split;
  d["matrix_products"] = s.matrix_products;
  return d;
}

// ([(file, file of an item, items, threads, work, bytes of scratch an item), ...], bytes for all items)
py::tuple end_rehearsal() {
  const cpu::Rehearsal rehearsal = cpu::end_rehearsal();
  py::list stages;
  for (const cpu::RehearsedStage& s : rehearsal.stages)
    stages.append(py::make_tuple(within_sources(s.file), within_sources(s.item), s.items, s.threads, s.work, s.scratch));
  return py::make_tuple(stages, rehearsal.shared);
}

}  // namespace

void bind_plan(py::module_& m) {
  m.def("tile_sizes", &tile_sizes, py::arg("like"));
  m.def("attention_sizes", &attention_sizes, py::arg("query"), py::arg("key"), py::arg("value"), py::arg("precision"));
  m.def("start_rehearsal", &cpu::start_rehearsal);
  m.def("end_rehearsal", &end_rehearsal);
}

}  // namespace regard::bindings
