// y = x W^T for weights of any dtype and stride, packed once a call and shared by its threads.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <new>

#include "cpu/blocks.h"
#include "cpu/parallel.h"
#include "cpu/strided.h"
#include "cpu/tile_simd.h"

namespace regard::cpu {

// Memory for one call that its threads share: aligned, uninitialised.
template <class T> class Shared {
 public:
  Shared() = default;
  explicit Shared(std::int64_t n) : base_(static_cast<T*>(::operator new(bytes(n), std::align_val_t{64}))) { note_memory(bytes(n)); }
  T* get() const { return base_.get(); }
  explicit operator bool() const { return base_ != nullptr; }

 private:
  static std::size_t bytes(std::int64_t n) {
    std::size_t size = 0;
    if (__builtin_mul_overflow(static_cast<std::size_t>(n), sizeof(T), &size) || size > (std::size_t{1} << 46)) throw std::bad_alloc();
    return size;
  }
  struct Delete {
    void operator()(T* p) const { ::operator delete(p, std::align_val_t{64}); }
  };
  std::unique_ptr<T[], Delete> base_;
};

template <class T> class Projection {
  static constexpr int kColumns = Tile<T>::kColumns;
  static constexpr int kW = kWidth<T>;

 public:
  Projection() = default;
  // w is [out, in].
  explicit Projection(const Array& w) : out_(w.shape[0]), in_(w.shape[1]) {
    const std::int64_t panels = (out_ + kColumns - 1) / kColumns;
    packed_ = Shared<T>(panels * in_ * kColumns);
    parallel_for(panels, static_cast<double>(out_) * static_cast<double>(in_), Rehearse::scratch, [&](std::int64_t panel) {
      Scratch scratch;
      const std::int64_t row = row_length<T>(in_);
      const auto staging = scratch.template reserve<T>(kColumns * row);
      scratch.acquire();
      T* const rows = scratch.template at<T>(staging);
      const int n = static_cast<int>(std::min<std::int64_t>(kColumns, out_ - panel * kColumns));
      for (int r = 0; r < n; ++r) read_row(w.dtype, w.at(panel * kColumns + r), w.stride[1], in_, rows + r * row);
      transpose_padded(rows, row, n, static_cast<int>(in_), packed_.get() + panel * in_ * kColumns, kColumns,
                       static_cast<int>(round_up(n, kW)));
    });
  }

  explicit operator bool() const { return static_cast<bool>(packed_); }
  std::int64_t out() const { return out_; }
  std::int64_t in() const { return in_; }

  // y [rows][ldy] = or += x W^T. x holds rows (depth contiguous) or columns (rows contiguous); x and y have room for
  // `rows` rounded up to Tile::kRows, and a row of y for whole vectors: what lies past `out` there becomes 0.
  template <Left Order> void apply(const T* x, std::int64_t ldx, T* y, std::int64_t ldy, int rows, bool add) const {
    Vec<T> ones[Tile<T>::kVectors];
    for (auto& one : ones) one = broadcast<Vec<T>>(1);
    for (std::int64_t c = 0; c < out_; c += kColumns) {
      const int vectors = static_cast<int>((std::min<std::int64_t>(kColumns, out_ - c) + kW - 1) / kW);
      multiply<T, Order>(x, ldx, packed_.get() + c * in_, kColumns, y + c, ldy, rows, vectors, static_cast<int>(in_), add ? ones : nullptr);
    }
  }

 private:
  std::int64_t out_ = 0;
  std::int64_t in_ = 0;
  Shared<T> packed_;  // [panels][in][kColumns]
};

// to[b - b0][row][..ld] = x[b, row] W^T for the rows of sequences b0.., in blocks that know nothing of sequences.
// `to` has room for Tile::kRows rows more.
template <class T>
inline void project_sequences(const Array& x, std::int64_t b0, std::int64_t sequences, const Projection<T>& w, T* to, std::int64_t ld) {
  constexpr std::int64_t kBlock = 48;
  const std::int64_t length = x.shape[1];
  const std::int64_t rows = sequences * length;
  const double work = static_cast<double>(rows) * static_cast<double>(w.in()) * static_cast<double>(w.out());
  parallel_for((rows + kBlock - 1) / kBlock, work, Rehearse::scratch, [&](std::int64_t block) {
    Scratch scratch;
    const std::int64_t row = row_length<T>(w.in());
    const auto staging = scratch.template reserve<T>(kBlock * row);
    scratch.acquire();
    T* const copied = scratch.template at<T>(staging);
    const int n = static_cast<int>(std::min(kBlock, rows - block * kBlock));
    for (int r = 0; r < n; ++r) {
      const std::int64_t at = block * kBlock + r;
      read_row(x.dtype, x.at(b0 + at / length, at % length), x.stride[2], w.in(), copied + r * row);
    }
    for (std::int64_t r = n; r < round_up(n, Tile<T>::kRows); ++r) std::fill_n(copied + r * row, w.in(), T(0));
    w.template apply<Left::depth_contiguous>(copied, row, to + block * kBlock * ld, ld, n, false);
  });
}

}  // namespace regard::cpu
