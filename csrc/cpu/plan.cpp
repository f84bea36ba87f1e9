#include "cpu/plan.h"

#include <algorithm>

#include "cpu/attention_tiles.h"
#include "cpu/simd.h"
#include "cpu/tile_simd.h"

namespace regard::cpu {

TileSizes tile_sizes(DType dtype) {
  const bool wide = dtype == DType::float64;
  return {kVectorBytes, kVectorRegisters, wide ? Tile<double>::kRows : Tile<float>::kRows,
          wide ? Tile<double>::kColumns : Tile<float>::kColumns, kChain};
}

AttentionSizes attention_sizes(std::int64_t dim_qk, std::int64_t dim_v) {
  return {queries_per_item(std::max(dim_qk, dim_v)), kKeys, kFewQueries, kSplit};
}

}  // namespace regard::cpu
