// Shared by the operations that pool a map, weigh its channels and rescale it:
//
//   for each image:  pool its channels;  weights = gate(network(pooled));  out = x * weights
//
// A small image is one thread's work from beginning to end; the pieces of a large one are shared out (stages.h).
#pragma once

#include "cpu/excitation.h"
#include "cpu/operations.h"
#include "cpu/parallel.h"
#include "cpu/pool_map.h"
#include "cpu/scale_map.h"
#include "cpu/stages.h"

namespace regard::cpu {

// Up to here an image's map and its result fit a 1 MiB L2 together.
constexpr std::int64_t kSmallImage = std::int64_t{512} << 10;

template <class S, class T, bool WithMax> class ChannelRescale {
  static constexpr int kW = kWidth<T>;

 public:
  explicit ChannelRescale(const ChannelProblem& p)
      : p_(p), x_(map_of(p.x)), out_(map_of(p.out)), cut_(x_, sizeof(S), kBlock<T>), network_(p) {}

  void run() {
    const std::int64_t images = p_.batch();
    if (images * x_.channels * x_.positions == 0) return;
    const double work = static_cast<double>(images) * static_cast<double>(x_.channels) * static_cast<double>(x_.positions + p_.reduced()) * 2;
    if (x_.channels * x_.positions * static_cast<std::int64_t>(sizeof(S)) <= kSmallImage) {
      parallel_for(images, work, [this](std::int64_t i) {
        Buffers b;
        take(b, 1);
        for (std::int64_t k = 0; k < cut_.pieces(); ++k) pool(b, i, k);
        weigh(b, i);
        // Backwards: what was pooled last is nearest.
        for (std::int64_t k = cut_.pieces(); k-- > 0;) rescale(b, i, k);
      });
      return;
    }
    Buffers b[kInFlight];
    const std::int64_t in_flight = std::min(images, kInFlight);
    take(b[0], in_flight);
    for (std::int64_t i = 1; i < in_flight; ++i) b[i] .share(b[0], i);
    const std::int64_t pieces[] = {cut_.pieces(), cut_.pieces()};
    run_stages(
        images, 2, pieces, work,
        [&](std::int64_t i, int stage, std::int64_t k) {
          if (stage == 0)
            pool(b[i % kInFlight], i, k);
          else
            rescale(b[i % kInFlight], i, cut_.pieces() - 1 - k);
        },
        [&](std::int64_t i, int stage) {
          if (stage == 0) weigh(b[i % kInFlight], i);
        });
  }

 private:
  struct Buffers {
    Scratch scratch;
    std::int64_t size;
    T *sums, *maxima;             // partials
    T *mean, *maximum;            // [channels], margins of zeros around
    T *room, *weights;
    void share(const Buffers& first, std::int64_t n) {
      const std::int64_t step = n * first.size;
      sums = first.sums + step;
      maxima = first.maxima + step;
      mean = first.mean + step;
      maximum = first.maximum + step;
      room = first.room + step;
      weights = first.weights + step;
    }
  };

  void take(Buffers& b, std::int64_t sets) const {
    const std::int64_t partials = whole_vectors(x_.channels * Partials<T>::count(x_), kW);
    const std::int64_t pooled = whole_vectors(x_.channels, kW) + 2 * network_.margin();
    const std::int64_t weights = whole_vectors(x_.channels, kW);
    b.size = (WithMax ? 2 : 1) * (partials + pooled) + network_.room() + weights;
    const auto all = b.scratch.template reserve<T>(sets * b.size);
    b.scratch.acquire();
    T* next = b.scratch.template at<T>(all);
    std::fill_n(next, sets * b.size, T(0));
    const auto part = [&](std::int64_t n) {
      T* const at = next;
      next += n;
      return at;
    };
    b.sums = part(partials);
    b.maxima = WithMax ? part(partials) : b.sums;
    b.mean = part(pooled) + network_.margin();
    b.maximum = WithMax ? part(pooled) + network_.margin() : b.mean;
    b.room = part(network_.room());
    b.weights = part(weights);
  }

  Map image(Map m, const Array& a, std::int64_t i) const {
    m.data += i * a.stride[0];
    return m;
  }
  Partials<T> partials(const Buffers& b) const { return Partials<T>(x_, b.sums, WithMax ? b.maxima : nullptr); }

  void pool(const Buffers& b, std::int64_t i, std::int64_t k) const {
    PoolMap<S, T, WithMax>::piece(image(x_, p_.x, i), cut_[k], partials(b));
  }
  void weigh(const Buffers& b, std::int64_t i) const {
    totals<S, T>(image(x_, p_.x, i), partials(b), 0, x_.channels, b.mean, WithMax ? b.maximum : nullptr);
    network_.weigh(b.mean, WithMax ? b.maximum : nullptr, b.room, b.weights);
  }
  void rescale(const Buffers& b, std::int64_t i, std::int64_t k) const {
    ScaleMap<S, T, false>::piece(image(x_, p_.x, i), image(out_, p_.out, i), cut_[k], b.weights, nullptr);
  }

  const ChannelProblem& p_;
  Map x_;
  Map out_;
  Cut cut_;
  ExcitationNetwork<S, T> network_;
};

template <bool WithMax> inline void channel_rescale(const ChannelProblem& p) {
  with_compute(p.x.dtype, [&](auto t) {
    using T = decltype(t);
    with_storage<T>(p.x.dtype, [&](auto s) { ChannelRescale<decltype(s), T, WithMax>(p).run(); });
  });
}

}  // namespace regard::cpu
