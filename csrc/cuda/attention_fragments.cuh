// What the tensor-core kernels do with scores and outputs while they lie in registers: one implementation for all of them.
//
// A warp has 16 rows at a time. Lane l has, of every eight columns n, columns 2 (l % 4) and the next of row l / 4 in
// [n][0] and [n][1], and those of row l / 4 + 8 in [n][2] and [n][3]: `half` 0 and 1.
#pragma once

#include "cuda/attention_scores.cuh"
#include "cuda/ptx.cuh"

namespace regard::cuda {

constexpr float kLog2E = 1.4426950408889634f;

// One row's softmax, spread over the four lanes that share the row: each has the sum of its own columns.
struct RowState {
  float m;
  float l;
};

// Before the first key: what the head's sink weighs, in one of the four lanes. `unit`: what 1 is worth in a score.
REGARD_DEVICE RowState row_before(const AttentionArguments& a, int h, int column, float unit) {
  const float m = sink_of<float>(a, h) / unit;
  return {m, m > -infinity<float>() && column == 0 ? 1.0f : 0.0f};
}

// Scores of query i and the keys from j on: those it does not see, and without kPlain the rest of what becomes of a score.
// `blocked`: the block mask hides some of the tile's keys.
template <bool kPlain, int kTiles>
REGARD_DEVICE void finish_fragments(const AttentionArguments& a, const SequenceMask& sequence, int b, int h, int i, int j, float slope,
                                    bool blocked, float (&s)[kTiles][4], int half) {
  const KeyRange range = sequence.keys_of(i);
  const int first = static_cast<int>(range.first);
  const int last = static_cast<int>(range.last);
  const auto score = [&](int n) -> float& { return s[n / 2][half * 2 + n % 2]; };
  const auto key = [&](int n) { return j + n / 2 * 8 + n % 2; };
  if constexpr (kPlain) {
#pragma unroll
    for (int n = 0; n < 2 * kTiles; ++n)
      if (key(n) < first || key(n) >= last) score(n) = -infinity<float>();
  } else {
#pragma unroll
    for (int n = 0; n < 2 * kTiles; ++n) score(n) *= a.scale_float;
    finish_scores<2 * kTiles>(a, b, h, i, first, last, slope, static_cast<int>(i + sequence.diagonal), blocked, score, key);
  }
}

// Scores become weights, and the row's state takes them in; the result is what earlier outputs are to be multiplied by.
// `factor` leads from a score's unit to powers of two.
template <int kTiles> REGARD_DEVICE float take_in(RowState& x, float (&s)[kTiles][4], int half, float factor) {
  float m = x.m;
#pragma unroll
  for (int n = 0; n < kTiles; ++n) m = fmaxf(m, fmaxf(s[n][half * 2], s[n][half * 2 + 1]));
  m = fmaxf(m, shuffle_xor(m, 1));
  m = fmaxf(m, shuffle_xor(m, 2));
  // Products rounded before they are subtracted, as the weights of earlier tiles were: where the maximum stays alpha is 1, while
  // what one rounding leaves of x.m * factor - base would shift all earlier weights against a tile's, with every tile again.
  const float base = m == -infinity<float>() ? 0.0f : rounded_product(m, factor);
  const float alpha = exp2_fast(rounded_product(x.m, factor) - base);
  float sum = 0;
#pragma unroll
  for (int n = 0; n < kTiles; ++n)
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      float& p = s[n][half * 2 + c];
      p = exp2_fast(fmaf(p, factor, -base));
      sum += p;
    }
  x = {m, x.l * alpha + sum};
  return alpha;
}

// Which weights dropout leaves, a bit for each of a lane's.
template <int kTiles> struct Kept {
  static constexpr int kWords = (kTiles + 7) / 8;
  std::uint32_t bits[kWords];

  // Of queries i, in half 0, and i + 8, and the keys from j0 on. A counter has the words of four keys of a row, half of them
  // a lane's own: one lane of two asks for the upper row, the other for the lower, and they exchange what they found.
  REGARD_DEVICE void draw(const AttentionArguments& a, int b, int h, int i, int j0) {
    const int lane = opaque(thread_index()) % kWarp;
    const int odd = lane % 2;
#pragma unroll
    for (int word = 0; word < kWords; ++word) {
      std::uint32_t mine = 0;
#pragma unroll 1
      for (int n = kTiles - word * 8 < 8 ? kTiles - word * 8 : 8; n-- > 0;) {
        std::uint32_t words[4];
        Dropout::counter_of(b, h, i + odd * 8, j0 + (word * 8 + n) * 8 + lane / 2 % 2 * 4, words);
        Philox(a.dropout.seed).words(words);
        for (int w = 3; w >= 0; --w) mine = mine << 1 | (words[w] >= a.dropout_least ? 1u : 0u);
      }
      const std::uint32_t other = shuffle_xor(mine, 1);
      constexpr std::uint32_t kTwoOfFour = 0x33333333;
      const std::uint32_t upper = (odd ? other : mine) >> odd * 2 & kTwoOfFour;
      const std::uint32_t lower = (odd ? mine : other) >> odd * 2 & kTwoOfFour;
      bits[word] = upper | lower << 2;
    }
  }

  REGARD_DEVICE void apply(float (&s)[kTiles][4]) const {
#pragma unroll
    for (int n = 0; n < kTiles; ++n)
#pragma unroll
      for (int c = 0; c < 4; ++c)
        if ((bits[n / 8] >> (n % 8 * 4 + c) & 1) == 0) s[n][c] = 0;
  }
};

template <int kTiles> REGARD_DEVICE void rescale(float (&o)[kTiles][4], int half, float alpha) {
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
    o[n][half * 2] *= alpha;
    o[n][half * 2 + 1] *= alpha;
  }
}

// Weights of 16 keys as the left operand of a product: they are in the right lanes already.
template <class T, int kTiles> REGARD_DEVICE void pack_weights(std::uint32_t (&p)[4], const float (&s)[kTiles][4], int k) {
#pragma unroll
  for (int part = 0; part < 4; ++part) {
    const float (&from)[4] = s[2 * k + part / 2];
    p[part] = pack_pair<T>(from[part % 2 * 2], from[part % 2 * 2 + 1]);
  }
}

// Whether a lane can write two columns at once.
REGARD_DEVICE bool writes_pairs(const AttentionArguments& a) {
  return a.out.stride[3] == 2 && a.dim_v % 2 == 0 &&
         ((a.out.stride[0] | a.out.stride[1] | a.out.stride[2] | reinterpret_cast<std::intptr_t>(a.out.data)) & 3) == 0;
}

// Divides a row by its sum and writes it and its lse; false, and nothing written, where the plain path has to compute it:
// it is not finite, or saw no key. `factor` leads from a score's unit to natural logarithms.
template <class T, int kTiles>
REGARD_DEVICE bool write_row(const AttentionArguments& a, int b, int h, int i, int column, bool real, bool pairs, const RowState& x,
                             float (&o)[kTiles][4], int half, float factor) {
  float l = x.l;
  l += shuffle_xor(l, 1);
  l += shuffle_xor(l, 2);
  const float inverse = a.dropout_kept / l;
  float rest = l > 0 ? 0.0f : infinity<float>();
#pragma unroll
  for (int n = 0; n < kTiles; ++n)
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      float& y = o[n][half * 2 + c];
      y *= inverse;
      rest += y - y;  // NaN where it is not finite
    }
  rest += shuffle_xor(rest, 1);
  rest += shuffle_xor(rest, 2);
  if (!(rest == 0.0f) || !real) return false;
  // Two loops, an address passed on: with both stores in one loop, a branch and a product a column, this was 40 % of a kernel.
  char* to = query_row(a, a.out, b, h, i) + column * a.out.stride[3];
  if (pairs) {
#pragma unroll
    for (int n = 0; n < kTiles; ++n)
      if (n * 8 + column < a.dim_v) *reinterpret_cast<std::uint32_t*>(to + n * 16) = pack_pair<T>(o[n][half * 2], o[n][half * 2 + 1]);
  } else {
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      const std::uint32_t y = pack_pair<T>(o[n][half * 2], o[n][half * 2 + 1]);
      if (n * 8 + column < a.dim_v) *reinterpret_cast<std::uint16_t*>(to) = static_cast<std::uint16_t>(y);
      if (n * 8 + column + 1 < a.dim_v) *reinterpret_cast<std::uint16_t*>(to + a.out.stride[3]) = static_cast<std::uint16_t>(y >> 16);
      to += 8 * a.out.stride[3];
    }
  }
  if (a.lse.data != nullptr && column == 0) write<float>(query_row(a, a.lse, b, h, i), x.m * factor + logf(l));
  return true;
}

// The rows of a warp that write_row left: bit r * 2 + half of `bad` in each of a row's lanes. All lanes call it, after all
// else is written: a call takes the registers that the outputs were in.
REGARD_DEVICE void mend_rows(const AttentionArguments& a, int b, int h, int first, int rows, unsigned bad) {
  if (!any_lane(bad != 0)) return;
  for (int n = 0; n < rows; ++n) {
    const unsigned bits = shuffle(bad, n % 8 * 4);
    if ((bits >> n / 8 & 1) != 0 && first + n < query_rows(a, b)) plain_row(a, b, h, first + n, 0, a.dim_v, true);
  }
}

}  // namespace regard::cuda
