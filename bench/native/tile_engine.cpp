// The tile engine's multiply on one thread, out of L1: how much of the multiply-add ceiling its registers reach.

#include <benchmark/benchmark.h>

#include "arrays.h"
#include "cpu/tile_simd.h"
#include "registry.h"

namespace regard::bench {
namespace {

using cpu::Left;
using cpu::Tile;
using cpu::Vec;

// 96 rows are the keys of one block of attention.
constexpr int kRows = 96;

template <class T, Left Order> void multiply(benchmark::State& state) {
  const int depth = static_cast<int>(state.range(0));
  const bool scaled = state.range(1) != 0;
  constexpr std::int64_t columns = Tile<T>::kColumns;
  const std::int64_t lda = (Order == Left::depth_contiguous ? depth : kRows) + 64 / static_cast<int>(sizeof(T));
  const Tensor a(dtype_of<T>(), {Order == Left::depth_contiguous ? kRows : depth, lda});
  const Tensor b(dtype_of<T>(), {depth, columns});
  const Tensor c(dtype_of<T>(), {kRows, columns});
  // Below 1, so that C stays finite over any number of iterations.
  Vec<T> scale[Tile<T>::kVectors];
  for (auto& v : scale) v = cpu::broadcast<Vec<T>>(T(0.5));
  for (auto _ : state) {
    cpu::multiply<T, Order>(a.data<T>(), lda, b.data<T>(), columns, c.data<T>(), columns, kRows, Tile<T>::kVectors, depth,
                            scaled ? scale : nullptr);
    benchmark::ClobberMemory();
  }
  set_rates(state, 2.0 * kRows * static_cast<double>(columns) * depth, 0);
}

}  // namespace

void register_tile_engine() {
  // {depth, whether C is scaled and kept}: scores start from 0, outputs go on.
  benchmark::RegisterBenchmark("tile_engine/scores/float32", multiply<float, Left::depth_contiguous>)->Args({64, 0})->Args({128, 0});
  benchmark::RegisterBenchmark("tile_engine/output/float32", multiply<float, Left::rows_contiguous>)->Args({96, 1});
  benchmark::RegisterBenchmark("tile_engine/scores/float64", multiply<double, Left::depth_contiguous>)->Args({64, 0})->Args({128, 0});
}

}  // namespace regard::bench
