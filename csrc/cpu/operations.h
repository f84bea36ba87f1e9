// The operations of one instruction set's build, each for a problem whose check() has passed.
#pragma once

#include "core/attention_problem.h"

namespace regard::cpu {

void attention_forward(const AttentionProblem& problem);

}  // namespace regard::cpu
