// Asking for memory before it is used.
#pragma once

#include <cstdint>

namespace regard::cpu {

constexpr std::int64_t kLine = 64;

// The line of the caches at p, which need not be memory of ours: to L2, since what comes into L1 pushes out what is worked on
// (a bias cost 1.14 of the plain attention call from L1, and 1.13 from L2). The empty statement is an effect: without
// one, gcc 12 leaves out calls of whatever function does no more than prefetch.
inline void ask_for_line(const void* p) {
  __builtin_prefetch(p, 0, 2);
  asm volatile("");
}
// The same, to be written.
inline void ask_to_write_line(const void* p) {
  __builtin_prefetch(p, 1);
  asm volatile("");
}

// Lines from p on, one every kLine bytes.
inline void ask_for(const char* p, std::int64_t bytes) {
  for (std::int64_t i = 0; i < bytes; i += kLine) ask_for_line(p + i);
}

}  // namespace regard::cpu
