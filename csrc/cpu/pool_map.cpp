#include "cpu/pool_map.h"

#include <cmath>
#include <limits>

#include "cpu/lanes.h"

namespace regard::cpu {
namespace {

template <class S, class T, bool WithMax> class PoolMap {
  using V = Vec<T>;
  static constexpr int kW = kWidth<T>;
  static constexpr T kLowest = -std::numeric_limits<T>::infinity();

 public:
  static void piece(const Map& m, const Piece& piece, const Partials<T>& to) {
    if (m.order == Order::pixels)
      pixels(m, piece, to);
    else
      planes(m, piece, to);
  }

 private:
  static void planes(const Map& m, Piece piece, const Partials<T>& to) {
    if (m.order == Order::planes && m.positions >= kW && m.positions <= kBlock<T>) piece.c0 = short_planes(m, piece, to);
    const std::int64_t first = to.place(piece.c0, piece.p0 / kBlock<T>);
    LaneReducer<T, Add> sums(to.sums + first);
    LaneReducer<T, Maximum> maxima(WithMax ? to.maxima + first : nullptr);
    S copy[kBlock<T>];
    for (std::int64_t c = piece.c0; c < piece.c1; ++c) {
      const S* const plane = reinterpret_cast<const S*>(m.data + c * m.channel_stride);
      for (std::int64_t p = piece.p0; p < piece.p1; p += kBlock<T>) {
        const std::int64_t n = std::min(kBlock<T>, piece.p1 - p);
        if (m.order == Order::strided) {
          gather(m, c, p, n, copy);
          plane_block(copy, n, 0, sums, maxima);
        } else {
          plane_block(plane + p, n, p, sums, maxima);
        }
      }
    }
    sums.finish();
    if constexpr (WithMax) maxima.finish();
  }

  // Planes of one block, a vector's width of them at a time: their sums stay in registers. Answers the first plane left.
  // 8x256x7x7 from L2, one thread, Zen 4: 6.9 us, and 10.5 by LaneReducer.
  static std::int64_t short_planes(const Map& m, const Piece& piece, const Partials<T>& to) {
    const std::int64_t whole = m.positions / kW * kW;
    const std::int64_t rest = m.positions - whole;
    const auto counted = lane_numbers<T>() >= broadcast<V>(static_cast<T>(kW - rest));
    std::int64_t c = piece.c0;
    for (; c + kW <= piece.c1; c += kW) {
      V sums[kW];
      V maxima[WithMax ? kW : 1];
#pragma GCC unroll 16
      for (int i = 0; i < kW; ++i) {
        const S* const plane = reinterpret_cast<const S*>(m.data + (c + i) * m.channel_stride);
        V sum{};
        V high = broadcast<V>(kLowest);
        for (std::int64_t p = 0; p < whole; p += kW) {
          const V v = load_as(plane + p);
          sum += v;
          if constexpr (WithMax) high = max(v, high);
        }
        const V v = load_as(plane + m.positions - kW);
        sums[i] = sum + (counted ? v : V{});
        if constexpr (WithMax) maxima[i] = max(counted ? v : broadcast<V>(kLowest), high);
      }
      store(to.sums + c, combine_lanes<Add, kW / 2>(sums));
      if constexpr (WithMax) store(to.maxima + c, combine_lanes<Maximum, kW / 2>(maxima));
    }
    return c;
  }

  // `before`: how many elements of the plane lie ahead of `from` in memory.
  static void plane_block(const S* from, std::int64_t n, std::int64_t before, LaneReducer<T, Add>& sums, LaneReducer<T, Maximum>& maxima) {
    V sum{};
    V high = broadcast<V>(kLowest);
    std::int64_t i = 0;
    for (; i + kW <= n; i += kW) {
      const V v = load_as(from + i);
      sum += v;
      if constexpr (WithMax) high = max(v, high);
    }
    if (i < n) {
      const auto rest = static_cast<int>(n - i);
      const V v = n + before >= kW ? load_as(from + n - kW) : load_last(from, rest);
      const auto counted = lane_numbers<T>() >= broadcast<V>(static_cast<T>(kW - rest));
      sum += counted ? v : V{};
      if constexpr (WithMax) high = max(counted ? v : broadcast<V>(kLowest), high);
    }
    sums.push(sum);
    if constexpr (WithMax) maxima.push(high);
  }

  static constexpr int kChannels = 256;  // accumulators of 16 KiB (AVX-512) stay in L1

  static void pixels(const Map& m, const Piece& piece, const Partials<T>& to) {
    alignas(64) T sums[kW * kChannels];
    alignas(64) T maxima[WithMax ? kW * kChannels : 1];
    for (std::int64_t p = piece.p0; p < piece.p1; p += kBlock<T>)
      for (std::int64_t c = piece.c0; c < piece.c1; c += kChannels) {
        const auto channels = static_cast<int>(std::min<std::int64_t>(kChannels, piece.c1 - c));
        const std::int64_t place = to.place(c, p / kBlock<T>);
        const char* from = m.data + p * m.position_stride + c * static_cast<std::int64_t>(sizeof(S));
        pixel_block(from, m.position_stride, std::min(kBlock<T>, piece.p1 - p), channels, sums, maxima, to.sums + place,
                    WithMax ? to.maxima + place : nullptr);
      }
  }

  // One block: accumulators [lane][channel], rows taken four at a time where whole vectors of positions remain.
  static void pixel_block(const char* from, std::int64_t stride, std::int64_t n, int channels, T* sums, T* maxima, T* to_sum, T* to_max) {
    std::fill_n(sums, kW * kChannels, T(0));
    if constexpr (WithMax) std::fill_n(maxima, kW * kChannels, kLowest);
    const std::int64_t step = kW * stride;
    std::int64_t p = 0;
    for (; p + 4 * kW <= n; p += 4 * kW)
      for (int lane = 0; lane < kW; ++lane)
        pixel_rows<4>(from + (p + lane) * stride, step, channels, sums + lane * kChannels, maxima + (WithMax ? lane * kChannels : 0));
    for (; p + kW <= n; p += kW)
      for (int lane = 0; lane < kW; ++lane)
        pixel_rows<1>(from + (p + lane) * stride, step, channels, sums + lane * kChannels, maxima + (WithMax ? lane * kChannels : 0));
    for (const std::int64_t rest = n - p; p < n; ++p) {
      const std::int64_t lane = kW - rest + p % kW;
      pixel_rows<1>(from + p * stride, step, channels, sums + lane * kChannels, maxima + (WithMax ? lane * kChannels : 0));
    }
    combine<Add>(sums, channels, to_sum);
    if constexpr (WithMax) combine<Maximum>(maxima, channels, to_max);
  }

  template <int Rows> static void pixel_rows(const char* from, std::int64_t step, int channels, T* sums, T* maxima) {
    // Accumulators are whole vectors.
    const auto add = [&](int c, auto&& row) {
      V sum = load<V>(sums + c);
      V high = WithMax ? load<V>(maxima + c) : V{};
#pragma GCC unroll 4
      for (int r = 0; r < Rows; ++r) {
        const V v = row(from + r * step + c * static_cast<std::int64_t>(sizeof(S)));
        sum += v;
        if constexpr (WithMax) high = max(v, high);
      }
      store(sums + c, sum);
      if constexpr (WithMax) store(maxima + c, high);
    };
    int c = 0;
    for (; c + kW <= channels; c += kW) add(c, [](const char* x) { return load_as(reinterpret_cast<const S*>(x)); });
    if (c < channels) add(c, [&](const char* x) { return load_few(reinterpret_cast<const S*>(x), channels - c); });
  }

  template <class Op> static void combine(const T* rows, int channels, T* to) {
    for (int c = 0; c < channels; c += kW) {
      V lanes[kW];
      for (int lane = 0; lane < kW; ++lane) lanes[lane] = load<V>(rows + lane * kChannels + c);
      const V all = combine_tree<Op>(lanes);
      if (c + kW <= channels)
        store(to + c, all);
      else
        store_few(to + c, all, channels - c);
    }
  }
};

bool holds_nan(const Map& m, std::int64_t c) {
  for (std::int64_t p = 0; p < m.positions; ++p)
    if (std::isnan(element(m.dtype, m.at(c, p)))) return true;
  return false;
}

}  // namespace

template <class T> void pool_piece(const Map& m, const Piece& piece, const Partials<T>& to) {
  with_storage<T>(m.dtype, [&](auto s) {
    using S = decltype(s);
    to.maxima != nullptr ? PoolMap<S, T, true>::piece(m, piece, to) : PoolMap<S, T, false>::piece(m, piece, to);
  });
}

template <class T> void totals(const Map& m, const Partials<T>& from, std::int64_t c0, std::int64_t c1, T* means, T* maxima) {
  if (from.blocks == 1 && maxima == nullptr) {
    const T n = static_cast<T>(m.positions);
    for (std::int64_t c = c0; c < c1; ++c) means[c] = from.sums[c] / n;
    return;
  }
  for (std::int64_t c = c0; c < c1; ++c) {
    double sum = 0;
    for (std::int64_t b = 0; b < from.blocks; ++b) sum += from.sums[from.place(c, b)];
    if (means != nullptr) means[c] = static_cast<T>(sum / static_cast<double>(m.positions));
    if (maxima != nullptr) {
      T high = -std::numeric_limits<T>::infinity();
      for (std::int64_t b = 0; b < from.blocks; ++b) high = std::max(high, from.maxima[from.place(c, b)]);
      maxima[c] = sum != sum && holds_nan(m, c) ? std::numeric_limits<T>::quiet_NaN() : high;
    }
  }
}

template void pool_piece(const Map&, const Piece&, const Partials<float>&);
template void pool_piece(const Map&, const Piece&, const Partials<double>&);
template void totals(const Map&, const Partials<float>&, std::int64_t, std::int64_t, float*, float*);
template void totals(const Map&, const Partials<double>&, std::int64_t, std::int64_t, double*, double*);

}  // namespace regard::cpu
