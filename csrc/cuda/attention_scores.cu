// The scores themselves, after a stage: len_q x len_kv of them, for who asks for that matrix. A thread has one.
//
// Neighbouring threads have neighbouring keys under one query: its row comes from the cache, as do the keys' after their
// first chunk. Writing the matrix is what takes time beside that.

#include "cuda/attention_launch.cuh"
#include "cuda/attention_scores.cuh"

namespace regard::cuda {
namespace {

constexpr int kThreads = 256;

template <class C> REGARD_KERNEL(kThreads, 1) score_elements(AttentionArguments a, SplitScale scale, std::int64_t count) {
  const std::int64_t n = static_cast<std::int64_t>(block_index()) * kThreads + thread_index();
  if (n >= count) return;
  const auto j = static_cast<int>(n % a.weights_kv);
  const std::int64_t row = n / a.weights_kv;
  const auto i = static_cast<int>(row % a.weights_q);
  const auto h = static_cast<int>(row / a.weights_q % a.heads);
  const auto b = static_cast<int>(row / a.weights_q / a.heads);
  const SequenceMask sequence = sequence_of(a, b);
  const KeyRange keys = sequence.keys_of(i);
  C s = -infinity<C>();
  if (j >= keys.first && j < keys.last) {
    const char* const query = query_row(a, a.query, b, h, i);
    const char* const key = key_row(a, a.key, b, h / a.group, j);
    C sum = 0;
    for (int d = 0; d < a.dim_qk; ++d)
      sum += load_as<C>(query + d * a.query.stride[3], a.type) * static_cast<C>(scale.factor) *
             load_as<C>(key + d * a.key.stride[3], a.stored);
    s = finished_score(a, sum * static_cast<C>(scale.rest), b, h, i, j, slope_of<C>(a, b, h), i + sequence.diagonal);
  }
  store_as(a.weights.at(b, h, i, j), a.out_type, s);
}

}  // namespace

void attention_scores(const AttentionProblem& problem, Stage stage, const Queue& queue) {
  AttentionProblem p = problem.up_to(stage);
  if (stage < Stage::masked) p.query_lengths = p.key_lengths = Array{};
  const std::int64_t count = p.batch() * p.heads() * p.len_q() * p.len_kv();
  require_room({p.batch(), p.heads(), p.len_q(), p.len_kv(), p.dim_qk()});
  const OnDevice here(queue.device);
  AttentionArguments a = arguments_of(p);
  a.out_type = p.weights.dtype;
  with_compute(p.query.dtype, [&](auto t) {
    launch(score_elements<decltype(t)>, (count + kThreads - 1) / kThreads, kThreads, 0, queue.stream, a, split_scale(a.scale), count);
  });
}

}  // namespace regard::cuda
