// What additive and multiplicative attention compute: their arguments and checks.
#pragma once

#include <cstdint>
#include <vector>

#include "core/refusal.h"

namespace regard {

// softmax_j(v . tanh(query_i w_query^T + key_j w_key^T + bias [+ location_ij w_location^T])) value_j,
// location_ij = location_bias + location_kernel correlated with query i's previous weights around key j.
struct AdditiveProblem {
  Array query;             // [batch, len_q, dim_q]; dim_q = dim without w_query
  Array key;               // [batch, len_kv, dim_k]; dim_k = dim without w_key
  Array value;             // [batch, len_kv, dim_v]
  Array v;                 // [dim]
  Array w_query;           // [dim, dim_q]
  Array w_key;             // [dim, dim_k]
  Array bias;              // [dim]
  Array mask;              // bool, broadcasts to [batch, len_q, len_kv]
  Array key_lengths;       // int32 or int64 [batch]
  Array previous_weights;  // [batch, len_q, channels, len_kv] after check(); see there for what it takes
  Array w_location;        // [dim, filters]
  Array location_kernel;   // [filters, channels, width] after check()
  Array location_bias;     // [filters]
  Array out;               // [batch, len_q, dim_v]
  Array weights;           // [batch, len_q, len_kv]

  bool needs_location = false;

  std::vector<std::int64_t> key_ends;  // checked copy of key_lengths; empty: all full

  std::int64_t batch() const { return query.shape[0]; }
  std::int64_t len_q() const { return query.shape[1]; }
  std::int64_t dim_q() const { return query.shape[2]; }
  std::int64_t len_kv() const { return key.shape[1]; }
  std::int64_t dim_k() const { return key.shape[2]; }
  std::int64_t dim_v() const { return value.shape[2]; }
  std::int64_t dim() const { return v.shape[0]; }
  std::int64_t filters() const { return location_kernel.shape[0]; }
  std::int64_t channels() const { return location_kernel.shape[1]; }
  std::int64_t width() const { return location_kernel.shape[2]; }

  std::int64_t keys_of(std::int64_t b) const { return key_ends.empty() ? len_kv() : key_ends[static_cast<std::size_t>(b)]; }

  // Checks the inputs, then broadcasts mask and previous_weights in place.
  Refusal check();

 private:
  Refusal check_location();
};

// softmax_j(query_i . w key_j) value_j, or query_i . key_j without w.
struct MultiplicativeProblem {
  Array query;        // [batch, len_q, dim_q]
  Array key;          // [batch, len_kv, dim_k]; dim_k = dim_q without w
  Array value;        // [batch, len_kv, dim_v]
  Array w;            // [dim_q, dim_k]
  Array mask;         // bool, broadcasts to [batch, len_q, len_kv]
  Array key_lengths;  // int32 or int64 [batch]
  Array out;          // [batch, len_q, dim_v]
  Array weights;      // [batch, len_q, len_kv]

  std::vector<std::int64_t> key_ends;

  std::int64_t batch() const { return query.shape[0]; }
  std::int64_t len_q() const { return query.shape[1]; }
  std::int64_t dim_q() const { return query.shape[2]; }
  std::int64_t len_kv() const { return key.shape[1]; }
  std::int64_t dim_k() const { return key.shape[2]; }
  std::int64_t dim_v() const { return value.shape[2]; }

  std::int64_t keys_of(std::int64_t b) const { return key_ends.empty() ? len_kv() : key_ends[static_cast<std::size_t>(b)]; }

  Refusal check();
};

namespace detail {

// What both have: three arrays of one dtype and batch, a mask, lengths.
template <class Problem> inline void check_sequences(Problem& p, Checker& c) {
  c.floats(p.query, 3, "query").floats(p.key, 3, "key").floats(p.value, 3, "value");
  c.require(p.key.dtype == p.query.dtype, rules::kSameDType, "key").require(p.value.dtype == p.query.dtype, rules::kSameDType, "value");
  if (c.result()) return;
  c.shape(p.key, "key", p.batch(), p.len_kv(), p.dim_k()).shape(p.value, "value", p.batch(), p.len_kv(), p.dim_v());
  if (p.mask.present()) {
    const std::int64_t scores[] = {p.batch(), p.len_q(), p.len_kv()};
    c.require(p.mask.kind == Array::Kind::array, rules::kType, "mask");
    c.require(p.mask.dtype == DType::boolean, rules::kDType, "mask");
    c.require(p.mask.broadcast_to(scores, 3), rules::kBroadcast, "mask");
  }
  c.lengths(p.key_lengths, p.batch(), p.len_kv(), "key_lengths", p.key_ends);
}

}  // namespace detail

inline Refusal AdditiveProblem::check() {
  Checker c;
  detail::check_sequences(*this, c);
  c.require(v.present(), rules::kType, "v").like(v, query, 1, "v");
  if (c.result()) return c.result();
  c.require(dim() > 0, rules::kShape, "v");
  c.like(w_query, query, 2, "w_query").shape(w_query, "w_query", dim(), dim_q());
  c.like(w_key, query, 2, "w_key").shape(w_key, "w_key", dim(), dim_k());
  c.require(w_query.present() || dim_q() == dim(), rules::kShape, "query");
  c.require(w_key.present() || dim_k() == dim(), rules::kShape, "key");
  c.like(bias, query, 1, "bias").shape(bias, "bias", dim());
  if (c.result() || !needs_location) return c.result();
  return check_location();
}

// previous_weights may be (batch, len_kv) or (batch, len_q, len_kv), one channel; (batch, channels, len_kv) for several,
// the same for every query; or all four axes. location_kernel without its channels has one.
inline Refusal AdditiveProblem::check_location() {
  Checker c;
  c.require(location_kernel.present(), rules::kType, "location_kernel");
  c.like(location_kernel, query, location_kernel.rank == 2 ? 2 : 3, "location_kernel");
  c.require(previous_weights.present(), rules::kType, "previous_weights");
  c.require(w_location.present(), rules::kType, "w_location");
  if (c.result()) return c.result();
  if (location_kernel.rank == 2) location_kernel.insert_axis(1);
  c.require(width() > 0 && channels() > 0, rules::kShape, "location_kernel");
  c.like(w_location, query, 2, "w_location").shape(w_location, "w_location", dim(), filters());
  c.like(location_bias, query, 1, "location_bias").shape(location_bias, "location_bias", filters());

  Array& previous = previous_weights;
  c.require(previous.kind == Array::Kind::array, rules::kType, "previous_weights");
  c.require(previous.dtype == query.dtype, rules::kSameDType, "previous_weights");
  c.require(previous.rank >= 2 && previous.rank <= 4, rules::kRank, "previous_weights");
  if (c.result()) return c.result();
  if (previous.rank == 2) previous.insert_axis(1);
  if (previous.rank == 3) previous.insert_axis(channels() == 1 ? 2 : 1);
  // Only the queries repeat by broadcasting: one channel for two, or one key for all, is a mistake.
  c.require(previous.shape[0] == batch() && previous.shape[2] == channels() && previous.shape[3] == len_kv(), rules::kShape,
            "previous_weights");
  const std::int64_t full[] = {batch(), len_q(), channels(), len_kv()};
  c.require(previous.broadcast_to(full, 4), rules::kShape, "previous_weights");
  return c.result();
}

inline Refusal MultiplicativeProblem::check() {
  Checker c;
  detail::check_sequences(*this, c);
  c.require(dim_q() > 0, rules::kShape, "query");
  c.like(w, query, 2, "w").shape(w, "w", dim_q(), dim_k());
  c.require(w.present() ? dim_k() > 0 : dim_k() == dim_q(), rules::kShape, "key");
  return c.result();
}

}  // namespace regard
