// What dot-product attention computes: its arguments, their checks, and where each sequence's rows lie.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <tuple>
#include <vector>

#include "core/block_mask.h"
#include "core/key_range.h"
#include "core/philox.h"
#include "core/refusal.h"

namespace regard {

// How the sequences of a batch are stored.
enum class Storage : std::uint8_t {
  separate,  // (batch, heads, len, dim), shorter ones padded
  packed,    // (total, heads, dim), one after another
  paged,     // queries separate; keys and values in pages that a table names
};

// Where a row lies: the index along the first axis of its array, and along the axis of lengths.
struct Place {
  std::int64_t outer;
  std::int64_t position;
};

// How float32 products may be computed: with float32's accuracy, with operands of 16 bits, or of 8.
enum class Precision : std::uint8_t { highest, high, medium };

// What becomes of a score, step by step.
enum class Stage : std::uint8_t { scaled, capped, masked, weights };

struct AttentionProblem {
  Array query;          // [batch, heads, len_q, dim_qk]          packed: [1, heads, total_q, dim_qk]
  Array key;            // [batch, heads_kv, len_kv, dim_qk]      packed: [1, heads_kv, total_kv, dim_qk]
  Array value;          // [batch, heads_kv, len_kv, dim_v]       paged: [pages, heads_kv, page_size, dim]
  Array mask;           // bool, broadcasts to [batch, heads, len_q, len_kv]
  Array bias;           // float32 or the query's dtype, broadcasts likewise
  Array alibi_slopes;   // float32 [heads] or [batch, heads]
  Array sinks;          // float32 [heads]
  Array query_lengths;  // int32 or int64 [batch]
  Array key_lengths;    // int32 or int64 [batch]
  Array cu_seqlens_q;   // packed: int32 or int64 [batch + 1], where each sequence begins, and the end of the last
  Array cu_seqlens_kv;
  Array page_table;    // paged: int32 or int64 [batch, pages of one sequence]
  Array key_scales;    // paged, of int8 or float8: float32 [pages, heads_kv, page_size]
  Array value_scales;  // likewise
  Array out;           // [batch, heads, len_q, dim_v]            packed: [1, heads, total_q, dim_v]
  Array lse;           // float32 [batch, heads, len_q]           packed: [1, heads, total_q]
  Array weights;       // the query's dtype [batch, heads, len_q, len_kv], of packed sequences too: each padded with zeros;
                       // on a CPU 1 in place of heads asks for their mean
  BlockMask block_mask;
  Dropout dropout;

  Storage storage = Storage::separate;
  std::int64_t window_left = kUnlimited;
  std::int64_t window_right = kUnlimited;
  Alignment alignment = Alignment::unspecified;
  double scale = 1;
  double softcap = 0;  // 0: none
  Precision precision = Precision::highest;

  // Checked copies of the index arrays. Ends are lengths of sequences; empty: all full.
  std::vector<std::int64_t> query_ends;
  std::vector<std::int64_t> key_ends;
  std::vector<std::int64_t> query_starts;  // packed: first rows, and the end of the last
  std::vector<std::int64_t> key_starts;
  std::vector<std::int64_t> pages;  // paged: [batch, pages of one sequence]

  // Lengths of packed and paged sequences are those of the longest; where index arrays are on a device, the most that
  // arrays and tables have room for.
  std::int64_t batch() const { return storage == Storage::packed ? sequences_ : query.shape[0]; }
  std::int64_t heads() const { return query.shape[1]; }
  std::int64_t len_q() const { return storage == Storage::packed ? longest_q_ : query.shape[2]; }
  std::int64_t dim_qk() const { return query.shape[3]; }
  std::int64_t heads_kv() const { return key.shape[1]; }
  std::int64_t len_kv() const { return storage == Storage::separate ? key.shape[2] : longest_kv_; }
  std::int64_t dim_v() const { return value.shape[3]; }
  std::int64_t page_size() const { return key.shape[2]; }

  bool banded() const { return window_left != kUnlimited || window_right != kUnlimited; }

  // Rows of sequence b in query, out and lse: all are written, those beyond its length with zeros.
  std::int64_t rows_of(std::int64_t b) const { return storage == Storage::packed ? length(query_starts, b) : query.shape[2]; }

  Place query_place(std::int64_t b, std::int64_t i) const {
    return storage == Storage::packed ? Place{0, query_starts[static_cast<std::size_t>(b)] + i} : Place{b, i};
  }
  Place key_place(std::int64_t b, std::int64_t j) const {
    if (storage == Storage::separate) return {b, j};
    if (storage == Storage::packed) return {0, key_starts[static_cast<std::size_t>(b)] + j};
    return {pages[static_cast<std::size_t>(b * page_table.shape[1] + j / page_size())], j % page_size()};
  }

  // How many of the keys [j, end) follow one another from where key_place() has j.
  std::int64_t keys_together(std::int64_t j, std::int64_t end) const {
    return storage == Storage::paged ? std::min(end - j, page_size() - j % page_size()) : end - j;
  }

  SequenceMask sequence(std::int64_t b) const;

  // Calls f(KeyRange) for the runs of keys of `seen` that the block mask lets query i see.
  template <class F> void for_each_run(std::int64_t b, std::int64_t h, std::int64_t i, KeyRange seen, F&& f) const {
    if (block_mask.present())
      block_mask.for_each_run(b, h, i, seen, f);
    else
      f(seen);
  }

  // From layout (batch, len, heads, dim): views with heads before lengths.
  void swap_sequence_and_heads() {
    for (Array* x : {&query, &key, &value, &out})
      if (x->rank == 4) x->swap_axes(1, 2);
  }

  // The problem whose scores are this one's after `stage`: less of what comes later.
  AttentionProblem up_to(Stage stage) const;

  // Checks the inputs, then makes views of 4 axes of packed and paged arrays, and broadcasts mask, bias and slopes in
  // place. Outputs are checked by check_outputs().
  Refusal check();
  Refusal check_outputs();

 private:
  static std::int64_t length(const std::vector<std::int64_t>& starts, std::int64_t b) {
    return starts[static_cast<std::size_t>(b) + 1] - starts[static_cast<std::size_t>(b)];
  }
  static void add_batch_axis(Array& x) {  // (total, heads, dim) -> (1, heads, total, dim)
    x.swap_axes(0, 1);
    x.insert_axis(0);
  }

  void check_separate(Checker& c) const;
  void check_packed(Checker& c);
  void check_starts(Checker& c, const Array& x, std::int64_t total, const char* argument, std::vector<std::int64_t>& starts) const;
  void check_paged(Checker& c);
  void check_scales(Checker& c, Array& x, const char* argument) const;
  void check_options(Checker& c);

  std::int64_t sequences_ = 0;
  std::int64_t longest_q_ = 0;
  std::int64_t longest_kv_ = 0;
};

inline Refusal AttentionProblem::check() {
  Checker c;
  if (storage == Storage::separate) check_separate(c);
  if (storage == Storage::packed) check_packed(c);
  if (storage == Storage::paged) check_paged(c);
  if (!c.result()) check_options(c);
  return c.result();
}

inline void AttentionProblem::check_separate(Checker& c) const {
  c.floats(query, 4, "query").floats(key, 4, "key").floats(value, 4, "value");
  c.require(key.dtype == query.dtype, rules::kSameDType, "key").require(value.dtype == query.dtype, rules::kSameDType, "value");
  if (c.result()) return;
  const std::int64_t groups = heads_kv();
  c.shape(key, "key", batch(), groups, len_kv(), dim_qk());
  c.require(groups > 0 ? heads() % groups == 0 : heads() == 0, rules::kShape, "key");
  c.shape(value, "value", batch(), groups, len_kv(), dim_v());
}

inline void AttentionProblem::check_starts(Checker& c, const Array& x, std::int64_t total, const char* argument,
                                           std::vector<std::int64_t>& starts) const {
  c.require(x.kind != Array::Kind::array || x.rank != 1 || x.shape[0] > 0, rules::kShape, argument);
  c.integers(x, 1, x.shape[0], argument, starts);
  for (std::size_t b = 0; b < starts.size() && !c.result(); ++b) {
    const std::int64_t least = b == 0 ? 0 : starts[b - 1];
    const std::int64_t most = b == 0 ? 0 : total;
    c.entry(starts[b] >= least && starts[b] <= most, argument, static_cast<std::int64_t>(b));
  }
}

inline void AttentionProblem::check_packed(Checker& c) {
  c.floats(query, 3, "query").floats(key, 3, "key").floats(value, 3, "value");
  c.require(key.dtype == query.dtype, rules::kSameDType, "key").require(value.dtype == query.dtype, rules::kSameDType, "value");
  if (c.result()) return;
  const std::int64_t groups = key.shape[1];
  c.shape(key, "key", key.shape[0], groups, query.shape[2]);
  c.require(groups > 0 ? query.shape[1] % groups == 0 : query.shape[1] == 0, rules::kShape, "key");
  c.shape(value, "value", key.shape[0], groups, value.shape[2]);
  check_starts(c, cu_seqlens_q, query.shape[0], "cu_seqlens_q", query_starts);
  check_starts(c, cu_seqlens_kv, key.shape[0], "cu_seqlens_kv", key_starts);
  c.require(c.result() || cu_seqlens_q.shape[0] == cu_seqlens_kv.shape[0], rules::kShape, "cu_seqlens_kv");
  if (c.result()) return;
  for (Array* x : {&query, &key, &value}) add_batch_axis(*x);
  sequences_ = cu_seqlens_q.shape[0] - 1;
  for (const auto& [longest, starts, x] : {std::tuple{&longest_q_, &query_starts, &query}, std::tuple{&longest_kv_, &key_starts, &key}}) {
    if (starts->empty()) *longest = x->shape[2];
    for (std::size_t b = 1; b < starts->size(); ++b) *longest = std::max(*longest, (*starts)[b] - (*starts)[b - 1]);
  }
}

inline void AttentionProblem::check_paged(Checker& c) {
  c.floats(query, 4, "query");
  for (const auto& [x, name] : {std::pair{&key, "key_pages"}, std::pair{&value, "value_pages"}}) {
    c.require(x->kind == Array::Kind::array, rules::kType, name);
    c.require(is_float(x->dtype) || is_scaled(x->dtype), rules::kDType, name);
    c.require(x->rank == 4, rules::kRank, name);
  }
  c.require(value.dtype == key.dtype, rules::kDType, "value_pages");
  if (c.result()) return;
  key.swap_axes(1, 2);
  value.swap_axes(1, 2);
  const std::int64_t groups = heads_kv();
  c.shape(key, "key_pages", key.shape[0], groups, page_size(), dim_qk());
  c.require(page_size() > 0 && (groups > 0 ? heads() % groups == 0 : heads() == 0), rules::kShape, "key_pages");
  c.shape(value, "value_pages", key.shape[0], groups, page_size(), dim_v());
  check_scales(c, key_scales, "key_scales");
  check_scales(c, value_scales, "value_scales");
  c.integers(page_table, 2, batch(), "page_table", pages);
  if (c.result()) return;
  const std::int64_t width = page_table.shape[1];
  c.require(key_lengths.present(), rules::kType, "key_lengths");
  c.lengths(key_lengths, batch(), width * page_size(), "key_lengths", key_ends);
  if (key_lengths.on_device) longest_kv_ = key.shape[0] > 0 ? width * page_size() : 0;
  for (std::int64_t b = 0; b < batch() && !key_lengths.on_device && !c.result(); ++b) {
    const std::int64_t keys = key_ends[static_cast<std::size_t>(b)];
    longest_kv_ = std::max(longest_kv_, keys);
    // A device's table is not looked at here, and without pages its entries have no range to be held to.
    c.entry(keys == 0 || key.shape[0] > 0 || !page_table.on_device, "key_lengths", b);
    // Entries past a sequence's last page are never read: tables are often padded with -1.
    for (std::int64_t k = 0; k < (keys + page_size() - 1) / page_size() && !page_table.on_device; ++k) {
      const std::int64_t page = pages[static_cast<std::size_t>(b * width + k)];
      c.entry(page >= 0 && page < key.shape[0], "page_table", b * width + k);
    }
  }
}

inline void AttentionProblem::check_scales(Checker& c, Array& x, const char* argument) const {
  if (!is_scaled(key.dtype)) {
    c.require(!x.present(), rules::kUnused, argument);
    return;
  }
  c.require(x.kind == Array::Kind::array, rules::kType, argument);
  c.require(x.dtype == DType::float32, rules::kDType, argument).require(x.rank == 3, rules::kRank, argument);
  if (c.result()) return;
  x.swap_axes(1, 2);
  c.shape(x, argument, key.shape[0], heads_kv(), page_size());
}

inline void AttentionProblem::check_options(Checker& c) {
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
  if (block_mask.present()) {
    const BlockMask& m = block_mask;
    c.require(m.len_q == len_q() && m.len_kv == len_kv() && (m.batch == 1 || m.batch == batch()) && (m.heads == 1 || m.heads == heads()),
              rules::kBroadcast, "mask");
    if (!c.result()) c.adopt(block_mask.check());
  }
  if (alibi_slopes.present()) {
    c.require(alibi_slopes.kind == Array::Kind::array, rules::kType, "alibi_slopes");
    c.require(alibi_slopes.dtype == DType::float32, rules::kDType, "alibi_slopes");
    c.require(alibi_slopes.rank == 1 || alibi_slopes.rank == 2, rules::kRank, "alibi_slopes");
    c.require(alibi_slopes.rank < 1 || alibi_slopes.rank > 2 || alibi_slopes.shape[alibi_slopes.rank - 1] == heads(), rules::kShape,
              "alibi_slopes");
    c.require(alibi_slopes.broadcast_to(scores, 2), rules::kShape, "alibi_slopes");
  }
  if (sinks.present()) {
    c.require(sinks.kind == Array::Kind::array, rules::kType, "sinks");
    c.require(sinks.dtype == DType::float32, rules::kDType, "sinks");
    c.require(sinks.rank == 1, rules::kRank, "sinks").shape(sinks, "sinks", heads());
  }
  c.lengths(query_lengths, batch(), len_q(), "query_lengths", query_ends);
  if (storage != Storage::paged) c.lengths(key_lengths, batch(), len_kv(), "key_lengths", key_ends);
  for (std::int64_t b = 0; b < batch() && storage == Storage::packed && !c.result(); ++b) {
    const auto at = static_cast<std::size_t>(b);
    if (!query_ends.empty() && !query_starts.empty()) c.entry(query_ends[at] <= length(query_starts, b), "query_lengths", b);
    if (!key_ends.empty() && !key_starts.empty()) c.entry(key_ends[at] <= length(key_starts, b), "key_lengths", b);
  }
  c.require(window_left >= kUnlimited && window_right >= kUnlimited, rules::kValue, "window");
  c.require(std::isfinite(scale), rules::kValue, "scale");
  c.require(std::isfinite(softcap) && softcap >= 0, rules::kValue, "softcap");
  c.require(dropout.p >= 0 && dropout.p <= 1, rules::kValue, "dropout_p");
  if (c.result() || alignment != Alignment::unspecified || !(banded() || alibi_slopes.present())) return;
  // Without the sequences' lengths there is no telling: the alignment has to be stated.
  const bool told = !cu_seqlens_q.on_device && !cu_seqlens_kv.on_device && !(storage == Storage::paged && key_lengths.on_device);
  bool same = storage != Storage::separate ? told : len_q() == len_kv();
  for (std::int64_t b = 0; b < batch() && storage != Storage::separate && same; ++b) {
    const SequenceMask s = sequence(b);
    same = s.len_q == s.len_kv;
  }
  c.require(same, rules::kAlignment, "alignment");
}

inline Refusal AttentionProblem::check_outputs() {
  Checker c;
  if (out.present()) {
    const bool packed = storage == Storage::packed;
    c.floats(out, packed ? 3 : 4, "out").like(out, query, packed ? 3 : 4, "out");
    if (packed && !c.result()) add_batch_axis(out);
    c.shape(out, "out", query.shape[0], heads(), query.shape[2], dim_v()).output(out, "out");
  }
  return c.result();
}

inline AttentionProblem AttentionProblem::up_to(Stage stage) const {
  AttentionProblem p = *this;
  if (stage < Stage::weights) p.sinks = Array{};
  if (stage < Stage::masked) {
    p.mask = p.bias = p.alibi_slopes = Array{};
    p.block_mask = BlockMask{};
    p.window_left = p.window_right = kUnlimited;
    p.query_ends.clear();
    p.key_ends.clear();
  }
  if (stage < Stage::capped) p.softcap = 0;
  return p;
}

inline SequenceMask AttentionProblem::sequence(std::int64_t b) const {
  const auto at = static_cast<std::size_t>(b);
  const std::int64_t queries = query_ends.empty() ? rows_of(b) : query_ends[at];
  const std::int64_t keys = !key_ends.empty() ? key_ends[at] : storage == Storage::packed ? length(key_starts, b) : len_kv();
  constexpr std::int64_t beyond = std::int64_t{1} << 60;  // wider than any array, with room to add a position
  return {queries, keys, alignment == Alignment::lower_right ? keys - queries : 0, std::min(window_left, beyond),
          std::min(window_right, beyond)};
}

}  // namespace regard
