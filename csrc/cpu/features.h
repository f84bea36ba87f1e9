// What this machine can run. For sources built at the architecture's baseline: asking must work anywhere.
#pragma once

#include <cstdint>
#include <vector>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace regard::cpu {

struct InstructionSet {
  const char* name;
  const char* lacks;  // why it cannot run here; null: it can
};

// In order of preference, worst first.
inline std::vector<InstructionSet> instruction_sets() {
#if defined(__x86_64__)
  unsigned a = 0, b = 0, c = 0, d = 0;
  __get_cpuid(1, &a, &b, &c, &d);
  const auto bit = [](unsigned word, int n) { return (word >> n & 1u) != 0; };
  const bool v2 = bit(c, 0) && bit(c, 9) && bit(c, 13) && bit(c, 19) && bit(c, 20) && bit(c, 23);  // SSE3 SSSE3 CX16 SSE4.1 SSE4.2 POPCNT
  const bool fma_movbe_f16c = bit(c, 12) && bit(c, 22) && bit(c, 29);
  std::uint64_t saved = 0;  // XCR0: the register states that the system saves
  if (bit(c, 27)) {
    unsigned low = 0, high = 0;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    saved = std::uint64_t{high} << 32 | low;
  }
  unsigned b7 = 0, c7 = 0, d7 = 0, a71 = 0, cl = 0;
  __get_cpuid_count(7, 0, &a, &b7, &c7, &d7);
  unsigned unused_b = 0, unused_c = 0, unused_d = 0;
  __get_cpuid_count(7, 1, &a71, &unused_b, &unused_c, &unused_d);
  __get_cpuid(0x80000001u, &a, &b, &cl, &d);
  const bool v3 = v2 && fma_movbe_f16c && bit(b7, 3) && bit(b7, 5) && bit(b7, 8) && bit(cl, 5);   // BMI1 AVX2 BMI2 LZCNT
  const bool v4 = v3 && bit(b7, 16) && bit(b7, 17) && bit(b7, 28) && bit(b7, 30) && bit(b7, 31);  // AVX-512 F DQ CD BW VL
  const bool tiles = v4 && bit(d7, 22) && bit(d7, 24) && bit(d7, 25) && bit(a71, 5);              // AMX BF16, TILE, INT8; AVX512_BF16
  const bool ymm = (saved & 0x6u) == 0x6u;
  const bool zmm = (saved & 0xe6u) == 0xe6u;
  const bool tile_state = (saved & 0x60000u) == 0x60000u;
  bool permitted = false;
#if defined(__linux__)
  // Linux hands out the 8 KiB of tile state on request only, and answers an error where it cannot.
  constexpr long kArchReqXcompPerm = 0x1023;
  constexpr long kTileData = 18;
  permitted = tiles && zmm && tile_state && syscall(SYS_arch_prctl, kArchReqXcompPerm, kTileData) == 0;
#endif
  const auto state = [](const char* name, bool has, const char* lacks, bool enabled, const char* disabled) {
    return InstructionSet{name, !has ? lacks : !enabled ? disabled : nullptr};
  };
  return {state("baseline", v2, "the processor is older than x86-64-v2", true, nullptr),
          state("avx2", v3, "the processor has no AVX2, FMA and F16C", ymm, "the system does not save AVX registers"),
          state("avx512", v4, "the processor has no AVX-512 (F, BW, DQ, VL)", zmm, "the system does not save AVX-512 registers"),
          state("amx", tiles, "the processor has no AMX tiles", permitted, "the system refuses AMX tile state")};
#else
  return {{"baseline", nullptr}};
#endif
}

}  // namespace regard::cpu
