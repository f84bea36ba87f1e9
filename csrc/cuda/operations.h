// The operations that this backend offers. Host code only; nothing here waits for the device.
#pragma once

#include <cstdint>
#include <functional>

#include "core/additive_problem.h"
#include "core/append_problem.h"
#include "core/attention_problem.h"
#include "core/channel_problem.h"
#include "core/linear_problem.h"
#include "core/merge_problem.h"
#include "core/norm_problem.h"
#include "core/recurrent_problem.h"
#include "core/rotary_problem.h"
#include "cuda/runtime.h"

namespace regard::cuda {

// Where an operation runs.
struct Queue {
  int device = 0;
  Stream stream = nullptr;
  // Device memory of that many bytes, aligned to 16, that lasts until the stream has passed this call.
  std::function<char*(std::int64_t)> scratch;
};

// The problem's arrays, index arrays included, are the device's.
void attention_forward(const AttentionProblem& problem, const Queue& queue);

// The problem's weights become its scores after a stage before the last.
void attention_scores(const AttentionProblem& problem, Stage stage, const Queue& queue);

void additive_attention(const AdditiveProblem& problem, const Queue& queue);
void multiplicative_attention(const MultiplicativeProblem& problem, const Queue& queue);

void rotary(const RotaryProblem& problem, const Queue& queue);
void merge_attention(const MergeProblem& problem, const Queue& queue);
void cache_append(const AppendProblem& problem, const Queue& queue);

void global_pool(const PoolProblem& problem, const Queue& queue);

// Squeeze-and-excitation, ECA, and CBAM's parts: what the problem has of excitation and w_spatial. out may be x itself.
void weigh_map(const ChannelProblem& problem, const Queue& queue);

// What follows the product of a linear layer, which is given: bias, activation, residual. out may be the product itself.
void finish_linear(const LinearProblem& problem, const Array& product, const Queue& queue);

// Linear layers whose problem has `scale`; and rows as bytes, [rows, byte_row(length)], each with a scale.
void linear_bytes(const LinearProblem& problem, const Queue& queue);
void quantise_rows(const Array& x, char* bytes, float* scales, const Queue& queue);

void norm(const NormProblem& problem, const Queue& queue);

// Of weights that are not packed.
void recurrent(const RecurrentProblem& problem, const Queue& queue);

}  // namespace regard::cuda
