// Linear layers whose weights are held in fewer bits, on words of four bytes (linear_words.cpp).
#pragma once

#include "core/linear_problem.h"

namespace regard::cpu {

// Whether a packed problem belongs to linear_words(): weights of int8; or of bfloat16 where x is bfloat16 too and the
// machine multiplies pairs of them on vector units; on matrix tiles those belong to linear_tiles().
bool is_for_words(const LinearProblem& problem);
void linear_words(const LinearProblem& problem);

// PackProblem for Held::bfloat16 and Held::int8.
void pack_words(const PackProblem& problem);

}  // namespace regard::cpu
