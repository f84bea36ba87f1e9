// The models of sm_90a's instructions, each by itself, and that mistakes with them are seen.

#include <cmath>
#include <cstring>
#include <string>
#include <vector>

#include "../native/check.h"
#include "cuda/ptx_hopper.cuh"

namespace regard::test {
namespace {

using namespace regard::cuda;

template <class F> void run(int threads, int shared_bytes, F&& lane) {
  emulation::run(1, threads, shared_bytes, std::function<void()>(lane));
}

template <class F> std::string failure(int threads, int shared_bytes, F&& lane) {
  try {
    run(threads, shared_bytes, lane);
  } catch (const emulation::Failure& f) {
    return f.what();
  }
  return "";
}

bool poisoned(float x) { return bits_of(x) == emulation::kPoison * 0x01010101u; }

bool contains(const std::string& text, const char* part) { return text.find(part) != std::string::npos; }

// ---- Barriers ------------------------------------------------------------------------------------------------------

// Lane 0 writes, others read after its arrival, and it writes again after theirs.
void test_phases() {
  for (const bool random : {false, true}) {
    emulation::settings() = {random, 9};
    run(64, 64, [] {
      int* const shared = reinterpret_cast<int*>(dynamic_shared());
      const SharedAddress full = shared_address(dynamic_shared() + 16);
      const SharedAddress free = full + 8;
      if (thread_index() == 0) {
        start_barrier(full, 1);
        start_barrier(free, 63);
        publish_barriers();
      }
      block_barrier();
      for (int round = 0; round < 5; ++round)
        if (thread_index() == 0) {
          await_phase(free, (round & 1) ^ 1);  // the first time at once: the phase before the first counts as over
          shared[0] = round;
          arrive(full);
        } else {
          await_phase(full, round & 1);
          CHECK(shared[0] == round);
          arrive(free);
        }
    });
  }
  emulation::settings() = {};
  const auto started = [](int arrivals) {
    if (thread_index() == 0) start_barrier(0, arrivals);
    block_barrier();
  };
  CHECK(contains(failure(32, 64, [] { await_phase(0, 0); }), "not started"));
  CHECK(contains(failure(32, 64, [] { start_barrier(4, 1); }), "no place"));
  CHECK(contains(failure(32, 64, [] { start_barrier(64, 1); }), "no place"));
  CHECK(contains(failure(32, 64,
                         [&] {
                           started(33);
                           arrive(0);
                           await_phase(0, 0);
                         }),
                 "nobody can go on"));
  CHECK(contains(failure(32, 64,
                         [&] {
                           started(32);
                           arrive(0);
                           await_phase(0, 1);  // of the wrong parity: passes where it should wait, waits where it should pass
                         }),
                 "nobody can go on"));
  CHECK(contains(failure(32, 64,
                         [&] {
                           started(1);
                           if (thread_index() == 0) arrive_expecting(0, 16);
                         }),
                 "expects bytes"));
}

void test_named_barriers() {
  for (const bool random : {false, true}) {
    emulation::settings() = {random, 3};
    std::string order;
    run(128, 0, [&] {
      // Warps 0, 1 and 2, 3 take turns.
      const int pair = thread_index() / 64;
      if (pair == 1) arrive_named(1, 128);
      for (int round = 0; round < 3; ++round) {
        named_barrier(1 + pair, 128);
        if (thread_index() % 64 == 0) order += pair == 0 ? 'a' : 'b';
        arrive_named(2 - pair, 128);
      }
      if (pair == 0) named_barrier(1, 128);
    });
    CHECK(order == "ababab");
  }
  emulation::settings() = {};
  CHECK(contains(failure(64, 0, [] { arrive_named(1, 128); }), "nobody passes"));
  CHECK(contains(failure(64, 0, [] { named_barrier(1, 96); }), "nobody can go on"));
  CHECK(contains(failure(64, 0, [] { named_barrier(16, 64); }), "there is not"));
  CHECK(contains(failure(64, 0, [] { thread_index() < 32 ? named_barrier(1, 64) : named_barrier(1, 96); }), "two sizes"));
}

void test_registers() {
  CHECK(failure(384, 0, [] { thread_index() < 128 ? give_up_registers<24>() : take_registers<240>(); }).empty());
  CHECK(contains(failure(384, 0, [] { thread_index() < 128 ? give_up_registers<32>() : take_registers<240>(); }), "nobody can go on"));
  CHECK(contains(failure(384, 0, [] { give_up_registers<176>(); }), "does not have"));
  CHECK(contains(failure(384, 0, [] { take_registers<160>(); }), "already"));
}

// ---- Bulk copies ---------------------------------------------------------------------------------------------------

constexpr int kRows = 8;

// Two heads of three rows of 72 columns: a box of eight rows, the second panel of which has eight columns.
struct Source {
  std::vector<std::uint16_t> x = std::vector<std::uint16_t>(2 * 3 * 72);
  Array array;
  TensorMap map;

  Source() {
    for (std::size_t i = 0; i < x.size(); ++i) x[i] = static_cast<std::uint16_t>(i + 1);
    array.kind = Array::Kind::array;
    array.data = reinterpret_cast<char*>(x.data());
    array.dtype = DType::bfloat16;
    array.rank = 4;
    const std::int64_t shape[] = {1, 2, 3, 72};
    const std::int64_t stride[] = {16, 3 * 144, 144, 2};
    std::copy(shape, shape + 4, array.shape);
    std::copy(stride, stride + 4, array.stride);
    map = tensor_map_of(array, kRows);
  }
  int at(int head, int row, int column) const {
    return row < 3 && row >= 0 && column < 72 ? x[static_cast<std::size_t>((head * 3 + row) * 72 + column)] : 0;
  }
};

void test_boxes() {
  const Source source;
  constexpr int kBytes = kRows * 128;
  const SharedAddress barrier = 2 * kBytes;
  for (const int column : {0, 64, 128})
    run(32, 2 * kBytes + 8, [&] {
      if (thread_index() == 0) {
        start_barrier(barrier, 1);
        publish_barriers();
        arrive_expecting(barrier, kBytes);
        copy_box(kBytes, source.map, column, 1, 1, 0, barrier);
        CHECK(poisoned(*reinterpret_cast<float*>(dynamic_shared() + kBytes)));
      }
      warp_barrier();
      await_phase(barrier, 0);
      for (int r = 0; r < kRows; ++r)
        for (int c = thread_index(); c < 64; c += kWarp) {
          const int lies = kBytes + r * 128 + ((c / 8) ^ r) * 16 + c % 8 * 2;
          CHECK(*reinterpret_cast<std::uint16_t*>(dynamic_shared() + lies) == source.at(1, 1 + r, column + c));
        }
      CHECK(poisoned(*reinterpret_cast<float*>(dynamic_shared())));
    });

  const auto copy = [&](SharedAddress to, int expected, bool published = true) {
    if (thread_index() == 0) {
      start_barrier(barrier, 1);
      if (published) publish_barriers();
      arrive_expecting(barrier, expected);
      copy_box(to, source.map, 0, 0, 0, 0, barrier);
    }
    warp_barrier();
    await_phase(barrier, 0);
  };
  CHECK(failure(32, 2 * kBytes + 8, [&] { copy(0, kBytes); }).empty());
  CHECK(contains(failure(32, 2 * kBytes + 8, [&] { copy(0, kBytes, false); }), "not published"));
  CHECK(contains(failure(32, 2 * kBytes + 8, [&] { copy(128, kBytes); }), "swizzle"));
  CHECK(contains(failure(32, 2 * kBytes + 8, [&] { copy(2 * kBytes, kBytes); }), "beyond"));
  CHECK(contains(failure(32, 2 * kBytes + 8, [&] { copy(0, kBytes + 16); }), "nobody can go on"));
  CHECK(contains(failure(32, 2 * kBytes + 8, [&] { copy(0, kBytes - 16); }), "nobody can go on"));
  CHECK(contains(failure(32, 2 * kBytes + 8,
                         [&] {
                           if (thread_index() > 0) return;
                           start_barrier(barrier, 1);
                           publish_barriers();
                           arrive_expecting(barrier, kBytes);
                           copy_box(0, source.map, 0, 0, 0, 0, barrier);
                         }),
                 "goes on"));
}

void test_which_arrays_have_a_map() {
  const auto with = [](auto&& change) {
    Source s;
    change(s.array);
    return has_tensor_map(s.array);
  };
  CHECK(with([](Array&) {}));
  CHECK(with([](Array& x) { x.stride[0] = -7; }));  // of one batch
  CHECK(!with([](Array& x) { x.stride[1] = 0; }));
  CHECK(!with([](Array& x) { x.stride[1] = -432; }));
  CHECK(!with([](Array& x) { x.stride[2] = 152; }));
  CHECK(!with([](Array& x) { x.stride[2] = 128; }));
  CHECK(with([](Array& x) {  // heads inside of rows
    x.stride[1] = 144;
    x.stride[2] = 2 * 144;
  }));
  CHECK(!with([](Array& x) { x.stride[3] = 4; }));
  CHECK(!with([](Array& x) { x.data += 2; }));
}

// The emulated driver refuses what the real one does.
void test_maps_that_the_driver_refuses() {
  Source one;
  one.array.shape[1] = one.array.shape[2] = 1;
  one.array.stride[1] = one.array.stride[2] = 8;
  const MapShape told(one.array);
  CHECK(told.length[0] == 72 && told.length[1] == 1 && told.length[2] == 1 && told.length[3] == 1);
  CHECK(told.stride[0] == 144 && told.stride[1] == 144 && told.stride[2] == 144);

  const auto refused = [](int rows, auto&& change) {
    Source s;
    change(s.array);
    try {
      tensor_map_of(s.array, rows);
    } catch (const Error&) {
      return true;
    }
    return false;
  };
  CHECK(!refused(kRows, [](Array&) {}) && !refused(256, [](Array&) {}));
  CHECK(refused(0, [](Array&) {}) && refused(257, [](Array&) {}));
  CHECK(refused(kRows, [](Array& x) { x.data += 2; }));
  CHECK(refused(kRows, [](Array& x) { x.shape[2] = 0; }));
  CHECK(refused(kRows, [](Array& x) { x.stride[1] = -432; }));
  CHECK(refused(kRows, [](Array& x) { x.stride[2] = 152; }));
  CHECK(refused(kRows, [](Array& x) { x.stride[2] = 128; }));
  CHECK(refused(kRows, [](Array& x) { x.stride[1] = std::int64_t{1} << 40; }));
  CHECK(!refused(kRows, [](Array& x) {
    x.shape[1] = x.shape[2] = 1;
    x.stride[0] = x.stride[1] = x.stride[2] = 0;
  }));
  CHECK(refused(kRows, [](Array& x) { x.stride[3] = 4; }));
  CHECK(refused(kRows, [](Array& x) { x.dtype = DType::float32; }));
}

// ---- Products ------------------------------------------------------------------------------------------------------

// Small integers, whose products are exact, laid out by the manual: rows of 64 elements, chunk c of row r at c ^ (r % 8).
struct Matrices {
  static constexpr int kColumns = 256;      // four panels
  static constexpr int kPanel = 128 * 128;  // bytes: 128 rows
  static constexpr int kBytes = kColumns / 64 * kPanel;
  std::vector<float> a = draw(64 * kColumns, 1);
  std::vector<float> b = draw(128 * kColumns, 2);
  std::vector<float> c = draw(64 * kColumns, 3);

  static std::vector<float> draw(int n, std::uint64_t seed) {
    Random random(seed);
    std::vector<float> x(static_cast<std::size_t>(n));
    for (float& y : x) y = std::floor(static_cast<float>(random.uniform(-8, 9)));
    return x;
  }
  float left(int i, int k) const { return a[static_cast<std::size_t>(i * kColumns + k)]; }
  float right(int i, int k) const { return b[static_cast<std::size_t>(i * kColumns + k)]; }
  float sum(int i, int k) const { return c[static_cast<std::size_t>(i * kColumns + k)]; }

  // Row r, column k of the panels that start at `start`.
  static std::uint16_t& place(int start, int r, int k) {
    const int at = start + k / 64 * kPanel + r * 128 + ((k % 64 / 8) ^ (r % 8)) * 16 + k % 8 * 2;
    return *reinterpret_cast<std::uint16_t*>(dynamic_shared() + at);
  }
  template <class T> void lay(int start, int rows, bool of_left) const {
    for (int n = thread_index(); n < rows * kColumns; n += kWarpgroup)
      place(start, n / kColumns, n % kColumns) =
          from_float<T>(of_left ? left(n / kColumns, n % kColumns) : right(n / kColumns, n % kColumns)).bits;
  }
};

int row_of(int i) { return thread_index() / 32 * 16 + thread_index() % 32 / 4 + i / 2 * 8; }
int column_of(int n, int i) { return n * 8 + thread_index() % 4 * 2 + i % 2; }

// All panels, in steps of 16 columns.
template <class T, int kTiles> void test_products_of_panels() {
  const Matrices m;
  run(kWarpgroup, 2 * Matrices::kBytes, [&] {
    constexpr int kRight = Matrices::kBytes;
    m.lay<T>(0, 64, true);
    m.lay<T>(kRight, 128, false);
    block_barrier();
    float c[kTiles][4];
    const std::uint64_t a = panel_descriptor(0, 0);
    const std::uint64_t b = panel_descriptor(kRight, 0);
    open_products();
    for (int k = 0; k < Matrices::kColumns / 16; ++k) {
      const auto at = static_cast<std::uint64_t>(k / 4 * Matrices::kPanel + k % 4 * 32) >> 4;
      if (k == 0)
        multiply_panels<T, false>(c, a + at, b + at);
      else
        multiply_panels<T, true>(c, a + at, b + at);
    }
    close_products();
    CHECK(poisoned(c[0][0]) && poisoned(c[kTiles - 1][3]));
    await_products<0>();
    for (int n = 0; n < kTiles; ++n)
      for (int i = 0; i < 4; ++i) {
        float want = 0;
        for (int k = 0; k < Matrices::kColumns; ++k) want += m.left(row_of(i), k) * m.right(column_of(n, i), k);
        CHECK(c[n][i] == want);
      }
  });
}

// 32 rows of one panel or more on the right; on the left registers.
template <class T, int kTiles> void test_products_of_rows() {
  const Matrices m;
  run(kWarpgroup, Matrices::kBytes, [&] {
    m.lay<T>(0, 128, false);
    block_barrier();
    std::uint32_t a[2][4];
    for (int k = 0; k < 2; ++k)
      for (int part = 0; part < 4; ++part) {
        const int row = row_of(part % 2 * 2);
        const int column = 16 * k + thread_index() % 4 * 2 + part / 2 * 8;
        a[k][part] = pack_pair<T>(m.left(row, column), m.left(row, column + 1));
      }
    float c[kTiles][4];
    for (int n = 0; n < kTiles; ++n)
      for (int i = 0; i < 4; ++i) c[n][i] = m.sum(row_of(i), column_of(n, i));
    const std::uint64_t b = panel_descriptor(0, Matrices::kPanel);
    open_products();
    multiply_rows<T>(c, a[0], b);
    close_products();
    multiply_rows<T>(c, a[1], b + (16 * 128 >> 4));
    close_products();
    await_products<1>();
    CHECK(poisoned(c[0][0]));  // the second adds to the same
    await_products<0>();
    for (int n = 0; n < kTiles; ++n)
      for (int i = 0; i < 4; ++i) {
        float want = m.sum(row_of(i), column_of(n, i));
        for (int k = 0; k < 32; ++k) want += m.left(row_of(i), k) * m.right(k, column_of(n, i));
        CHECK(c[n][i] == want);
      }
  });
}

void test_mistakes_with_products() {
  using T = BFloat16;
  constexpr int kBytes = Matrices::kBytes;
  const Matrices m;
  // One product, with something done before it, while it runs, and after; `registers` is its left operand.
  const auto product = [&](auto&& before, auto&& between, auto&& after) {
    return failure(kWarpgroup, kBytes, [&] {
      m.lay<T>(0, 128, false);
      block_barrier();
      std::uint32_t a[4] = {};
      float c[16][4] = {};
      before();
      multiply_rows<T>(c, a, panel_descriptor(0, Matrices::kPanel));
      close_products();
      between(a, c);
      after();
    });
  };
  const auto nothing = [](auto&, auto&) {};
  const auto wait = [] { await_products<0>(); };
  CHECK(product(open_products, nothing, wait).empty());
  CHECK(contains(product([] {}, nothing, wait), "without a fence"));
  CHECK(contains(product(
                     open_products,
                     [](auto& a, auto&) {
                       float other[16][4] = {};  // the fence before the first product says nothing of these
                       multiply_rows<T>(other, a, panel_descriptor(0, Matrices::kPanel));
                     },
                     wait),
                 "without a fence"));
  CHECK(contains(product(open_products, nothing, [] {}), "not awaited"));
  CHECK(contains(product(open_products, nothing, [] { await_products<1>(); }), "not awaited"));
  CHECK(contains(product(open_products, [](auto& a, auto&) { a[2] = 1; }, wait), "left operand"));
  CHECK(contains(product(open_products, [](auto&, auto& c) { c[3][1] = 1; }, wait), "sums were written"));
  CHECK(contains(product(open_products, [](auto&, auto&) { Matrices::place(0, 5, 70) = 7; }, wait), "shared memory has changed"));
  CHECK(contains(failure(kWarpgroup, kBytes,
                         [] {
                           float c[16][4] = {};
                           open_products();
                           multiply_panels<T, false>(c, panel_descriptor(Matrices::kBytes - 63 * 128, 0), panel_descriptor(0, 0));
                         }),
                 "beyond"));
  CHECK(contains(failure(kWarpgroup, kBytes,
                         [] {
                           float c[16][4] = {};
                           open_products();
                           multiply_panels<T, false>(c, panel_descriptor(0, 0) ^ std::uint64_t{3} << 62, panel_descriptor(0, 0));
                         }),
                 "not modelled"));
  CHECK(contains(failure(kWarpgroup, kBytes,
                         [] {
                           float c[16][4] = {};
                           open_products();
                           if (thread_index() < 96) multiply_panels<T, false>(c, panel_descriptor(0, 0), panel_descriptor(0, 0));
                         }),
                 "divergence"));
  CHECK(contains(failure(64, kBytes,
                         [] {
                           float c[16][4] = {};
                           open_products();
                           multiply_panels<T, false>(c, panel_descriptor(0, 0), panel_descriptor(0, 0));
                         }),
                 "not whole"));
}

}  // namespace

void test_hopper_models() {
  test_phases();
  test_named_barriers();
  test_registers();
  test_boxes();
  test_which_arrays_have_a_map();
  test_maps_that_the_driver_refuses();
  test_products_of_panels<Half, 16>();
  test_products_of_panels<BFloat16, 10>();
  test_products_of_panels<BFloat16, 8>();
  test_products_of_rows<Half, 8>();
  test_products_of_rows<BFloat16, 16>();
  test_products_of_rows<BFloat16, 32>();
  test_mistakes_with_products();
}

}  // namespace regard::test
