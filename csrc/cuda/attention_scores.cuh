// What all attention kernels do to one score, and the plain path for one row.
#pragma once

#include <cmath>
#include <cstdint>

#include "cuda/attention_arguments.cuh"

namespace regard::cuda {

// float32, or the query's type.
template <class C> REGARD_DEVICE C bias_at(const AttentionArguments& a, int b, int h, int i, int j) {
  const char* const at = a.bias.at(b, h, i, j);
  if (a.bias_type == DType::float32) return static_cast<C>(read<float>(at));
  if constexpr (sizeof(C) == 8)
    return read<double>(at);
  else
    return a.bias_type == DType::float16 ? value_at<Half>(at) : value_at<BFloat16>(at);
}

// A scaled score with softcap, bias, ALiBi and the boolean mask. `centre` is the key on the query's diagonal.
template <class C>
REGARD_DEVICE C finished_score(const AttentionArguments& a, C s, int b, int h, int i, int j, C slope, std::int64_t centre) {
  if (a.softcap > 0) s = static_cast<C>(a.softcap) * tanh_of(s / static_cast<C>(a.softcap));
  if (a.bias.data != nullptr) s += bias_at<C>(a, b, h, i, j);
  if (a.alibi_slopes.data != nullptr) {
    const std::int64_t distance = centre - j;
    s -= slope * static_cast<C>(distance < 0 ? -distance : distance);
  }
  if (a.mask.data != nullptr && *a.mask.at(b, h, i, j) == 0) s = -infinity<C>();
  return s;
}

template <class C> REGARD_DEVICE C slope_of(const AttentionArguments& a, int b, int h) {
  return a.alibi_slopes.data != nullptr && b < a.batch ? static_cast<C>(read<float>(a.alibi_slopes.at(b, h))) : C(0);
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
REGARD_DEVICE_CALL double plain_score(const AttentionArguments& a, int b, int h, int i, int j, std::int64_t centre) {
  if (a.mask.data != nullptr && *a.mask.at(b, h, i, j) == 0) return -infinity<double>();
  if (a.blocks.present() && !a.blocks.sees(b, h, i, j)) return -infinity<double>();
  const char* const query = query_row(a, a.query, b, h, i);
  const char* const key = key_row(a, a.key, b, h / a.group, j);
  double s = 0;
  for (int d = 0; d < a.dim_qk; ++d) {
    const auto x = load_as<double>(query + d * a.query.stride[3], a.type);
    const auto y = load_as<double>(key + d * a.key.stride[3], a.stored);
    s += a.additive_v != nullptr ? load_as<double>(a.additive_v + d * size_of(a.type), a.type) * tanh(x + y) : x * y;
  }
  s *= static_cast<double>(row_scale(a, a.key_scales, b, h / a.group, j));
  return finished_score(a, s * a.scale, b, h, i, j, slope_of<double>(a, b, h), centre);
}

// Columns [d0, d1) of one output row, and with `with_rest` its lse and weights; all lanes of the warp call it.
REGARD_DEVICE_CALL void plain_row(const AttentionArguments& a, int b, int h, int i, int d0, int d1, bool with_rest) {
  constexpr int kColumns = 4;  // a lane, a sweep over the keys
  const int lane = thread_index() % kWarp;
  const SequenceMask sequence = sequence_of(a, b);
  const KeyRange keys = sequence.keys_of(i);
  const int first = static_cast<int>(keys.first);
  const int last = static_cast<int>(keys.last);
  const std::int64_t centre = i + sequence.diagonal;
  const double sink = sink_of<double>(a, h);

  double m = sink;
  for (int j = first + lane; j < last; j += kWarp) m = max_or_nan(plain_score(a, b, h, i, j, centre), m);
  for (int step = 1; step < kWarp; step *= 2) m = max_or_nan(m, shuffle_xor(m, step));

  double sum = 0;
  for (int j = first + lane; j < last; j += kWarp) {
    const double s = plain_score(a, b, h, i, j, centre);
    if (s != -infinity<double>()) sum += exp(s - m);
  }
  for (int step = 1; step < kWarp; step *= 2) sum += shuffle_xor(sum, step);
  if (a.sinks.data != nullptr) sum += exp(sink - m);

  for (int column = d0; column < d1; column += kColumns * kWarp) {
    double o[kColumns] = {};
    for (int j0 = first; j0 < last; j0 += kWarp) {
      const double mine = j0 + lane < last ? plain_score(a, b, h, i, j0 + lane, centre) : -infinity<double>();
      for (int k = 0; k < kWarp; ++k) {
        const double s = shuffle(mine, k);
        if (s == -infinity<double>()) continue;
        double weight = exp(s - m) / sum;
        if (a.dropout.present()) weight *= a.dropout.factor(b, h, i, j0 + k);
        weight *= static_cast<double>(row_scale(a, a.value_scales, b, h / a.group, j0 + k));
        const char* const value = key_row(a, a.value, b, h / a.group, j0 + k);
        for (int c = 0; c < kColumns; ++c) {
          const int d = column + c * kWarp + lane;
          if (d < d1) o[c] += weight * load_as<double>(value + d * a.value.stride[3], a.stored);
        }
      }
    }
    for (int c = 0; c < kColumns; ++c) {
      const int d = column + c * kWarp + lane;
      if (d < d1) store_as(query_row(a, a.out, b, h, i, d), a.out_type, o[c]);
    }
  }
  if (!with_rest) return;
  if (a.lse.data != nullptr && lane == 0) write<float>(query_row(a, a.lse, b, h, i), static_cast<float>(m + log(sum)));
  for (int j = lane; a.weights.data != nullptr && b < a.batch && j < a.weights_kv; j += kWarp) {
    const double s = j < first || j >= last ? -infinity<double>() : plain_score(a, b, h, i, j, centre);
    double weight = s == -infinity<double>() ? 0 : exp(s - m) / sum;
    if (a.dropout.present()) weight *= a.dropout.factor(b, h, i, j);
    store_as(a.weights.at(b, h, i, j), a.out_type, weight);
  }
}

}  // namespace regard::cuda
