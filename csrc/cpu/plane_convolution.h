// The k x k convolution of two planes (mean and maximum over channels) into one, zero padded, as networks convolve:
// gates[h, w] = gate(bias + sum over plane, i, j of weight[plane, i, j] * plane[h + i - k/2, w + j - k/2]).
#pragma once

#include "cpu/excitation.h"
#include "cpu/strided.h"

namespace regard::cpu {

template <class T> class PlaneConvolution {
  using V = Vec<T>;
  static constexpr int kW = kWidth<T>;

 public:
  PlaneConvolution(const ChannelProblem& p, const GateFunction<T>& gate)
      : gate_(gate), height_(p.x.shape[2]), width_(p.x.shape[3]), kernel_(p.spatial() ? p.w_spatial.shape[2] : 1) {
    if (!p.spatial()) return;
    const auto taps = scratch_.template reserve<T>(2 * kernel_ * kernel_);
    scratch_.acquire();
    taps_ = scratch_.template at<T>(taps);
    T* tap = taps_;
    for (int plane = 0; plane < 2; ++plane)
      for (std::int64_t i = 0; i < kernel_; ++i, tap += kernel_)
        read_row(p.w_spatial.dtype, p.w_spatial.at(0, plane, i), p.w_spatial.stride[3], kernel_, tap);
    if (p.b_spatial.present()) read_row(p.b_spatial.dtype, p.b_spatial.data, 0, 1, &bias_);
  }

  // Both planes with margins of zeros, and the rows that four at a time reach beyond.
  std::int64_t padded_row() const { return whole_vectors(width_ + kernel_ - 1, kW) + kW; }
  std::int64_t padded_plane() const { return (height_ + kernel_ - 1 + kRows) * padded_row(); }

  // Puts positions p0 .. p0 + n of one plane between its margins.
  void place(T* padded, int plane, std::int64_t p0, std::int64_t n, const T* from) const {
    T* const inside = padded + plane * padded_plane() + kernel_ / 2 * padded_row() + kernel_ / 2;
    for (std::int64_t i = 0; i < n;) {
      const std::int64_t run = std::min(n - i, width_ - (p0 + i) % width_);
      std::copy_n(from + i, run, inside + (p0 + i) / width_ * padded_row() + (p0 + i) % width_);
      i += run;
    }
  }

  // gates[positions] of rows [first, last); first is a multiple of kRows.
  void rows(const T* padded, std::int64_t first, std::int64_t last, T* gates) const {
    for (std::int64_t h = first; h < last; h += kRows)
      for (std::int64_t w = 0; w < width_; w += kW) {
        V acc[kRows];
        square(padded + h * padded_row() + w, acc);
        for (std::int64_t r = 0; r < std::min(kRows, last - h); ++r) {
          T* const to = gates + (h + r) * width_ + w;
          const V g = gate_(acc[r]);
          if (w + kW <= width_) {
            store(to, g);
          } else {
            store_few(to, g, width_ - w);
          }
        }
      }
  }

  // Rows at a time: four chains of fused multiply-adds hide their latency, and share each tap.
  static constexpr std::int64_t kRows = 4;

 private:
  void square(const T* padded, V (&acc)[kRows]) const {
    for (V& a : acc) a = broadcast<V>(bias_);
    const T* tap = taps_;
    const std::int64_t ld = padded_row();
    for (int plane = 0; plane < 2; ++plane)
      for (std::int64_t i = 0; i < kernel_; ++i)
        for (std::int64_t j = 0; j < kernel_; ++j) {
          const V t = broadcast<V>(*tap++);
          const T* const from = padded + plane * padded_plane() + i * ld + j;
#pragma GCC unroll 4
          for (std::int64_t r = 0; r < kRows; ++r) acc[r] = fma(t, load<V>(from + r * ld), acc[r]);
        }
  }

  GateFunction<T> gate_;
  std::int64_t height_;
  std::int64_t width_;
  std::int64_t kernel_;
  Scratch scratch_;
  T* taps_ = nullptr;
  T bias_ = 0;
};

}  // namespace regard::cpu
