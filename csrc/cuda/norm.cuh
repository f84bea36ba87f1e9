// Normalisation over the last axis: out = norm(x + residual) * weight + bias. A block has one row; its lanes take grains
// of 16 bytes in turn, whatever the strides, and merge their sums in a fixed tree.
//
// Ba, Kiros & Hinton, "Layer normalization" (2016); Zhang & Sennrich, "Root mean square layer normalization" (2019).
#pragma once

#include "core/norm_problem.h"
#include "core/rows.h"
#include "cuda/types.cuh"

namespace regard::cuda {

constexpr int kNormThreads = 128;

struct NormArguments {
  Rows x;
  Rows residual;
  Rows out;
  bool has_residual;
  bool vectors;  // every row of x, residual and out is aligned, and its elements lie side by side
  const char* weight;
  const char* bias;
  std::int64_t weight_stride;
  std::int64_t bias_stride;
  int features;
  double eps;
  NormProblem::Kind kind;
};

// The block's sum of each lane's x; `room` holds one value a warp.
template <class C> REGARD_DEVICE C block_sum(C x, C* room) {
  for (int step = 1; step < kWarp; step *= 2) x += shuffle_xor(x, step);
  block_barrier();  // the room may still be read for the sum before
  if (thread_index() % kWarp == 0) room[thread_index() / kWarp] = x;
  block_barrier();
  C sum = 0;
  for (int w = 0; w < kNormThreads / kWarp; ++w) sum += room[w];
  return sum;
}

template <class T> REGARD_KERNEL(kNormThreads, 1) normalise_rows(const REGARD_GRID_CONSTANT NormArguments a) {
  using C = Compute<T>;
  constexpr int kGrain = Vector<T>::kLength;
  C* const room = reinterpret_cast<C*>(dynamic_shared());
  const char* const x = a.x.at(block_index());
  const char* const residual = a.has_residual ? a.residual.at(block_index()) : nullptr;
  char* const out = a.out.at(block_index());

  // f(values, first, count) for each grain of this lane.
  const auto each = [&](auto&& f) {
    for (int k = thread_index() * kGrain; k < a.features; k += kNormThreads * kGrain) {
      C v[kGrain];
      const int count = a.features - k < kGrain ? a.features - k : kGrain;
      if (a.vectors && count == kGrain) {
        const auto from = *reinterpret_cast<const Vector<T>*>(x + static_cast<std::int64_t>(k) * static_cast<int>(sizeof(T)));
        for (int i = 0; i < kGrain; ++i) v[i] = value_of(from.x[i]);
        if (residual != nullptr) {
          const auto more = *reinterpret_cast<const Vector<T>*>(residual + static_cast<std::int64_t>(k) * static_cast<int>(sizeof(T)));
          for (int i = 0; i < kGrain; ++i) v[i] += value_of(more.x[i]);
        }
      } else {
        for (int i = 0; i < count; ++i) {
          v[i] = value_at<T>(x + (k + i) * a.x.step());
          if (residual != nullptr) v[i] += value_at<T>(residual + (k + i) * a.residual.step());
        }
      }
      f(v, k, count);
    }
  };

  const C count = static_cast<C>(a.features);
  C mean = 0;
  if (a.kind == NormProblem::Kind::layer) {
    C sum = 0;
    each([&](const C* v, int, int n) {
      for (int i = 0; i < n; ++i) sum += v[i];
    });
    mean = block_sum(sum, room) / count;
  }
  // What the rounding of the mean left comes out of the second pass: differences keep their digits however large it is.
  C squares = 0;
  C rest = 0;
  each([&](const C* v, int, int n) {
    for (int i = 0; i < n; ++i) {
      const C d = v[i] - mean;
      rest += d;
      squares += d * d;
    }
  });
  squares = block_sum(squares, room) / count;
  rest = a.kind == NormProblem::Kind::layer ? block_sum(rest, room) / count : C(0);
  const double variance = static_cast<double>(squares) - static_cast<double>(rest) * static_cast<double>(rest);
  const C factor = static_cast<C>(1 / sqrt(variance + a.eps));

  each([&](const C* v, int k, int n) {
    Vector<T> made;
    for (int i = 0; i < n; ++i) {
      C y = ((v[i] - mean) - rest) * factor;
      if (a.weight != nullptr) y *= value_at<T>(a.weight + (k + i) * a.weight_stride);
      if (a.bias != nullptr) y += value_at<T>(a.bias + (k + i) * a.bias_stride);
      if (a.vectors && n == kGrain)
        write<T>(reinterpret_cast<char*>(&made.x[i]), y);
      else
        write<T>(out + (k + i) * a.out.step(), y);
    }
    if (a.vectors && n == kGrain) *reinterpret_cast<Vector<T>*>(out + static_cast<std::int64_t>(k) * static_cast<int>(sizeof(T))) = made;
  });
}

}  // namespace regard::cuda
