// Arrays that own their memory, filled with the same values every run.
#pragma once

#include <benchmark/benchmark.h>

#include <initializer_list>
#include <random>
#include <string>
#include <vector>

#include "core/array.h"

namespace regard::bench {

class Tensor {
 public:
  Tensor(DType dtype, std::initializer_list<std::int64_t> shape, float scale = 1) {
    view_.kind = Array::Kind::array;
    view_.dtype = dtype;
    view_.writable = true;
    for (const std::int64_t n : shape) view_.shape[view_.rank++] = n;
    std::int64_t step = size_of(dtype);
    for (int a = view_.rank - 1; a >= 0; --a) {
      view_.stride[a] = step;
      step *= view_.shape[a];
    }
    // One cache line more, so that the first element can lie on one.
    memory_.resize(static_cast<std::size_t>(step) + 64);
    view_.data = memory_.data() + (-reinterpret_cast<std::uintptr_t>(memory_.data()) & 63);
    fill(scale);
  }
  Tensor(const Tensor&) = delete;
  Tensor& operator=(const Tensor&) = delete;

  const Array& view() const { return view_; }
  double bytes() const { return static_cast<double>(view_.size() * size_of(view_.dtype)); }
  template <class T> T* data() const { return reinterpret_cast<T*>(view_.data); }

 private:
  void fill(float scale) {
    std::mt19937 random(1);
    std::normal_distribution<float> normal(0, scale);
    for (std::int64_t i = 0; i < view_.size(); ++i) {
      const float x = normal(random);
      switch (view_.dtype) {
        case DType::float32: data<float>()[i] = x; break;
        case DType::float64: data<double>()[i] = static_cast<double>(x); break;
        case DType::float16: data<Half>()[i] = from_float<Half>(x); break;
        case DType::bfloat16: data<BFloat16>()[i] = from_float<BFloat16>(x); break;
        default: break;
      }
    }
  }

  std::vector<char> memory_;
  Array view_;
};

inline const char* name_of(DType t) {
  switch (t) {
    case DType::float32: return "float32";
    case DType::float64: return "float64";
    case DType::float16: return "float16";
    case DType::bfloat16: return "bfloat16";
    default: return "other";
  }
}

// Rates over all iterations: FLOP/s counts a multiply-add as two, B/s what must move at least.
inline void set_rates(benchmark::State& state, double flops, double bytes) {
  using benchmark::Counter;
  if (flops > 0) state.counters["FLOP/s"] = Counter(flops, Counter::kIsIterationInvariantRate);
  if (bytes > 0) state.counters["B/s"] = Counter(bytes, Counter::kIsIterationInvariantRate);
}

}  // namespace regard::bench
