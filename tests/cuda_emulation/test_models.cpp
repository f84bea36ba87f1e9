// The emulator itself: every model of an instruction, and that mistakes are seen.

#include <bit>
#include <cmath>
#include <string>
#include <vector>

#include "../native/check.h"
#include "cuda/device.cuh"
#include "cuda/ptx.cuh"

namespace regard::test {
namespace {

using namespace regard::cuda;

template <class F> void run(int blocks, int threads, int shared_bytes, F&& lane) {
  emulation::run(blocks, threads, shared_bytes, std::function<void()>(lane));
}

template <class F> std::string failure(int threads, int shared_bytes, F&& lane) {
  try {
    run(1, threads, shared_bytes, lane);
  } catch (const emulation::Failure& f) {
    return f.what();
  }
  return "";
}

bool poisoned(float x) { return bits_of(x) == emulation::kPoison * 0x01010101u; }

bool contains(const std::string& text, const char* part) { return text.find(part) != std::string::npos; }

void test_indices_and_shuffles() {
  std::vector<int> seen(3 * 64, 0);
  run(3, 64, 0, [&] { seen[static_cast<std::size_t>(block_index() * 64 + thread_index())] += block_count(); });
  for (const int s : seen) CHECK(s == 3);
  run(1, 64, 0, [&] {
    const int t = thread_index();
    CHECK(shuffle_xor(t, 5) == (t ^ 5));
    CHECK(shuffle(t, 7) == t / 32 * 32 + 7);
    CHECK(shuffle(static_cast<double>(t), t % 32 / 4) == t / 32 * 32 + t % 32 / 4);
    CHECK(any_lane(t == 40) == (t >= 32));
  });
}

void test_barriers() {
  std::vector<int> got(96);
  for (const bool random : {false, true}) {
    emulation::settings() = {random, 3};
    run(1, 96, 96 * 4, [&] {
      int* const shared = reinterpret_cast<int*>(dynamic_shared());
      for (int round = 0; round < 3; ++round) {
        shared[thread_index()] = thread_index() * round;
        block_barrier();
        got[static_cast<std::size_t>(thread_index())] = shared[(thread_index() + 1) % 96];
        block_barrier();
        CHECK(got[static_cast<std::size_t>(thread_index())] == (thread_index() + 1) % 96 * round);
      }
    });
  }
  emulation::settings() = {};
}

void test_shared_memory_is_poisoned() {
  run(2, 32, 128, [] {
    CHECK(poisoned(reinterpret_cast<float*>(dynamic_shared())[thread_index()]));
    warp_barrier();
    reinterpret_cast<float*>(dynamic_shared())[thread_index()] = 1;
  });
}

void test_divergence_is_reported() {
  CHECK(contains(failure(64, 0,
                         [] {
                           if (thread_index() != 5) block_barrier();
                         }),
                 "divergence"));
  const auto two_barriers = [] {  // outside of the macro, which would put both on one line
    if (thread_index() < 32)
      block_barrier();
    else
      block_barrier();
  };
  CHECK(contains(failure(64, 0, two_barriers), "divergence"));
  CHECK(contains(failure(32, 0,
                         [] {
                           if (thread_index() > 0) shuffle(1, 0);
                         }),
                 "divergence"));
  CHECK(contains(failure(32, 0, [] { thread_index() > 3 ? shuffle(1, 0) : shuffle_xor(1, 1); }), "divergence"));
  CHECK(contains(failure(64, 0,
                         [] {
                           if (thread_index() == 0) block_barrier();
                           warp_barrier();
                           if (thread_index() > 0) block_barrier();
                         }),
                 "divergence"));
  CHECK(failure(64, 0, [] { block_barrier(); }).empty());
}

// A lane reads what its neighbour writes without a barrier between: in order it is lucky, in random order it is not.
void test_random_order_shows_a_missing_barrier() {
  const auto wrong_for = [](bool random, std::uint64_t seed) {
    emulation::settings() = {random, seed};
    int wrong = 0;
    run(1, 64, 64 * 4, [&] {
      int* const shared = reinterpret_cast<int*>(dynamic_shared());
      shared[thread_index()] = thread_index();
      if (thread_index() > 0 && shared[thread_index() - 1] != thread_index() - 1) ++wrong;
    });
    emulation::settings() = {};
    return wrong;
  };
  CHECK(wrong_for(false, 0) == 0);
  CHECK(wrong_for(true, 1) > 0);
}

void test_asynchronous_copies_land_at_their_wait() {
  alignas(16) float from[3][4] = {{1, 2, 3, 4}, {5, 6, 7, 8}, {9, 10, 11, 12}};
  run(1, 32, 64, [&] {
    float* const shared = reinterpret_cast<float*>(dynamic_shared());
    if (thread_index() == 0) {
      for (unsigned n = 0; n < 3; ++n) {
        copy_async(16 * n, from[n], true);
        close_copies();
      }
      copy_async(48, from[0], false);
      close_copies();
      CHECK(poisoned(shared[0]));
      await_copies<3>();
      CHECK(shared[0] == 1 && shared[3] == 4 && poisoned(shared[4]));
      await_copies<1>();
      CHECK(shared[4] == 5 && shared[11] == 12 && poisoned(shared[12]));
      await_copies<0>();
      CHECK(shared[12] == 0 && shared[15] == 0);
    }
  });
  CHECK(contains(failure(32, 64, [&] { copy_async(8, from[0], true); }), "misaligned"));
  CHECK(contains(failure(32, 64, [&] { copy_async(0, &from[0][1], true); }), "misaligned"));
  CHECK(contains(failure(32, 64, [&] { copy_async(64, from[0], true); }), "beyond"));
}

// Elements of four matrices are numbered m * 64 + row * 8 + column.
void test_matrix_loads() {
  for (const int pitch : {16, 32, 128}) {
    emulation::counters() = {};
    run(1, 32, 32 * pitch, [&] {
      const int l = thread_index();
      char* const row = dynamic_shared() + l * pitch;
      for (int c = 0; c < 8; ++c) reinterpret_cast<std::uint16_t*>(row)[c] = static_cast<std::uint16_t>(l * 8 + c);
      warp_barrier();
      std::uint32_t straight[4];
      std::uint32_t turned[4];
      load_matrices(straight, shared_address(row));
      load_matrices_transposed(turned, shared_address(row));
      for (int m = 0; m < 4; ++m) {
        const unsigned first = static_cast<unsigned>(m * 64 + l / 4 * 8 + l % 4 * 2);
        CHECK(straight[m] == (first | (first + 1) << 16));
        const unsigned above = static_cast<unsigned>(m * 64 + l % 4 * 2 * 8 + l / 4);
        CHECK(turned[m] == (above | (above + 8) << 16));
      }
    });
    CHECK(emulation::counters().matrix_loads == 2);
    CHECK(emulation::counters().bank_conflicts == (pitch == 16 ? 0 : 8));
  }
  CHECK(contains(failure(32, 64,
                         [] {
                           std::uint32_t x[4];
                           load_matrices(x, 8);
                         }),
                 "misaligned"));
  CHECK(contains(failure(32, 64,
                         [] {
                           std::uint32_t x[4];
                           load_matrices(x, 64);
                         }),
                 "beyond"));
}

// Matrices of small integers, whose products are exact; fragments filled by the lane maps of the PTX manual.
template <class T> void test_products() {
  Random random(7);
  float a[16][16];
  float b[16][8];
  float c[16][8];
  const auto draw = [&] { return std::floor(static_cast<float>(random.uniform(-8, 9))); };
  for (auto& row : a)
    for (float& x : row) x = draw();
  for (auto& row : b)
    for (float& x : row) x = draw();
  for (auto& row : c)
    for (float& x : row) x = draw();
  run(1, 32, 0, [&] {
    const int g = thread_index() / 4;
    const int t = thread_index() % 4 * 2;
    const auto pair = [](float low, float high) { return pack_pair<T>(low, high); };
    const std::uint32_t fa[4] = {pair(a[g][t], a[g][t + 1]), pair(a[g + 8][t], a[g + 8][t + 1]), pair(a[g][t + 8], a[g][t + 9]),
                                 pair(a[g + 8][t + 8], a[g + 8][t + 9])};
    float fc[4] = {c[g][t], c[g][t + 1], c[g + 8][t], c[g + 8][t + 1]};
    multiply_add<T>(fc, fa, pair(b[t][g], b[t + 1][g]), pair(b[t + 8][g], b[t + 9][g]));
    for (int i = 0; i < 4; ++i) {
      const int row = g + i / 2 * 8;
      const int column = t + i % 2;
      float want = c[row][column];
      for (int k = 0; k < 16; ++k) want += a[row][k] * b[k][column];
      CHECK(fc[i] == want);
    }
  });
}

// Of every byte there is: -128 too.
void test_byte_products() {
  Random random(8);
  std::int8_t a[16][32];
  std::int8_t b[32][8];
  std::int32_t c[16][8];
  for (auto& row : a)
    for (auto& x : row) x = static_cast<std::int8_t>(random.bits());
  for (auto& row : b)
    for (auto& x : row) x = static_cast<std::int8_t>(random.bits());
  for (auto& row : c)
    for (auto& x : row) x = static_cast<std::int32_t>(random.bits() >> 40);
  a[0][0] = b[0][0] = -128;
  run(1, 32, 0, [&] {
    const int g = thread_index() / 4;
    const int t = thread_index() % 4;
    const auto four = [](std::int8_t x0, std::int8_t x1, std::int8_t x2, std::int8_t x3) {
      const std::int8_t bytes[4] = {x0, x1, x2, x3};
      return std::bit_cast<std::uint32_t>(bytes);
    };
    const auto a_at = [&](int i, int k) { return four(a[i][k], a[i][k + 1], a[i][k + 2], a[i][k + 3]); };
    const auto b_at = [&](int k) { return four(b[k][g], b[k + 1][g], b[k + 2][g], b[k + 3][g]); };
    const std::uint32_t fa[4] = {a_at(g, 4 * t), a_at(g + 8, 4 * t), a_at(g, 4 * t + 16), a_at(g + 8, 4 * t + 16)};
    std::int32_t fc[4] = {c[g][2 * t], c[g][2 * t + 1], c[g + 8][2 * t], c[g + 8][2 * t + 1]};
    multiply_add_bytes(fc, fa, b_at(4 * t), b_at(4 * t + 16));
    for (int i = 0; i < 4; ++i) {
      const int row = g + i / 2 * 8;
      const int column = 2 * t + i % 2;
      std::int32_t want = c[row][column];
      for (int k = 0; k < 32; ++k) want += a[row][k] * b[k][column];
      CHECK(fc[i] == want);
    }
    CHECK(dot_bytes(four(-128, 127, -1, 5), four(-128, -127, 3, 0), 7) == 7 + 128 * 128 - 127 * 127 - 3);
  });
}

void test_scalars() {
  CHECK(pack_pair<BFloat16>(1.0f, -2.0f) == 0xc0003f80u);
  CHECK(pack_pair<Half>(1.0f, -2.0f) == 0xc0003c00u);
  CHECK(rounded_product(1.1f, 1.3f) == 1.1f * 1.3f);
  CHECK(exp2_fast(3.0f) == 8.0f && exp2_fast(-127.0f) == 0.0f && exp2_fast(-INFINITY) == 0.0f);
}

}  // namespace

void test_models() {
  test_indices_and_shuffles();
  test_barriers();
  test_shared_memory_is_poisoned();
  test_divergence_is_reported();
  test_random_order_shows_a_missing_barrier();
  test_asynchronous_copies_land_at_their_wait();
  test_matrix_loads();
  test_products<Half>();
  test_products<BFloat16>();
  test_byte_products();
  test_scalars();
}

}  // namespace regard::test
