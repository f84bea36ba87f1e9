// Ceilings by the same vector types, threads and flags as the kernels: what this build could reach, not the data sheet.
//
//   every thread, until a common deadline: a chunk of multiply-adds, or of reads; count what was done
//   rate = all that was done / the time from before the first thread's start to after the last one's end
//
// The clock covers starting the threads and waiting for the last: over some 50 ms both are below 1 %.

#include "cpu/ceilings.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>

#include "cpu/parallel.h"
#include "cpu/simd.h"
#include "cpu/tile_amx.h"

namespace regard::cpu {
namespace {

using Clock = std::chrono::steady_clock;
using V = Vec<float>;

// Independent chains: 2 ports x 4 cycles (x 8 where multiply and add are apart) want 8 to 16 in flight; 12 leaves
// registers for the two factors in every instruction set, and 24 where there are 32.
constexpr int kChains = kVectorRegisters == 32 ? 24 : 12;

// Independent exponentials: each is one chain of some 15 instructions.
constexpr int kExpChains = 8;

// Steps between looks at the clock: some 10 us.
constexpr int kSteps = 2048;
#ifdef REGARD_MATRIX_TILES
constexpr int kTileSteps = 400;  // of six products of 16 cycles
#endif

// Bytes read between looks at the clock, a multiple of kReadVectors vectors.
constexpr std::int64_t kReadVectors = 8;
constexpr std::int64_t kReadGrain = kReadVectors * kVectorBytes;
constexpr std::int64_t kReadChunk = std::int64_t{128} << 10;
static_assert(kReadChunk % kReadGrain == 0);

// Where results end up, so that no compiler can leave the work out.
std::atomic<float> sink{0};

void multiply_add_chunk(V (&chains)[kChains], V factor, V term) {
  V acc[kChains];
#pragma GCC unroll 24
  for (int c = 0; c < kChains; ++c) acc[c] = chains[c];
  for (int s = 0; s < kSteps; ++s) {
#pragma GCC unroll 24
    for (int c = 0; c < kChains; ++c) acc[c] = fma(acc[c], factor, term);
  }
#pragma GCC unroll 24
  for (int c = 0; c < kChains; ++c) chains[c] = acc[c];
}

void read_chunk(const char* p, std::int64_t bytes, V (&sums)[kReadVectors]) {
  V acc[kReadVectors];
#pragma GCC unroll 8
  for (int v = 0; v < kReadVectors; ++v) acc[v] = sums[v];
  for (std::int64_t i = 0; i < bytes; i += kReadGrain) {
#pragma GCC unroll 8
    for (int v = 0; v < kReadVectors; ++v) acc[v] += load<V>(p + i + v * kVectorBytes);
  }
#pragma GCC unroll 8
  for (int v = 0; v < kReadVectors; ++v) sums[v] = acc[v];
}

template <int N> void keep(const V (&values)[N]) {
  V all{};
  for (int i = 0; i < N; ++i) all += values[i];
  sink = sum_lanes(all);
}

// Runs work(item) -> amount on every thread, each until `deadline`, and answers amounts a nanosecond (so giga a second).
// Every item does one chunk at least, so that the rate is never 0, however late its thread came to run.
template <class F> double rate(double seconds, F&& work) {
  constexpr double kAlwaysParallel = 1e18;
  std::atomic<double> total{0};
  const auto start = Clock::now();
  const auto deadline = start + std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(seconds));
  parallel_for(get_num_threads(), kAlwaysParallel, [&](std::int64_t item) {
    const double done = work(item, deadline);
    double before = total;
    while (!total.compare_exchange_weak(before, before + done)) {
    }
  });
  return total / std::chrono::duration<double, std::nano>(Clock::now() - start).count();
}

}  // namespace

int openmp_date() { return _OPENMP; }

double measure_fma(double seconds) {
  // Unknown to the compiler; x -> x (1 - 2^-20) + 2^-20 stays near 1, far from subnormals and overflow.
  const volatile float factor = 1 - 0x1p-20f;
  const volatile float term = 0x1p-20f;
  return rate(seconds, [&](std::int64_t, Clock::time_point deadline) {
    V chains[kChains];
    for (int c = 0; c < kChains; ++c) chains[c] = broadcast<V>(static_cast<float>(c) / kChains);
    const V f = broadcast<V>(factor);
    const V t = broadcast<V>(term);
    double done = 0;
    do {
      multiply_add_chunk(chains, f, t);
      done += 2.0 * kChains * kSteps * kWidth<float>;
    } while (Clock::now() < deadline && !stop_requested());
    keep(chains);
    return done;
  });
}

#ifdef REGARD_MATRIX_TILES

bool has_tiles() { return true; }

double measure_tiles(double seconds) {
  alignas(64) std::uint32_t words[kTileFloats];  // pairs of bfloat16 between 1 and 2: zeros would draw less power
  for (std::uint32_t i = 0; i < kTileFloats; ++i) words[i] = 0x3f803f80u + i % 40 * 0x00030001u;
  return rate(seconds, [&](std::int64_t, Clock::time_point deadline) {
    const MatrixTiles unit;
    // Six sums in flight: a product takes 52 cycles and the next one may start after 16.
    tile_zero<0>();
    tile_zero<1>();
    tile_zero<2>();
    tile_zero<3>();
    tile_zero<4>();
    tile_zero<5>();
    tile_load<6>(words, 64);
    tile_load<7>(words, 64);
    double done = 0;
    do {
      for (int s = 0; s < kTileSteps; ++s) {
        tile_dot<0, 6, 7>();
        tile_dot<1, 6, 7>();
        tile_dot<2, 6, 7>();
        tile_dot<3, 6, 7>();
        tile_dot<4, 6, 7>();
        tile_dot<5, 6, 7>();
      }
      done += 2.0 * kTileSteps * 6 * kTileFloats * kTileDepth;
    } while (Clock::now() < deadline && !stop_requested());
    return done;
  });
}

#else

bool has_tiles() { return false; }

double measure_tiles(double) { return 0; }

#endif

double measure_exp(double seconds) {
  const volatile float start = -0.5f;
  return rate(seconds, [&](std::int64_t, Clock::time_point deadline) {
    V chains[kExpChains];
    for (int c = 0; c < kExpChains; ++c) chains[c] = broadcast<V>(start - static_cast<float>(c));
    double done = 0;
    do {
      for (int s = 0; s < kSteps; ++s) {
#pragma GCC unroll 8
        for (int c = 0; c < kExpChains; ++c) chains[c] = -exp_nonpositive(chains[c]);  // stays in (-1, 0)
      }
      done += static_cast<double>(kExpChains) * kSteps * kWidth<float>;
    } while (Clock::now() < deadline && !stop_requested());
    keep(chains);
    return done;
  });
}

double measure_read(std::int64_t bytes, double seconds) {
  const std::int64_t threads = get_num_threads();
  const std::int64_t share = std::max<std::int64_t>(1, bytes / threads / kReadGrain) * kReadGrain;
  Scratch scratch;
  const auto offset = scratch.reserve<char>(threads * share);
  scratch.acquire();
  char* const memory = scratch.at<char>(offset);
  // Written by all threads, so that pages are real and lie near whoever reads them. Zeros add up exactly.
  parallel_for(threads, static_cast<double>(bytes),
               [&](std::int64_t item) { std::memset(memory + item * share, 0, static_cast<std::size_t>(share)); });
  return rate(seconds, [&](std::int64_t item, Clock::time_point deadline) {
    const char* const mine = memory + item * share;
    V sums[kReadVectors] = {};
    double done = 0;
    std::int64_t at = 0;
    do {
      // Small shares are read several times between looks at the clock.
      for (std::int64_t left = kReadChunk; left > 0;) {
        const std::int64_t now = std::min(left, share - at);
        read_chunk(mine + at, now, sums);
        done += static_cast<double>(now);
        left -= now;
        at = at + now == share ? 0 : at + now;
      }
    } while (Clock::now() < deadline && !stop_requested());
    keep(sums);
    return done;
  });
}

}  // namespace regard::cpu
