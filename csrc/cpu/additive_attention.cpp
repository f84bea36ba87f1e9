// Additive attention: out = softmax_j(v . tanh(q_i + k_j)) value_j without the len_q x len_kv x dim tensor.
//
//   for each group of sequences whose projected keys fit the cache:
//     project the keys and the queries                              (parallel; once, not once a query block)
//     for each item: a block of queries of one sequence             (parallel)
//       E = e^2q
//       for each block of keys                                      (in order: the merge is sequential)
//         F = e^2k, transposed;  S = v . tanh from E and F;  pairs that E F cannot carry again, by tanh itself
//         mask;  P = exp2(S - max);  out = out * alpha + P V
//       out / sum; non-finite rows again by the plain path
//
// tanh(q + k) = 1 - 2 / (1 + e^2q e^2k) takes the exponentials once a row instead of once a pair: what is left is an FMA,
// a reciprocal and an FMA. Summing two or four of the fractions over one denominator saves divisions, but each product
// rounds: on Zen 4 it took 0.97 and 1.04 ns a 64-byte vector instead of 1.36, at 1.2 and 1.5 times the error.
//
// Bahdanau, Cho & Bengio, "Neural Machine Translation by Jointly Learning to Align and Translate" (2014); with a
// location term, Chorowski et al., "Attention-Based Models for Speech Recognition" (2015).

#include <algorithm>
#include <cmath>
#include <limits>

#include "cpu/additive_plain.h"
#include "cpu/math.h"
#include "cpu/operations.h"
#include "cpu/parallel.h"
#include "cpu/projection.h"
#include "cpu/strided.h"

namespace regard::cpu {
namespace {

constexpr int kKeys = 96;              // keys a block: whole vectors of every width
constexpr std::int64_t kSummed = 16;   // dimensions a chain of additions: one chain over 256 costs twice the error
constexpr std::int64_t kQueries = 64;  // queries an item at most: e^2k, as dear as 4 pairs, is computed once an item
constexpr std::int64_t kItemsPerThread = 2;
constexpr std::int64_t kGroupBytes = std::int64_t{4} << 20;     // projected keys held at a time
constexpr std::int64_t kWeightBytes = std::int64_t{512} << 10;  // scores kept by an item that returns weights

// What e^2q e^2k carries. |q| and |k| are clamped to kClamp, where e^(2 kClamp) and its inverse are normal numbers.
// Clamping changes nothing to rounding while the other one stays within kOther: tanh(kClamp - kOther) is 1.
// Only pairs where both rows hold more than that go the direct way.
// 1 + e^2x is held to kLargest, whose reciprocal is a normal number and nothing beside 1; where |q| + |k| <= kSmall it
// does not reach that.
template <class T> struct Range;
template <> struct Range<float> {
  static constexpr float kClamp = 43, kOther = 33, kSmall = 42, kLargest = 0x1p124f;
};
template <> struct Range<double> {
  static constexpr double kClamp = 353, kOther = 333, kSmall = 352, kLargest = 0x1p1020;
};

template <class T> class Additive {
  using V = Vec<T>;
  static constexpr int kW = kWidth<T>;
  static constexpr int kRows = kVectorRegisters == 32 ? 8 : 4;  // queries that share the loads of F and v
  static constexpr T kInfinity = std::numeric_limits<T>::infinity();

 public:
  explicit Additive(const AdditiveProblem& problem) : p_(problem), plain_(problem) {
    dim_ = p_.dim();
    dim_row_ = row_length<T>(dim_);
    value_row_ = row_length<T>(p_.dim_v());
    kept_row_ = round_up(p_.len_kv(), kKeys);
    previous_row_ = round_up(kKeys + (p_.needs_location ? p_.width() : 0), kW) + kW;
    if (p_.w_query.present()) w_query_ = {p_.w_query, p_.query.dtype};
    if (p_.w_key.present()) w_key_ = {p_.w_key, p_.key.dtype};
    v_ = Shared<T>(round_up(dim_, kW));
    std::fill_n(v_.get(), round_up(dim_, kW), T(0));
    read_row(p_.v.dtype, p_.v.data, p_.v.stride[0], dim_, v_.get());
    if (p_.bias.present()) {
      bias_ = Shared<T>(round_up(dim_, kW));
      read_row(p_.bias.dtype, p_.bias.data, p_.bias.stride[0], dim_, bias_.get());
    }
    if (p_.needs_location) prepare_location();
  }

  void run() {
    const std::int64_t a_sequence = std::max<std::int64_t>(1, p_.len_kv() * dim_row_ * static_cast<std::int64_t>(sizeof(T)));
    const std::int64_t group = w_key_ ? std::clamp<std::int64_t>(kGroupBytes / a_sequence, 1, std::max<std::int64_t>(1, p_.batch()))
                                      : std::max<std::int64_t>(1, p_.batch());
    if (w_key_) keys_ = Shared<T>((group * p_.len_kv() + Tile<T>::kRows) * dim_row_);
    if (w_query_) queries_ = Shared<T>((group * p_.len_q() + Tile<T>::kRows) * dim_row_);

    block_ = p_.needs_location ? 1 : kQueries;
    while (block_ > 1 && p_.weights.present() && block_ * kept_row_ * static_cast<std::int64_t>(sizeof(T)) > kWeightBytes) block_ /= 2;
    // A row's bits do not depend on the rows it shares an item with.
    const std::int64_t wanted = get_num_threads() > 1 ? kItemsPerThread * get_num_threads() : 1;
    while (block_ > 8 && group * ((p_.len_q() + block_ - 1) / block_) < wanted) block_ /= 2;
    const std::int64_t blocks = (p_.len_q() + block_ - 1) / block_;

    for (std::int64_t b0 = 0; b0 < p_.batch(); b0 += group) {
      const std::int64_t sequences = std::min(group, p_.batch() - b0);
      if (w_query_) w_query_(p_.query, b0, sequences, queries_.get(), dim_row_);
      if (w_key_) w_key_(p_.key, b0, sequences, keys_.get(), dim_row_);
      const double work =
          static_cast<double>(sequences * p_.len_q()) * static_cast<double>(p_.len_kv() + 1) * static_cast<double>(8 * dim_ + p_.dim_v());
      parallel_for(sequences * blocks, work, Rehearse::scratch, [&](std::int64_t item) {
        const std::int64_t i0 = item % blocks * block_;
        run_item(b0, b0 + item / blocks, i0, static_cast<int>(std::min(block_, p_.len_q() - i0)));
      });
    }
  }

 private:
  struct Buffers {
    Scratch scratch;
    T* queries;       // [block][dim_row], projected, with bias
    T* exponentials;  // [block][dim]: e^2q
    T* query_max;     // [block]: largest |q|, inf where not finite
    T* max;           // [block]
    T* sum;           // [block]
    T* output;        // [block, to whole tiles][value_row]
    T* scores;        // [block, to whole tiles][kKeys], then the weights relative to max
    T* kept;          // [block][kept_row]: all scores, where weights are wanted
    T* rows;          // [kKeys][dim_row]: this block's keys where they are not read from keys_
    T* key_max;       // [kKeys]
    T* factors;       // [kKeys / kW][dim][kW]: e^2k
    T* values;        // [kKeys][value_row]
    T* previous;      // [channels][previous_row]
    T* features;      // [filters][kKeys]
    double* plain;
    double* plain_out;
  };

  // One block of keys of one item.
  struct Block {
    std::int64_t b, i0, j0;
    int queries, keys;
    const T* key_rows;  // [keys][key_row]
    std::int64_t key_row;
  };

  void prepare_location() {
    w_location_ = Projection<T>(p_.w_location);
    const std::int64_t taps = p_.channels() * p_.width();
    kernel_ = Shared<T>(p_.filters() * taps + kW);
    location_bias_ = Shared<T>(p_.filters() + kW);
    std::fill_n(location_bias_.get(), p_.filters(), T(0));
    if (p_.location_bias.present())
      read_row(p_.location_bias.dtype, p_.location_bias.data, p_.location_bias.stride[0], p_.filters(), location_bias_.get());
    for (std::int64_t f = 0; f < p_.filters(); ++f)
      for (std::int64_t c = 0; c < p_.channels(); ++c)
        read_row(p_.location_kernel.dtype, p_.location_kernel.at(f, c), p_.location_kernel.stride[2], p_.width(),
                 kernel_.get() + f * taps + c * p_.width());
  }

  void take_buffers(Buffers& w) const {
    const std::int64_t tiled = round_up(block_, Tile<T>::kRows);
    Scratch& s = w.scratch;
    const auto queries = s.template reserve<T>(block_ * dim_row_);
    const auto exponentials = s.template reserve<T>(block_ * dim_ + kW);
    const auto state = s.template reserve<T>(3 * block_);
    const auto output = s.template reserve<T>(tiled * value_row_);
    const auto scores = s.template reserve<T>(tiled * kKeys);
    const auto kept = s.template reserve<T>(p_.weights.present() ? block_ * kept_row_ : 0);
    const auto rows = s.template reserve<T>(kKeys * dim_row_);
    const auto key_max = s.template reserve<T>(kKeys);
    const auto factors = s.template reserve<T>(kKeys * dim_);
    const auto values = s.template reserve<T>(kKeys * value_row_);
    const auto previous = s.template reserve<T>(p_.needs_location ? p_.channels() * previous_row_ : 0);
    const auto features = s.template reserve<T>(p_.needs_location ? p_.filters() * kKeys : 0);
    const auto plain = s.template reserve<double>(plain_.workspace());
    const auto plain_out = s.template reserve<double>(p_.dim_v());
    s.acquire();
    w.queries = s.template at<T>(queries);
    w.exponentials = s.template at<T>(exponentials);
    w.query_max = s.template at<T>(state);
    w.max = w.query_max + block_;
    w.sum = w.max + block_;
    w.output = s.template at<T>(output);
    w.scores = s.template at<T>(scores);
    w.kept = p_.weights.present() ? s.template at<T>(kept) : nullptr;
    w.rows = s.template at<T>(rows);
    w.key_max = s.template at<T>(key_max);
    w.factors = s.template at<T>(factors);
    w.values = s.template at<T>(values);
    w.previous = s.template at<T>(previous);
    w.features = s.template at<T>(features);
    w.plain = s.template at<double>(plain);
    w.plain_out = s.template at<double>(plain_out);
  }

  void run_item(std::int64_t b0, std::int64_t b, std::int64_t i0, int queries) const {
    Buffers w;
    take_buffers(w);
    const T* const projected = w_key_ ? keys_.get() + (b - b0) * p_.len_kv() * dim_row_ : nullptr;
    const T* const projected_queries = w_query_ ? queries_.get() + ((b - b0) * p_.len_q() + i0) * dim_row_ : nullptr;
    for (int q = 0; q < queries; ++q)
      start_query(w, b, i0 + q, q, projected_queries != nullptr ? projected_queries + q * dim_row_ : nullptr);
    const std::int64_t tiled = round_up(queries, Tile<T>::kRows);
    std::fill_n(w.output, tiled * value_row_, T(0));
    std::fill(w.scores + queries * kKeys, w.scores + tiled * kKeys, T(0));

    const std::int64_t end = p_.keys_of(b);
    for (std::int64_t j0 = 0; j0 < end; j0 += kKeys) {
      if (stop_requested()) return;
      Block t{b, i0, j0, queries, static_cast<int>(std::min<std::int64_t>(kKeys, end - j0)), nullptr, dim_row_};
      find_keys(w, t, projected);
      take_exponentials(w, t);
      score(w, t);
      mask(w, t);
      score_directly(w, t);
      for (int q = 0; q < queries; ++q) softmax(w, t, q);
      add_values(w, t);
    }
    for (int q = 0; q < queries; ++q) finish(w, b, i0 + q, q, projected);
  }

  void start_query(Buffers& w, std::int64_t b, std::int64_t i, int q, const T* projected) const {
    T* const row = w.queries + q * dim_row_;
    if (projected != nullptr)
      std::copy_n(projected, dim_, row);
    else
      read_row(p_.query.dtype, p_.query.at(b, i), p_.query.stride[2], dim_, row);
    std::fill(row + dim_, row + round_up(dim_, kW), T(0));
    if (bias_)
      for (std::int64_t d = 0; d < dim_; ++d) row[d] += bias_.get()[d];
    w.query_max[q] = largest_of(row);
    // What is written past dim, the next row or the room kept at the end takes.
    for (std::int64_t d = 0; d < dim_; d += kW) store(w.exponentials + q * dim_ + d, exponential(load<V>(row + d)));
    w.max[q] = -kInfinity;
    w.sum[q] = 0;
  }

  static V exponential(V x) {
    const V clamped = min(max(x, broadcast<V>(-Range<T>::kClamp)), broadcast<V>(Range<T>::kClamp));
    return exp_normal(clamped + clamped);
  }

  // max |row|, or inf where an element is not finite. Rows are whole vectors, zeros at the end.
  T largest_of(const T* row) const {
    V m{};
    V difference{};
    for (std::int64_t d = 0; d < dim_; d += kW) {
      const V x = load<V>(row + d);
      m = max(abs(x), m);
      difference += x - x;
    }
    return sum_lanes(difference) == 0 ? max_lanes(m) : kInfinity;
  }

  // Whether rows of x may be read where they lie: compute values, contiguous, whole vectors.
  static bool readable(const Array& x) {
    constexpr std::int64_t item = sizeof(T);
    return x.dtype == dtype_of<T>() && x.stride[2] == item && x.stride[1] % item == 0 &&
           reinterpret_cast<std::uintptr_t>(x.data) % item == 0 && x.stride[0] % item == 0 && x.shape[2] % kW == 0;
  }

  // The block's keys in the space of the sum, whole vectors a row, zeros past dim.
  void find_keys(Buffers& w, Block& t, const T* projected) const {
    if (!p_.needs_location && (projected != nullptr || readable(p_.key))) {
      t.key_row = projected != nullptr ? dim_row_ : p_.key.stride[1] / static_cast<std::int64_t>(sizeof(T));
      t.key_rows = projected != nullptr ? projected + t.j0 * dim_row_ : reinterpret_cast<const T*>(p_.key.at(t.b, t.j0));
      return;
    }
    for (int r = 0; r < t.keys; ++r) {
      T* const row = w.rows + r * dim_row_;
      if (projected != nullptr)
        std::copy_n(projected + (t.j0 + r) * dim_row_, dim_, row);
      else
        read_row(p_.key.dtype, p_.key.at(t.b, t.j0 + r), p_.key.stride[2], dim_, row);
      std::fill(row + dim_, row + round_up(dim_, kW), T(0));
    }
    t.key_rows = w.rows;
    if (p_.needs_location) add_location(w, t);
  }

  // rows += w_location (location_bias + location_kernel * previous weights), '*' along the keys.
  void add_location(Buffers& w, const Block& t) const {
    const std::int64_t first = t.j0 - (p_.width() - 1) / 2;
    const std::int64_t from = std::max<std::int64_t>(0, first);
    const std::int64_t to = std::clamp<std::int64_t>(first + kKeys + p_.width() - 1, from, std::max(from, p_.len_kv()));
    for (std::int64_t c = 0; c < p_.channels(); ++c) {
      T* const row = w.previous + c * previous_row_;
      std::fill_n(row, previous_row_, T(0));
      read_row(p_.previous_weights.dtype, p_.previous_weights.at(t.b, t.i0, c, from), p_.previous_weights.stride[3], to - from,
               row + (from - first));
    }
    constexpr int kAtOnce = 6;  // divides the vectors of a block at every width; 6 chains hide the FMA's latency
    const std::int64_t taps = p_.channels() * p_.width();
    for (std::int64_t f = 0; f < p_.filters(); ++f)
      for (int j = 0; j < kKeys; j += kAtOnce * kW) {
        V sum[kAtOnce];
        for (V& s : sum) s = broadcast<V>(location_bias_.get()[f]);
        for (std::int64_t c = 0; c < p_.channels(); ++c)
          for (std::int64_t tap = 0; tap < p_.width(); ++tap) {
            const V k = broadcast<V>(kernel_.get()[f * taps + c * p_.width() + tap]);
            const T* const x = w.previous + c * previous_row_ + j + tap;
#pragma GCC unroll 6
            for (int n = 0; n < kAtOnce; ++n) sum[n] = fma(k, load<V>(x + n * kW), sum[n]);
          }
        for (int n = 0; n < kAtOnce; ++n) store(w.features + f * kKeys + j + n * kW, sum[n]);
      }
    w_location_.template apply<Left::rows_contiguous>(w.features, kKeys, w.rows, dim_row_, t.keys, true);
  }

  // F, and each key's largest |k|, inf where not finite: keys run along the lanes here.
  void take_exponentials(Buffers& w, const Block& t) const {
    for (int j = 0; j < t.keys; j += kW) {
      T* const panel = w.factors + j * dim_;
      transpose_padded(t.key_rows + j * t.key_row, t.key_row, std::min(kW, t.keys - j), static_cast<int>(dim_), panel, kW, kW);
      V highest{};
      V lowest{};
      V difference{};
      for (std::int64_t d = 0; d < dim_; ++d) {
        const V x = load<V>(panel + d * kW);
        highest = max(x, highest);
        lowest = min(x, lowest);
        difference += x - x;
        store(panel + d * kW, exponential(x));
      }
      store(w.key_max + j, difference == 0 ? max(highest, -lowest) : broadcast<V>(kInfinity));
    }
  }

  void score(Buffers& w, const Block& t) const {
    const T queries = *std::max_element(w.query_max, w.query_max + t.queries);
    const T keys = *std::max_element(w.key_max, w.key_max + t.keys);
    // No bits depend on this choice: what is held to kLargest here does not reach it there.
    const bool small = queries + keys <= Range<T>::kSmall;
    for (int j = 0; j < t.keys; j += kW) {
      const T* const panel = w.factors + j * dim_;
      int q = 0;
      for (; q + kRows <= t.queries; q += kRows) score_rows<kRows>(w, panel, q, j, small);
      for (; q < t.queries; ++q) score_rows<1>(w, panel, q, j, small);
    }
  }

  template <int Rows> void score_rows(Buffers& w, const T* panel, int q, int j, bool small) const {
    if (small)
      score_tile<Rows, false>(w.exponentials + q * dim_, panel, w.scores + q * kKeys + j);
    else
      score_tile<Rows, true>(w.exponentials + q * dim_, panel, w.scores + q * kKeys + j);
  }

  // Sums v (1 / (1 + E F) - 1/2) = -v tanh / 2, in short chains.
  template <int Rows, bool Held> void score_tile(const T* e, const T* f, T* s) const {
    const V one = broadcast<V>(1);
    const V half = broadcast<V>(T(0.5));
    for (std::int64_t start = 0; start < dim_; start += kSummed) {
      const std::int64_t end = std::min(dim_, start + kSummed);
      V acc[Rows] = {};
      for (std::int64_t d = start; d < end; ++d) {
        const V factor = load<V>(f + d * kW);
        const V v = broadcast<V>(v_.get()[d]);
#pragma GCC unroll 8
        for (int r = 0; r < Rows; ++r) {
          V t = fma(broadcast<V>(e[r * dim_ + d]), factor, one);
          if constexpr (Held) t = min(t, broadcast<V>(Range<T>::kLargest));
          acc[r] = fma(v, reciprocal(t) - half, acc[r]);
        }
      }
      for (int r = 0; r < Rows; ++r) {
        const V sum = start > 0 ? load<V>(s + r * kKeys) + acc[r] : acc[r];
        store(s + r * kKeys, end == dim_ ? sum * T(-2) : sum);
      }
    }
  }

  void mask(Buffers& w, const Block& t) const {
    for (int q = 0; q < t.queries; ++q) {
      T* const row = w.scores + q * kKeys;
      std::fill(row + t.keys, row + round_up(t.keys, kW), -kInfinity);
      if (!p_.mask.present()) continue;
      const char* const kept = p_.mask.at(t.b, t.i0 + q, t.j0);
      for (int j = 0; j < t.keys; ++j) row[j] = kept[j * p_.mask.stride[2]] != 0 ? row[j] : -kInfinity;
    }
  }

  // Pairs of two rows so large that their sum may be small: v . tanh(q + k) along the rows.
  void score_directly(Buffers& w, const Block& t) const {
    const T keys = *std::max_element(w.key_max, w.key_max + t.keys);
    for (int q = 0; q < t.queries; ++q) {
      if (std::max(w.query_max[q], keys) <= Range<T>::kClamp) continue;
      for (int j = 0; j < t.keys; ++j) {
        T* const s = w.scores + q * kKeys + j;
        const auto [smaller, larger] = std::minmax(w.query_max[q], w.key_max[j]);
        const bool carried = larger <= Range<T>::kClamp || (smaller <= Range<T>::kOther && larger < kInfinity);
        if (carried || *s == -kInfinity) continue;
        if (larger == kInfinity) {  // perhaps only a projection that left the range: the plain path decides
          *s = std::numeric_limits<T>::quiet_NaN();
          continue;
        }
        const T* const a = w.queries + q * dim_row_;
        const T* const b = t.key_rows + j * t.key_row;
        V sum{};
        for (std::int64_t d = 0; d < dim_; d += kW) sum = fma(load<V>(v_.get() + d), tanh(load<V>(a + d) + load<V>(b + d)), sum);
        *s = sum_lanes(sum);
      }
    }
  }

  // One block of the online softmax along one row: scores become weights relative to the new max.
  void softmax(Buffers& w, const Block& t, int q) const {
    T* const row = w.scores + q * kKeys;
    if (w.kept != nullptr) std::copy_n(row, round_up(t.keys, kW), w.kept + q * kept_row_ + t.j0);
    V m = broadcast<V>(w.max[q]);
    for (int j = 0; j < t.keys; j += kW) m = max(load<V>(row + j), m);
    const T largest = max_lanes(m);
    const V base = largest == -kInfinity ? V{} : broadcast<V>(largest);
    V sum{};
    for (int j = 0; j < t.keys; j += kW) {
      const V weight = exp_nonpositive(load<V>(row + j) - base);
      sum += weight;
      store(row + j, weight);
    }
    const T alpha = exp_nonpositive(broadcast<V>(w.max[q]) - base)[0];
    w.sum[q] = w.sum[q] * alpha + sum_lanes(sum);
    w.max[q] = largest;
    if (alpha == 1) return;
    T* const out = w.output + q * value_row_;
    for (std::int64_t d = 0; d < p_.dim_v(); d += kW) store(out + d, load<V>(out + d) * broadcast<V>(alpha));
  }

  // output += P V. Every element is one chain over the keys, whichever way it goes.
  void add_values(Buffers& w, const Block& t) const {
    const std::int64_t padded = round_up(p_.dim_v(), kW);
    const T* values = w.values;
    std::int64_t row = value_row_;
    if (readable(p_.value)) {
      values = reinterpret_cast<const T*>(p_.value.at(t.b, t.j0));
      row = p_.value.stride[1] / static_cast<std::int64_t>(sizeof(T));
    } else {
      for (int r = 0; r < t.keys; ++r) {
        T* const copied = w.values + r * row;
        read_row(p_.value.dtype, p_.value.at(t.b, t.j0 + r), p_.value.stride[2], p_.dim_v(), copied);
        std::fill(copied + p_.dim_v(), copied + padded, T(0));
      }
    }
    if (t.queries <= Tile<T>::kRows / 2) {
      for (int q = 0; q < t.queries; ++q) add_values_to_row(w.scores + q * kKeys, values, row, t.keys, w.output + q * value_row_);
      return;
    }
    V ones[Tile<T>::kVectors];
    for (V& one : ones) one = broadcast<V>(1);
    for (std::int64_t c = 0; c < padded; c += Tile<T>::kColumns) {
      const int vectors = static_cast<int>(std::min<std::int64_t>(Tile<T>::kColumns, padded - c)) / kW;
      multiply<T, Left::depth_contiguous>(w.scores, kKeys, values + c, row, w.output + c, value_row_, t.queries, vectors, t.keys, ones);
    }
  }

  // One row of multiply(): the same chains of kChain keys, for items too small for its tiles.
  void add_values_to_row(const T* weights, const T* values, std::int64_t row, int keys, T* out) const {
    constexpr int kAtOnce = 4;
    for (int start = 0; start < keys; start += kChain) {
      const int end = std::min(keys, start + kChain);
      std::int64_t d = 0;
      for (; d + kAtOnce * kW <= p_.dim_v(); d += kAtOnce * kW) add_chain<kAtOnce>(weights, values + d, row, start, end, out + d);
      for (; d < p_.dim_v(); d += kW) add_chain<1>(weights, values + d, row, start, end, out + d);
    }
  }

  template <int Vectors> void add_chain(const T* weights, const T* values, std::int64_t row, int start, int end, T* out) const {
    V acc[Vectors] = {};
    for (int j = start; j < end; ++j)
#pragma GCC unroll 4
      for (int n = 0; n < Vectors; ++n) acc[n] = fma(broadcast<V>(weights[j]), load<V>(values + j * row + n * kW), acc[n]);
    for (int n = 0; n < Vectors; ++n) store(out + n * kW, load<V>(out + n * kW) + acc[n]);
  }

  void finish(Buffers& w, std::int64_t b, std::int64_t i, int q, const T* projected) const {
    T* const out = w.output + q * value_row_;
    T* const kept = w.kept != nullptr ? w.kept + q * kept_row_ : nullptr;
    const T sum = w.sum[q];
    bool finite = sum > 0 && sum < kInfinity;
    V difference{};  // 0 where all are finite, NaN otherwise
    for (std::int64_t d = 0; d < p_.dim_v(); d += kW) {
      const V o = load<V>(out + d) / broadcast<V>(sum);
      difference += o - o;
      store(out + d, o);
    }
    finite = finite && sum_lanes(difference) == 0;
    if (!finite) {
      plain_.row(b, i, projected, dim_row_, w.plain, w.plain_out, kept);
      for (std::int64_t d = 0; d < p_.dim_v(); ++d) out[d] = static_cast<T>(w.plain_out[d]);
    } else if (kept != nullptr) {
      const std::int64_t end = p_.keys_of(b);
      for (std::int64_t j = 0; j < end; j += kW)
        store(kept + j, exp_nonpositive(load<V>(kept + j) - broadcast<V>(w.max[q])) / broadcast<V>(sum));
      std::fill(kept + end, kept + p_.len_kv(), T(0));
    }
    write_row(p_.out.dtype, p_.out.at(b, i), p_.out.stride[2], p_.dim_v(), out);
    if (kept != nullptr) write_row(p_.weights.dtype, p_.weights.at(b, i), p_.weights.stride[2], p_.len_kv(), kept);
  }

  const AdditiveProblem& p_;
  PlainAdditive plain_;
  SequenceProjection<T> w_query_, w_key_;
  Projection<T> w_location_;
  Shared<T> v_;  // [dim, to whole vectors], zeros at the end
  Shared<T> bias_;
  Shared<T> kernel_;  // [filters][channels][width]
  Shared<T> location_bias_;
  Shared<T> queries_;  // [group][len_q][dim_row]
  Shared<T> keys_;     // [group][len_kv][dim_row]
  std::int64_t dim_, dim_row_, value_row_, kept_row_, previous_row_;
  std::int64_t block_ = 1;
};

}  // namespace

void additive_attention(const AdditiveProblem& problem) {
  with_compute(problem.query.dtype, [&](auto t) { Additive<decltype(t)>(problem).run(); });
}

}  // namespace regard::cpu
