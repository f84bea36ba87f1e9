#include "bindings/cuda_arrays.h"
#include "bindings/cuda_operations.h"

namespace regard::bindings {
namespace {

// What every kind of call has beside its queries, keys and values.
struct Options {
  const py::object& mask;
  const py::object& bias;
  const py::object& alibi_slopes;
  const py::object& sinks;
  const py::object& query_lengths;
  const py::object& key_lengths;
  const py::object& block_mask;
};

void set_options(DeviceCall& call, AttentionProblem& p, const Options& o) {
  p.mask = call.view(o.mask, "mask");
  p.bias = call.view(o.bias, "bias");
  p.alibi_slopes = call.view(o.alibi_slopes, "alibi_slopes");
  p.sinks = call.view(o.sinks, "sinks");
  p.query_lengths = call.indices(o.query_lengths, "query_lengths");
  p.key_lengths = call.indices(o.key_lengths, "key_lengths");
  p.block_mask = block_mask_of(o.block_mask);
}

// Checks, allocates what is missing, enqueues: [out, lse, weights], the last two where asked for.
py::object attend(DeviceCall& call, AttentionProblem& p, const py::object& out, bool sequence_first, bool return_lse, bool return_weights) {
  if (call.refusal) return refused(call.refusal);
  if (const Refusal r = p.check()) return refused(r);
  if (const Refusal r = p.check_outputs()) return refused(r);
  const bool packed = p.storage == Storage::packed;
  const bool given = p.out.present();
  const std::int64_t rows = p.query.shape[2];
  if (packed) {
    require_kernel(!return_weights || (!p.cu_seqlens_q.on_device && !p.cu_seqlens_kv.on_device),
                   "return_weights with cu_seqlens on the device");
    p.out = call.output(out, p.out, {rows, p.heads(), p.dim_v()}, "");
  } else if (sequence_first) {
    p.out = call.output(out, p.out, {p.batch(), rows, p.heads(), p.dim_v()}, "");
  } else {
    p.out = call.output(out, p.out, {p.batch(), p.heads(), rows, p.dim_v()}, "");
  }
  if (!given && packed) p.out.insert_axis(0);
  if (!given && (packed || sequence_first)) p.out.swap_axes(1, 2);
  if (return_lse && packed) {
    p.lse = call.output(py::none(), {}, {p.heads(), rows}, "float32");
    p.lse.insert_axis(0);
  } else if (return_lse) {
    p.lse = call.output(py::none(), {}, {p.batch(), p.heads(), rows}, "float32");
  }
  if (return_weights) p.weights = call.output(py::none(), {}, {p.batch(), p.heads(), p.len_q(), p.len_kv()}, "");
  call.move(p.query_lengths, p.query_ends);
  call.move(p.key_lengths, p.key_ends);
  call.move(p.cu_seqlens_q, p.query_starts);
  call.move(p.cu_seqlens_kv, p.key_starts);
  call.move(p.page_table, p.pages);
  if (p.block_mask.present()) {
    call.move(p.block_mask.offsets, p.block_mask.row_ends);
    call.move(p.block_mask.columns, p.block_mask.blocks);
  }
  cuda::attention_forward(p, call.queue);
  return call.outputs;
}

py::object attention(const py::object& query, const py::object& key, const py::object& value, const py::object& mask,
                     const py::object& bias, const py::object& alibi_slopes, const py::object& sinks, const py::object& query_lengths,
                     const py::object& key_lengths, const py::object& out, const py::object& block_mask, std::int64_t window_left,
                     std::int64_t window_right, int alignment, double scale, double softcap, double dropout_p, std::uint64_t seed,
                     int precision, bool sequence_first, bool return_lse, bool return_weights, std::uintptr_t stream,
                     const py::function& allocate) {
  DeviceCall call(stream, allocate);
  AttentionProblem p;
  p.query = call.view(query, "query");
  p.key = call.view(key, "key");
  p.value = call.view(value, "value");
  p.out = call.view(out, "out");
  set_options(call, p, {mask, bias, alibi_slopes, sinks, query_lengths, key_lengths, block_mask});
  set_numbers(p, window_left, window_right, alignment, scale, softcap, dropout_p, seed, precision);
  if (sequence_first) p.swap_sequence_and_heads();
  return attend(call, p, out, sequence_first, return_lse, return_weights);
}

py::object attention_varlen(const py::object& query, const py::object& key, const py::object& value, const py::object& cu_seqlens_q,
                            const py::object& cu_seqlens_kv, const py::object& mask, const py::object& bias, const py::object& alibi_slopes,
                            const py::object& sinks, const py::object& query_lengths, const py::object& key_lengths, const py::object& out,
                            const py::object& block_mask, std::int64_t window_left, std::int64_t window_right, int alignment, double scale,
                            double softcap, double dropout_p, std::uint64_t seed, int precision, bool return_lse, bool return_weights,
                            std::uintptr_t stream, const py::function& allocate) {
  DeviceCall call(stream, allocate);
  AttentionProblem p;
  p.storage = Storage::packed;
  p.query = call.view(query, "query");
  p.key = call.view(key, "key");
  p.value = call.view(value, "value");
  p.cu_seqlens_q = call.indices(cu_seqlens_q, "cu_seqlens_q");
  p.cu_seqlens_kv = call.indices(cu_seqlens_kv, "cu_seqlens_kv");
  p.out = call.view(out, "out");
  set_options(call, p, {mask, bias, alibi_slopes, sinks, query_lengths, key_lengths, block_mask});
  set_numbers(p, window_left, window_right, alignment, scale, softcap, dropout_p, seed, precision);
  return attend(call, p, out, false, return_lse, return_weights);
}

py::object attention_paged(const py::object& query, const py::object& key_pages, const py::object& value_pages,
                           const py::object& page_table, const py::object& key_scales, const py::object& value_scales,
                           const py::object& mask, const py::object& bias, const py::object& alibi_slopes, const py::object& sinks,
                           const py::object& query_lengths, const py::object& key_lengths, const py::object& out,
                           const py::object& block_mask, std::int64_t window_left, std::int64_t window_right, int alignment, double scale,
                           double softcap, double dropout_p, std::uint64_t seed, int precision, bool sequence_first, bool return_lse,
                           bool return_weights, std::uintptr_t stream, const py::function& allocate) {
  DeviceCall call(stream, allocate);
  AttentionProblem p;
  p.storage = Storage::paged;
  p.query = call.view(query, "query");
  p.key = call.view(key_pages, "key_pages");
  p.value = call.view(value_pages, "value_pages");
  p.page_table = call.indices(page_table, "page_table");
  p.key_scales = call.view(key_scales, "key_scales");
  p.value_scales = call.view(value_scales, "value_scales");
  p.out = call.view(out, "out");
  set_options(call, p, {mask, bias, alibi_slopes, sinks, query_lengths, key_lengths, block_mask});
  set_numbers(p, window_left, window_right, alignment, scale, softcap, dropout_p, seed, precision);
  if (sequence_first)
    for (Array* x : {&p.query, &p.out})
      if (x->rank == 4) x->swap_axes(1, 2);
  return attend(call, p, out, sequence_first, return_lse, return_weights);
}

py::object attention_scores(const py::object& query, const py::object& key, const py::object& mask, const py::object& bias,
                            const py::object& alibi_slopes, const py::object& sinks, const py::object& query_lengths,
                            const py::object& key_lengths, std::int64_t window_left, std::int64_t window_right, int alignment, double scale,
                            double softcap, int stage, bool mean_of_heads, std::uintptr_t stream, const py::function& allocate) {
  DeviceCall call(stream, allocate);
  AttentionProblem p;
  p.query = call.view(query, "query");
  p.key = p.value = call.view(key, "key");
  set_options(call, p, {mask, bias, alibi_slopes, sinks, query_lengths, key_lengths, py::none()});
  set_numbers(p, window_left, window_right, alignment, scale, softcap, 0, 0, 0);
  if (call.refusal) return refused(call.refusal);
  if (const Refusal r = p.check()) return refused(r);
  require_kernel(static_cast<Stage>(stage) != Stage::weights, "scores after the stage 'weights'");
  require_kernel(!mean_of_heads, "the mean of heads' scores");
  p.weights = call.output(py::none(), {}, {p.batch(), p.heads(), p.len_q(), p.len_kv()}, "");
  call.move(p.query_lengths, p.query_ends);
  call.move(p.key_lengths, p.key_ends);
  cuda::attention_scores(p, static_cast<Stage>(stage), call.queue);
  return call.outputs;
}

}  // namespace

void bind_cuda_attention(py::module_& m) {
  m.def("attention_scores", &attention_scores, py::arg("query"), py::arg("key"), py::arg("mask"), py::arg("bias"), py::arg("alibi_slopes"),
        py::arg("sinks"), py::arg("query_lengths"), py::arg("key_lengths"), py::arg("window_left"), py::arg("window_right"),
        py::arg("alignment"), py::arg("scale"), py::arg("softcap"), py::arg("stage"), py::arg("mean_of_heads"), py::arg("stream"),
        py::arg("allocate"));
  m.def("attention", &attention, py::arg("query"), py::arg("key"), py::arg("value"), py::arg("mask"), py::arg("bias"),
        py::arg("alibi_slopes"), py::arg("sinks"), py::arg("query_lengths"), py::arg("key_lengths"), py::arg("out"), py::arg("block_mask"),
        py::arg("window_left"), py::arg("window_right"), py::arg("alignment"), py::arg("scale"), py::arg("softcap"), py::arg("dropout_p"),
        py::arg("seed"), py::arg("precision"), py::arg("sequence_first"), py::arg("return_lse"), py::arg("return_weights"),
        py::arg("stream"), py::arg("allocate"));
  m.def("attention_varlen", &attention_varlen, py::arg("query"), py::arg("key"), py::arg("value"), py::arg("cu_seqlens_q"),
        py::arg("cu_seqlens_kv"), py::arg("mask"), py::arg("bias"), py::arg("alibi_slopes"), py::arg("sinks"), py::arg("query_lengths"),
        py::arg("key_lengths"), py::arg("out"), py::arg("block_mask"), py::arg("window_left"), py::arg("window_right"),
        py::arg("alignment"), py::arg("scale"), py::arg("softcap"), py::arg("dropout_p"), py::arg("seed"), py::arg("precision"),
        py::arg("return_lse"), py::arg("return_weights"), py::arg("stream"), py::arg("allocate"));
  m.def("attention_paged", &attention_paged, py::arg("query"), py::arg("key_pages"), py::arg("value_pages"), py::arg("page_table"),
        py::arg("key_scales"), py::arg("value_scales"), py::arg("mask"), py::arg("bias"), py::arg("alibi_slopes"), py::arg("sinks"),
        py::arg("query_lengths"), py::arg("key_lengths"), py::arg("out"), py::arg("block_mask"), py::arg("window_left"),
        py::arg("window_right"), py::arg("alignment"), py::arg("scale"), py::arg("softcap"), py::arg("dropout_p"), py::arg("seed"),
        py::arg("precision"), py::arg("sequence_first"), py::arg("return_lse"), py::arg("return_weights"), py::arg("stream"),
        py::arg("allocate"));
}

}  // namespace regard::bindings
