// The matrix unit: eight tiles of 16 rows of 64 bytes, multiplied as bfloat16 pairs or as bytes. The only file
// that knows its instructions. REGARD_MATRIX_TILES says that this build has them, or the model of tests/amx_model.
//
//   MatrixTiles scope;            configures the calling thread's tiles, and releases them at its end
//   tile_zero<C>()
//   tile_load<T>(from, stride)    16 rows of 64 bytes, `stride` bytes apart; tile_store<T>(to, stride) likewise
//   tile_dot<C, A, B>()           C[m][n] += sum over k of A[m][2k] B[k][2n] + A[m][2k + 1] B[k][2n + 1]
//   tile_dot_bytes<C, A, B>()     the same of four unsigned bytes of A and four signed ones of B, sums in 32 bits
//
// A has rows of 32 bfloat16 along the depth; B holds the depth down, in pairs: 16 dwords across, each of two steps.
// Intel, "Intel 64 and IA-32 Architectures Software Developer's Manual", volume 2: LDTILECFG, TDPBF16PS, TDPBUSD. Inputs and sums
// below the smallest normal number count as zero.
#pragma once

#include <cstdint>

namespace regard::cpu {

constexpr int kTileRows = 16;
constexpr int kTileColumns = 16;  // floats of a row
constexpr int kTileDepth = 32;    // bfloat16 of a row
constexpr int kTileFloats = kTileRows * kTileColumns;

// What LDTILECFG reads: all eight tiles whole.
struct alignas(64) TileShapes {
  std::uint8_t palette = 1;
  std::uint8_t start_row = 0;
  std::uint8_t reserved[14] = {};
  std::uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  std::uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
static_assert(sizeof(TileShapes) == 64);

}  // namespace regard::cpu

#if defined(REGARD_AMX_MODEL)
#define REGARD_MATRIX_TILES
#include "amx_model.h"
#elif defined(__AMX_BF16__)
#define REGARD_MATRIX_TILES

namespace regard::cpu {

// Written as instructions: the compiler's own functions (gcc 12) do not say that a load reads memory, and stores of what
// it loads could be moved behind it.
class MatrixTiles {
 public:
  MatrixTiles() {
    constexpr TileShapes shapes;
    asm volatile("ldtilecfg %0" ::"m"(shapes));
  }
  ~MatrixTiles() { asm volatile("tilerelease"); }
  MatrixTiles(const MatrixTiles&) = delete;
  MatrixTiles& operator=(const MatrixTiles&) = delete;
};

template <int T> inline void tile_zero() { asm volatile("tilezero %%tmm%c0" ::"i"(T)); }

template <int T> inline void tile_load(const void* from, std::int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(T) : "memory");
}

template <int T> inline void tile_store(void* to, std::int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride), "i"(T) : "memory");
}

template <int C, int A, int B> inline void tile_dot_bytes() {
  asm volatile("tdpbusd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}

template <int C, int A, int B> inline void tile_dot() { asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B)); }

}  // namespace regard::cpu

#endif
