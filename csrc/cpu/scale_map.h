// out = x * weight of its channel (* weight of its position), piece by piece. out may be x itself.
#pragma once

#include "cpu/map.h"

namespace regard::cpu {

// by_channel[c] and by_position[p], whole vectors of each; by_position may be null. For T = float and double, the compute
// type of the maps' dtype.
template <class T> void scale_piece(const Map& x, const Map& out, const Piece& piece, const T* by_channel, const T* by_position);

}  // namespace regard::cpu
