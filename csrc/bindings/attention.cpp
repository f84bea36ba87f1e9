#include "bindings/call.h"
#include "bindings/operations.h"
#include "cpu/operations.h"

namespace regard::bindings {
namespace {

py::object attention(const py::object& query, const Array& key, const Array& value, const Array& mask, const Array& bias,
                     const Array& alibi_slopes, const Array& sinks, const Array& query_lengths, const Array& key_lengths,
                     const py::object& out, std::int64_t window_left, std::int64_t window_right, int alignment, double scale,
                     double softcap, bool sequence_first, bool return_lse) {
  AttentionProblem p;
  p.query = py::cast<Array>(query);
  p.key = key;
  p.value = value;
  p.mask = mask;
  p.bias = bias;
  p.alibi_slopes = alibi_slopes;
  p.sinks = sinks;
  p.query_lengths = query_lengths;
  p.key_lengths = key_lengths;
  p.out = py::cast<Array>(out);
  p.window_left = window_left;
  p.window_right = window_right;
  p.alignment = static_cast<Alignment>(alignment);
  p.scale = scale;
  p.softcap = softcap;
  if (sequence_first) p.swap_sequence_and_heads();
  if (const Refusal r = p.check()) return refused(r);
  if (const Refusal r = p.check_outputs()) return refused(r);

  py::list outputs;
  Array made = p.out;
  if (!made.present()) {
    made.dtype = p.query.dtype;
    if (sequence_first) {
      outputs.append(output(out, query, {p.batch(), p.len_q(), p.heads(), p.dim_v()}, made));
      made.swap_axes(1, 2);
    } else {
      outputs.append(output(out, query, {p.batch(), p.heads(), p.len_q(), p.dim_v()}, made));
    }
    p.out = made;
  } else {
    outputs.append(out);
  }
  if (return_lse) {
    py::array lse = allocate(py::dtype::of<float>(), {p.batch(), p.heads(), p.len_q()});
    p.lse = view_of(lse);
    outputs.append(lse);
  }
  without_gil([&] { cpu::attention_forward(p); });
  return outputs;
}

}  // namespace

void bind_attention(py::module_& m) {
  m.def("attention", &attention, py::arg("query"), py::arg("key"), py::arg("value"), py::arg("mask"), py::arg("bias"),
        py::arg("alibi_slopes"), py::arg("sinks"), py::arg("query_lengths"), py::arg("key_lengths"), py::arg("out"), py::arg("window_left"),
        py::arg("window_right"), py::arg("alignment"), py::arg("scale"), py::arg("softcap"), py::arg("sequence_first"),
        py::arg("return_lse"));
}

}  // namespace regard::bindings
