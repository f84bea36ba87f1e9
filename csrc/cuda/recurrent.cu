// Gated recurrent units and long short-term memory: one layer, in one direction, over all steps of a batch.
//
//   states = h0, c0 in the compute type
//   for each chunk of steps, so that memory does not grow with their number
//     input products of its steps, all at once                      (project_rows, in the compute type: no rounding between)
//     for each step: states of all sequences                        (recurrent_step, one launch)
//   h_n, c_n = states, rounded
//
// A step needs the one before, so its launch is the barrier. Each reads W_hidden, gates * hidden^2 elements, once for every
// 8 sequences, from the L2 cache where that holds it, for 2 * gates * hidden^2 flops a sequence: 2 flops a float32 byte at 8
// sequences or more, where a GPU has some 10 a byte of its L2. So it is bound by the launches, some microseconds each,
// while weights are small, then by the L2 cache, never by arithmetic. The input products, 2 * gates * hidden * in_features
// flops a sequence and step on tiles of 64 x 64, are bound by arithmetic.
//
// Sequences from their length on leave their states as they are. Which step is whose end is not known on the host where
// lengths lie on the device, so all steps are launched.
//
// Cho et al., "Learning Phrase Representations using RNN Encoder-Decoder" (2014), in the form of cuDNN and PyTorch, with
// the reset after the product; Hochreiter & Schmidhuber, "Long Short-Term Memory" (1997), with forget gates (Gers 2000).

#include "cuda/recurrent.cuh"

#include <utility>

#include "cuda/operations.h"
#include "cuda/project.cuh"

namespace regard::cuda {
namespace {

constexpr std::int64_t kInputRows = 4096;  // input products held at a time, of a sequence and step: 64 tiles down

// (1, batch, hidden), or (batch, 1, 1, hidden), as (batch, hidden).
View matrix_of(Array x) {
  if (!x.present()) return {};
  if (x.rank == 3) x.move_axis(0, 2);
  if (x.rank == 4) x.move_axis(3, 1);
  return view_of(x);
}

void launch_copy(const Array& from, const Array& to, const RecurrentProblem& p, Stream stream) {
  const StateArguments a{matrix_of(from), matrix_of(to), from.dtype, to.dtype, static_cast<int>(p.batch()), static_cast<int>(p.hidden())};
  with_compute(p.x.dtype, [&](auto t) {
    launch(copy_states<decltype(t)>, (p.batch() * p.hidden() + kStateThreads - 1) / kStateThreads, kStateThreads, 0, stream, a);
  });
}

template <class T> void launch_step(Cell cell, const RecurrentArguments& a, Stream stream) {
  const std::int64_t units = (a.hidden + kRecurrentUnits - 1) / kRecurrentUnits;
  const std::int64_t blocks = (a.batch + kRecurrentRows - 1) / kRecurrentRows * units;
  const int bytes = kRecurrentRows * recurrent_pitch<T>(a.hidden) * static_cast<int>(sizeof(Compute<T>));
  launch(cell == Cell::lstm ? recurrent_step<T, true> : recurrent_step<T, false>, blocks, kRecurrentThreads, bytes, stream, a);
}

}  // namespace

void recurrent(const RecurrentProblem& p, const Queue& queue) {
  if (p.batch() == 0 || p.hidden() == 0) return;
  const std::int64_t rows = p.gates() * p.hidden();
  require_room({p.batch(), p.len(), p.in_features(), rows});
  const OnDevice here(queue.device);
  const RecurrentProblem::Weights& w = p.weights[0];
  const Array like = compute_rows(p.batch(), 1, p.hidden(), p.x.dtype);
  Array before = take_memory(like, queue);
  Array after = take_memory(like, queue);
  const Array cells = p.cell == Cell::lstm ? take_memory(like, queue) : Array{};
  launch_copy(p.h0, before, p, queue.stream);
  if (cells.present()) launch_copy(p.c0, cells, p, queue.stream);

  const std::int64_t most = std::min(p.len(), std::max<std::int64_t>(1, kInputRows / p.batch()));
  const Array inputs = take_memory(compute_rows(p.batch(), most, rows, p.x.dtype), queue);

  RecurrentArguments a{};
  a.w_hidden = view_of(w.w_hidden);
  a.b_hidden = view_of(w.b_hidden);
  a.out = view_of(p.out);
  a.lengths = indices_of(p.lengths);
  a.inputs = inputs.data;
  a.cells = cells.data;
  a.batch = static_cast<int>(p.batch());
  a.len = static_cast<int>(p.len());
  a.hidden = static_cast<int>(p.hidden());
  a.vectors = in_vectors(w.w_hidden);
  for (std::int64_t s0 = 0; s0 < p.len(); s0 += most) {
    const std::int64_t steps = std::min(most, p.len() - s0);
    const std::int64_t first = p.reverse ? p.len() - s0 - steps : s0;
    Array x = p.x;
    if (x.data != nullptr) x.data += first * x.stride[1];
    x.shape[1] = steps;
    Array products = compute_rows(p.batch(), steps, rows, p.x.dtype);
    products.data = inputs.data;
    project(x, w.w_input, w.b_input, products, queue);
    a.inputs_time = static_cast<int>(first);
    a.inputs_len = static_cast<int>(steps);
    for (std::int64_t s = 0; s < steps; ++s) {
      a.time = static_cast<int>(p.reverse ? first + steps - 1 - s : first + s);
      a.before = before.data;
      a.after = after.data;
      with_type(p.x.dtype, [&](auto t) { launch_step<decltype(t)>(p.cell, a, queue.stream); });
      std::swap(before, after);
    }
  }
  launch_copy(before, p.h_n, p, queue.stream);
  if (cells.present()) launch_copy(cells, p.c_n, p, queue.stream);
}

}  // namespace regard::cuda
