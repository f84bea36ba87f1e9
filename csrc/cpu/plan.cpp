#include "cpu/plan.h"

#include "cpu/attention_tiles.h"
#include "cpu/attention_vector.h"
#include "cpu/simd.h"
#include "cpu/tile_amx.h"
#include "cpu/tile_simd.h"
#ifdef REGARD_MATRIX_TILES
#include "cpu/attention_matrix.h"
#include "cpu/attention_row_tiles.h"
#endif

namespace regard::cpu {

TileSizes tile_sizes(DType dtype) {
  const bool wide = dtype == DType::float64;
  return {kVectorBytes, kVectorRegisters, wide ? Tile<double>::kRows : Tile<float>::kRows,
          wide ? Tile<double>::kColumns : Tile<float>::kColumns, kChain};
}

AttentionSizes attention_sizes(const AttentionProblem& p) {
  AttentionSizes sizes{queries_per_item(p, VectorProducts<float>::kShare), kKeys, few_queries(p.key.dtype, p.len_kv(), false, false),
                       kSplit, 0};
#ifdef REGARD_MATRIX_TILES
  with_matrix_products(p, [&](auto split) {
    using Split = decltype(split);
    sizes.queries_per_item = queries_per_item(p, MatrixProducts<Split>::kShare);
    sizes.few_queries = few_queries(p.key.dtype, p.len_kv(), true, RowTiles::serve(p));
    sizes.matrix_products = Split::kScores.kCount;
  });
#endif
  return sizes;
}

}  // namespace regard::cpu
