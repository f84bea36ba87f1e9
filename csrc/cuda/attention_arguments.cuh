// A dot-product attention problem as kernels get it: plain numbers and pointers, copied with the launch.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "core/attention_problem.h"
#include "cuda/view.cuh"

namespace regard::cuda {

struct AttentionArguments {
  View query;          // [batch, heads, len_q, dim_qk]
  View key;            // [batch, heads_kv, len_kv, dim_qk]
  View value;          // [batch, heads_kv, len_kv, dim_v]
  View mask;           // bool [batch, heads, len_q, len_kv]
  View bias;           // float32 or the query's type, likewise
  View alibi_slopes;   // float [batch, heads]
  View sinks;          // float [heads]
  View out;            // [batch, heads, len_q, dim_v]
  View lse;            // float [batch, heads, len_q]
  View query_lengths;  // [batch]
  View key_lengths;    // [batch]
  bool bias_is_float;
  bool query_lengths_are_wide;  // int64, else int32
  bool key_lengths_are_wide;
  bool lower_right;

  int batch;
  int heads;
  int group;  // query heads that share a key head
  int len_q;
  int len_kv;
  int dim_qk;
  int dim_v;
  int tiles;  // of queries, a head
  std::int64_t left;
  std::int64_t right;
  double scale;
  double softcap;
  Dropout dropout;
  float scale_float;  // scale, and scale * log2(e), rounded: operands of the tensor-core kernel
  float scale_to_exp2;
};

// The lengths' arrays, if any, must be the device's.
inline AttentionArguments arguments_of(const AttentionProblem& p) {
  AttentionArguments a{};
  a.query = view_of(p.query);
  a.key = view_of(p.key);
  a.value = view_of(p.value);
  a.mask = view_of(p.mask);
  a.bias = view_of(p.bias);
  a.alibi_slopes = view_of(p.alibi_slopes);
  a.sinks = view_of(p.sinks);
  a.out = view_of(p.out);
  a.lse = view_of(p.lse);
  a.query_lengths = view_of(p.query_lengths);
  a.key_lengths = view_of(p.key_lengths);
  a.bias_is_float = p.bias.dtype == DType::float32;
  a.query_lengths_are_wide = p.query_lengths.dtype == DType::int64;
  a.key_lengths_are_wide = p.key_lengths.dtype == DType::int64;
  a.lower_right = p.alignment == Alignment::lower_right;
  a.batch = static_cast<int>(p.batch());
  a.heads = static_cast<int>(p.heads());
  a.group = p.heads_kv() > 0 ? static_cast<int>(p.heads() / p.heads_kv()) : 1;
  a.len_q = static_cast<int>(p.len_q());
  a.len_kv = static_cast<int>(p.len_kv());
  a.dim_qk = static_cast<int>(p.dim_qk());
  a.dim_v = static_cast<int>(p.dim_v());
  constexpr std::int64_t beyond = std::int64_t{1} << 60;  // wider than any array, with room to add a position
  a.left = std::min(p.window_left, beyond);
  a.right = std::min(p.window_right, beyond);
  a.scale = p.scale;
  a.softcap = p.softcap;
  a.dropout = p.dropout;
  a.scale_float = static_cast<float>(p.scale);
  a.scale_to_exp2 = static_cast<float>(p.scale * 1.4426950408889634);
  return a;
}

// scale = factor * rest with |rest| in [1, 2): the power goes into Q exactly, so that a product overflows only where the
// scaled score would.
struct SplitScale {
  double factor;
  double rest;
};

inline SplitScale split_scale(double scale) {
  if (scale == 0) return {1, 0};
  int exponent = 0;
  std::frexp(scale, &exponent);
  const double factor = std::ldexp(1.0, std::clamp(exponent - 1, -120, 120));
  return {factor, scale / factor};
}

// A length read on the device is held to its range there: whatever the array says, nothing outside is read.
REGARD_DEVICE std::int64_t length_of(const View& lengths, bool wide, int b, int limit) {
  if (lengths.data == nullptr) return limit;
  const std::int64_t n = wide ? read<std::int64_t>(lengths.at(b)) : read<std::int32_t>(lengths.at(b));
  return n < 0 ? 0 : n > limit ? limit : n;
}

REGARD_DEVICE SequenceMask sequence_of(const AttentionArguments& a, int b) {
  const std::int64_t queries = length_of(a.query_lengths, a.query_lengths_are_wide, b, a.len_q);
  const std::int64_t keys = length_of(a.key_lengths, a.key_lengths_are_wide, b, a.len_kv);
  return {queries, keys, a.lower_right ? keys - queries : 0, a.left, a.right};
}

// Which queries of which head a block has. Late queries see the most keys under a causal mask: they go first.
struct BlockOf {
  int b;
  int h;
  int i0;
};
REGARD_DEVICE BlockOf block_of(const AttentionArguments& a, int item, int queries) {
  const int tile = a.tiles - 1 - item % a.tiles;
  const int head = item / a.tiles;
  return {head / a.heads, head % a.heads, tile * queries};
}

}  // namespace regard::cuda
