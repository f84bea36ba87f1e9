#include "cpu/position_statistics.h"

#include <limits>

#include "cpu/lanes.h"

namespace regard::cpu {
namespace {

template <class S, class T> class PositionStatistics {
  using V = Vec<T>;
  static constexpr int kW = kWidth<T>;
  static constexpr int kLevels = kW == 16 ? 5 : kW == 8 ? 4 : kW == 4 ? 3 : 2;  // rows that the tree holds at once
  static constexpr T kLowest = -std::numeric_limits<T>::infinity();

 public:
  PositionStatistics(const Map& m, const T* weights) : m_(m), weights_(weights), rest_(m.channels % kW), whole_(m.channels - rest_) {}

  void chunk(std::int64_t p0, std::int64_t n, T* mean, T* maximum) const {
    if (m_.order == Order::pixels)
      pixels(p0, n, mean, maximum);
    else
      planes(p0, n, mean, maximum);
    for (std::int64_t i = 0; i < n; ++i)
      if (mean[i] != mean[i] && holds_nan(p0 + i)) maximum[i] = std::numeric_limits<T>::quiet_NaN();
    const T channels = static_cast<T>(m_.channels);
    for (std::int64_t i = 0; i < n; ++i) mean[i] /= channels;
  }

 private:
  bool holds_nan(std::int64_t p) const {
    for (std::int64_t c = 0; c < m_.channels; ++c) {
      const T v = static_cast<T>(element(m_.dtype, m_.at(c, p))) * weights_[c];
      if (v != v) return true;
    }
    return false;
  }

  // ---- Pixels: vectors of channels ----

  void pixels(std::int64_t p0, std::int64_t n, T* sum, T* maximum) const {
    LaneReducer<T, Add> sums(sum);
    LaneReducer<T, Maximum> maxima(maximum);
    const V tail_weights = rest_ == 0 ? V{} : last_channels(weights_);
    std::int64_t i = 0;
    for (; i + 4 <= n; i += 4) rows<4>(p0 + i, tail_weights, sums, maxima);
    for (; i < n; ++i) rows<1>(p0 + i, tail_weights, sums, maxima);
    sums.finish();
    maxima.finish();
  }

  template <int Rows> void rows(std::int64_t p, V tail_weights, LaneReducer<T, Add>& sums, LaneReducer<T, Maximum>& maxima) const {
    const S* from[Rows];
    V acc[Rows] = {};
    V high[Rows];
#pragma GCC unroll 4
    for (int r = 0; r < Rows; ++r) {
      from[r] = reinterpret_cast<const S*>(m_.data + (p + r) * m_.position_stride);
      high[r] = broadcast<V>(kLowest);
    }
    for (std::int64_t c = 0; c < whole_; c += kW) {
      const V w = load<V>(weights_ + c);
#pragma GCC unroll 4
      for (int r = 0; r < Rows; ++r) {
        const V v = load_as(from[r] + c) * w;
        acc[r] += v;
        high[r] = max(v, high[r]);
      }
    }
    if (rest_ > 0) {
      const auto counted = lane_numbers<T>() >= broadcast<V>(static_cast<T>(kW - rest_));
      for (int r = 0; r < Rows; ++r) {
        const V v = last_channels(from[r]) * tail_weights;
        acc[r] += counted ? v : V{};
        high[r] = max(counted ? v : broadcast<V>(kLowest), high[r]);
      }
    }
    for (int r = 0; r < Rows; ++r) {
      sums.push(acc[r]);
      maxima.push(high[r]);
    }
  }

  // The last rest_ of a row of channels in the last lanes; anything in the others.
  template <class U> V last_channels(const U* row) const {
    return m_.channels >= kW ? load_as(row + m_.channels - kW) : load_last(row, rest_);
  }

  // ---- Planes: rows of positions ----

  struct Chunk {
    std::int64_t p0, n;
    T* maximum;
  };

  void planes(std::int64_t p0, std::int64_t n, T* sum, T* maximum) const {
    alignas(64) T levels[kLevels * kChunk<T>];
    std::fill_n(maximum, n, kLowest);
    subtree(0, 1, {p0, n, maximum}, levels);
    std::copy_n(levels, n, sum);
  }

  // to = the lanes first, first + step, ... added up as combine_tree() does. False where they have no channel.
  bool subtree(int first, int step, const Chunk& chunk, T* to) const {
    if (step == kW) return lane(first, chunk, to);
    if (!subtree(first, 2 * step, chunk, to)) return subtree(first + step, 2 * step, chunk, to);
    T* const other = to + kChunk<T>;
    if (subtree(first + step, 2 * step, chunk, other)) {
      for (std::int64_t i = 0; i < chunk.n; i += kW) store(to + i, load<V>(to + i) + load<V>(other + i));
    }
    return true;
  }

  bool lane(int lane, const Chunk& chunk, T* to) const {
    const std::int64_t in_tail = lane >= kW - rest_ ? 1 : 0;
    const std::int64_t channels = whole_ / kW + in_tail;
    const auto channel = [&](std::int64_t k) { return k < whole_ / kW ? k * kW + lane : whole_ + lane - (kW - rest_); };
    if (channels == 0) return false;
    std::fill_n(to, chunk.n, T(0));
    std::int64_t k = 0;
    if (m_.order != Order::strided)
      for (; k + 4 <= channels; k += 4) {
        const std::int64_t four[] = {channel(k), channel(k + 1), channel(k + 2), channel(k + 3)};
        add_channels<4>(four, chunk, to);
      }
    for (; k < channels; ++k) {
      const std::int64_t one[] = {channel(k)};
      add_channels<1>(one, chunk, to);
    }
    return true;
  }

  template <int Count> void add_channels(const std::int64_t* channels, const Chunk& chunk, T* to) const {
    const S* from[Count];
    V w[Count];
    S copy[Count == 1 ? kChunk<T> : 1];
    for (int r = 0; r < Count; ++r) {
      from[r] = reinterpret_cast<const S*>(m_.data + channels[r] * m_.channel_stride) + chunk.p0;
      w[r] = broadcast<V>(weights_[channels[r]]);
    }
    if (Count == 1 && m_.order == Order::strided) {
      gather(m_, channels[0], chunk.p0, chunk.n, copy);
      from[0] = copy;
    }
    const auto add = [&](std::int64_t i, auto&& positions) {
      V acc = load<V>(to + i);
      V high = load<V>(chunk.maximum + i);
#pragma GCC unroll 4
      for (int r = 0; r < Count; ++r) {
        const V v = positions(from[r] + i) * w[r];
        acc += v;
        high = max(v, high);
      }
      store(to + i, acc);
      store(chunk.maximum + i, high);
    };
    std::int64_t i = 0;
    for (; i + kW <= chunk.n; i += kW) add(i, [](const S* x) { return load_as(x); });
    if (i < chunk.n) add(i, [&](const S* x) { return load_few(x, chunk.n - i); });
  }

  const Map& m_;
  const T* weights_;
  std::int64_t rest_;
  std::int64_t whole_;
};

}  // namespace

template <class T> void describe_positions(const Map& m, const T* weights, std::int64_t p0, std::int64_t n, T* mean, T* maximum) {
  with_storage<T>(m.dtype, [&](auto s) { PositionStatistics<decltype(s), T>(m, weights).chunk(p0, n, mean, maximum); });
}

template void describe_positions(const Map&, const float*, std::int64_t, std::int64_t, float*, float*);
template void describe_positions(const Map&, const double*, std::int64_t, std::int64_t, double*, double*);

}  // namespace regard::cpu
