// Sums and maxima of each channel over a map's positions.
//
//   for each block of 16 vectors of positions:  partial = sum over lanes of (chain over the block's vectors)
//   total = the partials in order, in double
//
// Position p of a block belongs to lane p % width; the r positions beyond whole vectors to the last r lanes (a load that
// ends with the row reaches them). Planes run along the lanes, pixels keep a row of accumulators for each lane: both
// make the same additions, so results do not depend on the order of memory.
//
// Maxima drop NaN here. A channel with NaN has a NaN sum: total() looks again, which costs nothing where there is none.
#pragma once

#include "cpu/map.h"

namespace regard::cpu {

// Partial sums (and maxima) of one image: [channels][blocks] for planes, [blocks][channels] for pixels.
template <class T> struct Partials {
  T* sums;
  T* maxima;  // null: not wanted
  std::int64_t blocks;
  std::int64_t channel_step, block_step;

  Partials() = default;
  Partials(const Map& m, T* sums_, T* maxima_) : sums(sums_), maxima(maxima_), blocks(count(m)) {
    channel_step = m.order == Order::pixels ? 1 : blocks;
    block_step = m.order == Order::pixels ? m.channels : 1;
  }
  static std::int64_t count(const Map& m) { return (m.positions + kBlock<T> - 1) / kBlock<T>; }
  std::int64_t place(std::int64_t c, std::int64_t block) const { return c * channel_step + block * block_step; }
};

// The partial results of one piece. For T = float and double, as all below: the compute type of the map's dtype.
template <class T> void pool_piece(const Map& m, const Piece& piece, const Partials<T>& to);

// Means (and maxima; either may be null) of channels [c0, c1) from their partials. No positions: mean NaN, maximum -inf.
template <class T> void totals(const Map& m, const Partials<T>& from, std::int64_t c0, std::int64_t c1, T* means, T* maxima);

}  // namespace regard::cpu
