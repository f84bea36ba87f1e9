// Linear layers: out = activation(x weight^T + bias), on the tile engine.
//
//   pack weight^T in panels of kPanel output features, where it is not, and serves more than one block of rows (parallel)
//   for each item: a block of rows x a group of panels                (parallel)
//     for each block of the depth
//       copy the rows' part of x                                      (L2: shared by the group's panels)
//       for each panel: pack its part of weight^T, if that is not done
//         sums += x weight^T
//     out = activation(sums + bias), rounded
//
// The loops around the tile are Goto & van de Geijn's, "Anatomy of high-performance matrix multiplication" (2008), with
// the roles of the two matrices exchanged. An element is a sum of chains of kLinearChain fused multiply-adds over the
// depth, carried exactly from block to block: how rows, columns and blocks are cut, and by how many threads, cannot
// change its bits.

#include <algorithm>

#include "core/rows.h"
#include "cpu/linear_few.h"
#include "cpu/linear_panels.h"
#include "cpu/linear_tiles.h"
#include "cpu/linear_words.h"
#include "cpu/operations.h"
#include "cpu/parallel.h"
#include "cpu/prefetch.h"
#include "cpu/tile_simd.h"
#include "cpu/tile_words.h"

namespace regard::cpu {
namespace {

// Depth of a block. On a Zen 4 (32 KiB L1, 1 MiB L2), GFLOP/s of one thread for 1024 x 384 x 1536 and 2048^3, packed:
// 128: 95, 102; 192: 97, 103; 256: 97, 104; 384: 100, 104; 512: 100, 105. A panel streams from L2 well enough; what
// counts is how rarely the accumulators are carried.
constexpr std::int64_t kDepth = 384;
// Steps of one accumulation chain; blocks of the depth are whole chains. Longer than attention's, where sums over keys
// run on for long: chains of 32 cost 3 % here, and 128 pass the same gate of accuracy.
constexpr int kLinearChain = 128;
static_assert(kDepth % kLinearChain == 0);
// For few rows nothing is used twice: packed panels are read once, in long runs.
constexpr std::int64_t kDepthOfFewRows = 2048;
constexpr std::int64_t kFewRows = 12;

// Rows of a block: each reads all panels of its group, from L3 or from memory. Where L2 has 1 MiB, 48 to 176 rows are equally
// fast (Zen 4); where it has half of that, 128 are 1.1 to 1.2 times as fast as 64 (1024 x 3072 x 768, 2048^3; Zen 3).
constexpr std::int64_t kRowsPerBlock = 128;

// Panels of a group, all of them up to here: every group copies x again. With blocks of 64 rows 8 cost 6 % against 32 at
// 1024 x 768 x 768; 16 of 128 rows are as many sums as those 32.
constexpr std::int64_t kPanelsPerGroup = 16;

// Items a thread, so that threads end together.
constexpr std::int64_t kItemsPerThread = 4;

// to[k][j] = weight[n0 + j][k0 + k] for j < columns <= kPanel, k < depth; zeros up to kPanel.
// `staging` has room for [kPanel][row_length(depth)].
template <class T> void pack_panel(const Array& weight, std::int64_t n0, int columns, std::int64_t k0, int depth, T* to, T* staging) {
  const std::int64_t item = size_of(weight.dtype);
  if (weight.stride[0] == item && weight.stride[1] != item) {  // a transposed view: its rows are ours already
    for (int k = 0; k < depth; ++k) {
      read_row(weight.dtype, weight.at(n0, k0 + k), item, columns, to + k * kPanel<T>);
      std::fill(to + k * kPanel<T> + columns, to + (k + 1) * kPanel<T>, T(0));
    }
    return;
  }
  const T* from = reinterpret_cast<const T*>(weight.at(n0, k0));
  std::int64_t from_row = weight.stride[0] / item;
  const bool in_place = weight.dtype == dtype_of<T>() && weight.stride[1] == item && weight.stride[0] % item == 0 && depth % kWidth<T> == 0;
  if (!in_place) {
    from = staging;
    from_row = row_length<T>(depth);
    for (int j = 0; j < columns; ++j) read_row(weight.dtype, weight.at(n0 + j, k0), weight.stride[1], depth, staging + j * from_row);
  }
  transpose_padded(from, from_row, columns, depth, to, kPanel<T>, kPanel<T>);
}

template <class T> class Linear {
  using V = Vec<T>;
  static constexpr int kRows = Tile<T>::kRows;
  static constexpr int kColumns = Tile<T>::kColumns;
  static constexpr int kW = kWidth<T>;
  static_assert(kPanel<T> % kColumns == 0);

 public:
  explicit Linear(const LinearProblem& problem)
      : p_(problem), x_(problem.x), residual_(problem.residual.present() ? problem.residual : problem.out), out_(problem.out) {
    panels_ = panel_count(p_.out_features(), dtype_of<T>());
    const std::int64_t threads = get_num_threads();
    if (x_.count() == 0 || panels_ == 0) return;
    row_blocks_ = divide_up(x_.count(), kRowsPerBlock);
    if (row_blocks_ >= threads) row_blocks_ = round_up(row_blocks_, threads);
    row_block_ = std::min(x_.count(), round_up(divide_up(x_.count(), row_blocks_), kRows));
    row_blocks_ = divide_up(x_.count(), row_block_);
    // Narrow groups cost copies of x; narrower than two panels is for few rows, whose copies are small.
    const std::int64_t most_groups = x_.count() <= kFewRows ? panels_ : divide_up(panels_, 2);
    const std::int64_t wanted = threads > 1 ? divide_up(kItemsPerThread * threads, row_blocks_) : 1;
    groups_ = std::max(divide_up(panels_, kPanelsPerGroup), std::min(wanted, most_groups));
    group_ = divide_up(panels_, groups_);
    groups_ = divide_up(panels_, group_);
    const std::int64_t most_depth = x_.count() <= kFewRows && p_.packed ? kDepthOfFewRows : kDepth;
    depth_blocks_ = std::max<std::int64_t>(1, divide_up(p_.in_features(), most_depth));
    depth_ = round_up(divide_up(p_.in_features(), depth_blocks_), kLinearChain);
  }

  void run() {
    const double products =
        static_cast<double>(x_.count()) * static_cast<double>(p_.out_features()) * static_cast<double>(p_.in_features() + 8);
    parallel_for(row_blocks_ * groups_, work_of(p_, products), Rehearse::scratch,
                 [this](std::int64_t item) { run_item(item % row_blocks_, item / row_blocks_); });
  }

 private:
  struct Buffers {
    Scratch scratch;
    T* x;         // [row_block][x_row], one block of the depth
    T* sums;      // [row_block][sums_row]
    T* panel;     // [depth][kPanel]
    T* staging;   // [kPanel][row_length(depth)]
    T* bias;      // [group * kPanel]
    T* residual;  // [group * kPanel]
    std::int64_t x_row;
    std::int64_t sums_row;
  };

  void take_buffers(Buffers& w) const {
    const std::int64_t rows = round_up(row_block_, kRows);
    w.x_row = row_length<T>(depth_);
    w.sums_row = row_length<T>(group_ * kPanel<T>);
    const auto x = w.scratch.template reserve<T>(rows * w.x_row);
    const auto sums = w.scratch.template reserve<T>(rows * w.sums_row);
    const auto panel = w.scratch.template reserve<T>(p_.packed && p_.held == Held::compute ? 0 : depth_ * kPanel<T>);
    const auto staging = w.scratch.template reserve<T>(p_.packed ? 0 : kPanel<T> * row_length<T>(depth_));
    const auto bias = w.scratch.template reserve<T>(group_ * kPanel<T>);
    const auto residual = w.scratch.template reserve<T>(p_.residual.present() ? group_ * kPanel<T> : 0);
    w.scratch.acquire();
    w.residual = w.scratch.template at<T>(residual);
    w.x = w.scratch.template at<T>(x);
    w.sums = w.scratch.template at<T>(sums);
    w.panel = w.scratch.template at<T>(panel);
    w.staging = w.scratch.template at<T>(staging);
    w.bias = w.scratch.template at<T>(bias);
  }

  const T* packed_panel(std::int64_t panel, std::int64_t k) const {
    return reinterpret_cast<const T*>(p_.weight.data) + (panel * packed_rows(p_.in_features(), p_.held) + k) * kPanel<T>;
  }

  bool pairs() const { return p_.packed && p_.held == Held::bfloat16; }
  // k is even: blocks of the depth are whole chains.
  const std::int32_t* packed_pairs(std::int64_t panel, std::int64_t k) const {
    return reinterpret_cast<const std::int32_t*>(packed_panel(panel, k / 2));
  }

  void run_item(std::int64_t row_block, std::int64_t group) const {
    const std::int64_t i0 = row_block * row_block_;
    const int rows = static_cast<int>(std::min(row_block_, x_.count() - i0));
    const std::int64_t first = group * group_;
    const std::int64_t last = std::min(first + group_, panels_);
    if (rows <= 0 || first >= last) return;
    Buffers w;
    take_buffers(w);
    for (std::int64_t block = 0; block < depth_blocks_; ++block) {
      if (stop_requested()) return;
      const std::int64_t k0 = block * depth_;
      const int depth = static_cast<int>(std::clamp<std::int64_t>(p_.in_features() - k0, 0, depth_));
      if (depth == 0 && block > 0) break;
      copy_rows(w, i0, rows, k0, depth);
      for (std::int64_t panel = first; panel < last; ++panel) {
        const std::int64_t n0 = panel * kPanel<T>;
        const int columns = static_cast<int>(std::min<std::int64_t>(kPanel<T>, p_.out_features() - n0));
        T* const sums = w.sums + (panel - first) * kPanel<T>;
        if (pairs()) {
          if constexpr (std::is_same_v<T, float>) add_pairs(w, packed_pairs(panel, k0), sums, rows, columns, depth, block > 0);
          continue;
        }
        const T* right = w.panel;
        if (p_.packed)
          right = packed_panel(panel, k0);
        else
          pack_panel(p_.weight, n0, columns, k0, depth, w.panel, w.staging);
        // Of few rows all lies in one stretch: asked for at once, it was waited for (4 to 8 rows took 1.2 to 1.4 times as long).
        const bool more = p_.packed && panel + 1 < last && rows > kFewRows;
        const Next next{reinterpret_cast<const char*>(more ? packed_panel(panel + 1, k0) : right), more ? depth * kPanelBytes : 0};
        add_panel(w, w.x, right, sums, rows, columns, depth, block > 0, next);
      }
    }
    finish(w, i0, rows, first * kPanel<T>, std::min(last * kPanel<T>, p_.out_features()));
  }

  void copy_rows(Buffers& w, std::int64_t i0, int rows, std::int64_t k0, int depth) const {
    for (int r = 0; r < rows; ++r) read_row(p_.x.dtype, x_.at(i0 + r) + k0 * x_.step(), x_.step(), depth, w.x + r * w.x_row);
    for (int r = rows; r < round_up(rows, kRows); ++r) std::fill_n(w.x + r * w.x_row, depth, T(0));
  }

  // Packed weights that will be read next.
  struct Next {
    const char* at;
    std::int64_t bytes;
    Next part(std::int64_t i, std::int64_t n) const { return {at + i * (bytes / n), bytes / n}; }
  };

  // sums = (carry ? sums : 0) + x right for one panel.
  void add_panel(Buffers& w, const T* x, const T* right, T* sums, int rows, int columns, int depth, bool carry, Next next) const {
    if (rows <= 2) return add_wide(w, x, right, sums, rows, depth, carry);
    for (int j = 0; j < columns; j += kColumns)
      add_products(w, x, right + j, sums + j, rows, std::min(kColumns, columns - j), depth, carry,
                   next.part(j / kColumns, kPanel<T> / kColumns));
  }

  // The same for one row or two: see kWideVectors.
  void add_wide(Buffers& w, const T* x, const T* right, T* sums, int rows, int depth, bool carry) const {
    const auto tile = [&](auto height) {
      constexpr int vectors = kWideVectors<height>;
      V ones[vectors];
      for (V& one : ones) one = broadcast<V>(1);
      for (int j = 0; j < kPanel<T>; j += vectors * kW)
        detail::multiply_tile<T, height, vectors, Left::depth_contiguous, kLinearChain>(x, w.x_row, right + j, kPanel<T>, sums + j,
                                                                                        w.sums_row, depth, carry ? ones : nullptr);
    };
    rows == 1 ? tile(std::integral_constant<int, 1>{}) : tile(std::integral_constant<int, 2>{});
  }

  // The same for one column of tiles. Chain by chain, so that what a chain reads of `right` stays in L1 for all rows: 0.93 of
  // the time of whole depths (12 shapes of 64 to 1,024 rows, one thread of a Zen 3). The carried sum is taken times 1: exact.
  // Every stretch of rows asks for its part of `next`: panels that come from L3 or memory then cost no wait (1024 x 3072 x 768
  // took 0.7 to 0.85 of the time without; Zen 3). Stretches of one tile cost 2 % in calls, those of four 1 % in bursts.
  void add_products(Buffers& w, const T* x, const T* right, T* sums, int rows, int columns, int depth, bool carry, Next next) const {
    V ones[Tile<T>::kVectors];
    for (V& one : ones) one = broadcast<V>(1);
    constexpr int kStretch = 2 * kRows;
    const int whole = rows / kRows * kRows;
    const std::int64_t chains = std::max<std::int64_t>(1, divide_up(depth, kLinearChain));
    for (int start = 0; start == 0 || start < depth; start += kLinearChain) {
      const int steps = std::min(kLinearChain, depth - start);
      const V* const scale = carry || start > 0 ? ones : nullptr;
      const T* const part = right + start * kPanel<T>;
      for (int r = 0; r < whole; r += kStretch) {
        const int height = std::min(kStretch, whole - r);
        const Next share = next.part(start / kLinearChain, chains).part(r / kStretch, divide_up(whole, kStretch));
        const auto ahead = ask_ahead(share.at, share.bytes, height / kRows * std::max(steps, 1));
        multiply<T, Left::depth_contiguous, kLinearChain>(x + start + r * w.x_row, w.x_row, part, kPanel<T>, sums + r * w.sums_row,
                                                          w.sums_row, height, (columns + kW - 1) / kW, steps, scale, ahead);
      }
      if (whole < rows)
        multiply_few<T, Left::depth_contiguous, kLinearChain>(x + start + whole * w.x_row, w.x_row, part, kPanel<T>,
                                                              sums + whole * w.sums_row, w.sums_row, rows - whole, steps, scale);
    }
  }

  // The same for weights held as bfloat16, of which memory gives half the bytes. Few rows take them from registers; others
  // have a chain at a time widened in L1.
  void add_pairs(Buffers& w, const std::int32_t* right, float* sums, int rows, int columns, int depth, bool carry) const {
    if (rows <= kRowsOfPairs) {
      multiply_few_pairs<kLinearChain>(w.x, w.x_row, right, sums, w.sums_row, rows, depth, carry);
      return;
    }
    for (int start = 0; start == 0 || start < depth; start += kLinearChain) {
      const int steps = std::min(kLinearChain, depth - start);
      const std::int32_t* const part = right + start / 2 * kPanel<float>;
      widen_pairs(part, steps, w.panel);
      const Next next{reinterpret_cast<const char*>(part + kLinearChain / 2 * kPanel<float>), steps / 2 * kPanelBytes};
      add_panel(w, w.x + start, w.panel, sums, rows, columns, steps, carry || start > 0, next);
    }
  }

  static void widen_pairs(const std::int32_t* from, int depth, float* to) {
    for (int k = 0; k < depth; k += 2)
      for (int j = 0; j < kPanel<float>; j += kW) {
        const Words words = load<Words>(from + k / 2 * kPanel<float> + j);
        store(to + k * kPanel<float> + j, lower_of_pairs(words));
        if (k + 1 < depth) store(to + (k + 1) * kPanel<float> + j, upper_of_pairs(words));
      }
  }

  void finish(Buffers& w, std::int64_t i0, int rows, std::int64_t n0, std::int64_t n1) const {
    const std::int64_t columns = n1 - n0;
    const std::int64_t padded = round_up(columns, kW);
    if (p_.packed)
      for (std::int64_t n = n0; n < n1; n += kPanel<T>)
        std::copy_n(packed_panel(n / kPanel<T>, held_rows(p_.in_features(), p_.held)), kPanel<T>, w.bias + n - n0);
    else
      read_bias(p_.bias, n0, columns, w.bias, padded);
    for (int r = 0; r < rows; ++r) {
      T* const sums = w.sums + r * w.sums_row;
      for (std::int64_t n = 0; n < padded; n += kW) store(sums + n, load<V>(sums + n) + load<V>(w.bias + n));
      activate(p_.activation, sums, columns);
      if (p_.residual.present())
        add_residual(p_.residual, residual_.at(i0 + r) + n0 * residual_.step(), residual_.step(), columns, w.residual, sums);
      write_row(p_.out.dtype, out_.at(i0 + r) + n0 * out_.step(), out_.step(), columns, sums);
    }
  }

  const LinearProblem& p_;
  Rows x_;
  Rows residual_;
  Rows out_;
  std::int64_t panels_;
  std::int64_t row_block_ = 0;
  std::int64_t row_blocks_ = 0;
  std::int64_t group_ = 0;
  std::int64_t groups_ = 0;
  std::int64_t depth_ = 0;
  std::int64_t depth_blocks_ = 0;
};

template <class T> void pack(const PackProblem& p) {
  const std::int64_t out_features = p.weight.shape[0];
  const std::int64_t in_features = p.weight.shape[1];
  const double work = static_cast<double>(out_features) * static_cast<double>(in_features + 1);
  parallel_for(p.packed.shape[0], work, Rehearse::scratch, [&](std::int64_t panel) {
    Scratch scratch;
    const auto staging = scratch.reserve<T>(kPanel<T> * row_length<T>(kDepth));
    scratch.acquire();
    const std::int64_t n0 = panel * kPanel<T>;
    const int columns = static_cast<int>(std::min<std::int64_t>(kPanel<T>, out_features - n0));
    T* const to = reinterpret_cast<T*>(p.packed.data) + panel * (in_features + 1) * kPanel<T>;
    for (std::int64_t k0 = 0; k0 < in_features; k0 += kDepth)
      pack_panel(p.weight, n0, columns, k0, static_cast<int>(std::min(kDepth, in_features - k0)), to + k0 * kPanel<T>,
                 scratch.at<T>(staging));
    read_bias(p.bias, n0, columns, to + in_features * kPanel<T>, kPanel<T>);
  });
}

}  // namespace

void linear(const LinearProblem& problem) {
  if (is_for_words(problem)) return linear_words(problem);
#ifdef REGARD_MATRIX_TILES
  if (is_for_tiles(problem)) return linear_tiles(problem);
#endif
  with_compute(problem.x.dtype, [&](auto t) {
    using T = decltype(t);
    if (FewRows<T, kLinearChain>::serves(problem)) return FewRows<T, kLinearChain>(problem).run();
    if (problem.packed || Rows(problem.x).count() <= kRowsPerBlock) return Linear<T>(problem).run();
    // 3 to 5 % faster than blocks of rows that pack for themselves.
    with_packed<T>(problem, Held::compute, [](const LinearProblem& packed) { Linear<T>(packed).run(); });
  });
}

void pack_linear(const PackProblem& problem) {
  if (problem.held != Held::compute) return pack_words(problem);
  with_compute(problem.weight.dtype, [&](auto t) { pack<decltype(t)>(problem); });
}

}  // namespace regard::cpu
