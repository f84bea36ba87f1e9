// Keys and values of attention for few queries on their way: several vectors a lane, side by side.
#pragma once

#include <bit>

#include "cuda/attention_decode.cuh"

namespace regard::cuda {

// Vectors of a lane that are on their way together. An H200's memory gives 4.8 TB/s some 700 ns after it is asked: 25 KiB
// on their way to each SM. Three blocks of four vectors a lane have 24, four of one had 8.
constexpr int kTogether = 4;

// A vector as words: taken apart where its elements are wanted. As elements, the compiler spread each over a register of its
// own, and waited for every load to do so.
template <class T> struct alignas(sizeof(Vector<T>)) Grain {
  std::uint32_t words[sizeof(Vector<T>) / 4];

  // All at once, before any branch: taken out row by row, each behind a branch of its own, the compiler converted them once more
  // for every row (of float8, 3,600 instructions of a kernel's 10,000).
  REGARD_DEVICE void values(Compute<T> (&to)[Vector<T>::kLength]) const {
#pragma unroll
    for (int e = 0; e < Vector<T>::kLength; ++e) to[e] = value(e);
  }

 private:
  REGARD_DEVICE Compute<T> value(int e) const {
    if constexpr (std::is_same_v<T, double>) {
      return std::bit_cast<double>(std::uint64_t{words[2 * e + 1]} << 32 | words[2 * e]);
    } else if constexpr (std::is_same_v<T, float>) {
      return float_of(words[e]);
    } else if constexpr (std::is_same_v<T, BFloat16>) {
      return float_of(e % 2 == 0 ? words[e / 2] << 16 : words[e / 2] & 0xffff0000u);
    } else {
      constexpr int kEach = 4 / sizeof(T);
      using Bits = std::conditional_t<sizeof(T) == 2, std::uint16_t, std::uint8_t>;
      return value_of(std::bit_cast<T>(static_cast<Bits>(words[e / kEach] >> e % kEach * 8 * sizeof(T))));
    }
  }
};

// Where rows of keys or values of a block's key head lie. `base` is that of key 0 where there are no pages, found once: a row is a
// product away, where finding it anew took some 50 instructions.
struct StoredRows {
  const View& view;
  const char* base;

  template <class C>
  REGARD_DEVICE StoredRows(const DecodeBlock<C>& x, const View& v) : view(v), base(v.at(x.b, x.group, first_key(x.p.a, x.b))) {}

  // Of the keys key_of(0), key_of(1), ..., or the split's last where they are beyond it.
  template <class C, class KeyOf> REGARD_DEVICE void find(const char* (&row)[kTogether], const DecodeBlock<C>& x, KeyOf&& key_of) const {
    const AttentionArguments& a = x.p.a;
    if (a.page_table.present()) {
#pragma unroll
      for (int n = 0; n < kTogether; ++n) row[n] = paged_row(a, view, x.b, x.group, x.held_key(key_of(n)));
    } else {
#pragma unroll
      for (int n = 0; n < kTogether; ++n) row[n] = base + x.held_key(key_of(n)) * view.stride[2];
    }
  }
};

// Column d and on of rows. `whole`: rows are aligned vectors, with nothing left over. Then there is no branch between the loads, and
// none waits for the one before. Lanes beyond the row's end read its beginning once more, wherever it lies: what they multiply with
// zeros, an infinity too, must not depend on that.
template <class T>
REGARD_DEVICE void fetch_grains(Grain<T> (&to)[kTogether], const char* const (&row)[kTogether], std::int64_t stride, int d, int dim,
                                bool whole) {
  const int first = d < dim ? d : 0;
  if (whole) {
    const std::int64_t at = std::int64_t{first} * static_cast<int>(sizeof(T));
#pragma unroll
    for (int n = 0; n < kTogether; ++n) to[n] = *reinterpret_cast<const Grain<T>*>(row[n] + at);
  } else {
#pragma unroll
    for (int n = 0; n < kTogether; ++n) to[n] = std::bit_cast<Grain<T>>(stored_grain<T>(row[n], stride, first, dim, false));
  }
}

}  // namespace regard::cuda
