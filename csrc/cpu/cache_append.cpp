// Appending to a cache: new keys and values, converted to what it stores, into the slots of their tokens.
//
//   for each item: some tokens of a sequence                          (parallel)
//     their cosines and sines, where keys are turned on the way
//     for each head, for each token: the row read, turned, measured (int8, float8), written
//
// Nothing else of the cache is read or written.

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "cpu/operations.h"
#include "cpu/parallel.h"
#include "cpu/quantise.h"
#include "cpu/rotate.h"

namespace regard::cpu {
namespace {

// Elements an item: each head is a run of its own, and runs of 8 KiB stream less well than ones of 32 KiB (on Zen 4, 1.2
// times slower, 64 tokens to an item against 16).
constexpr std::int64_t kElementsPerItem = 1 << 17;

// One of the two halves of a cache.
struct Store {
  const Array& x;
  const Array& cache;
  const Array& scales;
};

class Append {
 public:
  explicit Append(const AppendProblem& problem) : p_(problem) {
    const std::int64_t token = std::max<std::int64_t>(1, p_.heads_kv() * (p_.dim_qk() + p_.dim_v()));
    tokens_ = std::clamp<std::int64_t>(kElementsPerItem / token, 1, std::max<std::int64_t>(1, p_.len()));
    blocks_ = (p_.len() + tokens_ - 1) / tokens_;
  }

  void run() {
    if (p_.batch() * p_.heads_kv() * p_.len() == 0) return;
    const double work = static_cast<double>(p_.key.size() + p_.value.size()) * 2;
    parallel_for(p_.batch() * blocks_, work, [this](std::int64_t item) {
      const std::int64_t first = item % blocks_ * tokens_;
      const std::int64_t last = std::min(p_.len(), first + tokens_);
      with_compute(p_.key.dtype, [&](auto t) {
        AngleRows<decltype(t)> angles(p_.angles, p_.len(), last - first);
        copy_rows<decltype(t)>({p_.key, p_.key_cache, p_.key_scales}, item / blocks_, first, last, angles);
      });
      with_compute(p_.value.dtype, [&](auto t) {
        AngleRows<decltype(t)> none(no_angles_, p_.len(), last - first);
        copy_rows<decltype(t)>({p_.value, p_.value_cache, p_.value_scales}, item / blocks_, first, last, none);
      });
    });
  }

 private:
  template <class T> void copy_rows(const Store& store, std::int64_t b, std::int64_t first, std::int64_t last, AngleRows<T>& angles) const {
    const std::int64_t n = store.x.shape[3];
    const auto row_at = angles.template reserve<T>(whole_vectors<T>(n));
    const auto narrow_at = angles.template reserve<float>(whole_vectors<float>(n));
    angles.read_tokens(b, first, last);
    T* row = angles.template at<T>(row_at);
    float* narrow = angles.template at<float>(narrow_at);
    const bool same = store.x.dtype == store.cache.dtype && angles.pairs() == 0 && in_order(store.x) && in_order(store.cache);
    for (std::int64_t h = 0; h < p_.heads_kv(); ++h)
      for (std::int64_t i = first; i < last; ++i) {
        const std::int64_t slot = p_.place(b, i);
        if (slot < 0) continue;
        const char* from = store.x.at(b, h, i);
        char* to = store.cache.at(b, h, slot);
        if (same) {
          const std::int64_t run = tokens_in_a_row(store, b, i, last);
          std::memcpy(to, from, static_cast<std::size_t>(run * n * size_of(store.x.dtype)));
          i += run - 1;
          continue;
        }
        read_row(store.x.dtype, from, store.x.stride[3], n, row);
        angles.rotate(row, i - first);
        if (is_scaled(store.cache.dtype))
          write_quantised(store, to, store.scales.at(b, h, slot), n, row, narrow);
        else
          write_floats(store.cache, to, n, row, narrow);
      }
  }

  // How many tokens from i on lie one behind the other, where they come from and where they go.
  std::int64_t tokens_in_a_row(const Store& store, std::int64_t b, std::int64_t i, std::int64_t last) const {
    const std::int64_t row = store.x.shape[3] * size_of(store.x.dtype);
    std::int64_t run = 1;
    if (store.x.stride[2] == row && store.cache.stride[2] == row)
      while (i + run < last && p_.place(b, i + run) == p_.place(b, i) + run) ++run;
    return run;
  }

  static bool in_order(const Array& x) { return x.stride[3] == size_of(x.dtype); }

  // From one compute type to a storage type of the other, through float or double.
  template <class T> static void write_floats(const Array& cache, char* to, std::int64_t n, const T* row, float* narrow) {
    if ((cache.dtype == DType::float64) == std::is_same_v<T, double>) return write_row(cache.dtype, to, cache.stride[3], n, row);
    if constexpr (std::is_same_v<T, double>) {
      for (std::int64_t k = 0; k < n; ++k) narrow[k] = static_cast<float>(row[k]);
      write_row(cache.dtype, to, cache.stride[3], n, static_cast<const float*>(narrow));
    } else {
      for (std::int64_t k = 0; k < n; ++k) {
        const double wide = row[k];
        std::memcpy(to + k * cache.stride[3], &wide, sizeof wide);
      }
    }
  }

  template <class T>
  static void write_quantised(const Store& store, char* to, char* scale_to, std::int64_t n, const T* row, float* narrow) {
    for (std::int64_t k = 0; k < n; ++k) narrow[k] = static_cast<float>(row[k]);
    std::fill(narrow + n, narrow + whole_vectors<float>(n), 0.0f);
    const float scale = store.cache.dtype == DType::int8 ? quantise<Int8>(narrow, to, store.cache.stride[3], n)
                                                         : quantise<Float8>(narrow, to, store.cache.stride[3], n);
    std::memcpy(scale_to, &scale, sizeof scale);
  }

  const AppendProblem& p_;
  const RotaryAngles no_angles_{};
  std::int64_t tokens_;  // of an item
  std::int64_t blocks_;  // of a sequence
};

}  // namespace

void cache_append(const AppendProblem& problem) { Append(problem).run(); }

}  // namespace regard::cpu
