// Kernels alone against loops in double, on buffers of exact size, in order and in random order.
//
// The mutations of test_mutations.py are compiled into this program: it is small on purpose.

#include "cuda/attention_decode_lanes.cuh"
#include "cuda/attention_decode_tensor.cuh"
#include "cuda/attention_launch.cuh"
#include "cuda/attention_portable.cuh"
#include "cuda/attention_tensor.cuh"
#include "kernel_check.h"

namespace regard::test {
namespace {

constexpr Shape kShapes[] = {{2, 2, 70, 150, 64, 64, false, false},
                             {1, 1, 130, 200, 64, 64, true, false},
                             {2, 1, 33, 65, 40, 56, true, true},
                             {2, 1, 40, 90, 64, 64, true, false, 0.25}};

void test_tensor() {
  for (const bool random : {false, true}) {
    emulation::settings() = {random, 5};
    emulation::counters() = {};
    for (const Shape& x : kShapes)
      // Weights and outputs are rounded to 8 bits, values are up to 2.
      compare<BFloat16>(x, 2 * 3 * 0x1p-8, [&](const AttentionProblem&, AttentionArguments& a) {
        constexpr int kQueries = 64;
        const std::int64_t blocks = blocks_of(a, kQueries);
        launch(is_plain(a) ? attention_tensor<BFloat16, 64, kQueries, 32, true> : attention_tensor<BFloat16, 64, kQueries, 32, false>,
               blocks, kTensorThreads, TensorShape<64, kQueries, 32>::kSharedBytes, nullptr, a);
      });
    CHECK(emulation::counters().products > 0);
    CHECK(emulation::counters().bank_conflicts == 0);
  }
  emulation::settings() = {};
}

void test_portable() {
  for (const bool random : {false, true}) {
    emulation::settings() = {random, 5};
    for (const Shape& x : kShapes)
      compare<float>(x, 1e-5, [&](const AttentionProblem&, AttentionArguments& a) {
        using P = Portable<float, 64>;
        const std::int64_t blocks = blocks_of(a, P::kQueries);
        launch(attention_portable<float, 64>, blocks, P::kThreads, static_cast<int>(sizeof(P::Shared)), nullptr, a, split_scale(a.scale),
               1);
      });
  }
  emulation::settings() = {};
}

// Rows of 16 and 32 lanes, of two sweeps, and of what is no multiple of a panel; splits of 128 keys.
template <class Products> void test_decode(double tolerance) {
  using T = typename Products::Stored;
  constexpr Shape kFewQueries[] = {{8, 4, 1, 300, 64, 64, true, false},
                                   {4, 2, 3, 200, 128, 40, true, true},
                                   {2, 1, 2, 131, 201, 72, false, false},
                                   {1, 1, 2, 161, 72, 200, true, false}};
  using C = Compute<T>;
  for (const bool random : {false, true}) {
    emulation::settings() = {random, 5};
    for (const Shape& x : kFewQueries)
      compare<T>(x, tolerance, [&](const AttentionProblem& problem, AttentionArguments& a) {
        DecodeArguments p = decode_arguments<Products>(problem, a, a.len_q);
        const std::int64_t heads = a.heads / a.group;
        Buffer<C> maximum(heads * p.splits * p.rows);
        Buffer<C> sum(heads * p.splits * p.rows);
        Buffer<C> out(heads * p.splits * p.rows * a.dim_v);
        p.maximum = maximum.data();
        p.sum = sum.data();
        p.out = out.data();
        const auto bytes = static_cast<int>(decode_bytes<Products>(a.dim_qk, a.dim_v, keys_per_split<C>(a.len_kv)));
        launch(attention_decode<Products>, heads * p.row_tiles * p.splits, kDecodeThreads, bytes, nullptr, p);
        launch(attention_merge<C>, heads * p.rows, kMergeThreads, static_cast<int>(sizeof(MergeShared<C>)), nullptr, p);
      });
  }
  emulation::settings() = {};
}

// All 256 bytes of 8-bit types, of which a lane's vector has eight, in the types that tensor cores multiply.
template <class T, class Stored> void test_bytes() {
  emulation::run(1, kWarp, 0, [] {
    const auto first = static_cast<std::uint32_t>(thread_index() * 8);
    const auto next = (first + 8) % 256;
    const auto grain_from = [](std::uint32_t byte) {
      Grain<Stored> x;
      for (std::uint32_t w = 0; w < 2; ++w) x.words[w] = (byte + 4 * w) * 0x01010101u + 0x03020100u;
      return TensorGrain<T, Stored>(x);
    };
    const auto value = [](std::uint32_t byte) { return to_float(std::bit_cast<Stored>(static_cast<std::uint8_t>(byte))); };
    const auto is = [&](std::uint32_t byte, float x, bool any_is_nan) { return any_is_nan ? x != x : x == value(byte); };
    const auto has_nan = [&](std::uint32_t byte) {
      bool found = false;
      for (std::uint32_t e = 0; e < 8; ++e) found |= value(byte + e) != value(byte + e);
      return found;
    };
    const TensorGrain<T, Stored> one = grain_from(first);
    const TensorGrain<T, Stored> other = grain_from(next);
    for (std::uint32_t e = 0; e < 8; ++e) {
      CHECK(is(first + e, model::half_of<T>(one.neighbours(static_cast<int>(e) / 2 * 2), e % 2), has_nan(first)));
      const std::uint32_t both = one.beside(other, static_cast<int>(e));
      const bool any_is_nan = has_nan(first) || has_nan(next);
      CHECK(is(first + e, model::half_of<T>(both, 0), any_is_nan) && is(next + e, model::half_of<T>(both, 1), any_is_nan));
    }
  });
}

// Tiles of the same scores weigh the same, however many there are.
void test_a_maximum_that_stays() {
  emulation::run(1, kWarp, 0, [] {
    RowState row = {-infinity<float>(), 0.0f};
    for (int tile = 0; tile < 20; ++tile) {
      float s[2][4];
      for (auto& pair : s)
        for (float& score : pair) score = 1234.5f;
      CHECK(take_in(row, s, 0, 0.125f * kLog2E) == (tile == 0 ? 0.0f : 1.0f));
    }
  });
}

}  // namespace

void test_kernels() {
  try {
    test_a_maximum_that_stays();
    test_bytes<Half, Int8>();
    test_bytes<Half, Float8>();
    test_bytes<BFloat16, Int8>();
    test_bytes<BFloat16, Float8>();
    test_tensor();
    test_portable();
    test_decode<LaneProducts<float>>(1e-5);
    test_decode<LaneProducts<BFloat16>>(2 * 3 * 0x1p-8);
    test_decode<TensorProducts<BFloat16>>(2 * 3 * 0x1p-8);
  } catch (const emulation::Failure& f) {
    std::printf("%s\n", f.what());
    CHECK(false);
  }
}

}  // namespace regard::test
