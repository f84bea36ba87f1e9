// Attention for few queries on tensor cores, for float16 and bfloat16: rows are the columns of m16n8k16, eight of them, and keys
// or columns of values its sixteen rows. Fragments come straight from global memory, in an order of their own:
//
//   S^T = K Q^T   which of a key's columns are which of the product's does not matter, as long as the queries agree: a lane
//                 gives the eight neighbours that it has read to four pairs of columns
//   O^T = V^T P   nor does it matter which column of the values is which row of the product; but two keys of a column share a
//                 register: a lane reads two keys, and exchanges halves of their words
//
// An H200 reads 2 KiB in the time of 390 of an SM's instructions. Keys of 128 columns take a warp some 70 of these, with eight
// rows as with one, values 90, and the softmax of eight rows over them 200; by the lanes' own multiply-adds it was 500 for
// keys alone with eight rows. Counted in machine code, not measured.
#pragma once

#include "cuda/attention_decode_launch.cuh"
#include "cuda/decode_grains.cuh"

namespace regard::cuda {

// What tensor cores multiply, two numbers of type T a word, made of eight neighbours of a row as they are stored.
//
// A byte becomes a 16-bit number by its bits, as one rounding of a product and a sum can mend them:
//   int8      float16 1024 + (x + 128), less 1152; bfloat16 128 + the lower seven bits, less 128, and 256 where x is negative
//   float8    exponent and mantissa moved to their places, times what the exponents' biases differ by
// A float8 NaN has no such bits: all eight are NaN then, and what comes of them is mended by the plain path.
template <class T, class Stored> class TensorGrain {
 public:
  TensorGrain() = default;
  REGARD_DEVICE explicit TensorGrain(const Grain<Stored>& x) : x_(x) {
    if constexpr (std::is_same_v<Stored, Float8>) {
      std::uint32_t carried = 0;
      for (const std::uint32_t word : x.words) carried |= (word & 0x7f7f7f7fu) + 0x01010101u;
      added_ = (carried & 0x80808080u) != 0 ? 0x7fff7fffu : 0x80008000u;
    }
  }

  // Elements e and e + 1, e even.
  REGARD_DEVICE std::uint32_t neighbours(int e) const {
    if constexpr (std::is_same_v<Stored, T>)
      return x_.words[e / 2];
    else
      return pair(*this, e, *this, e + 1);
  }
  // Element e of this and of the other.
  REGARD_DEVICE std::uint32_t beside(const TensorGrain& other, int e) const { return pair(*this, e, other, e); }

 private:
  static REGARD_DEVICE std::uint32_t pair(const TensorGrain& x, int e, const TensorGrain& y, int f) {
    constexpr int kEach = 4 / sizeof(Stored);
    const std::uint32_t one = x.x_.words[e / kEach];
    const std::uint32_t other = y.x_.words[f / kEach];
    const auto i = static_cast<std::uint32_t>(e % kEach);
    const auto j = static_cast<std::uint32_t>(f % kEach) + 4 / sizeof(Stored);
    if constexpr (sizeof(Stored) == 2) {
      return pick_bytes(one, other, 0x1010 + 0x22 * i + 0x2200 * j);
    } else {
      const std::uint32_t bytes = pick_bytes(one, other, 0x11 * i + 0x1100 * j);  // each twice
      constexpr bool kHalf = std::is_same_v<T, Half>;
      constexpr std::uint32_t kOnes = kHalf ? 0x3c003c00 : 0x3f803f80;
      if constexpr (std::is_same_v<Stored, Int8>) {
        if constexpr (kHalf) return fused_pairs<T>((bytes & 0x00ff00ffu) ^ 0x64806480u, kOnes, 0xe480e480);
        return fused_pairs<T>((bytes & 0x007f007fu) | 0x43004300u, kOnes, (bytes & 0x00800080u) | 0xc300c300u);
      } else {
        const std::uint32_t magnitude = kHalf ? bytes >> 1 & 0x3f803f80u : bytes >> 4 & 0x07f007f0u;
        constexpr std::uint32_t kBias = kHalf ? 0x5c005c00 : 0x7b807b80;  // 2^8; 2^120
        return fused_pairs<T>((bytes & 0x80008000u) | magnitude, kBias, x.added_ | y.added_);
      }
    }
  }

  Grain<Stored> x_;
  std::uint32_t added_ = 0;
};

// T is the type of queries, KeyType that of keys and values.
template <class T, class KeyType = T> struct TensorProducts {
  using Stored = KeyType;
  static constexpr int kRows = kDecodeRows;
  static constexpr int kBlocks = 4;
  static constexpr bool kTensor = true;
  static constexpr bool kScaledQueries = false;
  static constexpr bool kUnits = is_scaled(dtype_of<Stored>());  // what values are worth may be little
  static constexpr int kPanel = 64;                              // columns that a warp has of several keys at a time
  static constexpr int kGrain = 8;                               // columns of a lane's vector
  static constexpr int kHalfGrain = kGrain / 2;
  static_assert(Vector<Stored>::kLength == kGrain);

  // [kRows][query_pitch]: the rows of one product, four chunks of 16 bytes each, are in different banks.
  static REGARD_DEVICE int query_pitch(int dim_qk) { return (dim_qk + kPanel - 1) / kPanel * kPanel + kPanel / 2; }
  static std::int64_t query_bytes(std::int64_t dim_qk) { return 2 * kRows * (dim_qk + kPanel + kPanel / 2); }
  // [warps][kRows][2 kPanel]
  static std::int64_t sum_bytes(std::int64_t) { return 4 * kDecodeWarps * kRows * 2 * kPanel; }

  static REGARD_DEVICE void take_queries(const DecodeBlock<float>& x) {
    const AttentionArguments& a = x.p.a;
    auto* const queries = reinterpret_cast<std::uint16_t*>(x.rest);
    const int pitch = query_pitch(a.dim_qk);
    for (int n = thread_index(); n < kRows * pitch; n += kDecodeThreads) {
      const int r = n / pitch;
      const int d = n % pitch;
      queries[n] =
          r < x.rows && d < a.dim_qk ? read<std::uint16_t>(query_row(a, a.query, x.b, x.head_of(r), x.query_of(r), d)) : std::uint16_t{0};
    }
  }

  static REGARD_DEVICE void score_keys(const DecodeBlock<float>& x) {
    const AttentionArguments& a = x.p.a;
    const int lane = thread_index() % kWarp;
    const int row = lane / 4;  // of the right operand; and of the left, whose rows are keys
    const int chunk = lane % 4 * kGrain;
    const char* const queries = x.rest + (row * query_pitch(a.dim_qk) + chunk) * 2;
    constexpr int kKeys = 8 * kTogether;
    const StoredRows keys(x, a.key);
    for (int first = x.j0 + thread_index() / kWarp * kKeys; first < x.end; first += kDecodeWarps * kKeys) {
      const char* rows[kTogether];
      keys.find(rows, x, [&](int n) { return first + n * 8 + row; });
      float s[kTogether / 2][4] = {};
      for (int column = 0; column < a.dim_qk; column += kPanel) {
        Grain<Stored> key[2][kTogether];
        Grain<T> query[2];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int d = column + half * kPanel / 2;
          fetch_grains(key[half], rows, a.key.stride[3], d + chunk, a.dim_qk, x.p.key_vectors);
          query[half] = *reinterpret_cast<const Grain<T>*>(queries + d * 2);
        }
#pragma unroll
        for (int half = 0; half < 2; ++half)
#pragma unroll
          for (int n = 0; n < kTogether; n += 2) {
            const TensorGrain<T, Stored> upper(key[half][n]);
            const TensorGrain<T, Stored> lower(key[half][n + 1]);
#pragma unroll
            for (int e = 0; e < kGrain; e += 4) {
              const std::uint32_t left[4] = {upper.neighbours(e), lower.neighbours(e), upper.neighbours(e + 2), lower.neighbours(e + 2)};
              multiply_add<T>(s[n / 2], left, query[half].words[e / 2], query[half].words[e / 2 + 1]);
            }
          }
      }
      float* const scores = x.scores + lane % 4 * 2 * x.pitch;  // with room for whole steps: zeros come behind the last key
#pragma unroll
      for (int n = 0; n < kTogether; ++n) {
        const int at = first + n * 8 + row - x.j0;
        scores[at] = s[n / 2][n % 2 * 2];
        scores[x.pitch + at] = s[n / 2][n % 2 * 2 + 1];
      }
    }
  }

  // Two panels at a time: of the same keys, or where there is but one, of others.
  static REGARD_DEVICE void add_values(const DecodeBlock<float>& x) {
    const AttentionArguments& a = x.p.a;
    auto* const sums = reinterpret_cast<float*>(x.rest);
    const StoredRows values(x, a.value);
    const int lane = thread_index() % kWarp;
    const int warp = thread_index() / kWarp;
    const int row = lane / 4;
    const int pair = lane % 4 * 2;
    const bool narrow = a.dim_v <= kPanel;
    const int width = narrow ? kPanel : 2 * kPanel;
    const int keys = narrow ? 32 : 16;  // a warp, at a time
    for (int column = 0; column < a.dim_v; column += width) {
      float o[2][kHalfGrain][4] = {};
      for (int first = x.j0 + warp * keys; first < x.end; first += kDecodeWarps * keys) {
        Grain<Stored> value[2][kTogether];
        const char* rows[kTogether];
#pragma unroll
        for (int panel = 0; panel < 2; ++panel) {
          const int above = first + (narrow ? panel * 16 : 0) + pair;
          if (narrow || panel == 0) values.find(rows, x, [&](int n) { return above + n / 2 * 8 + n % 2; });
          const int d = column + (narrow ? 0 : panel * kPanel) + row * kGrain;
          fetch_grains(value[panel], rows, a.value.stride[3], d, a.dim_v, x.p.value_vectors);
        }
#pragma unroll
        for (int panel = 0; panel < 2; ++panel) {
          const float* const score = x.scores + row * x.pitch + first - x.j0 + (narrow ? panel * 16 : 0) + pair;
          const std::uint32_t right[2] = {pack_pair<T>(score[0], score[1]), pack_pair<T>(score[8], score[9])};
          TensorGrain<T, Stored> grain[kTogether];
#pragma unroll
          for (int n = 0; n < kTogether; ++n) grain[n] = TensorGrain<T, Stored>(value[panel][n]);
#pragma unroll
          for (int e = 0; e < kHalfGrain; ++e) {
            const std::uint32_t left[4] = {grain[0].beside(grain[1], e), grain[0].beside(grain[1], e + kHalfGrain),
                                           grain[2].beside(grain[3], e), grain[2].beside(grain[3], e + kHalfGrain)};
            multiply_add<T>(o[panel][e], left, right[0], right[1]);
          }
        }
      }
#pragma unroll
      for (int panel = 0; panel < 2; ++panel) {
        if (narrow && panel == 1) break;
#pragma unroll
        for (int e = 0; e < kHalfGrain; ++e)
#pragma unroll
          for (int c = 0; c < 4; ++c) {
            const int d = panel * kPanel + row * kGrain + e + c / 2 * kHalfGrain;
            sums[(warp * kRows + pair + c % 2) * 2 * kPanel + d] = narrow ? o[0][e][c] + o[1][e][c] : o[panel][e][c];
          }
      }
      add_warps<TensorProducts>(x, sums, 2 * kPanel, column, width);
    }
  }
};

// Host code: f(Of<Products>{}) for 16-bit queries, over keys and values of their type or of 8 bits.
template <class F> void with_tensor_products(const AttentionProblem& p, F&& f) {
  const auto with = [&](auto t) {
    using T = decltype(t);
    switch (p.key.dtype) {
      case DType::int8: return f(Of<TensorProducts<T, Int8>>{});
      case DType::float8_e4m3fn: return f(Of<TensorProducts<T, Float8>>{});
      default: return f(Of<TensorProducts<T>>{});
    }
  };
  p.query.dtype == DType::float16 ? with(Half{}) : with(BFloat16{});
}

}  // namespace regard::cuda
