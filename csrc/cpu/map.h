// One image's feature map in memory, and how it is cut into pieces for threads.
//
// Kernels know two orders of memory, whatever layout the caller names: planes (a channel's positions lie together: NCHW)
// and pixels (a position's channels lie together: NHWC). Everything else goes through small buffers, block by block.
#pragma once

#include <algorithm>
#include <cstdint>

#include "core/array.h"
#include "cpu/simd.h"
#include "cpu/strided.h"

namespace regard::cpu {

enum class Order : std::uint8_t { planes, pixels, strided };

// Positions whose sum is one partial result, in vectors. The order of all additions follows from it alone (see
// pool_map.h): 16 keeps chains short, and a block of 256 channels (AVX-512) at 256 KiB is small enough to share out.
constexpr int kBlockVectors = 16;
template <class T> constexpr std::int64_t kBlock = kBlockVectors * kWidth<T>;

struct Map {
  char* data;
  DType dtype;
  std::int64_t channels;
  std::int64_t width;
  std::int64_t positions;
  std::int64_t channel_stride, row_stride, column_stride;  // bytes
  std::int64_t position_stride;                            // of planes and pixels
  Order order;

  char* at(std::int64_t c, std::int64_t p) const { return data + c * channel_stride + p / width * row_stride + p % width * column_stride; }
};

// The first image of x: [batch, channels, height, width].
inline Map map_of(const Array& x) {
  Map m;
  m.data = x.data;
  m.dtype = x.dtype;
  m.channels = x.shape[1];
  m.width = x.shape[3];
  m.positions = x.shape[2] * x.shape[3];
  m.channel_stride = x.stride[1];
  m.row_stride = x.stride[2];
  m.column_stride = x.stride[3];
  const std::int64_t item = size_of(x.dtype);
  // Axes of length 1 have strides that mean nothing.
  m.position_stride = x.shape[3] > 1 ? m.column_stride : x.shape[2] > 1 ? m.row_stride : item;
  const bool one_run = x.shape[2] <= 1 || x.shape[3] <= 1 || m.row_stride == m.width * m.column_stride;
  const bool planes = one_run && m.position_stride == item;
  const bool pixels = one_run && (m.channel_stride == item || m.channels == 1);
  // A single position a channel is a row of channels.
  m.order = planes && !(pixels && m.positions == 1) ? Order::planes : pixels ? Order::pixels : Order::strided;
  if (m.channels == 1) m.channel_stride = item;
  return m;
}

// to[i] = element (c, p0 + i), for maps of any strides.
template <class S> inline void gather(const Map& m, std::int64_t c, std::int64_t p0, std::int64_t n, S* to) {
  for (std::int64_t i = 0; i < n;) {
    const std::int64_t run = std::min(n - i, m.width - (p0 + i) % m.width);
    const char* from = m.at(c, p0 + i);
    for (std::int64_t k = 0; k < run; ++k) to[i + k] = read<S>(from + k * m.column_stride);
    i += run;
  }
}
template <class S> inline void scatter(const Map& m, std::int64_t c, std::int64_t p0, std::int64_t n, const S* from) {
  for (std::int64_t i = 0; i < n;) {
    const std::int64_t run = std::min(n - i, m.width - (p0 + i) % m.width);
    char* to = m.at(c, p0 + i);
    for (std::int64_t k = 0; k < run; ++k) std::memcpy(to + k * m.column_stride, from + i + k, sizeof(S));
    i += run;
  }
}

// Part of a map: channels [c0, c1), positions [p0, p1); p0 is a multiple of a block.
struct Piece {
  std::int64_t c0, c1, p0, p1;
};

// A map cut into pieces of about kPieceBytes, or as many as are named. A piece of planes is either whole planes or part of one.
class Cut {
 public:
  // Claiming a piece costs some 20 ns, reading one 4 us or more; a quarter of an L2 leaves room for its neighbours.
  static constexpr std::int64_t kPieceBytes = std::int64_t{128} << 10;

  Cut(const Map& m, std::int64_t item, std::int64_t block, std::int64_t piece_bytes = kPieceBytes)
      : channels_(m.channels), positions_(m.positions) {
    const std::int64_t blocks = std::max<std::int64_t>(1, (positions_ + block - 1) / block);
    if (m.order == Order::pixels) {
      channels_a_piece_ = std::clamp<std::int64_t>(channels_, 1, kPixelChannels);
      positions_a_piece_ = block * std::max<std::int64_t>(1, piece_bytes / (block * channels_a_piece_ * item + 1));
    } else {
      const std::int64_t plane = positions_ * item;
      channels_a_piece_ = std::max<std::int64_t>(1, piece_bytes / (plane + 1));
      positions_a_piece_ = plane <= piece_bytes ? blocks * block : std::max<std::int64_t>(1, piece_bytes / (block * item)) * block;
    }
    position_pieces_ = (positions_ + positions_a_piece_ - 1) / positions_a_piece_;
    pieces_ = (channels_ + channels_a_piece_ - 1) / channels_a_piece_ * position_pieces_;
  }

  std::int64_t pieces() const { return pieces_; }
  Piece operator[](std::int64_t i) const {
    const std::int64_t c = i / position_pieces_ * channels_a_piece_;
    const std::int64_t p = i % position_pieces_ * positions_a_piece_;
    return {c, std::min(c + channels_a_piece_, channels_), p, std::min(p + positions_a_piece_, positions_)};
  }

 private:
  // 1 KiB of float32 from each position: long enough runs for the prefetchers.
  static constexpr std::int64_t kPixelChannels = 256;

  std::int64_t channels_;
  std::int64_t positions_;
  std::int64_t channels_a_piece_;
  std::int64_t positions_a_piece_;
  std::int64_t position_pieces_;
  std::int64_t pieces_;
};

}  // namespace regard::cpu
