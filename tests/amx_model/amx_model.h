// The matrix unit in plain C++, for machines without one: included by cpu/tile_amx.h where REGARD_AMX_MODEL is defined.
//
// As documented for palette 1, TDPBUSD and TDPBF16PS; of the latter: per element, even and odd products are summed apart, in fused steps
// rounded to nearest, then the two sums are added, then the old value; every operand and every sum below the smallest normal number is
// zero. Stricter than the hardware: use without a configuration, a second configuration, a tile that was neither loaded nor zeroed since,
// and pointers that are not of whole dwords end the process with a message.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace regard::cpu {

namespace amx_model {

struct State {
  bool configured;
  bool filled[8];
  alignas(64) std::uint8_t tile[8][16][64];
};
inline thread_local State state;  // zeros: nothing runs when a module is loaded

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "AMX model: %s\n", what);
  std::abort();
}
inline void require(bool holds, const char* what) {
  if (!holds) fail(what);
}

// LDTILECFG's checks, and that whole tiles are what comes out.
inline void configure(const TileShapes& shapes) {
  require(!state.configured, "configured twice without a release");
  require(shapes.palette == 1 && shapes.start_row == 0, "palette 1, starting at row 0, was expected");
  for (const std::uint8_t byte : shapes.reserved) require(byte == 0, "reserved bytes of the configuration are not 0");
  for (int t = 0; t < 16; ++t) {
    const bool exists = t < 8;
    require(shapes.rows[t] == (exists ? 16 : 0), "a tile of palette 1 is not of 16 rows");
    require(shapes.row_bytes[t] == (exists ? 64 : 0), "a row of a tile is not of 64 bytes");
  }
  state.configured = true;
  for (bool& filled : state.filled) filled = false;
}
inline void release() {
  require(state.configured, "released without a configuration");
  state.configured = false;
}

inline float flushed(float x) { return std::fabs(x) < 0x1p-126f ? std::copysign(0.0f, x) : x; }

inline void dot(int c, int a, int b) {
  require(state.configured, "a product without a configuration");
  require(state.filled[c] && state.filled[a] && state.filled[b], "a product of a tile that was never filled");
  require(c != a && c != b && a != b, "a product whose tiles are not distinct");
  float right[2][16][16];  // of even and odd steps
  for (int k = 0; k < 16; ++k)
    for (int n = 0; n < 16; ++n) {
      std::uint32_t pair = 0;
      std::memcpy(&pair, state.tile[b][k] + 4 * n, 4);
      const std::uint32_t words[2] = {pair << 16, pair & 0xffff0000u};
      for (int odd = 0; odd < 2; ++odd) {
        float value = 0;
        std::memcpy(&value, &words[odd], 4);
        right[odd][k][n] = flushed(value);
      }
    }
  for (int m = 0; m < 16; ++m) {
    float sums[2][16] = {};
    for (int k = 0; k < 16; ++k) {
      std::uint32_t pair = 0;
      std::memcpy(&pair, state.tile[a][m] + 4 * k, 4);
      const std::uint32_t words[2] = {pair << 16, pair & 0xffff0000u};
      for (int odd = 0; odd < 2; ++odd) {
        float left = 0;
        std::memcpy(&left, &words[odd], 4);
        left = flushed(left);
        for (int n = 0; n < 16; ++n) sums[odd][n] = flushed(std::fma(left, right[odd][k][n], sums[odd][n]));
      }
    }
    float row[16];
    std::memcpy(row, state.tile[c][m], 64);
    for (int n = 0; n < 16; ++n) row[n] = flushed(flushed(row[n]) + flushed(sums[0][n] + sums[1][n]));
    std::memcpy(state.tile[c][m], row, 64);
  }
}

inline void dot_bytes(int c, int a, int b) {
  require(state.configured, "a product without a configuration");
  require(state.filled[c] && state.filled[a] && state.filled[b], "a product of a tile that was never filled");
  require(c != a && c != b && a != b, "a product whose tiles are not distinct");
  for (int m = 0; m < 16; ++m)
    for (int n = 0; n < 16; ++n) {
      std::uint32_t sum = 0;  // wraps, as the instruction's does
      std::memcpy(&sum, state.tile[c][m] + 4 * n, 4);
      for (int k = 0; k < 16; ++k)
        for (int i = 0; i < 4; ++i)
          sum += static_cast<std::uint32_t>(state.tile[a][m][4 * k + i] * static_cast<std::int8_t>(state.tile[b][k][4 * n + i]));
      std::memcpy(state.tile[c][m] + 4 * n, &sum, 4);
    }
}

}  // namespace amx_model

class MatrixTiles {
 public:
  MatrixTiles() { amx_model::configure(TileShapes{}); }
  ~MatrixTiles() { amx_model::release(); }
  MatrixTiles(const MatrixTiles&) = delete;
  MatrixTiles& operator=(const MatrixTiles&) = delete;
};

template <int T> inline void tile_zero() {
  static_assert(T >= 0 && T < 8);
  amx_model::require(amx_model::state.configured, "a tile is zeroed without a configuration");
  std::memset(amx_model::state.tile[T], 0, 1024);
  amx_model::state.filled[T] = true;
}

template <int T> inline void tile_load(const void* from, std::int64_t stride) {
  static_assert(T >= 0 && T < 8);
  amx_model::require(amx_model::state.configured, "a tile is loaded without a configuration");
  for (int r = 0; r < 16; ++r) std::memcpy(amx_model::state.tile[T][r], static_cast<const char*>(from) + r * stride, 64);
  amx_model::state.filled[T] = true;
}

template <int T> inline void tile_store(void* to, std::int64_t stride) {
  static_assert(T >= 0 && T < 8);
  amx_model::require(amx_model::state.configured, "a tile is stored without a configuration");
  amx_model::require(amx_model::state.filled[T], "a tile that was never filled is stored");
  for (int r = 0; r < 16; ++r) std::memcpy(static_cast<char*>(to) + r * stride, amx_model::state.tile[T][r], 64);
}

template <int C, int A, int B> inline void tile_dot() { amx_model::dot(C, A, B); }
template <int C, int A, int B> inline void tile_dot_bytes() { amx_model::dot_bytes(C, A, B); }

}  // namespace regard::cpu
