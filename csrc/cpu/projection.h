// y = x W^T for weights of any dtype and stride, of which threads share what is packed.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <new>

#include "core/linear_problem.h"
#include "cpu/blocks.h"
#include "cpu/operations.h"
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

// The projection of sequences' rows, to compute values.
template <class T> class SequenceProjection {
 public:
  SequenceProjection() = default;
  // w is [out, in]; x the dtype of what is projected, which w has too.
  SequenceProjection(const Array& w, DType x) : w_(w) {
    if (x != dtype_of<T>()) packed_ = Projection<T>(w);
  }

  explicit operator bool() const { return w_.present(); }

  // to[b - b0][row][..ld] = x[b, row] W^T for the rows of sequences b0.., 0 past W's; `to` has room for Tile::kRows rows more.
  // Values that need no widening are a linear layer's, which packs for many rows alone: a query of 512 dimensions over 20
  // keys takes 0.1 to 0.4 of the time.
  void operator()(const Array& x, std::int64_t b0, std::int64_t sequences, T* to, std::int64_t ld) const {
    if (packed_) return by_blocks(x, b0, sequences, to, ld);
    constexpr std::int64_t item = sizeof(T);
    LinearProblem p;
    p.x = x;
    p.x.data = x.at(b0);
    p.x.shape[0] = sequences;
    p.weight = w_;
    p.out = p.x;
    p.out.data = reinterpret_cast<char*>(to);
    p.out.shape[2] = w_.shape[0];
    p.out.stride[0] = x.shape[1] * ld * item;
    p.out.stride[1] = ld * item;
    p.out.stride[2] = item;
    linear(p);
    for (std::int64_t row = 0; row < sequences * x.shape[1]; ++row) std::fill(to + row * ld + w_.shape[0], to + (row + 1) * ld, T(0));
  }

 private:
  // In blocks that know nothing of sequences.
  void by_blocks(const Array& x, std::int64_t b0, std::int64_t sequences, T* to, std::int64_t ld) const {
    constexpr std::int64_t kBlock = 48;
    const Projection<T>& w = packed_;
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

  Array w_;
  Projection<T> packed_;
};

}  // namespace regard::cpu
