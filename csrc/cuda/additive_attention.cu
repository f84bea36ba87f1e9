// Additive and multiplicative attention: queries and keys are projected, then the kernels of dot-product attention do the
// rest. Additive scores, v . tanh(query + key), are a form of the splitting kernel's: each tanh is computed once.
//
// Bahdanau, Cho & Bengio, "Neural machine translation by jointly learning to align and translate" (2015);
// Luong, Pham & Manning, "Effective approaches to attention-based neural machine translation" (2015).

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

void require_room(const Array& query, const Array& key, const Array& value) {
  for (const Array* x : {&query, &key, &value})
    for (int axis = 0; axis < 3; ++axis)
      if (x->shape[axis] > kMostElements) throw Error("no CUDA kernel for axes of 2^31 - 1024 elements or more");
}

}  // namespace

void additive_attention(const AdditiveProblem& p, const Queue& queue) {
  if (p.batch() * p.len_q() == 0) return;
  require_room(p.query, p.key, p.value);
  const OnDevice here(queue.device);
  AttentionProblem a = attention_of(p);
  a.query = projected(p.query, p.w_query, p.bias, queue);
  a.key = projected(p.key, p.w_key, {}, queue);
  a.value = projected(p.value, {}, {}, queue);
  Array v = p.v;
  v.insert_axis(0);
  v.insert_axis(0);
  launch_additive(a, projected(v, {}, {}, queue), queue);
}

void multiplicative_attention(const MultiplicativeProblem& p, const Queue& queue) {
  if (p.batch() * p.len_q() == 0) return;
  require_room(p.query, p.key, p.value);
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
