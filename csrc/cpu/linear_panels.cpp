#include "cpu/linear_panels.h"

namespace regard::cpu {

void pack_pairs_panel(const Array& weight, std::int64_t n0, int columns, std::int64_t k0, int depth, std::int32_t* to, float* staging) {
  constexpr int panel = kPanel<float>;
  const int words = (depth + 1) / 2;
  if (weight.stride[0] == 2 && weight.stride[1] != 2) {  // a transposed view: two of its rows are one of ours
    for (int k = 0; k < depth; k += 2) {
      std::uint16_t halves[2][panel] = {};
      for (int i = 0; i < std::min(2, depth - k); ++i)
        std::memcpy(halves[i], weight.at(n0, k0 + k + i), 2 * static_cast<std::size_t>(columns));
      for (int j = 0; j < panel; ++j) to[k / 2 * panel + j] = halves[0][j] | halves[1][j] << 16;
    }
    return;
  }
  const float* from = reinterpret_cast<const float*>(weight.at(n0, k0));
  std::int64_t from_row = weight.stride[0] / 4;
  if (weight.stride[1] != 2 || weight.stride[0] % 4 != 0 || depth % (2 * kWidth<float>) != 0) {
    from = staging;
    from_row = row_length<float>(words);
    for (int j = 0; j < columns; ++j) {
      float* const row = staging + j * from_row;
      row[words - 1] = 0;
      copy_halves(weight.at(n0 + j, k0), weight.stride[1], depth, reinterpret_cast<char*>(row));
    }
  }
  transpose_padded(from, from_row, columns, words, reinterpret_cast<float*>(to), panel, panel);
}

template <class T> void add_residual(const Array& residual, const char* from, std::int64_t step, std::int64_t columns, T* staging, T* y) {
  using V = Vec<T>;
  read_row(residual.dtype, from, step, columns, staging);
  for (std::int64_t n = 0; n < columns; n += kWidth<T>) store(y + n, load<V>(y + n) + load<V>(staging + n));
}

template <class T> void activate(LinearProblem::Activation a, T* y, std::int64_t n) {
  if (a == LinearProblem::Activation::none) return;
  with_activation(a, [&](auto activation) {
    for (std::int64_t i = 0; i < n; i += kWidth<T>) store(y + i, activation(load<Vec<T>>(y + i)));
  });
}

template void add_residual(const Array&, const char*, std::int64_t, std::int64_t, float*, float*);
template void add_residual(const Array&, const char*, std::int64_t, std::int64_t, double*, double*);
template void activate(LinearProblem::Activation, float*, std::int64_t);
template void activate(LinearProblem::Activation, double*, std::int64_t);

}  // namespace regard::cpu
