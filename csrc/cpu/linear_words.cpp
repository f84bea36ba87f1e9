// Linear layers with weights of int8, or of bfloat16 times bfloat16: out = activation(x weight^T + bias).
//
//   for each item: a block of rows x a group of panels                (parallel)
//     int8: s_i = max |x_i| / 127, x_i / s_i rounded, 128 added: unsigned bytes      (dynamic, by rows)
//     for each panel
//       int8: sums = -128 sum_k w_jk                                  (packed with the weight)
//       sums += x weight^T                                            (whole depth, in registers)
//       out = activation(s_i s_j sums + bias), rounded
//
// Sums of int8 are exact: every instruction set, and any cut of the work, has the same. Those of bfloat16 are chains of
// float32 over the depth, as in linear.cpp. Scales by rows and channels: Dettmers et al., "LLM.int8()" (2022), section 2.

#include "cpu/linear_words.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <limits>
#include <type_traits>

#include "core/rows.h"
#include "cpu/linear_panels.h"
#include "cpu/linear_tiles.h"
#include "cpu/parallel.h"
#include "cpu/tile_amx.h"
#include "cpu/tile_words.h"
#ifdef REGARD_MATRIX_TILES
#include "cpu/tile_matrix.h"
#endif

namespace regard::cpu {
namespace {

using V = Vec<float>;
constexpr int kW = kWidth<float>;
constexpr int kColumns = kPanel<float>;

// Panels of a group, at most: every group converts x again. Items a thread, so that threads end together.
constexpr std::int64_t kPanelsPerGroup = 32;
constexpr std::int64_t kItemsPerThread = 4;

struct Range {
  float largest;  // |x|
  bool finite;
};

// Of `padded` values, a multiple of the vector width.
Range range_of(const float* x, std::int64_t padded) {
  V largest = {};
  V zeros = {};
  for (std::int64_t k = 0; k < padded; k += kW) {
    const V v = load<V>(x + k);
    largest = max(abs(v), largest);
    zeros = zeros + v * 0;  // NaN where something is not finite
  }
  return {max_lanes(largest), sum_lanes(zeros) == 0};
}

// to[k] = round(x[k] / scale) + 128, a byte each, for x of `padded` values; answers the scale (NaN: x was not finite).
float quantise(const float* x, std::int64_t padded, std::uint8_t* to) {
  using Narrow = std::uint8_t __attribute__((vector_size(kVectorBytes / 4)));
  const Range range = range_of(x, padded);
  if (!range.finite || range.largest < kSmallestScaled) {
    std::fill_n(to, padded, std::uint8_t{128});
    return range.finite ? 0.0f : std::numeric_limits<float>::quiet_NaN();
  }
  const V factor = broadcast<V>(127.0f / range.largest);
  for (std::int64_t k = 0; k < padded; k += kW) {
    const auto rounded = std::bit_cast<Floats>(round_to_nearest(load<V>(x + k) * factor));
    store(to + k, __builtin_convertvector(__builtin_convertvector(rounded, Words) + 128, Narrow));
  }
  return range.largest / 127.0f;
}

// Rows of a block: as many as keep its words in half a megabyte of L2, whole tiles of them.
constexpr std::int64_t kMostRows = 64;
constexpr std::int64_t kBlockBytes = 512 << 10;

template <class Op>
inline void multiply_rows(Op, const std::int32_t* x, std::int64_t row, const std::int32_t* panel, std::int32_t* sums, int rows,
                          std::int64_t words, std::int32_t*) {
  multiply_words<Op>(x, row, panel, sums, kColumns, rows, words);
}
#ifdef REGARD_MATRIX_TILES
// Bytes on matrix tiles. `last` takes the words that are no whole step.
struct TileBytes : Bytes {
  using Unit = MatrixTiles;
  static constexpr int kRows = kTileRows;
  static constexpr int kStep = kTileColumns;
};
inline void multiply_rows(TileBytes, const std::int32_t* x, std::int64_t row, const std::int32_t* panel, std::int32_t* sums, int rows,
                          std::int64_t words, std::int32_t* last) {
  const std::int64_t whole = words / kTileColumns * kTileColumns;
  std::fill(std::copy_n(panel + whole * kColumns, (words - whole) * kColumns, last), last + kTileColumns * kColumns, 0);
  multiply_bytes(x, row, panel, kColumns, sums, round_up(rows, kTileRows), words, last);
}
#endif

// Op is one of the products of tile_words.h, or TileBytes.
template <class Op> class LinearWords {
  static constexpr bool kBytes = std::is_base_of_v<Bytes, Op>;
  static constexpr std::int64_t kRows = Op::kRows;

 public:
  explicit LinearWords(const LinearProblem& problem)
      : p_(problem), x_(problem.x), residual_(problem.residual.present() ? problem.residual : problem.out), out_(problem.out) {
    panels_ = panel_count(p_.out_features(), DType::float32);
    words_ = held_rows(p_.in_features(), p_.held);
    // Converted in whole vectors of values: so many words.
    row_ = row_length<std::int32_t>(std::max(round_up(p_.in_features(), kW) / (kBytes ? 4 : 2), padded_words()));
    if (x_.count() == 0 || panels_ == 0) return;
    const std::int64_t fitting = kBlockBytes / (row_ * 4) / kRows * kRows;
    const std::int64_t most = std::clamp<std::int64_t>(fitting, kRows, kMostRows);
    const std::int64_t threads = get_num_threads();
    row_blocks_ = divide_up(x_.count(), most);
    if (row_blocks_ >= threads) row_blocks_ = round_up(row_blocks_, threads);
    row_block_ = std::min(x_.count(), round_up(divide_up(x_.count(), row_blocks_), kRows));
    row_blocks_ = divide_up(x_.count(), row_block_);
    const std::int64_t wanted = threads > 1 ? divide_up(kItemsPerThread * threads, row_blocks_) : 1;
    groups_ = std::max(divide_up(panels_, kPanelsPerGroup), std::min(wanted, panels_));
    group_ = divide_up(panels_, groups_);
    groups_ = divide_up(panels_, group_);
  }

  void run() {
    // Work in float32's terms, which is what parallel_for counts.
    const double products = static_cast<double>(x_.count()) * static_cast<double>(p_.out_features()) * static_cast<double>(words_ + 8);
    parallel_for(row_blocks_ * groups_, work_of(p_, products), Rehearse::scratch,
                 [this](std::int64_t item) { run_item(item % row_blocks_, item / row_blocks_); });
  }

 private:
  struct Buffers {
    Scratch scratch;
    std::int32_t* x;     // [row_block][row_]
    std::int32_t* sums;  // [row_block][kColumns]
    float* scale;        // [row_block]
    float* staging;      // [padded in_features]
    std::int32_t* last;  // [kStep][kColumns]
  };

  std::int64_t padded_words() const { return round_up(words_, Op::kStep); }

  const std::int32_t* panel_row(std::int64_t panel, std::int64_t row) const {
    return reinterpret_cast<const std::int32_t*>(p_.weight.data) + (panel * packed_rows(p_.in_features(), p_.held) + row) * kColumns;
  }

  void run_item(std::int64_t row_block, std::int64_t group) const {
    const std::int64_t i0 = row_block * row_block_;
    const int rows = static_cast<int>(std::min(row_block_, x_.count() - i0));
    const std::int64_t last = std::min((group + 1) * group_, panels_);
    if (rows <= 0) return;
    Buffers w;
    const std::int64_t padded_rows = round_up(rows, kRows);
    const auto x = w.scratch.template reserve<std::int32_t>(padded_rows * row_);
    const auto sums = w.scratch.template reserve<std::int32_t>(padded_rows * kColumns);
    const auto scale = w.scratch.template reserve<float>(padded_rows);
    const auto staging = w.scratch.template reserve<float>(round_up(p_.in_features(), kW));
    const auto ending = w.scratch.template reserve<std::int32_t>(Op::kStep * kColumns);
    w.scratch.acquire();
    w.last = w.scratch.template at<std::int32_t>(ending);
    w.x = w.scratch.template at<std::int32_t>(x);
    w.sums = w.scratch.template at<std::int32_t>(sums);
    w.scale = w.scratch.template at<float>(scale);
    w.staging = w.scratch.template at<float>(staging);
    convert(w, i0, rows);
    for (std::int64_t r = 0; r < padded_rows; ++r) std::fill(w.x + r * row_ + (r < rows ? words_ : 0), w.x + r * row_ + padded_words(), 0);
    [[maybe_unused]] const typename Op::Unit unit;
    for (std::int64_t panel = group * group_; panel < last; ++panel) {
      if (stop_requested()) return;
      for (std::int64_t r = 0; r < padded_rows; ++r)
        if (kBytes)
          std::copy_n(panel_row(panel, words_ + 2), kColumns, w.sums + r * kColumns);
        else
          std::fill_n(w.sums + r * kColumns, kColumns, 0);
      multiply_rows(Op{}, w.x, row_, panel_row(panel, 0), w.sums, rows, words_, w.last);
      finish(w, i0, rows, panel);
    }
  }

  void convert(Buffers& w, std::int64_t i0, int rows) const {
    const std::int64_t n = p_.in_features();
    const std::int64_t padded = round_up(n, kW);
    if (kBytes) std::fill(w.staging + n, w.staging + padded, 0.0f);
    for (int r = 0; r < rows; ++r) {
      std::int32_t* const to = w.x + r * row_;
      if constexpr (kBytes) {
        read_row(p_.x.dtype, x_.at(i0 + r), x_.step(), n, w.staging);
        w.scale[r] = quantise(w.staging, padded, reinterpret_cast<std::uint8_t*>(to));
      } else {
        if (n > 0) to[words_ - 1] = 0;
        copy_halves(x_.at(i0 + r), x_.step(), n, reinterpret_cast<char*>(to));
      }
    }
  }

  void finish(Buffers& w, std::int64_t i0, int rows, std::int64_t panel) const {
    const std::int64_t n0 = panel * kColumns;
    const std::int64_t columns = std::min<std::int64_t>(kColumns, p_.out_features() - n0);
    const std::int32_t* const scales = panel_row(panel, words_);
    const std::int32_t* const bias = panel_row(panel, kBytes ? words_ + 1 : words_);
    for (int r = 0; r < rows; ++r) {
      std::int32_t* const sums = w.sums + r * kColumns;
      float y[kColumns];
      for (int j = 0; j < kColumns; j += kW) {
        V sum;
        if constexpr (kBytes)
          sum = float_of_words(load<Words>(sums + j)) * (load<V>(scales + j) * broadcast<V>(w.scale[r]));
        else
          sum = load<V>(sums + j);
        store(y + j, sum + load<V>(bias + j));
      }
      activate(p_.activation, y, columns);
      float residual[kColumns];
      if (p_.residual.present())
        add_residual(p_.residual, residual_.at(i0 + r) + n0 * residual_.step(), residual_.step(), columns, residual, y);
      write_row(p_.out.dtype, out_.at(i0 + r) + n0 * out_.step(), out_.step(), columns, y);
    }
  }

  const LinearProblem& p_;
  Rows x_;
  Rows residual_;
  Rows out_;
  std::int64_t panels_;
  std::int64_t words_;
  std::int64_t row_;
  std::int64_t row_block_ = 0;
  std::int64_t row_blocks_ = 0;
  std::int64_t group_ = 0;
  std::int64_t groups_ = 0;
};

// Depth of a block in which pairs are packed: their rows are staged in L1 where they must be.
constexpr std::int64_t kPackedDepth = 256;

// One column of a panel, from a row of the weight in floats, padded with zeros to whole words.
void pack_pairs(const float* from, std::int64_t words, char* column) {
  for (std::int64_t k = 0; k < words; ++k) {
    const BFloat16 pair[2] = {from_float<BFloat16>(from[2 * k]), from_float<BFloat16>(from[2 * k + 1])};
    const std::uint32_t word = pair[0].bits | static_cast<std::uint32_t>(pair[1].bits) << 16;
    std::memcpy(column + k * kPanelBytes, &word, sizeof word);
  }
}

void pack_bytes(const float* from, std::int64_t padded, std::int64_t words, char* column, std::uint8_t* bytes) {
  const float scale = quantise(from, padded, bytes);
  std::int32_t sum = 0;
  for (std::int64_t k = 0; k < words; ++k) {
    std::int8_t four[4];
    for (int i = 0; i < 4; ++i) {
      four[i] = static_cast<std::int8_t>(bytes[4 * k + i] - 128);
      sum += four[i];
    }
    std::memcpy(column + k * kPanelBytes, four, sizeof four);
  }
  const std::int32_t correction = -128 * sum;
  std::memcpy(column + words * kPanelBytes, &scale, sizeof scale);
  std::memcpy(column + (words + 2) * kPanelBytes, &correction, sizeof correction);
}

}  // namespace

bool is_for_words(const LinearProblem& problem) {
  if (!problem.packed) return false;
#ifdef REGARD_MATRIX_TILES
  const bool pairs = false;  // linear_tiles.cpp has them
#else
  const bool pairs = native_pairs();
#endif
  return problem.held == Held::int8 || (problem.held == Held::bfloat16 && problem.x.dtype == DType::bfloat16 && pairs);
}

void linear_words(const LinearProblem& problem) {
#ifdef REGARD_MATRIX_TILES
  // The bits are the same: fewer rows would leave most of a tile empty. 1024 x 768 x 768 takes 1.44 ms, and 2.59 on vectors;
  // 16 x 768 x 768 as long as there (Emerald Rapids, one thread).
  if (Rows(problem.x).count() >= kTileRows) return LinearWords<TileBytes>(problem).run();
#else
  if (problem.held == Held::bfloat16) return LinearWords<NativePairs>(problem).run();
#endif
  if (native_bytes()) return LinearWords<NativeBytes>(problem).run();
  LinearWords<Bytes>(problem).run();
}

void pack_words(const PackProblem& p) {
  const std::int64_t out_features = p.weight.shape[0];
  const std::int64_t in_features = p.weight.shape[1];
  const std::int64_t words = held_rows(in_features, p.held);
  const std::int64_t padded = round_up(in_features, std::max(kW, 4));
  const bool as_it_lies = p.held == Held::bfloat16 && p.weight.dtype == DType::bfloat16;
  const double work = static_cast<double>(out_features) * static_cast<double>(in_features + 1) * (as_it_lies ? 1 : 4);
  parallel_for(p.packed.shape[0], work, Rehearse::scratch, [&](std::int64_t panel) {
    Scratch scratch;
    const auto row = scratch.reserve<float>(as_it_lies ? kColumns * row_length<float>(kPackedDepth) : padded);
    const auto bytes = scratch.reserve<std::uint8_t>(padded);
    scratch.acquire();
    float* const from = scratch.at<float>(row);
    const std::int64_t n0 = panel * kColumns;
    const int columns = static_cast<int>(std::min<std::int64_t>(kColumns, out_features - n0));
    char* const to = p.packed.data + panel * packed_rows(in_features, p.held) * kPanelBytes;
    const std::int64_t bias_row = p.held == Held::int8 ? words + 1 : words;
    if (as_it_lies) {
      for (std::int64_t k = 0; k < in_features; k += kPackedDepth)
        pack_pairs_panel(p.weight, n0, columns, k, static_cast<int>(std::min(kPackedDepth, in_features - k)),
                         reinterpret_cast<std::int32_t*>(to + k / 2 * kPanelBytes), from);
    } else {
      std::fill(from + in_features, from + padded, 0.0f);
      std::fill_n(to, packed_rows(in_features, p.held) * kPanelBytes, char{0});
      for (int j = 0; j < columns; ++j) {
        read_row(p.weight.dtype, p.weight.at(n0 + j), p.weight.stride[1], in_features, from);
        if (p.held == Held::bfloat16)
          pack_pairs(from, words, to + 4 * j);
        else
          pack_bytes(from, padded, words, to + 4 * j, scratch.at<std::uint8_t>(bytes));
      }
    }
    read_bias(p.bias, n0, columns, reinterpret_cast<float*>(to + bias_row * kPanelBytes), kColumns);
  });
}

}  // namespace regard::cpu
