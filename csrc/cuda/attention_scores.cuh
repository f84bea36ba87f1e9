// What all attention kernels do to one score, and the plain path for one row.
#pragma once

#include <cmath>
#include <cstdint>

#include "cuda/attention_arguments.cuh"

namespace regard::cuda {

// Scores score(n) of query i and keys key(n), for n < kCount, keys rising: softcap, bias, ALiBi and the boolean mask for the
// scaled scores of those in [first, last), -inf for the others and, if `blocked`, for what the block mask hides. `centre` is the
// key on the query's diagonal. An option after the other, each for all scores: a pass has its loads on their way together, and
// no score has the code of options that a call has not.
template <int kCount, class C, class Score, class Key>
REGARD_DEVICE void finish_scores(const AttentionArguments& a, int b, int h, int i, int first, int last, C slope, int centre, bool blocked,
                                 Score&& score, Key&& key) {
  const auto each = [&](auto&& change) {
#pragma unroll
    for (int n = 0; n < kCount; ++n) change(score(n), key(n));
  };
  // change(score, what `row` has for the key), of the keys that are seen. One address is passed on.
  const auto join = [&](const char* row, std::int64_t stride, auto&& change) {
    const char* at = row + key(0) * stride;
#pragma unroll
    for (int n = 0; n < kCount; ++n) {
      if (key(n) >= first && key(n) < last) change(score(n), at);
      if (n + 1 < kCount) at += (key(n + 1) - key(n)) * stride;
    }
  };
  if (a.softcap > 0) {
    const auto cap = static_cast<C>(a.softcap);
    const C inverse = C(1) / cap;
    each([&](C& s, int) { s = cap * tanh_of(s * inverse); });
  }
  if (a.bias.data != nullptr) {
    const auto add = [&](auto value) {
      join(a.bias.at(b, h, i), a.bias.stride[3], [&](C& s, const char* at) { s += static_cast<C>(value(at)); });
    };
    if (a.bias_type == DType::float32) {
      add([](const char* at) { return read<float>(at); });
    } else if constexpr (sizeof(C) == 8) {
      add([](const char* at) { return read<double>(at); });
    } else {
      const bool half = a.bias_type == DType::float16;
      add([=](const char* at) {
        const auto bits = read<std::uint16_t>(at);
        return half ? value_of(Half{bits}) : value_of(BFloat16{bits});
      });
    }
  }
  if (a.alibi_slopes.data != nullptr) each([&](C& s, int j) { s -= slope * static_cast<C>(centre < j ? j - centre : centre - j); });
  if (a.mask.data != nullptr) join(a.mask.at(b, h, i), a.mask.stride[3], [&](C& s, const char* at) { s = *at != 0 ? s : -infinity<C>(); });
  if (blocked) {
    // Block by block: a search for each key, unrolled with them, was a third of the code of the tensor-core kernels.
    int edge = 0;
#pragma unroll 1
    for (int at = first < key(0) ? key(0) : first; at < last && at <= key(kCount - 1); at = edge) {
      const std::int64_t next = (at / a.blocks.block_kv + std::int64_t{1}) * a.blocks.block_kv;
      edge = next < last ? static_cast<int>(next) : last;
      if (!a.blocks.sees(b, h, i, at)) each([&](C& s, int j) { s = j >= at && j < edge ? -infinity<C>() : s; });
    }
  }
#pragma unroll
  for (int n = 0; n < kCount; ++n)
    if (key(n) < first || key(n) >= last) score(n) = -infinity<C>();
}

// Of one key that is seen.
template <class C>
REGARD_DEVICE C finished_score(const AttentionArguments& a, C s, int b, int h, int i, int j, C slope, std::int64_t centre) {
  C* const one = &s;
  finish_scores<1>(a, b, h, i, j, j + 1, slope, static_cast<int>(centre), false, [=](int) -> C& { return *one; }, [=](int) { return j; });
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
