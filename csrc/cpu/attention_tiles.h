// The sizes that attention works at.
#pragma once

#include <algorithm>
#include <cstdint>

#include "core/attention_problem.h"
#include "cpu/blocks.h"
#include "cpu/parallel.h"
#include "cpu/tile_simd.h"

namespace regard::cpu {

// Keys a block. The score tile (96 x 48 floats, 18 KiB) and Q^T stay in L1 while K and V stream from L2.
constexpr int kKeys = 96;

// Queries an item, a multiple of every tile's columns: they share one copy of K and V. Fewer for wide heads, so that
// Q^T, out and the copies stay within 1 MiB of L2. As many as `share` times what many cores are given, where every thread
// still has so many items that the last ones do not keep the others waiting: 384 on vector units take 0.97 of the time of 192
// (11 shapes, one thread of a Zen 3: 0.93 for 256 queries of 32 dimensions, 1.01 at most).
inline std::int64_t queries_per_item(const AttentionProblem& p, int share) {
  constexpr std::int64_t kItemsPerThread = 8;
  const std::int64_t dim = std::max(p.dim_qk(), p.dim_v());
  const std::int64_t least = dim <= 128 ? 192 : dim <= 256 ? 96 : 48;
  const std::int64_t queries = p.query.shape[0] * p.query.shape[1] * p.query.shape[2];
  const std::int64_t threads = get_num_threads();
  const std::int64_t wanted = threads > 1 ? kItemsPerThread * threads : 1;
  while (share > 1 && divide_up(queries, share * least) < wanted) share /= 2;
  return share * least;
}

// Sequences of no more queries than this take the path of few rows (attention_rows.h), which reads and widens K and V once for
// all heads that share them, where blocks do so for each. Its time goes by queries, that of blocks by vectors of queries. Of
// the time of blocks (AVX-512 and AVX2, Emerald Rapids), 16 bits take 0.3 to 0.75 with 5 queries and 0.4 to 1.05 with 8; float32
// of 1024 keys and more 0.4 to 0.8 with 5, and with 8 0.55 to 0.95 where heads share keys, else 0.8 to 1.05; float32 of fewer
// keys 0.7 to 0.95 with 5 and up to 1.4 with 8. Heads that share keys have no rule of their own: what one head's bits are
// would hang on the others. Beside a matrix unit none of that was measured: there, only rows that it serves as well go so far.
inline std::int64_t few_queries(DType key, std::int64_t len_kv, bool beside_matrix, bool rows_on_matrix) {
  constexpr std::int64_t kManyKeys = 1024;
  if (beside_matrix) return rows_on_matrix && len_kv >= kManyKeys ? 8 : 4;
  return size_of(key) <= 2 || (size_of(key) == 4 && len_kv >= kManyKeys) ? 8 : 5;
}

// Keys of one split on that path; partial results of splits are merged in order.
constexpr std::int64_t kSplit = 2048;

// How the queries of one sequence are cut into items: equal blocks rather than full ones and a rest, since each item
// copies K and V for itself; and none across two blocks of a block mask, since all of an item's queries see the same runs.
struct QueryBlocks {
  std::int64_t queries;  // of the sequence
  std::int64_t outer;    // queries of one block of the mask, or all
  std::int64_t inner;    // queries of an item
  std::int64_t per_outer;

  QueryBlocks(std::int64_t n, std::int64_t mask_block, std::int64_t most, std::int64_t lanes) : queries(n) {
    outer = mask_block > 0 ? std::min(mask_block, n) : n;
    per_outer = (outer + most - 1) / most;
    inner = per_outer > 0 ? std::min(most, round_up((outer + per_outer - 1) / per_outer, lanes)) : 0;
  }

  std::int64_t count() const { return outer > 0 ? (queries + outer - 1) / outer * per_outer : 0; }
  std::int64_t first(std::int64_t item) const { return item / per_outer * outer + item % per_outer * inner; }
  std::int64_t last(std::int64_t item) const { return std::min({first(item) + inner, (item / per_outer + 1) * outer, queries}); }
};

}  // namespace regard::cpu
