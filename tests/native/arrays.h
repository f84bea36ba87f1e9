// Arrays on heap blocks of exactly their extent, so that AddressSanitizer sees any access past them.
#pragma once

#include <algorithm>
#include <cstring>
#include <initializer_list>
#include <memory>
#include <vector>

#include "check.h"
#include "core/array.h"
#include "cpu/strided.h"

namespace regard::test {

enum class Strides { packed, sequence_first, negative, gaps, misaligned };

// An array in a block of exactly its extent, of values in [-1, 1].
struct Owned {
  Array view;
  std::unique_ptr<char[]> block;
};

inline void put(DType t, char* p, double x) {
  const auto store = [p](auto v) { std::memcpy(p, &v, sizeof v); };
  switch (t) {
    case DType::float64: return store(x);
    case DType::float32: return store(static_cast<float>(x));
    case DType::float16: return store(from_float<Half>(static_cast<float>(x)));
    case DType::bfloat16: return store(from_float<BFloat16>(static_cast<float>(x)));
    case DType::int8: return store(Int8{static_cast<std::int8_t>(x * 127)});
    case DType::float8_e4m3fn: return store(Float8{static_cast<std::uint8_t>((x + 1) * 62)});
    default: *p = x > 0 ? 1 : 0;
  }
}

template <class F> void for_each_element(const Array& a, F&& f) {
  std::int64_t n[4] = {1, 1, 1, 1};
  for (int i = 0; i < a.rank; ++i) n[i] = a.shape[i];
  for (std::int64_t i = 0; i < n[0]; ++i)
    for (std::int64_t j = 0; j < n[1]; ++j)
      for (std::int64_t k = 0; k < n[2]; ++k)
        for (std::int64_t l = 0; l < n[3]; ++l) f(a.data + i * a.stride[0] + j * a.stride[1] + k * a.stride[2] + l * a.stride[3]);
}

inline Owned make(DType t, std::initializer_list<std::int64_t> shape, Strides kind, Random& random) {
  Owned x;
  Array& a = x.view;
  a.kind = Array::Kind::array;
  a.dtype = t;
  a.writable = true;
  a.rank = static_cast<int>(shape.size());
  std::copy(shape.begin(), shape.end(), a.shape);
  const std::int64_t item = size_of(t);
  std::int64_t step = kind == Strides::gaps ? 3 * item : item;
  std::int64_t extent = item + (kind == Strides::misaligned ? 1 : 0);
  const bool swapped = kind == Strides::sequence_first && a.rank == 4;
  if (swapped) a.swap_axes(1, 2);
  for (int i = a.rank - 1; i >= 0; --i) {
    a.stride[i] = kind == Strides::negative ? -step : step;
    extent += std::max<std::int64_t>(a.shape[i] - 1, 0) * step;
    step *= std::max<std::int64_t>(a.shape[i], 1);
  }
  if (swapped) a.swap_axes(1, 2);
  if (a.size() == 0) extent = 0;
  x.block.reset(new char[static_cast<std::size_t>(extent)]);
  a.data = x.block.get();
  if (extent > 0) a.data += kind == Strides::negative ? extent - item : kind == Strides::misaligned ? 1 : 0;
  if (extent > 0) for_each_element(a, [&](char* p) { put(t, p, random.uniform(-1, 1)); });
  return x;
}

inline Owned make(DType t, std::initializer_list<std::int64_t> shape, Random& random) { return make(t, shape, Strides::packed, random); }

// A packed array in the memory of `x`.
template <class T> Array view_of(std::vector<T>& x, DType t, std::initializer_list<std::int64_t> shape) {
  Array a;
  a.kind = Array::Kind::array;
  a.dtype = t;
  a.data = reinterpret_cast<char*>(x.data());
  for (const std::int64_t n : shape) a.shape[a.rank++] = n;
  std::int64_t step = sizeof(T);
  for (int i = a.rank - 1; i >= 0; --i) {
    a.stride[i] = step;
    step *= a.shape[i];
  }
  return a;
}

// An element as float64.
template <class... Index> double value_at(const Array& x, Index... index) { return cpu::element(x.dtype, x.at(index...)); }

}  // namespace regard::test
