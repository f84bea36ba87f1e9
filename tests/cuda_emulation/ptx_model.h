// The functions of cuda/ptx.cuh, as the PTX ISA documents the instructions behind them.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <source_location>

#include "core/dtype.h"
#include "device_model.h"

namespace regard::cuda {

using SharedAddress = std::uint32_t;  // from the start of the block's shared memory
inline SharedAddress shared_address(const void* p) {
  return static_cast<SharedAddress>(static_cast<const char*>(p) - emulation::shared_memory());
}

inline float widened(Half x) { return to_float(x); }
inline Half rounded_to_half(float x) { return from_float<Half>(x); }

inline void copy_async(SharedAddress to, const void* from, bool valid, Where where = Where::current()) {
  emulation::copy_async(to, from, valid ? 16 : 0, 16, where);
}
inline void close_copies() { emulation::close_copies(); }
template <int kGroups> void await_copies() { emulation::await_copies(kGroups); }

namespace model {

struct MatrixLoad {
  SharedAddress row;
  std::uint32_t* to;
};

// Lane l gets, of matrix m, elements (l / 4, 2 (l % 4)) and the next; transposed: (2 (l % 4), l / 4) and the one below.
template <bool kTransposed> void load(void* const* all) {
  auto& count = emulation::counters();
  ++count.matrix_loads;
  for (int m = 0; m < 4; ++m) {
    std::uint16_t matrix[8][8];
    unsigned groups = 0;
    bool conflict = false;
    for (int r = 0; r < 8; ++r) {
      const SharedAddress row = static_cast<MatrixLoad*>(all[8 * m + r])->row;
      std::memcpy(matrix[r], emulation::shared_memory() + row, 16);
      const unsigned group = 1u << row / 16 % 8;  // 32 banks of 4 bytes
      conflict |= (groups & group) != 0;
      groups |= group;
    }
    count.bank_conflicts += conflict;
    for (int l = 0; l < kWarp; ++l) {
      const int i = l / 4;
      const int j = l % 4 * 2;
      const std::uint32_t low = kTransposed ? matrix[j][i] : matrix[i][j];
      const std::uint32_t high = kTransposed ? matrix[j + 1][i] : matrix[i][j + 1];
      static_cast<MatrixLoad*>(all[l])->to[m] = low | high << 16;
    }
  }
}

inline void check_row(SharedAddress row, Where where) {
  if (row % 16 != 0) emulation::fail("a misaligned matrix row", where);
  if (static_cast<int>(row) + 16 > emulation::shared_size()) emulation::fail("a matrix row beyond shared memory", where);
}

template <class T> float half_of(std::uint32_t pair, int which) {
  return to_float(T{static_cast<std::uint16_t>(which == 0 ? pair : pair >> 16)});
}

struct Product {
  float* c;
  const std::uint32_t* a;
  std::uint32_t b[2];
};

// With g = l / 4 and t = l % 4, lane l holds
//   a[0]: (g, 2t), (g, 2t + 1)   a[1]: rows + 8   a[2]: columns + 8   a[3]: both
//   b[0]: (2t, g), (2t + 1, g)   b[1]: rows + 8
//   c[0], c[1]: (g, 2t), (g, 2t + 1)   c[2], c[3]: rows + 8
template <class T> void product(void* const* all) {
  ++emulation::counters().products;
  float a[16][16];
  float b[16][8];
  for (int l = 0; l < kWarp; ++l) {
    const auto& p = *static_cast<Product*>(all[l]);
    const int g = l / 4;
    const int t = l % 4;
    for (int half = 0; half < 2; ++half) {
      const int k = 2 * t + half;
      a[g][k] = half_of<T>(p.a[0], half);
      a[g + 8][k] = half_of<T>(p.a[1], half);
      a[g][k + 8] = half_of<T>(p.a[2], half);
      a[g + 8][k + 8] = half_of<T>(p.a[3], half);
      b[k][g] = half_of<T>(p.b[0], half);
      b[k + 8][g] = half_of<T>(p.b[1], half);
    }
  }
  for (int l = 0; l < kWarp; ++l) {
    const auto& p = *static_cast<Product*>(all[l]);
    for (int i = 0; i < 4; ++i) {
      const int row = l / 4 + i / 2 * 8;
      const int column = l % 4 * 2 + i % 2;
      float sum = p.c[i];
      for (int k = 0; k < 16; ++k) sum += a[row][k] * b[k][column];
      p.c[i] = sum;
    }
  }
}

struct ByteProduct {
  std::int32_t* c;
  const std::uint32_t* a;
  std::uint32_t b[2];
};

// Byte n of a register, signed.
inline std::int32_t byte_of(std::uint32_t x, int n) { return static_cast<std::int8_t>(x >> (8 * n)); }

// With g = l / 4 and t = l % 4, lane l holds
//   a[0]: (g, 4t) to (g, 4t + 3)   a[1]: rows + 8   a[2]: columns + 16   a[3]: both
//   b[0]: (4t, g) to (4t + 3, g)   b[1]: rows + 16
//   c as above
inline void byte_product(void* const* all) {
  ++emulation::counters().products;
  std::int32_t a[16][32];
  std::int32_t b[32][8];
  for (int l = 0; l < kWarp; ++l) {
    const auto& p = *static_cast<ByteProduct*>(all[l]);
    const int g = l / 4;
    for (int n = 0; n < 4; ++n) {
      const int k = l % 4 * 4 + n;
      a[g][k] = byte_of(p.a[0], n);
      a[g + 8][k] = byte_of(p.a[1], n);
      a[g][k + 16] = byte_of(p.a[2], n);
      a[g + 8][k + 16] = byte_of(p.a[3], n);
      b[k][g] = byte_of(p.b[0], n);
      b[k + 16][g] = byte_of(p.b[1], n);
    }
  }
  for (int l = 0; l < kWarp; ++l) {
    const auto& p = *static_cast<ByteProduct*>(all[l]);
    for (int i = 0; i < 4; ++i)
      for (int k = 0; k < 32; ++k) p.c[i] += a[l / 4 + i / 2 * 8][k] * b[k][l % 4 * 2 + i % 2];
  }
}

}  // namespace model

inline void load_matrices(std::uint32_t (&to)[4], SharedAddress row, Where where = Where::current()) {
  model::check_row(row, where);
  model::MatrixLoad x{row, to};
  emulation::meet("ldmatrix", &x, model::load<false>, where);
}
inline void load_matrices_transposed(std::uint32_t (&to)[4], SharedAddress row, Where where = Where::current()) {
  model::check_row(row, where);
  model::MatrixLoad x{row, to};
  emulation::meet("ldmatrix.trans", &x, model::load<true>, where);
}

template <class T>
void multiply_add(float (&c)[4], const std::uint32_t (&a)[4], std::uint32_t b0, std::uint32_t b1, Where where = Where::current()) {
  model::Product p{c, a, {b0, b1}};
  emulation::meet("mma", &p, model::product<T>, where);
}

inline void multiply_add_bytes(std::int32_t (&c)[4], const std::uint32_t (&a)[4], std::uint32_t b0, std::uint32_t b1,
                               Where where = Where::current()) {
  model::ByteProduct p{c, a, {b0, b1}};
  emulation::meet("mma of bytes", &p, model::byte_product, where);
}

template <class T> std::uint32_t pack_pair(float low, float high) {
  return static_cast<std::uint32_t>(from_float<T>(low).bits) | static_cast<std::uint32_t>(from_float<T>(high).bits) << 16;
}

inline std::int32_t dot_bytes(std::uint32_t a, std::uint32_t b, std::int32_t sum) {
  for (int n = 0; n < 4; ++n) sum += model::byte_of(a, n) * model::byte_of(b, n);
  return sum;
}

inline std::uint32_t pick_bytes(std::uint32_t low, std::uint32_t high, std::uint32_t which) {
  const std::uint64_t all = std::uint64_t{high} << 32 | low;
  std::uint32_t made = 0;
  for (int n = 0; n < 4; ++n) made |= static_cast<std::uint32_t>(all >> 8 * (which >> 4 * n & 7) & 0xff) << 8 * n;
  return made;
}

// The product of two 16-bit numbers is exact in double, and so are sums of those that kernels have.
template <class T> std::uint32_t fused_pairs(std::uint32_t a, std::uint32_t b, std::uint32_t c) {
  const auto fused = [&](int n) {
    return static_cast<float>(static_cast<double>(model::half_of<T>(a, n)) * static_cast<double>(model::half_of<T>(b, n)) +
                              static_cast<double>(model::half_of<T>(c, n)));
  };
  return pack_pair<T>(fused(0), fused(1));
}

inline int opaque(int x) { return x; }

inline float rounded_product(float a, float b) { return a * b; }

inline float exp2_fast(float x) {
  const float y = std::exp2(x);
  return y < 0x1p-126f ? 0.0f : y;
}

}  // namespace regard::cuda
