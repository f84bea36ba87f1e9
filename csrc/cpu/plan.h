// The sizes that kernels were built with, for those who only want to know.
#pragma once

#include <cstdint>

#include "core/attention_problem.h"
#include "core/dtype.h"

namespace regard::cpu {

struct TileSizes {
  int vector_bytes;
  int vector_registers;
  int rows;     // of a register tile
  int columns;  // of a register tile
  int chain;    // multiply-adds of one chain
};
TileSizes tile_sizes(DType dtype);

struct AttentionSizes {
  std::int64_t queries_per_item;  // at most
  std::int64_t keys_per_block;
  std::int64_t few_queries;     // sequences of no more than this are split along their keys
  std::int64_t keys_per_split;  // there
  int matrix_products;          // of bfloat16 for each product of numbers; 0: vector units
};
// Reads dtypes, dimensions and precision alone.
AttentionSizes attention_sizes(const AttentionProblem& problem);

}  // namespace regard::cpu
