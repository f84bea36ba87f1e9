// Rows of features as compute values, projected where there is a weight: y = x w^T + bias + added. For the products inside
// additive attention and recurrent layers, which go on in the compute type; linear's is the framework's.
//
// Rows may also be windows over what lies along an axis: a convolution is the product of each window and its taps.
#pragma once

#include "core/linear_problem.h"
#include "cuda/operations.h"
#include "cuda/view.cuh"

namespace regard::cuda {

constexpr int kProjectThreads = 256;
constexpr int kProjectTile = 64;   // rows, and outputs, of a block
constexpr int kProjectDepth = 16;  // inputs in shared memory at a time

struct ProjectArguments {
  View x;       // [batch, len, in]; windows: [batch / sharing, sharing, channels, len]
  View weight;  // [out, in]; absent: in = out, and rows are only copied; windows: [out, channels, width]
  View bias;    // [out], or absent
  View added;   // [batch / sharing, len, out], or absent
  void* to;     // [batch, len, out] in the compute type, without gaps
  DType x_type;
  DType type;  // of weight and bias
  DType added_type;
  std::int64_t rows;
  int len;
  int in;  // windows: channels * width
  int out;
  int tiles;    // of outputs
  int sharing;  // entries of the batch, one after another, to which the same rows are added
  int width;    // of a window, and what of it lies before its row
  int left;
};

template <class C> struct ProjectShared {
  C x[kProjectTile][kProjectDepth + 1];
  C w[kProjectTile][kProjectDepth + 1];
};

// A thread has 4 x 4 outputs, 16 apart.
template <class C, bool kWindows = false> REGARD_KERNEL(kProjectThreads, 1) project_rows(const REGARD_GRID_CONSTANT ProjectArguments a) {
  constexpr int kAcross = 16;
  constexpr int kEach = kProjectTile / kAcross;
  auto& shared = *reinterpret_cast<ProjectShared<C>*>(dynamic_shared());
  const std::int64_t row0 = static_cast<std::int64_t>(block_index() / a.tiles) * kProjectTile;
  const int out0 = block_index() % a.tiles * kProjectTile;
  const int across = thread_index() % kAcross;
  const int down = thread_index() / kAcross;
  const auto x_at = [&](std::int64_t row, int k) {
    const std::int64_t entry = row / a.len;
    const auto n = static_cast<int>(row % a.len);
    if constexpr (kWindows) {
      const int at = n + k % a.width - a.left;
      return at >= 0 && at < a.len ? load_as<C>(a.x.at(entry / a.sharing, entry % a.sharing, k / a.width, at), a.x_type) : C(0);
    } else {
      return load_as<C>(a.x.at(entry, n, k), a.x_type);
    }
  };
  const auto w_at = [&](int o, int k) {
    return load_as<C>(kWindows ? a.weight.at(o, k / a.width, k % a.width) : a.weight.at(o, k), a.type);
  };

  C y[kEach][kEach] = {};
  for (int k0 = 0; a.weight.data != nullptr && k0 < a.in; k0 += kProjectDepth) {
    block_barrier();
    for (int n = thread_index(); n < kProjectTile * kProjectDepth; n += kProjectThreads) {
      const int r = n / kProjectDepth;
      const int k = k0 + n % kProjectDepth;
      shared.x[r][n % kProjectDepth] = row0 + r < a.rows && k < a.in ? x_at(row0 + r, k) : C(0);
      shared.w[r][n % kProjectDepth] = out0 + r < a.out && k < a.in ? w_at(out0 + r, k) : C(0);
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
      if (a.added.data != nullptr) made += load_as<C>(a.added.at(row / a.len / a.sharing, row % a.len, o), a.added_type);
      static_cast<C*>(a.to)[row * a.out + o] = made;
    }
}

// An array (batch, 1, len, features) of compute values without gaps, still without memory.
inline Array compute_rows(std::int64_t batch, std::int64_t len, std::int64_t features, DType dtype) {
  Array a;
  a.kind = Array::Kind::array;
  a.rank = 4;
  a.on_device = true;
  a.dtype = compute_dtype(dtype);
  const std::int64_t shape[] = {batch, 1, len, features};
  std::int64_t stride = size_of(a.dtype);
  for (int axis = 3; axis >= 0; --axis) {
    a.shape[axis] = shape[axis];
    a.stride[axis] = stride;
    stride *= shape[axis];
  }
  return a;
}

inline Array take_memory(Array x, const Queue& queue) {
  if (x.size() > 0) x.data = queue.scratch(x.size() * size_of(x.dtype));
  return x;
}

// What every projection has. x is (batch, len, in); `to` is compute_rows of them.
inline ProjectArguments project_arguments(const Array& x, const Array& weight, const Array& bias, const Array& to) {
  ProjectArguments a{};
  a.x = view_of(x);
  a.weight = view_of(weight);
  a.bias = view_of(bias);
  a.to = to.data;
  a.x_type = x.dtype;
  a.type = weight.present() ? weight.dtype : x.dtype;
  a.rows = to.shape[0] * to.shape[2];
  a.len = static_cast<int>(to.shape[2]);
  a.in = static_cast<int>(x.shape[2]);
  a.out = static_cast<int>(to.shape[3]);
  a.tiles = (a.out + kProjectTile - 1) / kProjectTile;
  a.sharing = a.width = 1;
  return a;
}

template <bool kWindows = false> void launch_project(const ProjectArguments& a, DType dtype, Stream stream) {
  with_compute(dtype, [&](auto t) {
    using C = decltype(t);
    launch(project_rows<C, kWindows>, (a.rows + kProjectTile - 1) / kProjectTile * a.tiles, kProjectThreads,
           static_cast<int>(sizeof(ProjectShared<C>)), stream, a);
  });
}

inline void project(const Array& x, const Array& weight, const Array& bias, const Array& to, const Queue& queue) {
  launch_project(project_arguments(x, weight, bias, to), x.dtype, queue.stream);
}

// x, (batch, len, in), as a new array (batch, 1, len, out) in the type that it is computed in.
inline Array projected(const Array& x, const Array& weight, const Array& bias, const Queue& queue) {
  const std::int64_t out = weight.present() ? weight.shape[0] : x.shape[2];
  const Array made = take_memory(compute_rows(x.shape[0], x.shape[1], out, x.dtype), queue);
  project(x, weight, bias, made, queue);
  return made;
}

}  // namespace regard::cuda
