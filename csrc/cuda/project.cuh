// Rows of features as compute values, projected where there is a weight: y = x w^T + bias. For the small products inside
// additive attention; large ones are the framework's.
#pragma once

#include "core/linear_problem.h"
#include "cuda/operations.h"
#include "cuda/view.cuh"

namespace regard::cuda {

constexpr int kProjectThreads = 256;
constexpr int kProjectTile = 64;   // rows, and outputs, of a block
constexpr int kProjectDepth = 16;  // inputs in shared memory at a time

struct ProjectArguments {
  View x;       // [batch, len, in]
  View weight;  // [out, in]; absent: in = out, and rows are only copied
  View bias;    // [out], or absent
  void* to;     // [batch, len, out] in the compute type, without gaps
  DType type;
  std::int64_t rows;
  int len;
  int in;
  int out;
  int tiles;  // of outputs
};

template <class C> struct ProjectShared {
  C x[kProjectTile][kProjectDepth + 1];
  C w[kProjectTile][kProjectDepth + 1];
};

// A thread has 4 x 4 outputs, 16 apart.
template <class C> REGARD_KERNEL(kProjectThreads, 1) project_rows(const REGARD_GRID_CONSTANT ProjectArguments a) {
  constexpr int kAcross = 16;
  constexpr int kEach = kProjectTile / kAcross;
  auto& shared = *reinterpret_cast<ProjectShared<C>*>(dynamic_shared());
  const std::int64_t row0 = static_cast<std::int64_t>(block_index() / a.tiles) * kProjectTile;
  const int out0 = block_index() % a.tiles * kProjectTile;
  const int across = thread_index() % kAcross;
  const int down = thread_index() / kAcross;
  const auto x_at = [&](std::int64_t row, int k) { return load_as<C>(a.x.at(row / a.len, row % a.len, k), a.type); };

  C y[kEach][kEach] = {};
  for (int k0 = 0; a.weight.data != nullptr && k0 < a.in; k0 += kProjectDepth) {
    block_barrier();
    for (int n = thread_index(); n < kProjectTile * kProjectDepth; n += kProjectThreads) {
      const int r = n / kProjectDepth;
      const int k = k0 + n % kProjectDepth;
      shared.x[r][n % kProjectDepth] = row0 + r < a.rows && k < a.in ? x_at(row0 + r, k) : C(0);
      shared.w[r][n % kProjectDepth] = out0 + r < a.out && k < a.in ? load_as<C>(a.weight.at(out0 + r, k), a.type) : C(0);
    }
    block_barrier();
    for (int k = 0; k < kProjectDepth; ++k) {
      C w[kEach];
#pragma unroll
      for (int c = 0; c < kEach; ++c) w[c] = shared.w[across + kAcross * c][k];
#pragma unroll
      for (int r = 0; r < kEach; ++r) {
        const C x = shared.x[down + kAcross * r][k];
#pragma unroll
        for (int c = 0; c < kEach; ++c) y[r][c] += x * w[c];
      }
    }
  }
#pragma unroll
  for (int r = 0; r < kEach; ++r)
#pragma unroll
    for (int c = 0; c < kEach; ++c) {
      const std::int64_t row = row0 + down + kAcross * r;
      const int o = out0 + across + kAcross * c;
      if (row >= a.rows || o >= a.out) continue;
      C made = a.weight.data != nullptr ? y[r][c] : x_at(row, o);
      if (a.bias.data != nullptr) made += load_as<C>(a.bias.at(o), a.type);
      static_cast<C*>(a.to)[row * a.out + o] = made;
    }
}

// x, (batch, len, in), as a new array (batch, 1, len, out) in the type that it is computed in.
inline Array projected(const Array& x, const Array& weight, const Array& bias, const Queue& queue) {
  Array made;
  made.kind = Array::Kind::array;
  made.rank = 4;
  made.on_device = true;
  made.dtype = compute_dtype(x.dtype);
  const std::int64_t out = weight.present() ? weight.shape[0] : x.shape[2];
  const std::int64_t shape[] = {x.shape[0], 1, x.shape[1], out};
  std::int64_t stride = size_of(made.dtype);
  for (int axis = 3; axis >= 0; --axis) {
    made.shape[axis] = shape[axis];
    made.stride[axis] = stride;
    stride *= shape[axis];
  }
  if (made.size() == 0) return made;
  made.data = queue.scratch(made.size() * size_of(made.dtype));
  const std::int64_t rows = x.shape[0] * x.shape[1];
  const auto tiles = static_cast<int>((out + kProjectTile - 1) / kProjectTile);
  const ProjectArguments a{view_of(x),
                           view_of(weight),
                           view_of(bias),
                           made.data,
                           x.dtype,
                           rows,
                           static_cast<int>(x.shape[1]),
                           static_cast<int>(x.shape[2]),
                           static_cast<int>(out),
                           tiles};
  with_compute(x.dtype, [&](auto t) {
    using C = decltype(t);
    launch(project_rows<C>, (rows + kProjectTile - 1) / kProjectTile * tiles, kProjectThreads, static_cast<int>(sizeof(ProjectShared<C>)),
           queue.stream, a);
  });
  return made;
}

}  // namespace regard::cuda
