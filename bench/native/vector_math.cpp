// The elementary functions on one thread, out of L1: items/s are elements.

#include <benchmark/benchmark.h>

#include "arrays.h"
#include "cpu/math.h"
#include "cpu/simd.h"
#include "registry.h"

namespace regard::bench {
namespace {

constexpr std::int64_t kElements = 2048;  // input and output, 8 KiB each in float32

template <class T, class F> void apply(benchmark::State& state, F function, float scale) {
  using V = cpu::Vec<T>;
  const Tensor x(dtype_of<T>(), {kElements}, scale);
  const Tensor y(dtype_of<T>(), {kElements});
  for (auto _ : state) {
    for (std::int64_t i = 0; i < kElements; i += cpu::kWidth<T>) cpu::store(y.data<T>() + i, function(cpu::load<V>(x.data<T>() + i)));
    benchmark::ClobberMemory();
  }
  state.SetItemsProcessed(state.iterations() * kElements);
}

template <class T> void register_for(const std::string& dtype) {
  using V = cpu::Vec<T>;
  const auto add = [&](const char* name, auto function, float scale) {
    benchmark::RegisterBenchmark((std::string("vector_math/") + name + "/" + dtype).c_str(),
                                 [=](benchmark::State& state) { apply<T>(state, function, scale); });
  };
  // What attention runs: arguments at or below 0.
  const V log2e = cpu::broadcast<V>(T(1.4426950408889634));
  add("exp2_scaled", [=](V x) { return cpu::exp2_scaled(x > 0 ? -x : x, log2e, V{}); }, 8);
  add("exp", [](V x) { return cpu::exp(x); }, 8);
  add("tanh", [](V x) { return cpu::tanh(x); }, 2);
  add("gelu", [](V x) { return cpu::gelu(x); }, 2);
  add("silu", [](V x) { return cpu::silu(x); }, 2);
}

}  // namespace

void register_vector_math() {
  register_for<float>("float32");
  register_for<double>("float64");
}

}  // namespace regard::bench
