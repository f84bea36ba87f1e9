// Gated recurrent units and long short-term memory: one layer over all steps of a batch.
//
//   states = h0, c0 in the compute type
//   for each chunk of steps, so that memory does not grow with their number
//     input products of its steps, all at once                      (project_rows, in the compute type: no rounding between)
//     for each step: states of all sequences, in both directions    (recurrent_step, one launch)
//   h_n, c_n = states, rounded
//
// A step needs the one before, so its launch is the barrier. It is 2 * gates * hidden^2 flops a sequence, for which it reads
// W_hidden, gates * hidden^2 elements, once for every 8 sequences: 4 flops a byte of float32, 8 of 16-bit types, where a
// GPU's units do some 10 for each byte that its L2 cache gives. So while weights are small a step takes what a launch
// takes, some microseconds, and then what reading them takes, not arithmetic. The input products are 2 * gates * hidden *
// in_features flops a sequence and step on tiles of 64 x 64, 16 a byte: arithmetic, without the matrix units.
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

void launch_copy(const Array& from, const Array& to, const RecurrentProblem& p, Stream stream) {
  const StateArguments a{
      view_of(from), view_of(to), from.dtype, to.dtype, p.directions, static_cast<int>(p.batch()), static_cast<int>(p.hidden())};
  const std::int64_t elements = p.directions * p.batch() * p.hidden();
  with_compute(p.x.dtype, [&](auto t) {
    launch(copy_states<decltype(t)>, (elements + kStateThreads - 1) / kStateThreads, kStateThreads, 0, stream, a);
  });
}

template <class T> void launch_step(const RecurrentProblem& p, const RecurrentArguments& a, Stream stream) {
  const std::int64_t units = (p.hidden() + kRecurrentUnits - 1) / kRecurrentUnits;
  const std::int64_t blocks = p.directions * ((p.batch() + kRecurrentRows - 1) / kRecurrentRows) * units;
  const int bytes = kRecurrentRows * recurrent_pitch<T>(a.hidden) * static_cast<int>(sizeof(Compute<T>));
  launch(p.cell == Cell::lstm ? recurrent_step<T, true> : recurrent_step<T, false>, blocks, kRecurrentThreads, bytes, stream, a);
}

// The input products of `steps` steps, from `first` on in time's order.
void project_steps(const RecurrentProblem& p, int direction, std::int64_t first, std::int64_t steps, const Array& inputs,
                   const Queue& queue) {
  Array x = p.x;
  if (x.data != nullptr) x.data += first * x.stride[1];
  x.shape[1] = steps;
  Array products = compute_rows(p.batch(), steps, p.gates() * p.hidden(), p.x.dtype);
  products.data = inputs.data;
  project(x, p.weights[direction].w_input, p.weights[direction].b_input, products, queue);
}

}  // namespace

void recurrent(const RecurrentProblem& p, const Queue& queue) {
  if (p.batch() == 0 || p.hidden() == 0) return;
  const std::int64_t rows = p.gates() * p.hidden();
  require_room({p.batch(), p.len(), p.in_features(), rows});
  const OnDevice here(queue.device);
  Array like = compute_rows(p.directions, p.batch(), p.hidden(), p.x.dtype);
  like.move_axis(1, 3);  // (directions, batch, hidden)
  Array before = take_memory(like, queue);
  Array after = take_memory(like, queue);
  const Array cells = p.cell == Cell::lstm ? take_memory(like, queue) : Array{};
  launch_copy(p.h0, before, p, queue.stream);
  if (cells.present()) launch_copy(p.c0, cells, p, queue.stream);

  const std::int64_t most = std::min(p.len(), std::max<std::int64_t>(1, kInputRows / p.batch()));
  RecurrentArguments a{};
  Array inputs[2];
  for (int d = 0; d < p.directions; ++d) {
    inputs[d] = take_memory(compute_rows(p.batch(), most, rows, p.x.dtype), queue);
    a.direction[d].w_hidden = view_of(p.weights[d].w_hidden);
    a.direction[d].b_hidden = view_of(p.weights[d].b_hidden);
    a.direction[d].inputs = inputs[d].data;
    a.direction[d].vectors = in_vectors(p.weights[d].w_hidden);
  }
  a.out = view_of(p.out);
  a.lengths = indices_of(p.lengths);
  a.cells = cells.data;
  a.batch = static_cast<int>(p.batch());
  a.len = static_cast<int>(p.len());
  a.hidden = static_cast<int>(p.hidden());
  for (std::int64_t s0 = 0; s0 < p.len(); s0 += most) {
    const std::int64_t steps = std::min(most, p.len() - s0);
    a.inputs_len = static_cast<int>(steps);
    for (int d = 0; d < p.directions; ++d) {
      const std::int64_t first = p.backwards(d) ? p.len() - s0 - steps : s0;
      project_steps(p, d, first, steps, inputs[d], queue);
      a.direction[d].inputs_time = static_cast<int>(first);
    }
    for (std::int64_t s = s0; s < s0 + steps; ++s) {
      for (int d = 0; d < p.directions; ++d) a.direction[d].time = static_cast<int>(p.backwards(d) ? p.len() - 1 - s : s);
      a.before = before.data;
      a.after = after.data;
      with_type(p.x.dtype, [&](auto t) { launch_step<decltype(t)>(p, a, queue.stream); });
      std::swap(before, after);
    }
  }
  launch_copy(before, p.h_n, p, queue.stream);
  if (cells.present()) launch_copy(cells, p.c_n, p, queue.stream);
}

}  // namespace regard::cuda
