// What a problem's check() answers: fine, or which argument breaks which rule. python/regard/_checks.py words it.
#pragma once

#include <cstdint>
#include <cstring>
#include <vector>

#include "core/array.h"

namespace regard {

struct Refusal {
  const char* rule = nullptr;  // null: nothing is wrong
  const char* argument = nullptr;
  std::int64_t entry = -1;  // for index arrays: the place of the first bad entry
  explicit operator bool() const { return rule != nullptr; }
};

namespace rules {
constexpr const char* kType = "type";             // not an array
constexpr const char* kDType = "dtype";           // not one of the dtypes this argument may have
constexpr const char* kSameDType = "same_dtype";  // must have the dtype of the first array
constexpr const char* kRank = "rank";             // wrong number of axes
constexpr const char* kShape = "shape";           // an axis disagrees with the other arguments
constexpr const char* kBroadcast = "broadcast";   // cannot be broadcast to the named shape
constexpr const char* kWritable = "writable";     // an output that is read-only or has repeated elements
constexpr const char* kValue = "value";           // a number outside its range
constexpr const char* kAlignment = "alignment";   // needed, but not given
constexpr const char* kEntry = "entry";           // an index array holds a number outside its range
constexpr const char* kUnused = "unused";         // given, but the other arguments have no use for it
constexpr const char* kPacked = "packed";         // already inside the packed weight
constexpr const char* kHeld = "held";             // a weight that cannot be held in so few bits
}  // namespace rules

// One entry, at `p`, of an index array of int32 or int64.
inline std::int64_t read_index(const Array& x, const char* p) {
  std::int64_t entry = 0;
  std::int32_t narrow = 0;
  if (x.dtype == DType::int64) {
    std::memcpy(&entry, p, sizeof entry);
    return entry;
  }
  std::memcpy(&narrow, p, sizeof narrow);
  return narrow;
}

// A check, one condition a line: each call after the first failure is ignored.
class Checker {
 public:
  Checker& require(bool ok, const char* rule, const char* argument) {
    if (!refusal_ && !ok) refusal_ = {rule, argument};
    return *this;
  }

  // Copies an index array of `n` rows (or entries) once: what is checked afterwards is the copy, which nobody else can
  // change. One on a device leaves the copy empty: kernels hold its entries to their range.
  Checker& integers(const Array& x, int rank, std::int64_t n, const char* argument, std::vector<std::int64_t>& copy) {
    require(x.kind == Array::Kind::array, rules::kType, argument);
    require(x.dtype == DType::int32 || x.dtype == DType::int64, rules::kDType, argument);
    require(x.rank == rank, rules::kRank, argument);
    require(x.shape[0] == n, rules::kShape, argument);
    if (refusal_ || x.on_device) return *this;
    const std::int64_t rows = rank == 2 ? x.shape[0] : 1;
    const std::int64_t columns = x.shape[rank - 1];
    copy.resize(static_cast<std::size_t>(rows * columns));
    for (std::int64_t r = 0; r < rows; ++r)
      for (std::int64_t i = 0; i < columns; ++i) {
        const char* const from = x.data + (rank == 2 ? r * x.stride[0] : 0) + i * x.stride[rank - 1];
        copy[static_cast<std::size_t>(r * columns + i)] = read_index(x, from);
      }
    return *this;
  }

  // Says which entry of a copied index array is wrong.
  Checker& entry(bool ok, const char* argument, std::int64_t place) {
    if (!refusal_ && !ok) refusal_ = {rules::kEntry, argument, place};
    return *this;
  }

  // `n` lengths, each from 0 to `limit`. Absent is fine: full lengths.
  Checker& lengths(const Array& x, std::int64_t n, std::int64_t limit, const char* argument, std::vector<std::int64_t>& copy) {
    if (!x.present()) return *this;
    integers(x, 1, n, argument, copy);
    if (refusal_ || x.on_device) return *this;
    for (std::int64_t i = 0; i < n; ++i) {
      const std::int64_t length = copy[static_cast<std::size_t>(i)];
      entry(length >= 0 && length <= limit, argument, i);
    }
    return *this;
  }

  // An input of floats, of exactly this rank.
  Checker& floats(const Array& x, int rank, const char* argument) {
    require(x.kind == Array::Kind::array, rules::kType, argument);
    require(is_float(x.dtype), rules::kDType, argument);
    return require(x.rank == rank, rules::kRank, argument);
  }

  // A further input that must have the dtype of `first`. Absent is fine: arguments that are needed are not optional.
  Checker& like(const Array& x, const Array& first, int rank, const char* argument) {
    if (!x.present()) return *this;
    require(x.kind == Array::Kind::array, rules::kType, argument);
    require(x.dtype == first.dtype, rules::kSameDType, argument);
    return require(x.rank == rank, rules::kRank, argument);
  }

  // x.shape == expected; call after floats() or like(), which fix the rank.
  template <class... Length> Checker& shape(const Array& x, const char* argument, Length... expected) {
    if (!x.present() || refusal_) return *this;
    const std::int64_t lengths[] = {static_cast<std::int64_t>(expected)...};
    bool ok = x.rank == static_cast<int>(sizeof...(expected));
    for (int a = 0; ok && a < x.rank; ++a) ok = x.shape[a] == lengths[a];
    return require(ok, rules::kShape, argument);
  }

  Checker& output(const Array& x, const char* argument) {
    if (!x.present()) return *this;
    return require(x.writable && (refusal_ || !x.repeats()), rules::kWritable, argument);
  }

  // The answer of a part's own check.
  Checker& adopt(const Refusal& r) {
    if (!refusal_) refusal_ = r;
    return *this;
  }

  Refusal result() const { return refusal_; }

 private:
  Refusal refusal_;
};

}  // namespace regard
