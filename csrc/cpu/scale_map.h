// out = x * weight of its channel (* weight of its position), piece by piece. out may be x itself.
#pragma once

#include "cpu/map.h"

namespace regard::cpu {

template <class S, class T, bool ByPosition> class ScaleMap {
  using V = Vec<T>;
  static constexpr int kW = kWidth<T>;

 public:
  // by_channel[c] and, where ByPosition, by_position[p].
  static void piece(const Map& x, const Map& out, const Piece& piece, const T* by_channel, const T* by_position) {
    if (x.order == out.order && x.order == Order::planes) {
      for (std::int64_t c = piece.c0; c < piece.c1; ++c)
        plane(row(x, c) + piece.p0, row(out, c) + piece.p0, piece.p1 - piece.p0, by_channel[c],
              ByPosition ? by_position + piece.p0 : nullptr);
    } else if (x.order == out.order && x.order == Order::pixels) {
      for (std::int64_t p = piece.p0; p < piece.p1; ++p)
        pixel(reinterpret_cast<const S*>(x.data + p * x.position_stride) + piece.c0,
              reinterpret_cast<S*>(out.data + p * out.position_stride) + piece.c0, piece.c1 - piece.c0, by_channel + piece.c0,
              ByPosition ? by_position[p] : T(1));
    } else {
      S copy[kBlock<T>];
      for (std::int64_t c = piece.c0; c < piece.c1; ++c)
        for (std::int64_t p = piece.p0; p < piece.p1; p += kBlock<T>) {
          const std::int64_t n = std::min(kBlock<T>, piece.p1 - p);
          gather(x, c, p, n, copy);
          plane(copy, copy, n, by_channel[c], ByPosition ? by_position + p : nullptr);
          scatter(out, c, p, n, copy);
        }
    }
  }

 private:
  static S* row(const Map& m, std::int64_t c) { return reinterpret_cast<S*>(m.data + c * m.channel_stride); }

  static void scalar(const S* x, S* out, T weight, T position) {
    T v = to_float(read<S>(reinterpret_cast<const char*>(x))) * weight;
    if constexpr (ByPosition) v *= position;
    const S s = rounded<S>(v);
    std::memcpy(static_cast<void*>(out), &s, sizeof s);
  }

  static void plane(const S* x, S* out, std::int64_t n, T weight, const T* by_position) {
    const V w = broadcast<V>(weight);
    const auto scaled = [&](std::int64_t i) {
      V v = load_as(x + i) * w;
      if constexpr (ByPosition) v *= load<V>(by_position + i);
      return v;
    };
    if (n < kW) {
      for (std::int64_t i = 0; i < n; ++i) scalar(x + i, out + i, weight, ByPosition ? by_position[i] : T(1));
      return;
    }
    // The last vector overlaps the one before it: computed before anything is written, it is right in place, too.
    const V last = scaled(n - kW);
    for (std::int64_t i = 0; i + kW <= n; i += kW) store_as(out + i, scaled(i));
    store_as(out + n - kW, last);
  }

  static void pixel(const S* x, S* out, std::int64_t n, const T* by_channel, T position) {
    const V g = broadcast<V>(position);
    const auto scaled = [&](std::int64_t i) {
      V v = load_as(x + i) * load<V>(by_channel + i);
      if constexpr (ByPosition) v *= g;
      return v;
    };
    if (n < kW) {
      for (std::int64_t i = 0; i < n; ++i) scalar(x + i, out + i, by_channel[i], position);
      return;
    }
    const V last = scaled(n - kW);
    for (std::int64_t i = 0; i + kW <= n; i += kW) store_as(out + i, scaled(i));
    store_as(out + n - kW, last);
  }
};

}  // namespace regard::cpu
