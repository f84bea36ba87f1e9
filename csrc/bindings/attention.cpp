#include <algorithm>
#include <cmath>
#include <utility>

#include "bindings/call.h"
#include "bindings/operations.h"
#include "cpu/operations.h"

namespace regard::bindings {
namespace {

// The arguments that every kind of call has.
struct Options {
  Array mask;
  Array bias;
  Array alibi_slopes;
  Array sinks;
  Array query_lengths;
  Array key_lengths;
};

void set_options(AttentionProblem& p, const Options& o, const py::object& block_mask, std::int64_t window_left, std::int64_t window_right,
                 int alignment, double scale, double softcap, double dropout_p, std::uint64_t seed, int precision) {
  p.mask = o.mask;
  p.bias = o.bias;
  p.alibi_slopes = o.alibi_slopes;
  p.sinks = o.sinks;
  p.query_lengths = o.query_lengths;
  p.key_lengths = o.key_lengths;
  p.block_mask = block_mask_of(block_mask);
  set_numbers(p, window_left, window_right, alignment, scale, softcap, dropout_p, seed, precision);
}

// Checks, allocates what is missing, computes: [out, lse, weights], the last two where asked for.
py::object attend(AttentionProblem& p, const py::object& query, const py::object& out, bool sequence_first, bool return_lse,
                  bool return_weights) {
  if (const Refusal r = p.check()) return refused(r);
  if (const Refusal r = p.check_outputs()) return refused(r);
  const bool packed = p.storage == Storage::packed;
  py::list outputs;
  if (p.out.present()) {
    outputs.append(out);
  } else {
    Array made;
    made.dtype = p.query.dtype;
    const std::int64_t rows = p.query.shape[2];
    if (packed)
      outputs.append(output(out, query, {rows, p.heads(), p.dim_v()}, made));
    else if (sequence_first)
      outputs.append(output(out, query, {p.batch(), rows, p.heads(), p.dim_v()}, made));
    else
      outputs.append(output(out, query, {p.batch(), p.heads(), rows, p.dim_v()}, made));
    if (packed) made.insert_axis(0);
    if (packed || sequence_first) made.swap_axes(1, 2);
    p.out = made;
  }
  if (return_lse) {
    py::array lse = packed ? allocate(py::dtype::of<float>(), {p.heads(), p.query.shape[2]})
                           : allocate(py::dtype::of<float>(), {p.batch(), p.heads(), p.len_q()});
    p.lse = view_of(lse);
    if (packed) p.lse.insert_axis(0);
    outputs.append(lse);
  }
  if (return_weights) {
    p.weights.dtype = p.query.dtype;
    outputs.append(output(py::none(), query, {p.batch(), p.heads(), p.len_q(), p.len_kv()}, p.weights));
  }
  constexpr double kBrief = 1 << 16;  // multiply-adds, and one a score for its softmax: a few us
  const double scores =
      static_cast<double>(p.query.shape[0] * p.heads()) * static_cast<double>(p.query.shape[2]) * static_cast<double>(p.len_kv() + 1);
  without_gil(
      [&] {
        cpu::attention_forward(p);
        if (return_weights) cpu::attention_weights(p, Stage::weights);
      },
      scores * static_cast<double>(p.dim_qk() + p.dim_v() + 1) < kBrief);
  return outputs;
}

py::object attention(const py::object& query, const Array& key, const Array& value, const Array& mask, const Array& bias,
                     const Array& alibi_slopes, const Array& sinks, const Array& query_lengths, const Array& key_lengths,
                     const py::object& out, const py::object& block_mask, std::int64_t window_left, std::int64_t window_right,
                     int alignment, double scale, double softcap, double dropout_p, std::uint64_t seed, int precision, bool sequence_first,
                     bool return_lse, bool return_weights) {
  AttentionProblem p;
  p.query = py::cast<Array>(query);
  p.key = key;
  p.value = value;
  p.out = py::cast<Array>(out);
  set_options(p, {mask, bias, alibi_slopes, sinks, query_lengths, key_lengths}, block_mask, window_left, window_right, alignment, scale,
              softcap, dropout_p, seed, precision);
  if (sequence_first) p.swap_sequence_and_heads();
  return attend(p, query, out, sequence_first, return_lse, return_weights);
}

// attention() of NumPy's arrays with no options but these: 22 arguments, and what Python has to do for each, are more work than
// a short sequence. None for other arrays, an output that overlaps an input, or what is to be refused: attention() has all of
// that.
py::object attention_without_options(const py::object& query, const py::object& key, const py::object& value, const py::object& out,
                                     bool causal, int alignment, bool sequence_first) {
  AttentionProblem p;
  for (const auto& [x, view] : {std::pair{&query, &p.query}, {&key, &p.key}, {&value, &p.value}, {&out, &p.out}}) {
    if (x == &out && out.is_none()) continue;
    if (!is_exactly_numpy(*x)) return py::none();
    *view = view_of(py::reinterpret_borrow<py::array>(*x));
    if (view->rank != 4) return py::none();
  }
  if (p.out.present() && (p.out.may_overlap(p.query) || p.out.may_overlap(p.key) || p.out.may_overlap(p.value))) return py::none();
  if (sequence_first) p.swap_sequence_and_heads();
  p.scale = 1 / std::sqrt(static_cast<double>(std::max<std::int64_t>(p.dim_qk(), 1)));
  if (causal) p.window_right = 0;
  p.alignment = static_cast<Alignment>(alignment);
  const py::object outputs = attend(p, query, out, sequence_first, false, false);
  return py::isinstance<py::list>(outputs) ? py::object(outputs[py::int_(0)]) : py::none();
}

py::object attention_varlen(const py::object& query, const Array& key, const Array& value, const Array& cu_seqlens_q,
                            const Array& cu_seqlens_kv, const Array& mask, const Array& bias, const Array& alibi_slopes, const Array& sinks,
                            const Array& query_lengths, const Array& key_lengths, const py::object& out, const py::object& block_mask,
                            std::int64_t window_left, std::int64_t window_right, int alignment, double scale, double softcap,
                            double dropout_p, std::uint64_t seed, int precision, bool return_lse, bool return_weights) {
  AttentionProblem p;
  p.storage = Storage::packed;
  p.query = py::cast<Array>(query);
  p.key = key;
  p.value = value;
  p.cu_seqlens_q = cu_seqlens_q;
  p.cu_seqlens_kv = cu_seqlens_kv;
  p.out = py::cast<Array>(out);
  set_options(p, {mask, bias, alibi_slopes, sinks, query_lengths, key_lengths}, block_mask, window_left, window_right, alignment, scale,
              softcap, dropout_p, seed, precision);
  return attend(p, query, out, false, return_lse, return_weights);
}

py::object attention_paged(const py::object& query, const Array& key_pages, const Array& value_pages, const Array& page_table,
                           const Array& key_scales, const Array& value_scales, const Array& mask, const Array& bias,
                           const Array& alibi_slopes, const Array& sinks, const Array& query_lengths, const Array& key_lengths,
                           const py::object& out, const py::object& block_mask, std::int64_t window_left, std::int64_t window_right,
                           int alignment, double scale, double softcap, double dropout_p, std::uint64_t seed, int precision,
                           bool sequence_first, bool return_lse, bool return_weights) {
  AttentionProblem p;
  p.storage = Storage::paged;
  p.query = py::cast<Array>(query);
  p.key = key_pages;
  p.value = value_pages;
  p.page_table = page_table;
  p.key_scales = key_scales;
  p.value_scales = value_scales;
  p.out = py::cast<Array>(out);
  set_options(p, {mask, bias, alibi_slopes, sinks, query_lengths, key_lengths}, block_mask, window_left, window_right, alignment, scale,
              softcap, dropout_p, seed, precision);
  if (sequence_first)
    for (Array* x : {&p.query, &p.out})
      if (x->rank == 4) x->swap_axes(1, 2);
  return attend(p, query, out, sequence_first, return_lse, return_weights);
}

py::object attention_scores(const py::object& query, const Array& key, const Array& mask, const Array& bias, const Array& alibi_slopes,
                            const Array& sinks, const Array& query_lengths, const Array& key_lengths, std::int64_t window_left,
                            std::int64_t window_right, int alignment, double scale, double softcap, int stage, bool mean_of_heads) {
  AttentionProblem p;
  p.query = py::cast<Array>(query);
  p.key = p.value = key;
  set_options(p, {mask, bias, alibi_slopes, sinks, query_lengths, key_lengths}, py::none(), window_left, window_right, alignment, scale,
              softcap, 0, 0, 0);
  if (const Refusal r = p.check()) return refused(r);
  py::list outputs;
  p.weights.dtype = p.query.dtype;
  if (mean_of_heads) {
    outputs.append(output(py::none(), query, {p.batch(), p.len_q(), p.len_kv()}, p.weights));
    p.weights.insert_axis(1);
  } else {
    outputs.append(output(py::none(), query, {p.batch(), p.heads(), p.len_q(), p.len_kv()}, p.weights));
  }
  without_gil([&] { cpu::attention_weights(p, static_cast<Stage>(stage)); });
  return outputs;
}

}  // namespace

void bind_attention(py::module_& m) {
  m.def("attention", &attention, py::arg("query"), py::arg("key"), py::arg("value"), py::arg("mask"), py::arg("bias"),
        py::arg("alibi_slopes"), py::arg("sinks"), py::arg("query_lengths"), py::arg("key_lengths"), py::arg("out"), py::arg("block_mask"),
        py::arg("window_left"), py::arg("window_right"), py::arg("alignment"), py::arg("scale"), py::arg("softcap"), py::arg("dropout_p"),
        py::arg("seed"), py::arg("precision"), py::arg("sequence_first"), py::arg("return_lse"), py::arg("return_weights"));
  m.def("attention_without_options", &attention_without_options, py::arg("query"), py::arg("key"), py::arg("value"), py::arg("out"),
        py::arg("causal"), py::arg("alignment"), py::arg("sequence_first"));
  m.def("attention_varlen", &attention_varlen, py::arg("query"), py::arg("key"), py::arg("value"), py::arg("cu_seqlens_q"),
        py::arg("cu_seqlens_kv"), py::arg("mask"), py::arg("bias"), py::arg("alibi_slopes"), py::arg("sinks"), py::arg("query_lengths"),
        py::arg("key_lengths"), py::arg("out"), py::arg("block_mask"), py::arg("window_left"), py::arg("window_right"),
        py::arg("alignment"), py::arg("scale"), py::arg("softcap"), py::arg("dropout_p"), py::arg("seed"), py::arg("precision"),
        py::arg("return_lse"), py::arg("return_weights"));
  m.def("attention_paged", &attention_paged, py::arg("query"), py::arg("key_pages"), py::arg("value_pages"), py::arg("page_table"),
        py::arg("key_scales"), py::arg("value_scales"), py::arg("mask"), py::arg("bias"), py::arg("alibi_slopes"), py::arg("sinks"),
        py::arg("query_lengths"), py::arg("key_lengths"), py::arg("out"), py::arg("block_mask"), py::arg("window_left"),
        py::arg("window_right"), py::arg("alignment"), py::arg("scale"), py::arg("softcap"), py::arg("dropout_p"), py::arg("seed"),
        py::arg("precision"), py::arg("sequence_first"), py::arg("return_lse"), py::arg("return_weights"));
  m.def("attention_scores", &attention_scores, py::arg("query"), py::arg("key"), py::arg("mask"), py::arg("bias"), py::arg("alibi_slopes"),
        py::arg("sinks"), py::arg("query_lengths"), py::arg("key_lengths"), py::arg("window_left"), py::arg("window_right"),
        py::arg("alignment"), py::arg("scale"), py::arg("softcap"), py::arg("stage"), py::arg("mean_of_heads"));
}

}  // namespace regard::bindings
