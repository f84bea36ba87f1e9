// Squeeze-and-excitation and the pool it starts with, in both orders of memory.

#include <benchmark/benchmark.h>

#include <cmath>

#include "arrays.h"
#include "cpu/operations.h"
#include "registry.h"

namespace regard::bench {
namespace {

struct Shape {
  const char* name;
  std::int64_t batch, channels, side, reduced;
};

constexpr Shape kShapes[] = {
    {"8x256x56x56", 8, 256, 56, 16},
    {"8x960x7x7", 8, 960, 7, 240},
    {"8x256x7x7", 8, 256, 7, 16},
};

enum class Layout { nchw, nhwc };

// `x` as a map with channels second, whatever its order in memory.
Array channels_second(Array x, Layout layout) {
  if (layout == Layout::nhwc) x.move_axis(3, 1);
  return x;
}

void excite(benchmark::State& state, const Shape& s, DType dtype, Layout layout) {
  const bool last = layout == Layout::nhwc;
  const Tensor x(dtype, {s.batch, last ? s.side : s.channels, s.side, last ? s.channels : s.side});
  const Tensor out(dtype, {s.batch, last ? s.side : s.channels, s.side, last ? s.channels : s.side});
  const Tensor w_reduce(dtype, {s.reduced, s.channels}, 1 / std::sqrt(static_cast<float>(s.channels)));
  const Tensor b_reduce(dtype, {s.reduced});
  const Tensor w_expand(dtype, {s.channels, s.reduced}, 1 / std::sqrt(static_cast<float>(s.reduced)));
  const Tensor b_expand(dtype, {s.channels});
  ChannelProblem p;
  p.x = channels_second(x.view(), layout);
  p.out = channels_second(out.view(), layout);
  p.w_reduce = w_reduce.view();
  p.b_reduce = b_reduce.view();
  p.w_expand = w_expand.view();
  p.b_expand = b_expand.view();
  p.excitation = Excitation::average;
  if (p.check()) return state.SkipWithError("refused");
  for (auto _ : state) {
    cpu::squeeze_excitation(p);
    benchmark::ClobberMemory();
  }
  set_rates(state, 0, x.bytes() + out.bytes());
}

void pool(benchmark::State& state, const Shape& s, Layout layout) {
  const bool last = layout == Layout::nhwc;
  const Tensor x(DType::float32, {s.batch, last ? s.side : s.channels, s.side, last ? s.channels : s.side});
  const Tensor out(DType::float32, {s.batch, s.channels});
  PoolProblem p;
  p.x = channels_second(x.view(), layout);
  p.out = out.view();
  if (p.check()) return state.SkipWithError("refused");
  for (auto _ : state) {
    cpu::global_pool(p);
    benchmark::ClobberMemory();
  }
  set_rates(state, 0, x.bytes());
}

}  // namespace

void register_excitation() {
  for (const Layout layout : {Layout::nchw, Layout::nhwc}) {
    const std::string order = layout == Layout::nchw ? "/nchw" : "/nhwc";
    for (const Shape& s : kShapes) {
      for (const DType dtype : {DType::float32, DType::bfloat16})
        benchmark::RegisterBenchmark(("squeeze_excitation/" + (s.name + order) + "/" + name_of(dtype)).c_str(), excite, s, dtype, layout)
            ->UseRealTime()
            ->Unit(benchmark::kMicrosecond);
      benchmark::RegisterBenchmark(("global_average_pool/" + (s.name + order) + "/float32").c_str(), pool, s, layout)
          ->UseRealTime()
          ->Unit(benchmark::kMicrosecond);
    }
  }
}

}  // namespace regard::bench
