// What appending to a cache computes: its arguments and their checks.
#pragma once

#include <cstdint>
#include <vector>

#include "core/refusal.h"
#include "core/rotary_problem.h"

namespace regard {

// Copies new keys, turned by rotary angles where given, and values into the slots of a cache, converted to its dtype.
// int8 and float8 caches hold x / scale, rounded to nearest even; scale = max |x| / 127 (448) of each token and head.
// A token and head that holds NaN or an infinity gets the scale NaN, and 0 for its numbers.
struct AppendProblem {
  Array key;           // [batch, heads_kv, len, dim_qk]
  Array value;         // [batch, heads_kv, len, dim_v]
  Array key_cache;     // [batch, heads_kv, slots, dim_qk]; paged: batch 1, whose slots serve all sequences
  Array value_cache;   // [batch, heads_kv, slots, dim_v]
  Array key_scales;    // float32 [batch, heads_kv, slots], with int8 and float8 only
  Array value_scales;  // likewise
  Array slots;         // int32 or int64 [batch, len]: where each token goes; -1 leaves it out
  RotaryAngles angles;
  bool paged = false;

  std::vector<std::int64_t> places;  // checked copy of slots

  std::int64_t batch() const { return key.shape[0]; }
  std::int64_t heads_kv() const { return key.shape[1]; }
  std::int64_t len() const { return key.shape[2]; }
  std::int64_t dim_qk() const { return key.shape[3]; }
  std::int64_t dim_v() const { return value.shape[3]; }
  std::int64_t capacity() const { return key_cache.shape[2]; }
  std::int64_t place(std::int64_t b, std::int64_t i) const { return places[static_cast<std::size_t>(b * len() + i)]; }

  // From layout (batch, len, heads_kv, dim): views with heads before lengths.
  void swap_sequence_and_heads() {
    for (Array* x : {&key, &value})
      if (x->rank == 4) x->swap_axes(1, 2);
  }

  Refusal check();

 private:
  void check_cache(Checker& c, const Array& cache, const Array& scales, const Array& x, const char* name) const;
};

inline void AppendProblem::check_cache(Checker& c, const Array& cache, const Array& scales, const Array& x, const char* name) const {
  c.require(cache.kind == Array::Kind::array && cache.writable, rules::kWritable, name);
  c.require(is_float(cache.dtype) || is_scaled(cache.dtype), rules::kDType, name);
  c.shape(cache, name, batch(), heads_kv(), capacity(), x.shape[3]);
  c.require(scales.present() == is_scaled(cache.dtype), rules::kType, name);
  c.require(!scales.present() || (scales.dtype == DType::float32 && scales.writable), rules::kDType, name);
  c.shape(scales, name, batch(), heads_kv(), capacity());
}

inline Refusal AppendProblem::check() {
  Checker c;
  c.floats(key, 4, "key").floats(value, 4, "value");
  if (c.result()) return c.result();
  if (paged)
    for (Array* x : {&key_cache, &value_cache, &key_scales, &value_scales}) {
      c.require(!x->present() || x->shape[0] == 1, rules::kShape, "key_cache");
      x->shape[0] = key.shape[0];
      x->stride[0] = 0;
    }
  c.require(key_cache.rank == 4, rules::kRank, "key");
  c.shape(key, "key", key_cache.shape[0], key_cache.shape[1], len(), key_cache.shape[3]);
  c.require(value_cache.rank == 4, rules::kRank, "value");
  c.shape(value, "value", batch(), heads_kv(), len(), value_cache.shape[3]);
  check_cache(c, key_cache, key_scales, key, "key_cache");
  check_cache(c, value_cache, value_scales, value, "value_cache");
  c.require(slots.dtype == DType::int32 || slots.dtype == DType::int64, rules::kDType, "slots");
  c.require(slots.rank == 2, rules::kRank, "slots");
  c.require(slots.shape[0] == batch() && slots.shape[1] == len(), rules::kShape, "key");
  if (c.result()) return c.result();
  if (angles.present())
    if (const Refusal r = angles.check(key.dtype, batch(), len(), dim_qk())) return r;
  places.resize(static_cast<std::size_t>(batch() * len()));
  for (std::int64_t i = 0; i < batch() * len(); ++i) {
    const std::int64_t slot = read_index(slots, slots.at(i / len(), i % len()));
    if (slot < -1 || slot >= capacity()) return {rules::kEntry, "slots", i};
    places[static_cast<std::size_t>(i)] = slot;
  }
  return c.result();
}

}  // namespace regard
