// What dot-product attention computes: its arguments, their checks, and which keys a query may see.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "core/refusal.h"

namespace regard {

enum class Alignment : std::uint8_t { unspecified, upper_left, lower_right };

// The keys [first, last) that one query may see before any boolean mask.
struct KeyRange {
  std::int64_t first;
  std::int64_t last;
};

constexpr std::int64_t kUnlimited = -1;

struct SequenceMask;

struct AttentionProblem {
  Array query;          // [batch, heads, len_q, dim_qk]
  Array key;            // [batch, heads_kv, len_kv, dim_qk]
  Array value;          // [batch, heads_kv, len_kv, dim_v]
  Array mask;           // bool, broadcasts to [batch, heads, len_q, len_kv]
  Array bias;           // float32 or the query's dtype, broadcasts likewise
  Array alibi_slopes;   // float32 [heads] or [batch, heads]
  Array sinks;          // float32 [heads]
  Array query_lengths;  // int32 or int64 [batch]
  Array key_lengths;    // int32 or int64 [batch]
  Array out;            // [batch, heads, len_q, dim_v]
  Array lse;            // float32 [batch, heads, len_q]

  std::int64_t window_left = kUnlimited;
  std::int64_t window_right = kUnlimited;
  Alignment alignment = Alignment::unspecified;
  double scale = 1;
  double softcap = 0;  // 0: none

  std::vector<std::int64_t> query_ends;  // checked copies of query_lengths and key_lengths; empty: all full
  std::vector<std::int64_t> key_ends;

  std::int64_t batch() const { return query.shape[0]; }
  std::int64_t heads() const { return query.shape[1]; }
  std::int64_t len_q() const { return query.shape[2]; }
  std::int64_t dim_qk() const { return query.shape[3]; }
  std::int64_t heads_kv() const { return key.shape[1]; }
  std::int64_t len_kv() const { return key.shape[2]; }
  std::int64_t dim_v() const { return value.shape[3]; }

  bool banded() const { return window_left != kUnlimited || window_right != kUnlimited; }

  SequenceMask sequence(std::int64_t b) const;

  // From layout (batch, len, heads, dim): views with heads before lengths.
  void swap_sequence_and_heads() {
    for (Array* x : {&query, &key, &value, &out})
      if (x->rank == 4) x->swap_axes(1, 2);
  }

  // Checks the inputs, then broadcasts mask, bias and slopes in place. Outputs are checked by check_outputs().
  Refusal check();
  Refusal check_outputs() const;
};

inline Refusal AttentionProblem::check() {
  Checker c;
  c.floats(query, 4, "query").floats(key, 4, "key").floats(value, 4, "value");
  c.require(key.dtype == query.dtype, rules::kSameDType, "key").require(value.dtype == query.dtype, rules::kSameDType, "value");
  if (c.result()) return c.result();
  const std::int64_t groups = heads_kv();
  c.shape(key, "key", batch(), groups, len_kv(), dim_qk());
  c.require(groups > 0 ? heads() % groups == 0 : heads() == 0, rules::kShape, "key");
  c.shape(value, "value", batch(), groups, len_kv(), dim_v());
  c.require(dim_qk() > 0, rules::kShape, "query");

  const std::int64_t scores[] = {batch(), heads(), len_q(), len_kv()};
  if (mask.present()) {
    c.require(mask.kind == Array::Kind::array, rules::kType, "mask");
    c.require(mask.dtype == DType::boolean, rules::kDType, "mask");
    c.require(mask.broadcast_to(scores, 4), rules::kBroadcast, "mask");
  }
  if (bias.present()) {
    c.require(bias.kind == Array::Kind::array, rules::kType, "bias");
    c.require(bias.dtype == DType::float32 || bias.dtype == query.dtype, rules::kDType, "bias");
    c.require(bias.broadcast_to(scores, 4), rules::kBroadcast, "bias");
  }
  if (alibi_slopes.present()) {
    c.require(alibi_slopes.kind == Array::Kind::array, rules::kType, "alibi_slopes");
    c.require(alibi_slopes.dtype == DType::float32, rules::kDType, "alibi_slopes");
    c.require(alibi_slopes.rank == 1 || alibi_slopes.rank == 2, rules::kRank, "alibi_slopes");
    c.require(alibi_slopes.rank < 1 || alibi_slopes.shape[alibi_slopes.rank - 1] == heads(), rules::kShape, "alibi_slopes");
    c.require(alibi_slopes.broadcast_to(scores, 2), rules::kShape, "alibi_slopes");
  }
  if (sinks.present()) {
    c.require(sinks.kind == Array::Kind::array, rules::kType, "sinks");
    c.require(sinks.dtype == DType::float32, rules::kDType, "sinks");
    c.require(sinks.rank == 1, rules::kRank, "sinks").shape(sinks, "sinks", heads());
  }
  c.lengths(query_lengths, batch(), len_q(), "query_lengths", query_ends);
  c.lengths(key_lengths, batch(), len_kv(), "key_lengths", key_ends);
  c.require(window_left >= kUnlimited && window_right >= kUnlimited, rules::kValue, "window");
  c.require(std::isfinite(scale), rules::kValue, "scale");
  c.require(std::isfinite(softcap) && softcap >= 0, rules::kValue, "softcap");
  c.require(len_q() == len_kv() || alignment != Alignment::unspecified || !(banded() || alibi_slopes.present()), rules::kAlignment,
            "alignment");
  return c.result();
}

inline Refusal AttentionProblem::check_outputs() const {
  Checker c;
  if (out.present()) {
    c.floats(out, 4, "out").like(out, query, 4, "out").shape(out, "out", batch(), heads(), len_q(), dim_v()).output(out, "out");
  }
  if (lse.present()) c.shape(lse, "lse", batch(), heads(), len_q()).output(lse, "lse");
  return c.result();
}

// Lengths of one sequence, its diagonal, and what each of its queries may see.
struct SequenceMask {
  std::int64_t len_q;
  std::int64_t len_kv;
  std::int64_t diagonal;  // j - i on the diagonal
  std::int64_t left;
  std::int64_t right;

  KeyRange keys_of(std::int64_t i) const {
    if (i >= len_q) return {0, 0};
    const std::int64_t centre = i + diagonal;
    const std::int64_t first = left == kUnlimited ? 0 : std::max<std::int64_t>(0, centre - left);
    const std::int64_t last = right == kUnlimited ? len_kv : std::min(len_kv, centre + right + 1);
    return {std::min(first, len_kv), std::max(last, std::min(first, len_kv))};
  }

  // The keys that any of the queries [i0, i1) may see, and those that all of them see.
  KeyRange seen_by_any(std::int64_t i0, std::int64_t i1) const {
    const std::int64_t end = std::min(i1, len_q);
    if (i0 >= end) return {0, 0};
    return {keys_of(i0).first, keys_of(end - 1).last};
  }
  KeyRange seen_by_all(std::int64_t i0, std::int64_t i1) const {
    if (i1 > len_q) return {0, 0};
    return {keys_of(i1 - 1).first, keys_of(i0).last};
  }
};

inline SequenceMask AttentionProblem::sequence(std::int64_t b) const {
  const std::int64_t queries = query_ends.empty() ? len_q() : query_ends[static_cast<std::size_t>(b)];
  const std::int64_t keys = key_ends.empty() ? len_kv() : key_ends[static_cast<std::size_t>(b)];
  constexpr std::int64_t beyond = std::int64_t{1} << 60;  // wider than any array, with room to add a position
  return {queries, keys, alignment == Alignment::lower_right ? keys - queries : 0, std::min(window_left, beyond),
          std::min(window_right, beyond)};
}

}  // namespace regard
