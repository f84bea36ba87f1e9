// What both attention kernels do to one score, and the plain path for one row.
#pragma once

#include <cmath>
#include <cstdint>

#include "cuda/attention_arguments.cuh"

namespace regard::cuda {

// A scaled score with softcap, bias, ALiBi and the boolean mask. `centre` is the key on the query's diagonal.
template <class T, class C>
REGARD_DEVICE C finished_score(const AttentionArguments& a, C s, int b, int h, int i, int j, C slope, std::int64_t centre) {
  if (a.softcap > 0) s = static_cast<C>(a.softcap) * tanh_of(s / static_cast<C>(a.softcap));
  if (a.bias.data != nullptr) {
    const char* const at = a.bias.at(b, h, i, j);
    s += a.bias_is_float ? static_cast<C>(read<float>(at)) : static_cast<C>(value_at<T>(at));
  }
  if (a.alibi_slopes.data != nullptr) {
    const std::int64_t distance = centre - j;
    s -= slope * static_cast<C>(distance < 0 ? -distance : distance);
  }
  if (a.mask.data != nullptr && *a.mask.at(b, h, i, j) == 0) s = -infinity<C>();
  return s;
}

template <class C> REGARD_DEVICE C slope_of(const AttentionArguments& a, int b, int h) {
  return a.alibi_slopes.data != nullptr ? static_cast<C>(read<float>(a.alibi_slopes.at(b, h))) : C(0);
}

// The logit beside the scores in the head's softmax: -inf where there is none, which weighs nothing.
template <class C> REGARD_DEVICE C sink_of(const AttentionArguments& a, int h) {
  return a.sinks.data != nullptr ? static_cast<C>(read<float>(a.sinks.at(h))) : -infinity<C>();
}

// ---- The plain path ------------------------------------------------------------------------------------------------
//
// Tiles cannot carry everything: 0 x inf behind a mask, products beyond the largest float. A row that came out
// non-finite, or that saw no key at all, is computed again here, by one warp in float64, masked keys skipped one by one.

// The score of a key that is seen, else -inf: it weighs exactly nothing.
template <class T> REGARD_DEVICE double plain_score(const AttentionArguments& a, int b, int h, int i, int j, std::int64_t centre) {
  if (a.mask.data != nullptr && *a.mask.at(b, h, i, j) == 0) return -infinity<double>();
  const int group = h / a.group;
  double s = 0;
  for (int d = 0; d < a.dim_qk; ++d)
    s += static_cast<double>(value_at<T>(a.query.at(b, h, i, d))) * static_cast<double>(value_at<T>(a.key.at(b, group, j, d)));
  return finished_score<T, double>(a, s * a.scale, b, h, i, j, slope_of<double>(a, b, h), centre);
}

// Columns [d0, d1) of one output row, and with `with_lse` its lse; all lanes of the warp call it.
template <class T> REGARD_DEVICE_CALL void plain_row(const AttentionArguments& a, int b, int h, int i, int d0, int d1, bool with_lse) {
  constexpr int kColumns = 4;  // a lane, a sweep over the keys
  const int lane = thread_index() % kWarp;
  const SequenceMask sequence = sequence_of(a, b);
  const KeyRange keys = sequence.keys_of(i);
  const int first = static_cast<int>(keys.first);
  const int last = static_cast<int>(keys.last);
  const std::int64_t centre = i + sequence.diagonal;
  const double sink = sink_of<double>(a, h);

  double m = sink;
  for (int j = first + lane; j < last; j += kWarp) m = max_or_nan(plain_score<T>(a, b, h, i, j, centre), m);
  for (int step = 1; step < kWarp; step *= 2) m = max_or_nan(m, shuffle_xor(m, step));

  double sum = 0;
  for (int j = first + lane; j < last; j += kWarp) {
    const double s = plain_score<T>(a, b, h, i, j, centre);
    if (s != -infinity<double>()) sum += exp(s - m);
  }
  for (int step = 1; step < kWarp; step *= 2) sum += shuffle_xor(sum, step);
  if (a.sinks.data != nullptr) sum += exp(sink - m);

  for (int column = d0; column < d1; column += kColumns * kWarp) {
    double o[kColumns] = {};
    for (int j0 = first; j0 < last; j0 += kWarp) {
      const double mine = j0 + lane < last ? plain_score<T>(a, b, h, i, j0 + lane, centre) : -infinity<double>();
      for (int k = 0; k < kWarp; ++k) {
        const double s = shuffle(mine, k);
        if (s == -infinity<double>()) continue;
        double weight = exp(s - m) / sum;
        if (a.dropout.present()) weight *= a.dropout.factor(b, h, i, j0 + k);
        for (int c = 0; c < kColumns; ++c) {
          const int d = column + c * kWarp + lane;
          if (d < d1) o[c] += weight * static_cast<double>(value_at<T>(a.value.at(b, h / a.group, j0 + k, d)));
        }
      }
    }
    for (int c = 0; c < kColumns; ++c) {
      const int d = column + c * kWarp + lane;
      if (d < d1) write<T>(a.out.at(b, h, i, d), static_cast<Compute<T>>(o[c]));
    }
  }
  if (with_lse && a.lse.data != nullptr && lane == 0) write<float>(a.lse.at(b, h, i), static_cast<float>(m + log(sum)));
}

}  // namespace regard::cuda
