// Kernels on maps (batch, channels, height, width): sums and maxima over positions or channels, and rescaling.
//
//   statistics   for each kept index: mean and maximum over the reduced axes. 32 lanes share a sum in grains of 16 bytes,
//                and merge in a fixed tree: whether a warp lies along the reduced axes (one kept index) or across them
//                (32 kept indices), the bits are the same
//   rescale      out = x * weight of the channel * weight of the position, 16 bytes a lane where memory allows
#pragma once

#include <cstdint>

#include "cuda/types.cuh"

namespace regard::cuda {

constexpr int kMapThreads = 256;

// Up to two axes as one index: n = n0 * length[1] + n1.
struct Axes {
  int length[2];
  std::int64_t stride[2];

  REGARD_DEVICE std::int64_t offset(int n) const {
    if (length[0] == 1) return n * stride[1];
    return n / length[1] * stride[0] + n % length[1] * stride[1];
  }
};

// Entry b of [batch, n] values in the compute type; null where there are none.
template <class C> REGARD_DEVICE const C* entry(const void* values, int b, int n) {
  return values != nullptr ? static_cast<const C*>(values) + static_cast<std::int64_t>(b) * n : nullptr;
}

struct StatisticsArguments {
  const char* x;
  std::int64_t batch_stride;
  Axes kept;
  Axes reduced;
  int kept_count;
  int reduced_count;
  int blocks;          // a batch entry
  const void* factor;  // [batch, reduced]: x is multiplied by it first; or null
  void* mean;          // [batch, kept] in the compute type; or null
  void* maximum;
  char* out;  // [batch, kept] in x's type: the maximum if `pool_maximum`, else the mean; or null
  std::int64_t out_stride[2];
  bool pool_maximum;
  bool vectors;  // reduced elements lie side by side, aligned
};

template <class T> struct Statistics {
  using C = Compute<T>;
  C sum = 0;
  C maximum = -infinity<C>();

  REGARD_DEVICE void add(C x) {
    sum += x;
    maximum = max_or_nan(maximum, x);
  }
  REGARD_DEVICE void merge(C other_sum, C other_maximum) {
    sum += other_sum;
    maximum = max_or_nan(maximum, other_maximum);
  }
};

// Of the reduced indices, those whose grain belongs to `lane` of 32.
template <class T>
REGARD_DEVICE Statistics<T> lane_statistics(const StatisticsArguments& a, const char* x, const Compute<T>* factor, int lane) {
  constexpr int kGrain = Vector<T>::kLength;
  Statistics<T> s;
  for (int r = lane * kGrain; r < a.reduced_count; r += kWarp * kGrain) {
    if (a.vectors && r + kGrain <= a.reduced_count) {
      const auto v = *reinterpret_cast<const Vector<T>*>(x + static_cast<std::int64_t>(r) * static_cast<int>(sizeof(T)));
      for (int i = 0; i < kGrain; ++i) s.add(factor != nullptr ? value_of(v.x[i]) * factor[r + i] : value_of(v.x[i]));
    } else {
      const int end = r + kGrain < a.reduced_count ? r + kGrain : a.reduced_count;
      for (int i = r; i < end; ++i) {
        const Compute<T> v = value_at<T>(x + a.reduced.offset(i));
        s.add(factor != nullptr ? v * factor[i] : v);
      }
    }
  }
  return s;
}

template <class T> REGARD_DEVICE void write_statistics(const StatisticsArguments& a, int b, int kept, const Statistics<T>& s) {
  using C = Compute<T>;
  const std::int64_t at = static_cast<std::int64_t>(b) * a.kept_count + kept;
  const C mean = s.sum / static_cast<C>(a.reduced_count);
  if (a.mean != nullptr) static_cast<C*>(a.mean)[at] = mean;
  if (a.maximum != nullptr) static_cast<C*>(a.maximum)[at] = s.maximum;
  if (a.out != nullptr) write<T>(a.out + b * a.out_stride[0] + kept * a.out_stride[1], a.pool_maximum ? s.maximum : mean);
}

// A warp has one kept index, its lanes lie along the reduced axes.
template <class T> REGARD_KERNEL(kMapThreads, 1) statistics_along(const REGARD_GRID_CONSTANT StatisticsArguments a) {
  constexpr int kWarps = kMapThreads / kWarp;
  const int b = block_index() / a.blocks;
  const int kept = block_index() % a.blocks * kWarps + thread_index() / kWarp;
  if (kept >= a.kept_count) return;  // whole warps, and no barrier follows
  const auto* const factor = entry<Compute<T>>(a.factor, b, a.reduced_count);
  Statistics<T> s = lane_statistics<T>(a, a.x + b * a.batch_stride + a.kept.offset(kept), factor, thread_index() % kWarp);
  for (int step = 1; step < kWarp; step *= 2) s.merge(shuffle_xor(s.sum, step), shuffle_xor(s.maximum, step));
  if (thread_index() % kWarp == 0) write_statistics<T>(a, b, kept, s);
}

// A warp has 32 kept indices, which lie side by side; each of the block's 8 warps has 4 of the 32 lanes of their sums.
template <class T> REGARD_KERNEL(kMapThreads, 1) statistics_across(const REGARD_GRID_CONSTANT StatisticsArguments a) {
  constexpr int kWarps = kMapThreads / kWarp;
  constexpr int kLanes = kWarp / kWarps;
  auto* const shared = reinterpret_cast<Statistics<T>*>(dynamic_shared());  // [kWarps][kWarp]
  const int b = block_index() / a.blocks;
  const int column = thread_index() % kWarp;
  const int part = thread_index() / kWarp;
  const int kept = block_index() % a.blocks * kWarp + column;
  const auto* const factor = entry<Compute<T>>(a.factor, b, a.reduced_count);
  Statistics<T> lanes[kLanes];
  if (kept < a.kept_count) {
    const char* const x = a.x + b * a.batch_stride + a.kept.offset(kept);
    for (int l = 0; l < kLanes; ++l) lanes[l] = lane_statistics<T>(a, x, factor, part * kLanes + l);
  }
  // The tree of statistics_along: neighbours first.
  for (int step = 1; step < kLanes; step *= 2)
    for (int l = 0; l < kLanes; l += 2 * step) lanes[l].merge(lanes[l + step].sum, lanes[l + step].maximum);
  shared[part * kWarp + column] = lanes[0];
  for (int step = 1; step < kWarps; step *= 2) {
    block_barrier();
    if (part % (2 * step) == 0) {
      const Statistics<T> other = shared[(part + step) * kWarp + column];
      shared[part * kWarp + column].merge(other.sum, other.maximum);
    }
  }
  if (part == 0 && kept < a.kept_count) write_statistics<T>(a, b, kept, shared[column]);
}

// ---- Rescaling -----------------------------------------------------------------------------------------------------

// One axis of a map as the kernel walks it, and what a step along it is for channels and positions.
struct MapAxis {
  int length;
  std::int64_t x_stride;
  std::int64_t out_stride;
  int channel_step;
  int position_step;
};

struct RescaleArguments {
  const char* x;
  char* out;
  std::int64_t x_batch_stride;
  std::int64_t out_batch_stride;
  MapAxis axes[3];  // the last one lies closest in memory
  int channels;
  int positions;
  int items;                // of one batch entry: elements, or vectors along the last axis
  int blocks;               // a batch entry
  const void* by_channel;   // [batch, channels] in the compute type; or null
  const void* by_position;  // [batch, positions]; or null
};

template <class T, bool kVectors> REGARD_KERNEL(kMapThreads, 1) rescale(const REGARD_GRID_CONSTANT RescaleArguments a) {
  using C = Compute<T>;
  constexpr int kGrain = kVectors ? Vector<T>::kLength : 1;
  const int b = block_index() / a.blocks;
  const int n = block_index() % a.blocks * kMapThreads + thread_index();
  if (n >= a.items) return;
  const int last = a.axes[2].length / kGrain;
  const int middle = n / last;
  const int at[3] = {middle / a.axes[1].length, middle % a.axes[1].length, n % last * kGrain};
  const char* x = a.x + b * a.x_batch_stride;
  char* out = a.out + b * a.out_batch_stride;
  int channel = 0;
  int position = 0;
  for (int axis = 0; axis < 3; ++axis) {
    x += at[axis] * a.axes[axis].x_stride;
    out += at[axis] * a.axes[axis].out_stride;
    channel += at[axis] * a.axes[axis].channel_step;
    position += at[axis] * a.axes[axis].position_step;
  }
  const C* const by_channel = entry<C>(a.by_channel, b, a.channels);
  const C* const by_position = entry<C>(a.by_position, b, a.positions);
  const auto scaled = [&](C v, int i) {
    if (by_channel != nullptr) v *= by_channel[channel + i * a.axes[2].channel_step];
    if (by_position != nullptr) v *= by_position[position + i * a.axes[2].position_step];
    return v;
  };
  if constexpr (kVectors) {
    auto v = *reinterpret_cast<const Vector<T>*>(x);
    for (int i = 0; i < kGrain; ++i) write<T>(reinterpret_cast<char*>(&v.x[i]), scaled(value_of(v.x[i]), i));
    *reinterpret_cast<Vector<T>*>(out) = v;
  } else {
    write<T>(out, scaled(value_at<T>(x), 0));
  }
}

}  // namespace regard::cuda
