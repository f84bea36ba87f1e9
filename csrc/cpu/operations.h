// The operations of one instruction set's build, each for a problem whose check() has passed.
#pragma once

#include "core/additive_problem.h"
#include "core/append_problem.h"
#include "core/attention_problem.h"
#include "core/linear_problem.h"
#include "core/merge_problem.h"
#include "core/norm_problem.h"
#include "core/rotary_problem.h"
#include "core/channel_problem.h"
#include "core/recurrent_problem.h"

namespace regard::cpu {

void additive_attention(const AdditiveProblem& problem);
void attention_forward(const AttentionProblem& problem);
void attention_weights(const AttentionProblem& problem, Stage stage);
void cache_append(const AppendProblem& problem);
void linear(const LinearProblem& problem);
void merge_attention(const MergeProblem& problem);
void multiplicative_attention(const MultiplicativeProblem& problem);
void norm(const NormProblem& problem);
void pack_linear(const PackProblem& problem);
void rotary(const RotaryProblem& problem);
void pack_recurrent(const PackRecurrentProblem& problem);
void recurrent(const RecurrentProblem& problem);
void global_pool(const PoolProblem& problem);
void squeeze_excitation(const ChannelProblem& problem);
void channel_attention(const ChannelProblem& problem);
void spatial_attention(const ChannelProblem& problem);
void cbam(const ChannelProblem& problem);

}  // namespace regard::cpu
