// Additive and multiplicative attention: queries and keys are projected, then the kernels of dot-product attention do the
// rest. Additive scores, v . tanh(query + key), are a form of the splitting kernel's: each tanh is computed once.
//
// With a location term each query has keys of its own, so queries stand where heads do, some at a time:
//   features = location_bias + location_kernel . windows of the previous weights    (project_rows, windows as rows)
//   keys = projected keys + features w_location^T                                   (project_rows)
//   scores and the rest as without
// For a query and key that is filters * (channels * width + dim) multiply-adds beside dim tanh, and dim floats written and
// read once more: at the sizes of Tacotron 2 (32 filters, 2 channels, width 31, dim 128) 8 flops a byte, which the L2 cache
// holds. One step of one decoder is its launches.
//
// Bahdanau, Cho & Bengio, "Neural machine translation by jointly learning to align and translate" (2015);
// Luong, Pham & Manning, "Effective approaches to attention-based neural machine translation" (2015);
// Chorowski et al., "Attention-based models for speech recognition" (2015).

#include <vector>

#include "cuda/attention_launch.cuh"
#include "cuda/project.cuh"

namespace regard::cuda {
namespace {

// (batch, len, ..) as (batch, 1, len, ..): one head.
Array one_head(Array x) {
  if (x.present()) x.insert_axis(1);
  return x;
}

// What both have beside their queries and keys.
template <class Problem> AttentionProblem attention_of(const Problem& p) {
  AttentionProblem a;
  a.value = one_head(p.value);
  a.mask = one_head(p.mask);
  a.key_lengths = p.key_lengths;
  a.out = one_head(p.out);
  a.weights = one_head(p.weights);
  a.scale = 1;
  return a;
}

template <class Problem> void require_room_of(const Problem& p) {
  require_room({p.batch(), p.len_q(), p.len_kv(), p.dim_q(), p.dim_k(), p.dim_v()});
}

constexpr std::int64_t kLocatedKeys = 1 << 14;  // held at a time, for all queries together: 256 tiles of the projection

// Queries i0.. of an array (batch, 1, len_q, ..) as heads: (batch, n, 1, ..).
Array as_heads(Array x, std::int64_t i0, std::int64_t n) {
  if (!x.present()) return x;
  x.swap_axes(1, 2);
  x.shape[1] = n;
  if (x.data != nullptr) x.data += i0 * x.stride[1];
  return x;
}

// `a` has projected queries, and values; its keys are made here.
void attend_located(const AdditiveProblem& p, const AttentionProblem& a, const Array& v, const Queue& queue) {
  require_room({p.filters(), p.channels() * p.width()});
  const Array keys = p.w_key.present() ? projected(p.key, p.w_key, {}, queue) : one_head(p.key);
  const std::int64_t a_query = std::max<std::int64_t>(1, p.batch() * p.len_kv());
  const std::int64_t most = std::clamp<std::int64_t>(kLocatedKeys / a_query, 1, p.len_q());
  Array features = take_memory(compute_rows(p.batch() * most, p.len_kv(), p.filters(), p.query.dtype), queue);
  Array located = take_memory(compute_rows(p.batch() * most, p.len_kv(), p.dim(), p.query.dtype), queue);
  // What the first queries take serves the others after them: none are more.
  std::vector<char*> taken;
  std::size_t next = 0;
  Queue again = queue;
  again.scratch = [&](std::int64_t bytes) {
    if (next == taken.size()) taken.push_back(queue.scratch(bytes));
    return taken[next++];
  };
  for (std::int64_t i0 = 0; i0 < p.len_q(); i0 += most) {
    const std::int64_t n = std::min(most, p.len_q() - i0);
    features.shape[0] = located.shape[0] = p.batch() * n;

    Array previous = p.previous_weights;  // [batch, len_q, channels, len_kv]
    if (previous.data != nullptr) previous.data += i0 * previous.stride[1];
    ProjectArguments windows = project_arguments(previous, p.location_kernel, p.location_bias, features);
    windows.in = static_cast<int>(p.channels() * p.width());
    windows.width = static_cast<int>(p.width());
    windows.left = (windows.width - 1) / 2;
    windows.sharing = static_cast<int>(n);
    launch_project<true>(windows, p.query.dtype, queue.stream);

    Array rows = features;  // (batch, len_kv, filters)
    rows.swap_axes(1, 2);
    rows.swap_axes(2, 3);
    ProjectArguments sums = project_arguments(rows, p.w_location, {}, located);
    Array added = keys;  // likewise
    added.swap_axes(1, 2);
    added.swap_axes(2, 3);
    sums.added = view_of(added);
    sums.added_type = keys.dtype;
    sums.sharing = static_cast<int>(n);
    launch_project(sums, p.query.dtype, queue.stream);

    AttentionProblem heads = a;
    heads.query = as_heads(a.query, i0, n);
    heads.mask = as_heads(a.mask, i0, n);
    heads.out = as_heads(a.out, i0, n);
    heads.weights = as_heads(a.weights, i0, n);
    heads.key = located;
    heads.key.shape[0] = p.batch();
    heads.key.shape[1] = n;
    heads.key.stride[1] = located.stride[0];
    heads.key.stride[0] = n * located.stride[0];
    heads.value.shape[1] = n;
    heads.value.stride[1] = 0;
    next = 0;
    launch_additive(heads, v, again);
  }
}

}  // namespace

void additive_attention(const AdditiveProblem& p, const Queue& queue) {
  if (p.batch() * p.len_q() == 0) return;
  require_room_of(p);
  const OnDevice here(queue.device);
  AttentionProblem a = attention_of(p);
  a.query = projected(p.query, p.w_query, p.bias, queue);
  a.value = projected(p.value, {}, {}, queue);
  Array v = p.v;
  v.insert_axis(0);
  v.insert_axis(0);
  v = projected(v, {}, {}, queue);
  if (p.needs_location) return attend_located(p, a, v, queue);
  a.key = projected(p.key, p.w_key, {}, queue);
  launch_additive(a, v, queue);
}

void multiplicative_attention(const MultiplicativeProblem& p, const Queue& queue) {
  if (p.batch() * p.len_q() == 0) return;
  require_room_of(p);
  const OnDevice here(queue.device);
  AttentionProblem a = attention_of(p);
  a.key = one_head(p.key);
  a.query = one_head(p.query);
  if (p.w.present()) {
    Array transposed = p.w;
    transposed.swap_axes(0, 1);
    a.query = projected(p.query, transposed, {}, queue);
  }
  attention_forward(a, queue);
}

}  // namespace regard::cuda
