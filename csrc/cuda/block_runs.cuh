// A block mask on the device: the rows of a CSR matrix, searched where a tile or a key asks.
#pragma once

#include <climits>

#include "core/block_mask.h"
#include "cuda/types.cuh"

namespace regard::cuda {

struct BlockRuns {
  const std::int64_t* row_ends;  // [batch * heads * rows + 1]; null: no block mask
  const std::int64_t* columns;   // rising within a row
  int block_q;
  int block_kv;
  int rows;
  int batch;  // 1: one axis serves all
  int heads;

  constexpr bool present() const { return row_ends != nullptr; }
  REGARD_DEVICE std::int64_t row_of(int b, int h, int block) const {
    return (static_cast<std::int64_t>(batch == 1 ? 0 : b) * heads + (heads == 1 ? 0 : h)) * rows + block;
  }
  // Of a row, the place of the first column from `column` on.
  REGARD_DEVICE std::int64_t place_of(std::int64_t row, int column) const {
    std::int64_t low = row_ends[row];
    std::int64_t high = row_ends[row + 1];
    while (low < high) {
      const std::int64_t middle = (low + high) / 2;
      if (columns[middle] < column)
        low = middle + 1;
      else
        high = middle;
    }
    return low;
  }
  REGARD_DEVICE bool sees(int b, int h, int i, int j) const {
    const std::int64_t row = row_of(b, h, i / block_q);
    const std::int64_t at = place_of(row, j / block_kv);
    return at < row_ends[row + 1] && columns[at] == j / block_kv;
  }

  // The first key from j on whose block any of the queries [i0, i1) sees; INT_MAX where there is none.
  REGARD_DEVICE int next(int b, int h, int i0, int i1, int j) const {
    std::int64_t nearest = INT_MAX;
    for (int block = i0 / block_q; block <= (i1 - 1) / block_q; ++block) {
      const std::int64_t row = row_of(b, h, block);
      const std::int64_t at = place_of(row, j / block_kv);
      if (at == row_ends[row + 1]) continue;
      const std::int64_t first = columns[at] * block_kv;
      nearest = first < nearest ? first : nearest;
    }
    return nearest < j ? j : static_cast<int>(nearest);
  }

  // Whether all of the queries [i0, i1) see all of the keys [j0, j1).
  REGARD_DEVICE bool all(int b, int h, int i0, int i1, int j0, int j1) const {
    const int first = j0 / block_kv;
    const int more = (j1 - 1) / block_kv - first;
    for (int block = i0 / block_q; block <= (i1 - 1) / block_q; ++block) {
      const std::int64_t row = row_of(b, h, block);
      const std::int64_t at = place_of(row, first);
      if (at + more >= row_ends[row + 1] || columns[at] != first || columns[at + more] != first + more) return false;
    }
    return true;
  }
};

}  // namespace regard::cuda
