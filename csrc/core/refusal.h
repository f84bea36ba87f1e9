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
constexpr const char* kPacked = "packed";         // already inside the packed weight
}  // namespace rules

// A check, one condition a line: each call after the first failure is ignored.
class Checker {
 public:
  Checker& require(bool ok, const char* rule, const char* argument) {
    if (!refusal_ && !ok) refusal_ = {rule, argument};
    return *this;
  }

  // Copies an index array of `n` lengths once, then checks the copy: nobody can change it after the check.
  Checker& lengths(const Array& x, std::int64_t n, std::int64_t limit, const char* argument, std::vector<std::int64_t>& copy) {
    if (!x.present()) return *this;
    require(x.kind == Array::Kind::array, rules::kType, argument);
    require(x.dtype == DType::int32 || x.dtype == DType::int64, rules::kDType, argument);
    require(x.rank == 1, rules::kRank, argument).shape(x, argument, n);
    if (refusal_) return *this;
    copy.resize(static_cast<std::size_t>(n));
    for (std::int64_t i = 0; i < n; ++i) {
      std::int64_t entry = 0;
      std::int32_t narrow = 0;
      if (x.dtype == DType::int64) {
        std::memcpy(&entry, x.at(i), sizeof entry);
      } else {
        std::memcpy(&narrow, x.at(i), sizeof narrow);
        entry = narrow;
      }
      if (entry < 0 || entry > limit) {
        refusal_ = {rules::kEntry, argument, i};
        return *this;
      }
      copy[static_cast<std::size_t>(i)] = entry;
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

  Refusal result() const { return refusal_; }

 private:
  Refusal refusal_;
};

}  // namespace regard
