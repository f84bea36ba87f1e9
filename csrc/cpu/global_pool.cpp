// The mean or the maximum of each channel over its positions.

#include <algorithm>

#include "cpu/operations.h"
#include "cpu/parallel.h"
#include "cpu/pool_map.h"

namespace regard::cpu {
namespace {

// What an element costs, in parallel_for's operations of some 20 ps: 8x256x7x7 takes 7 us from L2.
constexpr double kWorkAnElement = 3.5;

// Threads take turns at pieces, and every piece starts the prefetchers anew. 8x256x56x56 on two threads, Zen 4: 300 us in
// pieces of 128 KiB, 265 of 512 KiB, 205 to 230 in eight.
constexpr std::int64_t kPiecesAThread = 4;
constexpr std::int64_t kLargestPiece = std::int64_t{2} << 20;

template <class T> void pool(const PoolProblem& p) {
  const std::int64_t channels = p.x.shape[1];
  const std::int64_t images = p.x.shape[0];
  if (channels == 0 || images == 0) return;
  const Map first = map_of(p.x);
  const std::int64_t bytes = images * channels * first.positions * size_of(p.x.dtype);
  const Cut cut(first, size_of(p.x.dtype), kBlock<T>,
                std::clamp(bytes / (kPiecesAThread * get_num_threads()), Cut::kPieceBytes, kLargestPiece));
  const std::int64_t partials = channels * Partials<T>::count(first);
  Scratch scratch;
  const auto sums = scratch.template reserve<T>(images * partials);
  const auto maxima = scratch.template reserve<T>(p.maximum ? images * partials : 0);
  const auto results = scratch.template reserve<T>(images * channels);
  scratch.acquire();
  const auto image = [&](std::int64_t i) {
    Map m = first;
    m.data += i * p.x.stride[0];
    return m;
  };
  const auto partials_of = [&](std::int64_t i) {
    return Partials<T>(first, scratch.template at<T>(sums) + i * partials,
                       p.maximum ? scratch.template at<T>(maxima) + i * partials : nullptr);
  };
  const double work = static_cast<double>(images) * static_cast<double>(first.positions) * static_cast<double>(channels) * kWorkAnElement;
  T* const pooled = scratch.template at<T>(results);
  const auto finish = [&](std::int64_t i, std::int64_t c0, std::int64_t c1) {
    T* const row = pooled + i * channels;
    totals<T>(image(i), partials_of(i), c0, c1, p.maximum ? nullptr : row, p.maximum ? row : nullptr);
  };
  const auto whole = [&](const Piece& piece) { return piece.p0 == 0 && piece.p1 == first.positions; };
  parallel_for(first.positions > 0 ? images * cut.pieces() : 0, work, [&](std::int64_t item) {
    const std::int64_t i = item / cut.pieces();
    const Piece piece = cut[item % cut.pieces()];
    pool_piece(image(i), piece, partials_of(i));
    if (whole(piece)) finish(i, piece.c0, piece.c1);
  });
  const bool finished = cut.pieces() > 0 && whole(cut[0]);
  for (std::int64_t i = 0; i < images; ++i) {
    if (!finished) finish(i, 0, channels);
    write_row(p.out.dtype, p.out.at(i), p.out.stride[1], channels, pooled + i * channels);
  }
}

}  // namespace

void global_pool(const PoolProblem& p) {
  with_compute(p.x.dtype, [&](auto t) { pool<decltype(t)>(p); });
}

}  // namespace regard::cpu
