// The matrix unit, or its model: products, what counts as zero, splits into bfloat16, and misuse of the model.

#include <sys/wait.h>
#include <unistd.h>

#include <cstring>
#include <vector>

#include "check.h"
#include "core/dtype.h"
#include "cpu/simd.h"
#include "cpu/tile_amx.h"
#ifdef REGARD_MATRIX_TILES
#include "cpu/tile_matrix.h"
#endif

namespace regard::test {
namespace {

using namespace cpu;

// Pairs of bfloat16, as vector units make them: the same bits as one by one.
void test_pairs() {
  Random random(5);
  for (int n = 0; n < 1000; ++n) {
    float even[kWidth<float>];
    float odd[kWidth<float>];
    for (int i = 0; i < kWidth<float>; ++i) {
      even[i] = static_cast<float>(random.uniform(-4, 4) * std::pow(10, random.uniform(-30, 30)));
      odd[i] = static_cast<float>(random.uniform(-4, 4));
    }
    odd[0] = n % 2 == 0 ? std::nanf("") : INFINITY;
    const Words words = bfloat16_pairs(load<Vec<float>>(even), load<Vec<float>>(odd));
    for (int i = 0; i < kWidth<float>; ++i) {
      const auto word = static_cast<std::uint32_t>(words[i]);
      CHECK((word & 0xffffu) == from_float<BFloat16>(even[i]).bits);
      CHECK(word >> 16 == from_float<BFloat16>(odd[i]).bits);
    }
  }
}

#ifdef REGARD_MATRIX_TILES

// 16 rows of 32 values each, and the operands' layouts: A in rows, B in pairs of rows.
struct Operands {
  float a[16][32];
  float b[32][16];
  alignas(64) BFloat16 left[16][32];
  alignas(64) BFloat16 right[16][32];

  template <class F> explicit Operands(F&& value) {
    for (int i = 0; i < 16; ++i)
      for (int k = 0; k < 32; ++k) {
        left[i][k] = from_float<BFloat16>(value());
        a[i][k] = to_float(left[i][k]);
        right[k / 2][2 * i + k % 2] = from_float<BFloat16>(value());
        b[k][i] = to_float(right[k / 2][2 * i + k % 2]);
      }
  }

  void multiply(float (&c)[16][16]) const {
    const MatrixTiles unit;
    tile_load<0>(c, 64);
    tile_load<4>(left, 64);
    tile_load<6>(right, 64);
    tile_dot<0, 4, 6>();
    tile_store<0>(c, 64);
  }
};

void test_products() {
  Random random(1);
  // Small whole numbers are exact in any order.
  const Operands whole([&] { return static_cast<float>(static_cast<int>(random.bits() % 17) - 8); });
  float c[16][16];
  for (auto& row : c)
    for (float& x : row) x = static_cast<float>(random.bits() % 100);
  float want[16][16];
  for (int i = 0; i < 16; ++i)
    for (int j = 0; j < 16; ++j) {
      want[i][j] = c[i][j];
      for (int k = 0; k < 32; ++k) want[i][j] += whole.a[i][k] * whole.b[k][j];
    }
  whole.multiply(c);
  for (int i = 0; i < 16; ++i)
    for (int j = 0; j < 16; ++j) CHECK(c[i][j] == want[i][j]);

  // Others within some roundings of the sum of magnitudes.
  const Operands any([&] { return static_cast<float>(random.uniform(-3, 3)); });
  for (auto& row : c)
    for (float& x : row) x = 1;
  any.multiply(c);
  for (int i = 0; i < 16; ++i)
    for (int j = 0; j < 16; ++j) {
      double sum = 1;
      double size = 1;
      for (int k = 0; k < 32; ++k) {
        sum += static_cast<double>(any.a[i][k]) * any.b[k][j];
        size += std::abs(static_cast<double>(any.a[i][k]) * any.b[k][j]);
      }
      CHECK(std::abs(c[i][j] - sum) <= 8 * 0x1p-24 * size);
    }
}

void test_flushing() {
  float c[16][16] = {};
  const Operands tiny([] { return 0x1p-127f; });  // subnormal operands count as zero, even times large ones
  tiny.multiply(c);
  for (const auto& row : c)
    for (const float x : row) CHECK(x == 0);
  const Operands small([] { return 0x1p-66f; });  // and so do sums that come out subnormal: 32 x 2^-132 = 2^-127
  small.multiply(c);
  for (const auto& row : c)
    for (const float x : row) CHECK(x == 0);
  const Operands normal([] { return 0x1p-60f; });
  normal.multiply(c);
  for (const auto& row : c)
    for (const float x : row) CHECK(x == 0x1p-115f);
}

// Tiles keep their sums between products, and move with any stride.
void test_strides() {
  Random random(2);
  const Operands x([&] { return static_cast<float>(static_cast<int>(random.bits() % 9) - 4); });
  std::vector<char> wide(16 * 192, 0);
  float once[16][16] = {};
  x.multiply(once);
  const MatrixTiles unit;
  tile_zero<3>();
  tile_load<5>(x.left, 64);
  tile_load<7>(x.right, 64);
  tile_dot<3, 5, 7>();
  tile_dot<3, 5, 7>();
  tile_store<3>(wide.data() + 64, 192);
  for (int r = 0; r < 16; ++r) {
    const auto* const row = reinterpret_cast<const float*>(wide.data() + r * 192);
    for (int j = 0; j < 16; ++j) CHECK(row[j] == 0 && row[16 + j] == 2 * once[r][j] && row[32 + j] == 0);
  }
}

// A float is its three parts, and a half's value its two.
void test_splits() {
  Random random(3);
  float row[32];
  for (int n = 0; n < 2000; ++n) {
    for (float& x : row) x = static_cast<float>(random.uniform(-1, 1) * std::pow(10, random.uniform(-20, 20)));
    for (int halves = 0; halves < 2; ++halves) {
      if (halves == 1)
        for (float& x : row) x = to_float(Half{static_cast<std::uint16_t>(random.bits() % 0x7c00)});
      BFloat16 parts[3][32];
      float tiles[3 * kTileColumns];
      split_row<3>(row, 32, tiles, 0, kTileColumns);
      std::memcpy(parts, tiles, sizeof parts);
      for (int i = 0; i < 32; ++i) {
        CHECK(to_float(parts[0][i]) + (to_float(parts[1][i]) + to_float(parts[2][i])) == row[i]);
        CHECK(halves == 0 || to_float(parts[2][i]) == 0);
      }
      BFloat16 stored[32];
      for (int i = 0; i < 32; ++i) stored[i] = from_float<BFloat16>(row[i]);
      copy_row(reinterpret_cast<const char*>(stored), 32, tiles, 0);
      CHECK(std::memcmp(tiles, parts[0], sizeof parts[0]) == 0);
    }
  }
}

// Weights, which are positive, are three parts too, cut off and not rounded; alone, they are rounded.
void test_weights() {
  constexpr int w = kWidth<float>;
  Random random(4);
  for (int n = 0; n < 2000; ++n) {
    float even[w];
    float odd[w];
    for (float& x : even) x = static_cast<float>(std::pow(10, random.uniform(-20, 0)));
    for (float& x : odd) x = static_cast<float>(random.uniform(0, 1));
    Words three[3];
    Words one[1];
    split_weights(load<Vec<float>>(even), load<Vec<float>>(odd), three);
    split_weights(load<Vec<float>>(even), load<Vec<float>>(odd), one);
    for (int i = 0; i < w; ++i) {
      const auto sum = [&](auto half) { return half(three[0])[i] + (half(three[1])[i] + half(three[2])[i]); };
      CHECK(sum(lower_of_pairs) == even[i] && sum(upper_of_pairs) == odd[i]);
      CHECK(std::abs(lower_of_pairs(one[0])[i] - even[i]) <= 0x1p-8f * even[i]);
      CHECK(std::abs(upper_of_pairs(one[0])[i] - odd[i]) <= 0x1p-8f * odd[i] + 0x1p-126f);
    }
  }
}

// Sums of unsigned and signed bytes.
void test_bytes() {
  Random random(5);
  std::uint8_t a[16][64];
  std::int8_t b[16][64];
  std::int32_t c[16][16];
  for (auto& row : a)
    for (std::uint8_t& x : row) x = static_cast<std::uint8_t>(random.bits());
  for (auto& row : b)
    for (std::int8_t& x : row) x = static_cast<std::int8_t>(random.bits());
  for (auto& row : c)
    for (std::int32_t& x : row) x = static_cast<std::int32_t>(random.bits() % 1000);
  std::int32_t want[16][16];
  for (int m = 0; m < 16; ++m)
    for (int n = 0; n < 16; ++n) {
      want[m][n] = c[m][n];
      for (int k = 0; k < 64; ++k) want[m][n] += a[m][k] * b[k / 4][4 * n + k % 4];
    }
  const MatrixTiles unit;
  tile_load<0>(c, 64);
  tile_load<4>(a, 64);
  tile_load<6>(b, 64);
  tile_dot_bytes<0, 4, 6>();
  tile_store<0>(c, 64);
  CHECK(std::memcmp(c, want, sizeof c) == 0);
}

#ifdef REGARD_AMX_MODEL
template <class F> bool aborts(F&& f) {
  std::fflush(stdout);
  const pid_t child = fork();
  if (child == 0) {
    std::fclose(stderr);
    f();
    std::_Exit(0);
  }
  int status = 0;
  waitpid(child, &status, 0);
  return WIFSIGNALED(status) && WTERMSIG(status) == SIGABRT;
}

void test_misuse() {
  alignas(64) float tile[kTileFloats] = {};
  CHECK(aborts([] { tile_zero<0>(); }));
  CHECK(aborts([&] { tile_load<1>(tile, 64); }));
  CHECK(aborts([] { amx_model::release(); }));
  CHECK(aborts([] {
    const MatrixTiles one;
    const MatrixTiles two;
  }));
  CHECK(aborts([&] {  // tiles do not outlive their configuration
    {
      const MatrixTiles unit;
      tile_zero<2>();
    }
    const MatrixTiles unit;
    tile_store<2>(tile, 64);
  }));
  CHECK(aborts([] {
    const MatrixTiles unit;
    tile_zero<0>();
    tile_zero<1>();
    tile_dot<0, 1, 2>();
  }));
  for (const auto spoil :
       {+[](TileShapes& s) { s.palette = 0; }, +[](TileShapes& s) { s.rows[3] = 17; }, +[](TileShapes& s) { s.row_bytes[7] = 128; },
        +[](TileShapes& s) { s.row_bytes[8] = 64; }, +[](TileShapes& s) { s.reserved[5] = 1; }})
    CHECK(aborts([&] {
      TileShapes shapes;
      spoil(shapes);
      amx_model::configure(shapes);
    }));
  CHECK(!aborts([&] {
    const MatrixTiles unit;
    tile_zero<0>();
    tile_store<0>(tile, 64);
  }));
}
#endif

#endif

}  // namespace

void test_tiles() {
  test_pairs();
#ifdef REGARD_MATRIX_TILES
  test_products();
  test_flushing();
  test_strides();
  test_splits();
  test_weights();
  test_bytes();
#ifdef REGARD_AMX_MODEL
  test_misuse();
#endif
#endif
}

}  // namespace regard::test
