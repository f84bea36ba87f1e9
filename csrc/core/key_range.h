// Which keys a query may see by its position: windows (causal is one with no right side), alignment, lengths.
#pragma once

#include <algorithm>
#include <cstdint>

namespace regard {

enum class Alignment : std::uint8_t { unspecified, upper_left, lower_right };

constexpr std::int64_t kUnlimited = -1;

// The keys [first, last).
struct KeyRange {
  std::int64_t first;
  std::int64_t last;
};

// Lengths of one sequence, its diagonal, and what each of its queries may see. Device code calls it too.
struct SequenceMask {
  std::int64_t len_q;
  std::int64_t len_kv;
  std::int64_t diagonal;  // j - i on the diagonal
  std::int64_t left;
  std::int64_t right;

  constexpr KeyRange keys_of(std::int64_t i) const {
    if (i >= len_q) return {0, 0};
    const std::int64_t centre = i + diagonal;
    const std::int64_t first = left == kUnlimited ? 0 : std::max<std::int64_t>(0, centre - left);
    const std::int64_t last = right == kUnlimited ? len_kv : std::min(len_kv, centre + right + 1);
    return {std::min(first, len_kv), std::max(last, std::min(first, len_kv))};
  }

  // The keys that any of the queries [i0, i1) may see, and those that all of them see.
  constexpr KeyRange seen_by_any(std::int64_t i0, std::int64_t i1) const {
    const std::int64_t end = std::min(i1, len_q);
    if (i0 >= end) return {0, 0};
    return {keys_of(i0).first, keys_of(end - 1).last};
  }
  constexpr KeyRange seen_by_all(std::int64_t i0, std::int64_t i1) const {
    if (i1 > len_q) return {0, 0};
    return {keys_of(i1 - 1).first, keys_of(i0).last};
  }
};

}  // namespace regard
