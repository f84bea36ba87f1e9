// What the kernel tests share: problems on buffers of exact size, and their results by loops in double.
#pragma once

#include <cmath>
#include <cstring>
#include <vector>

#include "../native/check.h"
#include "cuda/attention_arguments.cuh"

namespace regard::test {
using namespace regard::cuda;

// Exactly as many bytes as it has elements, at an address that copies of 16 bytes can take.
template <class T> struct Buffer {
  explicit Buffer(std::int64_t n) : bytes(static_cast<std::size_t>(n) * sizeof(T)) {
    if (posix_memalign(&memory, 16, bytes) != 0) std::abort();
    std::memset(memory, 0xff, bytes);
  }
  ~Buffer() { std::free(memory); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  T* data() { return static_cast<T*>(memory); }
  T& operator[](std::int64_t i) { return data()[i]; }
  std::size_t bytes;
  void* memory = nullptr;
};

struct Shape {
  int heads;
  int group;
  int len_q;
  int len_kv;
  int dim;
  int dim_v;
  bool causal;
  bool masked;
  double dropout = 0;
};

inline Array rows_of(void* data, DType dtype, int heads, int len, int dim) {
  Array a;
  a.kind = Array::Kind::array;
  a.data = static_cast<char*>(data);
  a.dtype = dtype;
  std::int64_t stride = size_of(dtype);
  for (const int n : {dim, len, heads, 1}) {
    a.insert_axis(0);
    a.shape[0] = n;
    a.stride[0] = stride;
    stride *= n;
  }
  return a;
}

// run(problem, arguments) launches the kernel.
template <class T, class Launch> void compare(const Shape& x, double tolerance, Launch&& run) {
  Random random(11);
  const int heads_kv = x.heads / x.group;
  Buffer<T> q(static_cast<std::int64_t>(x.heads) * x.len_q * x.dim);
  Buffer<T> k(static_cast<std::int64_t>(heads_kv) * x.len_kv * x.dim);
  Buffer<T> v(static_cast<std::int64_t>(heads_kv) * x.len_kv * x.dim_v);
  Buffer<char> mask(static_cast<std::int64_t>(x.heads) * x.len_q * x.len_kv);
  Buffer<T> out(static_cast<std::int64_t>(x.heads) * x.len_q * x.dim_v);
  Buffer<float> lse(static_cast<std::int64_t>(x.heads) * x.len_q);
  for (Buffer<T>* b : {&q, &k, &v})
    for (std::size_t i = 0; i < b->bytes / sizeof(T); ++i) b->data()[i] = from_float<T>(static_cast<float>(random.uniform(-2, 2)));
  for (std::size_t i = 0; i < mask.bytes; ++i) mask.data()[i] = random.uniform(0, 1) < 0.7;

  AttentionProblem p;
  p.query = rows_of(q.data(), dtype_of<T>(), x.heads, x.len_q, x.dim);
  p.key = rows_of(k.data(), dtype_of<T>(), heads_kv, x.len_kv, x.dim);
  p.value = rows_of(v.data(), dtype_of<T>(), heads_kv, x.len_kv, x.dim_v);
  p.out = rows_of(out.data(), dtype_of<T>(), x.heads, x.len_q, x.dim_v);
  p.lse = rows_of(lse.data(), DType::float32, x.heads, x.len_q, 1);
  if (x.masked) p.mask = rows_of(mask.data(), DType::boolean, x.heads, x.len_q, x.len_kv);
  p.window_right = x.causal ? 0 : kUnlimited;
  p.alignment = Alignment::lower_right;
  p.scale = 0.3;
  p.dropout = {x.dropout, 0x123456789abcull};
  AttentionArguments a = arguments_of(p);
  run(p, a);

  for (int h = 0; h < x.heads; ++h)
    for (int i = 0; i < x.len_q; ++i) {
      std::vector<double> o(static_cast<std::size_t>(x.dim_v), 0);
      double sum = 0;
      for (int j = 0; j < x.len_kv; ++j) {
        if (x.causal && j > i + x.len_kv - x.len_q) continue;
        if (x.masked && !mask[(static_cast<std::int64_t>(h) * x.len_q + i) * x.len_kv + j]) continue;
        double s = 0;
        const std::int64_t key = (static_cast<std::int64_t>(h / x.group) * x.len_kv + j);
        for (int d = 0; d < x.dim; ++d)
          s += static_cast<double>(to_float(q[(static_cast<std::int64_t>(h) * x.len_q + i) * x.dim + d])) *
               static_cast<double>(to_float(k[key * x.dim + d]));
        const double weight = std::exp(s * p.scale);
        sum += weight;
        const double kept = x.dropout > 0 ? weight * p.dropout.factor(0, h, i, j) : weight;
        for (int d = 0; d < x.dim_v; ++d) o[static_cast<std::size_t>(d)] += kept * static_cast<double>(to_float(v[key * x.dim_v + d]));
      }
      const std::int64_t row = static_cast<std::int64_t>(h) * x.len_q + i;
      bool ok = sum == 0 ? lse[row] == -INFINITY : std::abs(static_cast<double>(lse[row]) - std::log(sum)) < 1e-4;
      for (int d = 0; d < x.dim_v; ++d) {
        const double want = sum == 0 ? 0 : o[static_cast<std::size_t>(d)] / sum;
        ok = ok && std::abs(static_cast<double>(to_float(out[row * x.dim_v + d])) - want) <= tolerance;
      }
      CHECK(ok);
    }
}

}  // namespace regard::test
