// Linear layers on matrix tiles (linear_tiles.cpp).
#pragma once

#include "core/linear_problem.h"
#include "cpu/tile_amx.h"

#ifdef REGARD_MATRIX_TILES
namespace regard::cpu {

// Whether a problem belongs there: x of bfloat16, and a weight of it, packed or as it lies.
bool is_for_tiles(const LinearProblem& problem);
void linear_tiles(const LinearProblem& problem);

}  // namespace regard::cpu
#endif
