// A dot-product attention problem as kernels get it: plain numbers and pointers, copied with the launch.
//
// Index arrays may come from the device unchecked. Kernels hold each entry to its range: whatever it says, nothing outside
// the arrays is touched.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "core/attention_problem.h"
#include "cuda/block_runs.cuh"
#include "cuda/view.cuh"

namespace regard::cuda {

constexpr int kMostTileKeys = 128;  // of a tile, in any kernel

struct AttentionArguments {
  View query;              // [batch, heads, len_q, dim_qk]          packed: [1, heads, total_q, dim_qk], as out and lse
  View key;                // [batch, heads_kv, len_kv, dim_qk]      packed: [1, heads_kv, total_kv, dim_qk]
  View value;              // [batch, heads_kv, len_kv, dim_v]       paged: [pages, heads_kv, page_size, dim]
  View tile_key;           // key and value as the tensor-core kernel fetches them: rows in chunks of 16 bytes,
  View tile_value;         // of the query's type
  View key_scales;         // float [pages, heads_kv, page_size], of int8 and float8 keys
  View value_scales;       // likewise
  View mask;               // bool [batch, heads, len_q, len_kv]
  View bias;               // float32 or the query's type, likewise
  View alibi_slopes;       // float [batch, heads]
  View sinks;              // float [heads]
  View out;                // [batch, heads, len_q, dim_v]
  View lse;                // float [batch, heads, len_q]
  View weights;            // [batch, heads, len_q, len_kv]
  const char* additive_v;  // [dim_qk] in the compute type: scores are v . tanh(query + key); or null
  Indices query_starts;    // packed: [batch + 1]
  Indices key_starts;
  Indices page_table;     // paged: [batch, pages of one sequence]
  Indices query_lengths;  // [batch]
  Indices key_lengths;
  BlockRuns blocks;
  DType type;      // of query
  DType out_type;  // of out and weights
  DType stored;    // of key and value
  DType bias_type;
  bool lower_right;
  bool tiles_are_paged;

  int batch;
  int heads;
  int group;   // query heads that share a key head
  int len_q;   // packed: of all sequences together
  int len_kv;  // likewise
  int dim_qk;
  int dim_v;
  int pages;
  int page_size;
  int weights_q;  // queries and keys that the weights have room for
  int weights_kv;
  int tiles;  // of queries, a head
  int few;    // packed sequences of up to so many queries are the splitting kernel's
  std::int64_t left;
  std::int64_t right;
  double scale;
  double softcap;
  Dropout dropout;
  std::uint64_t dropout_least;  // words from here on keep a weight
  float dropout_kept;           // what is kept is multiplied by it
  float scale_float;            // scale, and scale * log2(e), rounded: operands of the tensor-core kernel
  float scale_to_exp2;
};

// The index arrays, if any, must be the device's.
inline AttentionArguments arguments_of(const AttentionProblem& p) {
  AttentionArguments a{};
  a.query = view_of(p.query);
  a.key = view_of(p.key);
  a.value = view_of(p.value);
  a.tile_key = a.key;
  a.tile_value = a.value;
  a.key_scales = view_of(p.key_scales);
  a.value_scales = view_of(p.value_scales);
  a.mask = view_of(p.mask);
  a.bias = view_of(p.bias);
  a.alibi_slopes = view_of(p.alibi_slopes);
  a.sinks = view_of(p.sinks);
  a.out = view_of(p.out);
  a.lse = view_of(p.lse);
  a.weights = view_of(p.weights);
  a.query_starts = indices_of(p.cu_seqlens_q);
  a.key_starts = indices_of(p.cu_seqlens_kv);
  a.page_table = indices_of(p.page_table);
  a.query_lengths = indices_of(p.query_lengths);
  if (const BlockMask& m = p.block_mask; m.present()) {
    a.blocks = {reinterpret_cast<const std::int64_t*>(view_of(m.offsets).data),
                reinterpret_cast<const std::int64_t*>(view_of(m.columns).data),
                static_cast<int>(std::min<std::int64_t>(m.block_q, kMostElements)),
                static_cast<int>(std::min<std::int64_t>(m.block_kv, kMostElements)),
                static_cast<int>(m.rows()),
                static_cast<int>(m.batch),
                static_cast<int>(m.heads)};
  }
  a.key_lengths = indices_of(p.key_lengths);
  a.type = p.query.dtype;
  a.out_type = p.out.dtype;
  a.stored = p.key.dtype;
  a.bias_type = p.bias.dtype;
  a.lower_right = p.alignment == Alignment::lower_right;
  a.tiles_are_paged = p.storage == Storage::paged;
  a.batch = static_cast<int>(p.batch());
  a.heads = static_cast<int>(p.heads());
  a.group = p.heads_kv() > 0 ? static_cast<int>(p.heads() / p.heads_kv()) : 1;
  a.len_q = static_cast<int>(p.query.shape[2]);
  a.len_kv = static_cast<int>(p.storage == Storage::packed ? p.key.shape[2] : p.len_kv());
  a.dim_qk = static_cast<int>(p.dim_qk());
  a.dim_v = static_cast<int>(p.dim_v());
  a.pages = static_cast<int>(p.key.shape[0]);
  a.page_size = static_cast<int>(p.page_size());
  a.weights_q = static_cast<int>(p.len_q());
  a.weights_kv = static_cast<int>(p.len_kv());
  constexpr std::int64_t beyond = std::int64_t{1} << 60;  // wider than any array, with room to add a position
  a.left = std::min(p.window_left, beyond);
  a.right = std::min(p.window_right, beyond);
  a.scale = p.scale;
  a.softcap = p.softcap;
  a.dropout = p.dropout;
  a.dropout_least = p.dropout.threshold();
  a.dropout_kept = static_cast<float>(p.dropout.kept_scale());
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

// ---- Where rows lie -------------------------------------------------------------------------------------------------

// The first row of packed sequence b; `batch` is what lies behind the last one: a sequence that sees nothing.
REGARD_DEVICE int start_of(const Indices& starts, int b, int batch, int total) {
  if (!starts.present() || b == 0) return 0;
  return b > batch ? total : static_cast<int>(held(starts.at(b), 0, total));
}
REGARD_DEVICE int first_query(const AttentionArguments& a, int b) { return start_of(a.query_starts, b, a.batch, a.len_q); }
REGARD_DEVICE int first_key(const AttentionArguments& a, int b) { return start_of(a.key_starts, b, a.batch, a.len_kv); }

// Rows of sequence b in query, out and lse, and in key and value.
REGARD_DEVICE int packed_rows(const Indices& starts, int b, int batch, int total) {
  const int rows = start_of(starts, b + 1, batch, total) - start_of(starts, b, batch, total);
  return rows < 0 ? 0 : rows;
}
REGARD_DEVICE int query_rows(const AttentionArguments& a, int b) {
  return a.query_starts.present() ? packed_rows(a.query_starts, b, a.batch, a.len_q) : a.len_q;
}
REGARD_DEVICE int key_rows(const AttentionArguments& a, int b) {
  return a.key_starts.present() ? packed_rows(a.key_starts, b, a.batch, a.len_kv) : a.len_kv;
}

// Query i of sequence b in query, out or lse.
template <class... Index> REGARD_DEVICE char* query_row(const AttentionArguments& a, const View& x, int b, int h, int i, Index... more) {
  return x.at(b, h, first_query(a, b) + i, more...);
}

// Key j of sequence b in key, value or their scales.
REGARD_DEVICE int page_of(const AttentionArguments& a, int b, int j) {
  return static_cast<int>(held(a.page_table.at(b, j / a.page_size), 0, a.pages - 1));
}
REGARD_DEVICE char* paged_row(const AttentionArguments& a, const View& x, int b, int h, int j) {
  return x.at(page_of(a, b, j), h, j % a.page_size);
}
REGARD_DEVICE char* key_row(const AttentionArguments& a, const View& x, int b, int h, int j) {
  return a.page_table.present() ? paged_row(a, x, b, h, j) : x.at(b, h, first_key(a, b) + j);
}

// What 1 in a row of int8 or float8 is worth.
REGARD_DEVICE float row_scale(const AttentionArguments& a, const View& scales, int b, int h, int j) {
  return scales.data != nullptr ? read<float>(key_row(a, scales, b, h, j)) : 1.0f;
}

REGARD_DEVICE SequenceMask sequence_of(const AttentionArguments& a, int b) {
  if (b == a.batch) return {0, 0, 0, a.left, a.right};  // the rows behind packed sequences
  const std::int64_t queries = length_of(a.query_lengths, b, query_rows(a, b));
  const std::int64_t keys = length_of(a.key_lengths, b, key_rows(a, b));
  return {queries, keys, a.lower_right ? keys - queries : 0, a.left, a.right};
}

// Which queries of which head a block has: [i0, rows) and on, or none.
struct BlockOf {
  int b;
  int h;
  int i0;
  int rows;  // of the whole sequence
};

// Late queries see the most keys under a causal mask: they go first. Packed sequence b has the tiles from
// first row / queries + b on: as many as it can need, and none of another's.
REGARD_DEVICE BlockOf block_of(const AttentionArguments& a, int item, int queries) {
  const int tile = a.tiles - 1 - item % a.tiles;
  const int head = item / a.tiles;
  if (!a.query_starts.present()) return {head / a.heads, head % a.heads, tile * queries, a.len_q};
  int b = 0;
  for (int high = a.batch; b < high;) {
    const int middle = (b + high + 1) / 2;
    if (first_query(a, middle) / queries + middle <= tile)
      b = middle;
    else
      high = middle - 1;
  }
  const int rows = query_rows(a, b);
  return {b, head, (tile - first_query(a, b) / queries - b) * queries, b < a.batch && rows <= a.few ? 0 : rows};
}

}  // namespace regard::cuda
