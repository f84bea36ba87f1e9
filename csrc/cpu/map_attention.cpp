// The operations that weigh a map's channels, its positions, or both:
//
//   for each image:
//     pool:      means (and maxima) of the channels                      reads the map
//     weigh:     weights = gate(network(pooled))
//     describe:  mean and maximum over x * weights at each position      reads the map   (spatial only)
//     convolve:  gates = gate(k x k convolution of the two planes)                       (spatial only)
//     rescale:   out = x * weights * gates                               reads the map, writes out
//
// A small image is one thread's work from beginning to end, and so are large ones of which every thread has as many;
// else the pieces of a large image are shared out (stages.h). Both make the same sums.
//
// squeeze_excitation  weights = gate(W_expand act(W_reduce mean + b_reduce) + b_expand); Hu, Shen & Sun,
//                     "Squeeze-and-Excitation Networks" (2018). ECA (Wang et al., "ECA-Net", 2020) has a convolution over
//                     channels in the two matrices' place.
// channel_attention   weights = gate(network(mean) + network(maximum)); Woo, Park, Lee & Kweon, "CBAM: Convolutional
//                     Block Attention Module" (2018), section 3.1
// spatial_attention   section 3.2: weights are 1
// cbam                both. x * weights is never written: its statistics and out are computed from x, in three passes.

#include "cpu/excitation.h"
#include "cpu/operations.h"
#include "cpu/parallel.h"
#include "cpu/plane_convolution.h"
#include "cpu/pool_map.h"
#include "cpu/position_statistics.h"
#include "cpu/scale_map.h"
#include "cpu/stages.h"

namespace regard::cpu {
namespace {

// Up to here an image's map and its result fit a 1 MiB L2 together.
constexpr std::int64_t kSmallImage = std::int64_t{512} << 10;

// Images of all threads in flight together, to be read from L3 again. Each thread on its own image has nobody to wait
// for: 8x256x56x56 on two threads of a loaded Zen 4 with 32 MiB of L3 takes 1.75 ms in planes and 1.41 in pixels, and with
// pieces shared out 2.23 and 1.61 (PyTorch 2.19 and 3.55, a plain product 1.39).
constexpr std::int64_t kSharedCache = std::int64_t{16} << 20;

// What a stage does to an element, in parallel_for's operations of some 20 ps: 8x256x7x7 takes 25 us of two stages.
constexpr double kWorkAnElement = 6;

template <class T> class MapAttention {
  static constexpr int kW = kWidth<T>;

 public:
  MapAttention(const ChannelProblem& p, bool with_max)
      : p_(p),
        with_max_(with_max),
        spatial_(p.spatial()),
        x_(map_of(p.x)),
        out_(map_of(p.out)),
        cut_(x_, size_of(p.x.dtype), kBlock<T>),
        network_(p),
        convolution_(p, network_.gate()) {
    const std::int64_t n = x_.positions;
    chunks_ = (n + kChunk<T> - 1) / kChunk<T>;
    chunk_ = chunks_ > 0 ? whole_vectors((n + chunks_ - 1) / chunks_, kW) : 0;
    // Some 4096 positions of a 7 x 7 kernel take 10 us.
    rows_ = whole_vectors(std::max<std::int64_t>(1, 4096 / std::max<std::int64_t>(1, x_.width)), PlaneConvolution<T>::kRows);
    row_pieces_ = (p.x.shape[2] + rows_ - 1) / rows_;
    if (p.excitation != Excitation::none) stages_[count_++] = Stage::pool;
    if (spatial_) {
      stages_[count_++] = Stage::describe;
      stages_[count_++] = Stage::convolve;
    }
    stages_[count_++] = Stage::rescale;
  }

  void run(std::source_location at) {
    const std::int64_t images = p_.batch();
    const std::int64_t elements = x_.channels * x_.positions;
    if (images * elements == 0) return;
    const double work = static_cast<double>(images) * static_cast<double>(elements) * count_ * kWorkAnElement;
    if (one_thread_an_image(images, elements * size_of(p_.x.dtype))) {
      const auto whole_image = [this](std::int64_t i) {
        Buffers b;
        take(b, 1);
        for (int s = 0; s < count_; ++s) {
          for (std::int64_t k = 0; k < pieces(stages_[s]); ++k) piece(b, i, stages_[s], k);
          finish(b, i, stages_[s]);
        }
      };
      parallel_for(images, work, Rehearse::scratch, whole_image, at);
      return;
    }
    const std::int64_t in_flight = std::min(images, kInFlight);
    Buffers all;
    take(all, in_flight);
    std::int64_t counts[kMostStages];
    for (int s = 0; s < count_; ++s) counts[s] = pieces(stages_[s]);
    run_stages(
        images, count_, counts, work, [&](std::int64_t i, int s, std::int64_t k) { piece(all.set(i % kInFlight), i, stages_[s], k); },
        [&](std::int64_t i, int s) { finish(all.set(i % kInFlight), i, stages_[s]); }, at);
  }

 private:
  static bool one_thread_an_image(std::int64_t images, std::int64_t bytes) {
    if (bytes <= kSmallImage) return true;
    const std::int64_t threads = get_num_threads();
    const std::int64_t rounds = (images + threads - 1) / threads;
    // Idle at most a tenth of the time.
    return 10 * images >= 9 * rounds * threads && bytes <= kSharedCache / threads;
  }

  enum class Stage : std::uint8_t { pool, describe, convolve, rescale };

  // One image's values.
  struct Values {
    T *sums, *maxima;   // partials
    T *mean, *maximum;  // [channels], margins of zeros around them
    T *room, *weights;  // weights: [channels]
    T *planes, *gates;  // [2][padded plane], [positions]
  };
  struct Buffers {
    Scratch scratch;
    std::int64_t size;
    Values first;
    Values set(std::int64_t n) const {
      Values v = first;
      for (T** x : {&v.sums, &v.maxima, &v.mean, &v.maximum, &v.room, &v.weights, &v.planes, &v.gates}) *x += n * size;
      return v;
    }
    operator Values() const { return first; }
  };

  void take(Buffers& b, std::int64_t sets) const {
    const bool pooled = p_.excitation != Excitation::none;
    const std::int64_t partials = pooled ? whole_vectors(x_.channels * Partials<T>::count(x_), kW) : 0;
    const std::int64_t weights = whole_vectors(x_.channels, kW);
    const std::int64_t means = weights + 2 * network_.margin();
    const std::int64_t planes = spatial_ ? whole_vectors(2 * convolution_.padded_plane() + kW, kW) : 0;
    const std::int64_t gates = spatial_ ? whole_vectors(x_.positions, kW) : 0;
    b.size = (with_max_ ? 2 : 1) * (partials + means) + network_.room() + weights + planes + gates;
    const auto all = b.scratch.template reserve<T>(sets * b.size);
    b.scratch.acquire();
    T* next = b.scratch.template at<T>(all);
    std::fill_n(next, sets * b.size, T(0));
    const auto part = [&](std::int64_t n) {
      T* const at = next;
      next += n;
      return at;
    };
    Values& v = b.first;
    v.sums = part(partials);
    v.maxima = with_max_ ? part(partials) : v.sums;
    v.mean = part(means) + network_.margin();
    v.maximum = with_max_ ? part(means) + network_.margin() : v.mean;
    v.room = part(network_.room());
    v.weights = part(weights);
    v.planes = part(planes);
    v.gates = part(gates);
    if (!pooled)
      for (std::int64_t s = 0; s < sets; ++s) std::fill_n(v.weights + s * b.size, x_.channels, T(1));
  }

  std::int64_t pieces(Stage stage) const {
    return stage == Stage::describe ? chunks_ : stage == Stage::convolve ? row_pieces_ : cut_.pieces();
  }

  void piece(const Values& v, std::int64_t i, Stage stage, std::int64_t k) const {
    const Map x = image(x_, p_.x, i);
    switch (stage) {
      case Stage::pool: pool_piece(x, cut_[k], partials(v)); break;
      case Stage::describe: describe(x, v, k); break;
      case Stage::convolve: convolution_.rows(v.planes, k * rows_, std::min((k + 1) * rows_, p_.x.shape[2]), v.gates); break;
      case Stage::rescale:
        // Backwards: what was read last is nearest.
        scale_piece(x, image(out_, p_.out, i), cut_[cut_.pieces() - 1 - k], v.weights, spatial_ ? v.gates : nullptr);
        break;
    }
  }

  void finish(const Values& v, std::int64_t i, Stage stage) const {
    if (stage != Stage::pool) return;
    totals(image(x_, p_.x, i), partials(v), 0, x_.channels, v.mean, with_max_ ? v.maximum : nullptr);
    network_.weigh(v.mean, with_max_ ? v.maximum : nullptr, v.room, v.weights);
  }

  void describe(const Map& x, const Values& v, std::int64_t k) const {
    alignas(64) T mean[kChunk<T>];
    alignas(64) T maximum[kChunk<T>];
    const std::int64_t p0 = k * chunk_;
    const std::int64_t n = std::min(chunk_, x.positions - p0);
    if (n <= 0) return;
    describe_positions(x, v.weights, p0, n, mean, maximum);
    convolution_.place(v.planes, 0, p0, n, mean);
    convolution_.place(v.planes, 1, p0, n, maximum);
  }

  static Map image(Map m, const Array& a, std::int64_t i) {
    m.data += i * a.stride[0];
    return m;
  }
  Partials<T> partials(const Values& v) const { return Partials<T>(x_, v.sums, with_max_ ? v.maxima : nullptr); }

  const ChannelProblem& p_;
  bool with_max_;
  bool spatial_;
  Map x_;
  Map out_;
  Cut cut_;
  ExcitationNetwork<T> network_;
  PlaneConvolution<T> convolution_;
  std::int64_t chunks_, chunk_;     // of positions, for describe
  std::int64_t rows_, row_pieces_;  // for convolve
  Stage stages_[kMostStages];
  int count_ = 0;
};

// `at` is the operation, for rehearsals.
void map_attention(const ChannelProblem& p, bool with_max, std::source_location at = std::source_location::current()) {
  with_compute(p.x.dtype, [&](auto t) { MapAttention<decltype(t)>(p, with_max).run(at); });
}

}  // namespace

void squeeze_excitation(const ChannelProblem& problem) { map_attention(problem, false); }

void channel_attention(const ChannelProblem& problem) { map_attention(problem, true); }

void spatial_attention(const ChannelProblem& problem) { map_attention(problem, false); }

void cbam(const ChannelProblem& problem) { map_attention(problem, true); }

}  // namespace regard::cpu
