// Pooling, squeeze-and-excitation, ECA and CBAM: pool, weigh, rescale, each a kernel; x is read twice (CBAM: three times)
// and nothing of its size is stored but out.

#include <algorithm>
#include <cstdlib>

#include "cuda/excitation.cuh"
#include "cuda/operations.h"

namespace regard::cuda {
namespace {

int blocks_for(std::int64_t items, int per_block) { return static_cast<int>((items + per_block - 1) / per_block); }

bool aligned(const void* p, std::int64_t stride) { return (reinterpret_cast<std::intptr_t>(p) | stride) % 16 == 0; }

void require_int(const Array& x) {
  if (x.shape[0] > kMostElements || x.shape[1] * x.shape[2] * x.shape[3] > kMostElements)
    throw NoKernel("no CUDA kernel for maps of 2^31 - 1024 elements or more");
}

// What is done to a map: its positions reduced, or its channels.
template <class T> struct MapCall {
  using C = Compute<T>;
  const Array& x;  // [batch, channels, height, width]
  const Queue& queue;

  std::int64_t batch() const { return x.shape[0]; }
  int channels() const { return static_cast<int>(x.shape[1]); }
  int positions() const { return static_cast<int>(x.shape[2] * x.shape[3]); }
  C* scratch(std::int64_t n) const {
    return reinterpret_cast<C*>(queue.scratch(std::max<std::int64_t>(n, 1) * static_cast<int>(sizeof(C))));
  }

  bool rows_follow() const { return x.shape[2] <= 1 || x.stride[2] == x.shape[3] * x.stride[3]; }
  Axes position_axes() const {
    if (rows_follow()) return {{1, positions()}, {0, x.stride[3]}};
    return {{static_cast<int>(x.shape[2]), static_cast<int>(x.shape[3])}, {x.stride[2], x.stride[3]}};
  }
  Axes channel_axes() const { return {{1, channels()}, {0, x.stride[1]}}; }

  StatisticsArguments over_positions() const {
    StatisticsArguments a{};
    a.kept = channel_axes();
    a.reduced = position_axes();
    a.kept_count = channels();
    a.reduced_count = positions();
    a.vectors = x.stride[3] == static_cast<std::int64_t>(sizeof(T)) && rows_follow() && aligned(x.data, x.stride[0] | x.stride[1]);
    return a;
  }
  StatisticsArguments over_channels() const {
    StatisticsArguments a{};
    a.kept = position_axes();
    a.reduced = channel_axes();
    a.kept_count = positions();
    a.reduced_count = channels();
    a.vectors = x.stride[1] == static_cast<std::int64_t>(sizeof(T)) && aligned(x.data, x.stride[0] | x.stride[2] | x.stride[3]);
    return a;
  }

  void run(StatisticsArguments a) const {
    a.x = x.data;
    a.batch_stride = x.stride[0];
    // Warps lie along the axis that is closer in memory.
    const auto step = [](const Axes& axes) { return std::abs(axes.length[1] > 1 ? axes.stride[1] : axes.stride[0]); };
    const bool along = a.kept_count == 1 || step(a.reduced) <= step(a.kept);
    a.blocks = blocks_for(a.kept_count, along ? kMapThreads / kWarp : kWarp);
    if (along)
      launch(statistics_along<T>, batch() * a.blocks, kMapThreads, 0, queue.stream, a);
    else
      launch(statistics_across<T>, batch() * a.blocks, kMapThreads, kMapThreads * static_cast<int>(sizeof(Statistics<T>)), queue.stream, a);
  }
};

GateArguments gate_of(const ChannelProblem& p) { return {p.gate, p.gate_alpha, p.gate_beta}; }

// A weight for each channel, [batch, channels].
template <class T> Compute<T>* channel_weights(const ChannelProblem& p, const MapCall<T>& map) {
  const std::int64_t n = map.batch() * map.channels();
  auto* const mean = map.scratch(n);
  auto* const maximum = p.excitation == Excitation::average_and_maximum ? map.scratch(n) : nullptr;
  StatisticsArguments s = map.over_positions();
  s.mean = mean;
  s.maximum = maximum;
  map.run(s);

  ExcitationArguments a{};
  a.kind = p.excitation;
  a.activation = p.activation;
  a.gate = gate_of(p);
  a.channels = map.channels();
  a.reduced = p.through_mlp() ? static_cast<int>(p.reduced()) : 0;
  a.kernel = p.w_channel.present() ? static_cast<int>(p.w_channel.shape[0]) : 0;
  a.reduce = view_of(p.w_reduce);
  a.b_reduce = view_of(p.b_reduce);
  a.expand = view_of(p.w_expand);
  a.b_expand = view_of(p.b_expand);
  a.taps = view_of(p.w_channel);
  a.mean = mean;
  a.maximum = maximum;
  auto* const weights = map.scratch(n);
  a.weights = weights;
  const std::int64_t bytes = 2LL * a.reduced * static_cast<int>(sizeof(Compute<T>));
  if (bytes > device(map.queue.device).shared_bytes)
    throw NoKernel("no CUDA kernel for so many hidden units: they must fit shared memory twice");
  launch(excite<T>, map.batch(), kMapThreads, static_cast<int>(bytes), map.queue.stream, a);
  return weights;
}

// A weight for each position of x * by_channel, [batch, positions].
template <class T> Compute<T>* position_weights(const ChannelProblem& p, const MapCall<T>& map, const Compute<T>* by_channel) {
  const std::int64_t n = map.batch() * map.positions();
  ConvolutionArguments a{};
  StatisticsArguments s = map.over_channels();
  a.mean = s.mean = map.scratch(n);
  a.maximum = s.maximum = map.scratch(n);
  s.factor = by_channel;
  map.run(s);

  a.gate = gate_of(p);
  a.height = static_cast<int>(p.x.shape[2]);
  a.width = static_cast<int>(p.x.shape[3]);
  a.kernel = static_cast<int>(p.w_spatial.shape[2]);
  a.blocks = blocks_for(map.positions(), kMapThreads);
  a.taps = view_of(p.w_spatial);
  a.bias = view_of(p.b_spatial);
  auto* const weights = map.scratch(n);
  a.weights = weights;
  launch(convolve_positions<T>, map.batch() * a.blocks, kMapThreads, 0, map.queue.stream, a);
  return weights;
}

template <class T> void rescale_map(const ChannelProblem& p, const MapCall<T>& map, const void* by_channel, const void* by_position) {
  RescaleArguments a{};
  a.x = p.x.data;
  a.out = p.out.data;
  a.x_batch_stride = p.x.stride[0];
  a.out_batch_stride = p.out.stride[0];
  a.channels = map.channels();
  a.positions = map.positions();
  a.by_channel = by_channel;
  a.by_position = by_position;
  const int width = static_cast<int>(p.x.shape[3]);
  for (int axis = 1; axis < 4; ++axis)
    a.axes[axis - 1] = {static_cast<int>(p.x.shape[axis]), p.x.stride[axis], p.out.stride[axis], axis == 1,
                        axis == 1   ? 0
                        : axis == 2 ? width
                                    : 1};
  // Rows that follow each other are one axis.
  MapAxis& rows = a.axes[1];
  MapAxis& columns = a.axes[2];
  if (rows.x_stride == width * columns.x_stride && rows.out_stride == width * columns.out_stride) {
    columns.length = a.positions;
    rows = {1, 0, 0, 0, 0};
  }
  std::stable_sort(a.axes, a.axes + 3, [](const MapAxis& l, const MapAxis& r) {
    return (l.length > 1 ? std::abs(l.x_stride) : INT64_MAX) > (r.length > 1 ? std::abs(r.x_stride) : INT64_MAX);
  });
  const MapAxis& last = a.axes[2];
  constexpr int kGrain = Vector<T>::kLength;
  std::int64_t strides = a.x_batch_stride | a.out_batch_stride;
  for (int axis = 0; axis < 2; ++axis)
    if (a.axes[axis].length > 1) strides |= a.axes[axis].x_stride | a.axes[axis].out_stride;
  const std::int64_t item = static_cast<int>(sizeof(T));
  const bool vectors =
      last.x_stride == item && last.out_stride == item && last.length % kGrain == 0 && aligned(a.x, strides) && aligned(a.out, 0);
  a.items = a.channels * a.positions / (vectors ? kGrain : 1);
  a.blocks = blocks_for(a.items, kMapThreads);
  launch(vectors ? rescale<T, true> : rescale<T, false>, map.batch() * a.blocks, kMapThreads, 0, map.queue.stream, a);
}

}  // namespace

void global_pool(const PoolProblem& p, const Queue& queue) {
  require_int(p.x);
  const OnDevice here(queue.device);
  if (p.x.shape[0] * p.x.shape[1] == 0) return;
  with_type(p.x.dtype, [&](auto t) {
    const MapCall<decltype(t)> map{p.x, queue};
    StatisticsArguments s = map.over_positions();
    s.out = p.out.data;
    s.out_stride[0] = p.out.stride[0];
    s.out_stride[1] = p.out.stride[1];
    s.pool_maximum = p.maximum;
    map.run(s);
  });
}

void weigh_map(const ChannelProblem& p, const Queue& queue) {
  require_int(p.x);
  const OnDevice here(queue.device);
  if (p.x.size() == 0) return;
  with_type(p.x.dtype, [&](auto t) {
    using T = decltype(t);
    const MapCall<T> map{p.x, queue};
    const auto* const by_channel = p.excitation != Excitation::none ? channel_weights<T>(p, map) : nullptr;
    const auto* const by_position = p.spatial() ? position_weights<T>(p, map, by_channel) : nullptr;
    rescale_map<T>(p, map, by_channel, by_position);
  });
}

}  // namespace regard::cuda
