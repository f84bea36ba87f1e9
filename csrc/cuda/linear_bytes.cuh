// Linear layers with weights of int8: out = activation(x weight^T + bias) + residual.
//
//   quantise_rows    a block each row of x: s_i = max |x_i| / 127, bytes x_i / s_i rounded       (of the weight, when packed)
//   multiply_bytes   sums = x weight^T by tiles, in whole numbers; out = activation(s_i s_j sums + bias) + residual
//   multiply_few     the same for up to 8 rows: a warp has 2 outputs and reads their weights once
//
// Sums of bytes are exact, and scales are rounded as on the CPU: whatever kernel, tile or order, the bits before an
// activation are the CPU's. Scales by rows and channels: Dettmers et al., "LLM.int8()" (2022), section 2.
#pragma once

#include "cuda/lane_sums.cuh"
#include "cuda/linear_epilogue.cuh"
#include "cuda/ptx.cuh"

namespace regard::cuda {

constexpr int kQuantiseThreads = 256;

struct QuantiseArguments {
  Rows x;
  bool vectors;  // rows lie in aligned chunks of 16 bytes
  int length;
  int pitch;     // of a row of bytes
  char* to;      // [rows, pitch], zeros beyond a row's end
  float* scale;  // [rows]; NaN: the row is not finite, and its bytes are zeros
};

template <class T> REGARD_KERNEL(kQuantiseThreads, 1) quantise_rows(const REGARD_GRID_CONSTANT QuantiseArguments a) {
  constexpr int kGrain = Vector<T>::kLength;
  constexpr int kWarps = kQuantiseThreads / kWarp;
  float* const room = reinterpret_cast<float*>(dynamic_shared());  // [kWarps]
  const char* const x = a.x.at(block_index());
  float v[kGrain];

  float top = 0;
  for (int k = thread_index() * kGrain; k < a.length; k += kQuantiseThreads * kGrain) {
    load_grain<T>(v, x, a.x.step(), k, a.length, a.vectors);
    for (int e = 0; e < kGrain; ++e) top = max_or_nan(v[e] < 0 ? -v[e] : v[e], top);
  }
  for (int step = 1; step < kWarp; step *= 2) top = max_or_nan(shuffle_xor(top, step), top);
  if (thread_index() % kWarp == 0) room[thread_index() / kWarp] = top;
  block_barrier();
  for (int w = 0; w < kWarps; ++w) top = max_or_nan(room[w], top);

  const bool finite = top < infinity<float>();
  const bool zero = !finite || top < kSmallestScaled;
  const float factor = zero ? 0.0f : 127.0f / top;
  if (thread_index() == 0) a.scale[block_index()] = !finite ? top - top : zero ? 0.0f : top / 127.0f;
  char* const to = a.to + static_cast<std::int64_t>(block_index()) * a.pitch;
  for (int k = thread_index() * kGrain; k < a.pitch; k += kQuantiseThreads * kGrain) {
    load_grain<T>(v, x, a.x.step(), k, a.length, a.vectors);
    std::uint32_t words[kGrain / 4];
    for (int n = 0; n < kGrain / 4; ++n) {
      words[n] = 0;
      for (int e = 0; e < 4; ++e) {
        const int whole = zero ? 0 : static_cast<int>(rintf(v[4 * n + e] * factor));
        words[n] |= (static_cast<std::uint32_t>(whole) & 0xffu) << (8 * e);
      }
    }
    for (int n = 0; n < kGrain / 4; ++n) *reinterpret_cast<std::uint32_t*>(to + k + 4 * n) = words[n];
  }
}

struct ByteArguments {
  const char* x;         // [rows, pitch]
  const float* x_scale;  // [rows]
  const char* weight;    // [outputs, pitch]
  const float* scale;    // [outputs]
  std::int64_t rows;
  int outputs;
  int pitch;          // whole chunks of 16 bytes
  std::int64_t down;  // tiles of rows, one after another through the same weights
  EpilogueArguments epilogue;
};

// Two roundings, as the CPU has them.
REGARD_DEVICE float scaled_sum(std::int32_t sum, float scale, float bias) { return rounded_product(static_cast<float>(sum), scale) + bias; }

constexpr int kByteThreads = 128;
constexpr int kByteDepth = 64;  // bytes of a row in a stage
constexpr int kByteStages = 4;

// A block's tile: warps side by side, kAcross of them, and one below another, each of kDown x kRight products of 16 x 8.
template <int kAcross, int kDown, int kRight> struct ByteTile {
  static constexpr int kBelow = kByteThreads / kWarp / kAcross;
  static constexpr int kRows = 16 * kDown * kBelow;
  static constexpr int kOutputs = 8 * kRight * kAcross;
  static constexpr int kStageBytes = (kRows + kOutputs) * kByteDepth;
  static constexpr int kSharedBytes = kByteStages * kStageBytes;
  static_assert(kRows * kOutputs * 4 <= kSharedBytes && kRight % 2 == 0);

  // Where chunk c of 16 bytes of row r of a stage lies: 8 rows of one chunk meet in no bank.
  REGARD_DEVICE static int at(int r, int c) { return r * kByteDepth + ((c ^ (r >> 1 & 3)) * 16); }
  // Where the sums lie at the end: pairs of 4 rows fill the banks.
  REGARD_DEVICE static int sum_at(int r, int o) { return r * kOutputs + (o ^ (r & 3) * 8); }
};
// 64 x 64 a warp: half the bytes from shared memory that 64 x 32 would take for each product.
using LargeByteTile = ByteTile<2, 4, 8>;
using SmallByteTile = ByteTile<2, 1, 4>;  // 32 x 64

template <class Tile> REGARD_KERNEL(kByteThreads, 1) multiply_bytes(const REGARD_GRID_CONSTANT ByteArguments a) {
  constexpr int kDown = Tile::kRows / Tile::kBelow / 16;
  constexpr int kAcross = kByteThreads / kWarp / Tile::kBelow;
  constexpr int kRight = Tile::kOutputs / kAcross / 8;
  constexpr int kChunks = kByteDepth / 16;
  const std::int64_t row0 = block_index() % a.down * Tile::kRows;
  const int out0 = static_cast<int>(block_index() / a.down) * Tile::kOutputs;
  const int lane = thread_index() % kWarp;
  const int warp_row = thread_index() / kWarp / kAcross * (16 * kDown);
  const int warp_out = thread_index() / kWarp % kAcross * (8 * kRight);
  const SharedAddress shared = shared_address(dynamic_shared());

  const auto fetch = [&](int step) {
    const SharedAddress stage = shared + static_cast<SharedAddress>(step % kByteStages * Tile::kStageBytes);
    for (int n = thread_index(); n < (Tile::kRows + Tile::kOutputs) * kChunks; n += kByteThreads) {
      const int r = n / kChunks;
      const int k = step * kByteDepth + n % kChunks * 16;
      const bool of_x = r < Tile::kRows;
      const std::int64_t row = of_x ? row0 + r : out0 + r - Tile::kRows;
      const bool there = row < (of_x ? a.rows : a.outputs) && k < a.pitch;
      copy_async(stage + static_cast<SharedAddress>(Tile::at(r, n % kChunks)), (of_x ? a.x : a.weight) + (there ? row * a.pitch + k : 0),
                 there);
    }
  };

  std::int32_t sums[kDown][kRight][4] = {};
  const int steps = (a.pitch + kByteDepth - 1) / kByteDepth;
  for (int step = 0; step < kByteStages - 1; ++step) {
    if (step < steps) fetch(step);
    close_copies();
  }
  for (int step = 0; step < steps; ++step) {
    await_copies<kByteStages - 2>();
    block_barrier();  // all have what this step reads, and are done with the stage that the next fetch fills
    if (step + kByteStages - 1 < steps) fetch(step + kByteStages - 1);
    close_copies();
    const SharedAddress stage = shared + static_cast<SharedAddress>(step % kByteStages * Tile::kStageBytes);
#pragma unroll
    for (int c = 0; c < kChunks; c += 2) {
      std::uint32_t x[kDown][4];
#pragma unroll
      for (int i = 0; i < kDown; ++i)
        load_matrices(x[i], stage + static_cast<SharedAddress>(Tile::at(warp_row + 16 * i + lane % 16, c + lane / 16)));
#pragma unroll
      for (int j = 0; j < kRight; j += 2) {
        std::uint32_t w[4];  // of outputs 8 j and on, and of those 8 further
        const int row = Tile::kRows + warp_out + 8 * j + lane / 16 * 8 + lane % 8;
        load_matrices(w, stage + static_cast<SharedAddress>(Tile::at(row, c + lane / 8 % 2)));
#pragma unroll
        for (int i = 0; i < kDown; ++i) {
          multiply_add_bytes(sums[i][j], x[i], w[0], w[1]);
          multiply_add_bytes(sums[i][j + 1], x[i], w[2], w[3]);
        }
      }
    }
  }

  // Through shared memory, so that neighbours write neighbours and the rest of the work is a loop.
  await_copies<0>();
  block_barrier();
  std::int32_t* const all = reinterpret_cast<std::int32_t*>(dynamic_shared());
#pragma unroll
  for (int i = 0; i < kDown; ++i)
#pragma unroll
    for (int j = 0; j < kRight; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e)
        all[Tile::sum_at(warp_row + 16 * i + lane / 4 + e / 2 * 8, warp_out + 8 * j + lane % 4 * 2 + e % 2)] = sums[i][j][e];
  block_barrier();
  static_assert(kByteThreads % Tile::kOutputs == 0);
  const int o = thread_index() % Tile::kOutputs;  // a lane has one output, of every row or every other
  if (out0 + o >= a.outputs) return;
  const float scale = a.scale[out0 + o];
  const float bias = bias_of<float>(a.epilogue, out0 + o);
  for (int r = thread_index() / Tile::kOutputs; r < Tile::kRows && row0 + r < a.rows; r += kByteThreads / Tile::kOutputs) {
    const float y = scaled_sum(all[Tile::sum_at(r, o)], scale * a.x_scale[row0 + r], bias);
    finish_element(a.epilogue, row0 + r, out0 + o, y);
  }
}

constexpr int kFewRows = 8;
constexpr int kFewOutputs = 2;  // of a warp: what it reads of x serves both
constexpr int kFewBlockOutputs = kFewOutputs * kByteThreads / kWarp;

struct alignas(16) Chunk {
  std::uint32_t words[4];
};

REGARD_KERNEL(kByteThreads, 1) multiply_few(const REGARD_GRID_CONSTANT ByteArguments a) {
  const int lane = thread_index() % kWarp;
  const std::int64_t row0 = block_index() % a.down * kFewRows;
  const int out0 = (static_cast<int>(block_index() / a.down) * (kByteThreads / kWarp) + thread_index() / kWarp) * kFewOutputs;
  if (out0 >= a.outputs) return;
  const auto rows = static_cast<int>(a.rows - row0 < kFewRows ? a.rows - row0 : kFewRows);
  const char* const x = a.x + row0 * a.pitch;
  const char* weight[kFewOutputs];  // the last output again where there is no further one
#pragma unroll
  for (int o = 0; o < kFewOutputs; ++o)
    weight[o] = a.weight + static_cast<std::int64_t>(out0 + o < a.outputs ? out0 + o : a.outputs - 1) * a.pitch;

  std::int32_t sums[kFewOutputs * kFewRows] = {};
#pragma unroll 2
  for (int k = lane * 16; k < a.pitch; k += kWarp * 16) {
    Chunk w[kFewOutputs];
#pragma unroll
    for (int o = 0; o < kFewOutputs; ++o) w[o] = *reinterpret_cast<const Chunk*>(weight[o] + k);
#pragma unroll
    for (int r = 0; r < kFewRows; ++r) {
      if (r >= rows) break;
      const Chunk v = *reinterpret_cast<const Chunk*>(x + r * a.pitch + k);
#pragma unroll
      for (int o = 0; o < kFewOutputs; ++o)
#pragma unroll
        for (int n = 0; n < 4; ++n) sums[o * kFewRows + r] = dot_bytes(v.words[n], w[o].words[n], sums[o * kFewRows + r]);
    }
  }
  const std::int32_t mine = sum_to_lanes(sums);
  const int r = lane % kFewRows;
  const int o = out0 + lane / kFewRows;
  if (lane >= kFewOutputs * kFewRows || r >= rows || o >= a.outputs) return;
  const float y = scaled_sum(mine, a.scale[o] * a.x_scale[row0 + r], bias_of<float>(a.epilogue, o));
  finish_element(a.epilogue, row0 + r, o, y);
}

}  // namespace regard::cuda
