// Sizes of blocks and of the rows copied into them.
#pragma once

#include <algorithm>
#include <cstdint>

namespace regard::cpu {

inline std::int64_t divide_up(std::int64_t n, std::int64_t by) { return (n + by - 1) / by; }
inline std::int64_t round_up(std::int64_t n, std::int64_t to) { return divide_up(n, to) * to; }

// Row length of a copied block: whole vectors, and an odd number of cache lines, so that rows spread over all L1 sets.
template <class T> std::int64_t row_length(std::int64_t n) {
  constexpr std::int64_t line = 64 / sizeof(T);
  return (divide_up(std::max<std::int64_t>(n, 1), line) | 1) * line;
}

}  // namespace regard::cpu
