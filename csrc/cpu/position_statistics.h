// Mean and maximum over the channels at each position, of x * weight of its channel.
//
// Lanes take channels as pool_map.h's take positions: channel c belongs to lane c % width, the r beyond whole vectors to
// the last r lanes; a lane's channels are a chain from 0, and lanes add up in a tree. In pixels that is what vectors do;
// in planes each lane's chain is a row over positions, and the tree a recursion over rows. Maxima drop NaN: where the
// sum is NaN, the position's channels are looked at again.
#pragma once

#include "cpu/map.h"

namespace regard::cpu {

// Positions a chunk: 4 KiB of float32 from each plane, long enough for the prefetchers, and rows that stay in L1.
template <class T> constexpr std::int64_t kChunk = 4096 / static_cast<std::int64_t>(sizeof(T));

// mean[i], maximum[i] of position p0 + i, for n <= kChunk positions: both have room for whole vectors. For T = float and
// double, the compute type of the map's dtype.
template <class T> void describe_positions(const Map& m, const T* weights, std::int64_t p0, std::int64_t n, T* mean, T* maximum);

}  // namespace regard::cpu
