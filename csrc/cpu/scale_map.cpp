#include "cpu/scale_map.h"

#include "cpu/lanes.h"

namespace regard::cpu {
namespace {

template <class S, class T, bool ByPosition> class ScaleMap {
  using V = Vec<T>;
  static constexpr int kW = kWidth<T>;

 public:
  static void piece(const Map& x, const Map& out, const Piece& piece, const T* by_channel, const T* by_position) {
    if (x.order == out.order && x.order == Order::planes) {
      if constexpr (!ByPosition)
        if (x.positions >= kW && x.positions < kLongPlane && side_by_side(x) && side_by_side(out))
          return short_planes(row(x, piece.c0), row(out, piece.c0), x.positions, piece.c1 - piece.c0, by_channel + piece.c0);
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
  // Planes shorter than this are rescaled as one run of memory. squeeze_excitation 8x256x7x7 from L2, one thread, Zen 4:
  // 23.4 us, and 24.6 plane by plane.
  static constexpr std::int64_t kLongPlane = 16 * kW;

  static bool side_by_side(const Map& m) { return m.channel_stride == m.positions * static_cast<std::int64_t>(sizeof(S)); }

  // Stores are aligned. Where a vector reaches into the next plane, its last lanes have that one's weight.
  static void short_planes(const S* x, S* out, std::int64_t positions, std::int64_t channels, const T* by_channel) {
    const std::int64_t all = channels * positions;
    const auto few = [=](std::int64_t i, std::int64_t n, T weight) { store_few(out + i, load_few(x + i, n) * broadcast<V>(weight), n); };
    constexpr std::uintptr_t bytes = kW * sizeof(S);
    std::int64_t i = std::min(all, static_cast<std::int64_t>((bytes - reinterpret_cast<std::uintptr_t>(out) % bytes) % bytes / sizeof(S)));
    few(0, i, by_channel[0]);
    std::int64_t end = positions;
    for (std::int64_t c = 0; c < channels; ++c, end += positions) {
      const V w = broadcast<V>(by_channel[c]);
      for (; i + kW <= end; i += kW) store_as(out + i, load_as(x + i) * w);
      if (c + 1 == channels) break;
      const auto next_plane = lane_numbers<T>() >= broadcast<V>(static_cast<T>(end - i));
      store_as(out + i, load_as(x + i) * (next_plane ? broadcast<V>(by_channel[c + 1]) : w));
      i += kW;
    }
    if (i < all) few(i, all - i, by_channel[channels - 1]);
  }

  static S* row(const Map& m, std::int64_t c) { return reinterpret_cast<S*>(m.data + c * m.channel_stride); }

  static void plane(const S* x, S* out, std::int64_t n, T weight, const T* by_position) {
    const V w = broadcast<V>(weight);
    write(out, n, [=](std::int64_t i, auto&& values) {
      V v = values(x + i) * w;
      if constexpr (ByPosition) v *= load<V>(by_position + i);
      return v;
    });
  }

  [[gnu::always_inline]] static void pixel(const S* x, S* out, std::int64_t n, const T* by_channel, T position) {
    const V g = broadcast<V>(position);
    write(out, n, [=](std::int64_t i, auto&& values) {
      V v = values(x + i) * load<V>(by_channel + i);
      if constexpr (ByPosition) v *= g;
      return v;
    });
  }

  // Rows this long have their stores aligned: a vector across two cache lines costs two of them, and NumPy's arrays
  // start 16 bytes off a line. Rescaling 8x256x7x7 in pixels, from L2: 8.9 us against 10.5; from memory no difference.
  // (Stores past the caches lost, on 8x256x56x56 one thread: 2.18 ms against 1.99 in planes, 10.5 against 2.3 in
  // pixels, and 7.7 against 7.4 with the result read afterwards. AMD EPYC, Zen 4, 1 MiB L2.)
  static constexpr std::int64_t kWorthAligning = 8 * kW;

  // The last vector overlaps the one before it, the second the first: in place, both are computed before the overlap
  // is written. Inlined by order: a call a pixel, of 256 bfloat16 channels, cost a ninth.
  template <class F> [[gnu::always_inline]] static void write(S* out, std::int64_t n, F product) {
    if (n < kW) return store_few(out, product(0, [=](const S* x) { return load_few(x, n); }), n);
    const auto scaled = [=](std::int64_t i) { return product(i, [](const S* x) { return load_as(x); }); };
    const V last = scaled(n - kW);
    std::int64_t i = 0;
    if (n >= kWorthAligning) {
      constexpr std::uintptr_t bytes = kW * sizeof(S);
      const auto beyond = static_cast<std::int64_t>(reinterpret_cast<std::uintptr_t>(out) % bytes / sizeof(S));
      const V first = scaled(0);
      const V second = scaled(kW - beyond);
      store_as(out, first);
      store_as(out + kW - beyond, second);
      i = 2 * kW - beyond;
    }
    for (; i + kW <= n; i += kW) store_as(out + i, scaled(i));
    store_as(out + n - kW, last);
  }
};

}  // namespace

template <class T> void scale_piece(const Map& x, const Map& out, const Piece& piece, const T* by_channel, const T* by_position) {
  with_storage<T>(x.dtype, [&](auto s) {
    using S = decltype(s);
    by_position != nullptr ? ScaleMap<S, T, true>::piece(x, out, piece, by_channel, by_position)
                           : ScaleMap<S, T, false>::piece(x, out, piece, by_channel, nullptr);
  });
}

template void scale_piece(const Map&, const Map&, const Piece&, const float*, const float*);
template void scale_piece(const Map&, const Map&, const Piece&, const double*, const double*);

}  // namespace regard::cpu
