// A block-sparse mask: for each block of queries, the blocks of keys it sees, as the rows of a CSR matrix.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "core/key_range.h"
#include "core/refusal.h"

namespace regard {

struct BlockMask {
  Array offsets;  // int32 or int64 [batch * heads * rows + 1]
  Array columns;  // int32 or int64 [offsets[-1]], rising within a row

  std::int64_t block_q = 0;  // 0: no block mask
  std::int64_t block_kv = 0;
  std::int64_t batch = 1;  // 1 or the problem's: one axis of 1 serves all
  std::int64_t heads = 1;
  std::int64_t len_q = 0;
  std::int64_t len_kv = 0;

  std::vector<std::int64_t> row_ends;  // checked copies
  std::vector<std::int64_t> blocks;

  bool present() const { return block_q > 0; }
  std::int64_t rows() const { return len_q / block_q + (len_q % block_q != 0 ? 1 : 0); }

  Refusal check() {
    Checker c;
    c.require(block_q > 0 && block_kv > 0 && batch >= 0 && heads >= 0 && len_q >= 0 && len_kv >= 0, rules::kValue, "mask");
    if (c.result()) return c.result();
    c.integers(offsets, 1, batch * heads * rows() + 1, "row_offsets", row_ends);
    c.integers(columns, 1, columns.shape[0], "columns", blocks);
    if (c.result()) return c.result();
    const auto count = static_cast<std::int64_t>(blocks.size());
    const std::int64_t width = len_kv / block_kv + (len_kv % block_kv != 0 ? 1 : 0);
    c.entry(row_ends[0] == 0, "row_offsets", 0);
    for (std::size_t r = 1; r < row_ends.size() && !c.result(); ++r) {
      c.entry(row_ends[r] >= row_ends[r - 1] && row_ends[r] <= count, "row_offsets", static_cast<std::int64_t>(r));
      std::int64_t before = -1;
      for (std::int64_t k = row_ends[r - 1]; k < row_ends[r] && !c.result(); ++k) {
        const std::int64_t column = blocks[static_cast<std::size_t>(k)];
        c.entry(column > before && column < width, "columns", k);
        before = column;
      }
    }
    return c.result();
  }

  // Calls f(KeyRange) for each run of neighbouring blocks that query i sees, clipped to `seen`.
  template <class F> void for_each_run(std::int64_t b, std::int64_t h, std::int64_t i, KeyRange seen, F&& f) const {
    const std::int64_t row = ((batch == 1 ? 0 : b) * heads + (heads == 1 ? 0 : h)) * rows() + i / block_q;
    const std::int64_t* k = blocks.data() + row_ends[static_cast<std::size_t>(row)];
    const std::int64_t* const end = blocks.data() + row_ends[static_cast<std::size_t>(row) + 1];
    while (k < end) {
      const std::int64_t first = *k;
      std::int64_t last = first + 1;
      for (++k; k < end && *k == last; ++k) ++last;
      const KeyRange run{std::max(first * block_kv, seen.first), std::min(last * block_kv, seen.last)};
      if (run.first < run.last) f(run);
    }
  }
};

}  // namespace regard
