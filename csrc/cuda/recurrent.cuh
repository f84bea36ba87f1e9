// One step of a recurrent layer: a warp has one hidden unit, all its gates, and up to kRecurrentRows sequences.
//
//   the sequences' states into shared memory
//   sums = h W_hidden^T: lanes take grains of 16 bytes of the unit's weights in turn, and their sums merge in a fixed tree
//   gates, new state: a lane each sequence
//
// A state is a sum in this order plus its gates' arithmetic, whatever it is computed beside.
#pragma once

#include "core/recurrent_problem.h"
#include "cuda/lane_sums.cuh"
#include "cuda/view.cuh"

namespace regard::cuda {

constexpr int kRecurrentThreads = 128;
constexpr int kRecurrentUnits = kRecurrentThreads / kWarp;  // of a block
constexpr int kRecurrentRows = 8;                           // sequences of a block: their sums fill a warp's lanes

// Elements of a state in shared memory at a time: 32 KiB for all rows.
template <class C> constexpr int kRecurrentDepth = 4096 / static_cast<int>(sizeof(C));

struct RecurrentDirection {
  View w_hidden;       // [gates hidden, hidden]
  View b_hidden;       // [gates hidden], or absent
  const void* inputs;  // [batch, inputs_len, gates hidden]: the input products, in the compute type
  int time;            // of this step
  int inputs_time;     // of the first of the input products
  bool vectors;        // rows of w_hidden lie in aligned chunks of 16 bytes
};

struct RecurrentArguments {
  RecurrentDirection direction[2];
  View out;            // [batch, len, directions hidden]
  Indices lengths;     // [batch], or absent
  const void* before;  // [directions, batch, hidden], in the compute type, like after and cells
  void* after;         // not `before`: other blocks still read that
  void* cells;         // lstm only
  int batch;
  int len;
  int hidden;
  int inputs_len;
};

// Elements of a state's row in shared memory: whole grains, zeros beyond its end.
template <class T> constexpr int recurrent_pitch(int hidden) {
  constexpr int kGrain = Vector<T>::kLength;
  constexpr int most = kRecurrentDepth<Compute<T>>;
  return hidden < most ? (hidden + kGrain - 1) / kGrain * kGrain : most;
}

template <class T, bool kLstm> REGARD_KERNEL(kRecurrentThreads, 1) recurrent_step(const REGARD_GRID_CONSTANT RecurrentArguments a) {
  using C = Compute<T>;
  constexpr int kGates = static_cast<int>(gates_of(kLstm ? Cell::lstm : Cell::gru));
  constexpr int kGrain = Vector<T>::kLength;
  constexpr int kPart = Vector<C>::kLength;  // whole vectors from shared memory: lanes a grain apart meet in no bank
  const int blocks = (a.hidden + kRecurrentUnits - 1) / kRecurrentUnits;  // of units
  const int tiles = (a.batch + kRecurrentRows - 1) / kRecurrentRows;
  const int direction = block_index() / blocks / tiles;
  const RecurrentDirection& own = a.direction[direction];
  const int row0 = block_index() / blocks % tiles * kRecurrentRows;
  const int lane = thread_index() % kWarp;
  const int unit = block_index() % blocks * kRecurrentUnits + thread_index() / kWarp;
  const int b = row0 + lane % kRecurrentRows;
  const bool running = b < a.batch && own.time < length_of(a.lengths, b, a.len);
  const std::int64_t first = static_cast<std::int64_t>(direction) * a.batch * a.hidden;
  const C* const before = static_cast<const C*>(a.before) + first;
  C* const h = reinterpret_cast<C*>(dynamic_shared());  // [kRecurrentRows][pitch]
  const int pitch = recurrent_pitch<T>(a.hidden);

  C sums[kWarp] = {};                                  // [gates][kRecurrentRows], or less
  const int depth = any_lane(running) ? a.hidden : 0;  // the same in all warps: they have the same rows
  for (int k0 = 0; k0 < depth; k0 += pitch) {
    block_barrier();
    for (int r = 0; r < kRecurrentRows; ++r)
      for (int k = thread_index(); k < pitch; k += kRecurrentThreads)
        h[r * pitch + k] = row0 + r < a.batch && k0 + k < a.hidden ? before[static_cast<std::int64_t>(row0 + r) * a.hidden + k0 + k] : C(0);
    block_barrier();
    if (unit >= a.hidden) continue;
    for (int k = lane * kGrain; k < pitch && k0 + k < a.hidden; k += kWarp * kGrain) {
      C w[kGates][kGrain];
#pragma unroll
      for (int g = 0; g < kGates; ++g)
        load_grain<T>(w[g], own.w_hidden.at(g * a.hidden + unit), own.w_hidden.stride[1], k0 + k, a.hidden, own.vectors);
#pragma unroll
      for (int r = 0; r < kRecurrentRows; ++r)
#pragma unroll
        for (int part = 0; part < kGrain; part += kPart) {
          const auto x = *reinterpret_cast<const Vector<C>*>(h + r * pitch + k + part);
#pragma unroll
          for (int e = 0; e < kPart; ++e)
#pragma unroll
            for (int g = 0; g < kGates; ++g) sums[g * kRecurrentRows + r] += w[g][part + e] * x.x[e];
        }
    }
  }
  if (unit >= a.hidden) return;
  const C mine = sum_to_lanes(sums);
  C s[kGates];
#pragma unroll
  for (int g = 0; g < kGates; ++g) {
    s[g] = shuffle(mine, g * kRecurrentRows + lane % kRecurrentRows);
    if (own.b_hidden.data != nullptr) s[g] += value_at<T>(own.b_hidden.at(g * a.hidden + unit));
  }
  if (lane >= kRecurrentRows || b >= a.batch) return;

  const std::int64_t at = static_cast<std::int64_t>(b) * a.hidden + unit;
  C made = before[at];
  if (running) {
    const C* const input = static_cast<const C*>(own.inputs) +
                           (static_cast<std::int64_t>(b) * a.inputs_len + own.time - own.inputs_time) * kGates * a.hidden + unit;
    if constexpr (!kLstm) {
      const C r = sigmoid_of(input[0] + s[0]);
      const C z = sigmoid_of(input[a.hidden] + s[1]);
      const C n = tanh_of(input[2 * static_cast<std::int64_t>(a.hidden)] + r * s[2]);
      made = n + z * (made - n);
    } else {
      const auto sum = [&](int g) { return input[g * static_cast<std::int64_t>(a.hidden)] + s[g]; };
      C& cell = static_cast<C*>(a.cells)[first + at];
      cell = sigmoid_of(sum(1)) * cell + sigmoid_of(sum(0)) * tanh_of(sum(2));
      made = sigmoid_of(sum(3)) * tanh_of(cell);
    }
  }
  static_cast<C*>(a.after)[first + at] = made;
  write<T>(a.out.at(b, own.time, direction * a.hidden + unit), running ? made : C(0));
}

constexpr int kStateThreads = 256;

struct StateArguments {
  View from;  // [directions, batch, hidden]; absent: zeros
  View to;
  DType from_type;
  DType to_type;
  int directions;
  int batch;
  int hidden;
};

template <class C> REGARD_KERNEL(kStateThreads, 1) copy_states(const REGARD_GRID_CONSTANT StateArguments a) {
  const std::int64_t n = static_cast<std::int64_t>(block_index()) * kStateThreads + thread_index();
  const std::int64_t row = n / a.hidden;
  const std::int64_t d = row / a.batch;
  if (d >= a.directions) return;
  const C x = a.from.data != nullptr ? load_as<C>(a.from.at(d, row % a.batch, n % a.hidden), a.from_type) : C(0);
  store_as(a.to.at(d, row % a.batch, n % a.hidden), a.to_type, x);
}

}  // namespace regard::cuda
