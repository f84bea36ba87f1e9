// Linear layers of bfloat16 on matrix tiles: out = activation(x weight^T + bias).
//
//   pack weight^T in panels of pairs, where it is not, and serves more than one block of rows   (parallel)
//   for each item: a block of rows x a group of panels                                          (parallel)
//     for each block of the depth
//       copy the rows' part of x into tiles                                                     (L2: shared by the panels)
//       for each pair of row tiles and some panels, sums in tiles
//         sums += x weight^T; between products, finish a row of the pair before:
//           out = activation(sums + bias), rounded
//
// A tile's sums of 32 products join the ones before, over the whole depth and carried exactly from block to block: how
// rows, columns and blocks are cut, and by how many threads, cannot change a bit. A weight that is packed here gives the
// bits of one packed as bfloat16. NaN and infinities go as in any arithmetic; subnormals count as zero.

#include "cpu/linear_tiles.h"

#ifdef REGARD_MATRIX_TILES

#include <algorithm>
#include <cstring>

#include "core/rows.h"
#include "cpu/linear_panels.h"
#include "cpu/operations.h"
#include "cpu/parallel.h"
#include "cpu/prefetch.h"
#include "cpu/tile_matrix.h"

namespace regard::cpu {
namespace {

using V = Vec<float>;
constexpr int kW = kWidth<float>;
constexpr int kColumns = kPanel<float>;
static_assert(kColumns == 3 * kTileColumns);

// Words of a step of the depth: of a tile of rows, and of a panel.
constexpr std::int64_t kLeftWords = kTileFloats;
constexpr std::int64_t kRightWords = 3 * kTileFloats;

// Bytes of an element of the result.
constexpr std::int64_t kOutBytes = 2;

// Rows of a block: so often a panel is used while it is in L2.
constexpr std::int64_t kRowsPerBlock = 256;
// Bytes of panels that a pair of row tiles meets one after another, in L2 with the block of x: rows of the result are
// written in longer pieces (2048 x 384 x 1152: 1.71 ms, panel by panel 1.86; beyond 512 KiB, 2048^3 loses 10 %).
constexpr std::int64_t kNearBytes = 256 << 10;
// Bytes of a block of x, most of which stays in 2 MiB of L2: one block up to 2048 features.
constexpr std::int64_t kBlockBytes = 1 << 20;

// Panels of a group, at most, where sums are taken up again by the next block of the depth. Otherwise one group: every
// group copies x again (2048^3, Sapphire Rapids: 17 ms with one, 19 with three). Items a thread, so that threads end
// together.
constexpr std::int64_t kPanelsPerGroup = 16;
constexpr std::int64_t kItemsPerThread = 4;

class LinearTiles {
 public:
  explicit LinearTiles(const LinearProblem& problem)
      : p_(problem), x_(problem.x), residual_(problem.residual.present() ? problem.residual : problem.out), out_(problem.out) {
    panels_ = panel_count(p_.out_features(), DType::float32);
    if (x_.count() == 0 || panels_ == 0) return;
    const std::int64_t threads = get_num_threads();
    row_blocks_ = divide_up(x_.count(), kRowsPerBlock);
    if (row_blocks_ >= threads) row_blocks_ = round_up(row_blocks_, threads);
    row_block_ = round_up(divide_up(x_.count(), row_blocks_), 2 * kTileRows);
    row_blocks_ = divide_up(x_.count(), row_block_);
    row_tiles_ = divide_up(std::min(x_.count(), row_block_), kTileRows);
    const std::int64_t all = std::max<std::int64_t>(1, divide_up(p_.in_features(), kTileDepth));
    depth_blocks_ = divide_up(all, kBlockBytes / (kRowsPerBlock * kTileDepth * 2));
    steps_ = divide_up(all, depth_blocks_);
    depth_blocks_ = divide_up(all, steps_);
    near_ = p_.packed ? std::max<std::int64_t>(1, kNearBytes / (steps_ * kRightWords * 4)) : 1;
    const std::int64_t wanted = threads > 1 ? divide_up(kItemsPerThread * threads, row_blocks_) : 1;
    groups_ = std::max<std::int64_t>(one_block() ? 1 : divide_up(panels_, kPanelsPerGroup), std::min(wanted, panels_));
    group_ = divide_up(panels_, groups_);
    groups_ = divide_up(panels_, group_);
  }

  static bool packs_as_it_goes(const LinearProblem& p) { return Rows(p.x).count() <= kRowsPerBlock; }

  void run() {
    // Work in float32's terms, which is what parallel_for counts.
    const double products =
        static_cast<double>(x_.count()) * static_cast<double>(p_.out_features()) * static_cast<double>(p_.in_features() + 8) / 16;
    parallel_for(row_blocks_ * groups_, work_of(p_, products), Rehearse::scratch,
                 [this](std::int64_t item) { run_item(item % row_blocks_, item / row_blocks_); });
  }

 private:
  // What is left to finish of a panel and up to two row tiles, while the next ones are multiplied.
  struct Rest {
    std::int64_t i0 = 0;
    std::int64_t panel = 0;
    int rows = 0;
    int next = 0;
    const float* tiles[2] = {};
  };
  struct Buffers {
    Scratch scratch;
    std::int32_t* x;      // [row_tiles][steps] tiles
    float* sums;          // [row_tiles][group][3] tiles; [2][2][3], in turn, where there is one block of the depth
    std::int32_t* right;  // [steps][kRightWords], or the last step
    float* staging;       // [kColumns] rows of the weight
    float* bias;          // [kColumns]
    Rest rest;
    int turn = 0;
  };
  struct Block {
    std::int64_t start;
    int depth;
    std::int64_t steps() const { return divide_up(depth, kTileDepth); }
  };
  // Rows from i0 on, and a panel, the place-th of its group.
  struct Place {
    std::int64_t i0;
    int rows;
    std::int64_t panel;
    std::int64_t place;
  };

  struct Right {
    const std::int32_t* words;
    std::int64_t whole;
  };

  bool one_block() const { return depth_blocks_ == 1; }

  void take_buffers(Buffers& w) const {
    const auto x = w.scratch.reserve<std::int32_t>(row_tiles_ * steps_ * kLeftWords);
    const auto sums = w.scratch.reserve<float>((one_block() ? 4 : row_tiles_ * group_) * kRightWords);
    const auto right = w.scratch.reserve<std::int32_t>((p_.packed ? 1 : steps_) * kRightWords);
    const auto staging = w.scratch.reserve<float>(p_.packed ? 0 : kColumns * row_length<float>(steps_ * kTileDepth / 2));
    const auto bias = w.scratch.reserve<float>(kColumns);
    w.scratch.acquire();
    w.x = w.scratch.at<std::int32_t>(x);
    w.sums = w.scratch.at<float>(sums);
    w.right = w.scratch.at<std::int32_t>(right);
    w.staging = w.scratch.at<float>(staging);
    w.bias = w.scratch.at<float>(bias);
  }

  const std::int32_t* packed_panel(std::int64_t panel, std::int64_t row) const {
    return reinterpret_cast<const std::int32_t*>(p_.weight.data) + (panel * packed_rows(p_.in_features(), p_.held) + row) * kColumns;
  }
  int columns_of(std::int64_t panel) const {
    return static_cast<int>(std::min<std::int64_t>(kColumns, p_.out_features() - panel * kColumns));
  }

  void run_item(std::int64_t row_block, std::int64_t group) const {
    const std::int64_t i0 = row_block * row_block_;
    const int rows = static_cast<int>(std::min(row_block_, x_.count() - i0));
    const std::int64_t first = group * group_;
    const std::int64_t last = std::min(first + group_, panels_);
    if (rows <= 0 || first >= last) return;
    Buffers w;
    take_buffers(w);
    const MatrixTiles unit;
    for (std::int64_t index = 0; index < depth_blocks_; ++index) {
      const std::int64_t start = index * steps_ * kTileDepth;
      const Block b{start, static_cast<int>(std::min(p_.in_features() - start, steps_ * kTileDepth))};
      place_x(w, i0, rows, b);
      for (std::int64_t panel = first; panel < last; panel += near_) {
        if (stop_requested()) return;
        add(w, b, {i0, rows, panel, panel - first}, std::min(near_, last - panel));
      }
    }
    finish(w, 2 * kTileRows);
  }

  // x's part as tiles, zeros beyond its rows and its depth.
  void place_x(Buffers& w, std::int64_t i0, int rows, Block b) const {
    for (std::int64_t r = 0; r < round_up(rows, kTileRows); ++r) {
      std::int32_t* to = w.x + r / kTileRows * steps_ * kLeftWords + r % kTileRows * kTileColumns;
      const char* const from = r < rows ? x_.at(i0 + r) + b.start * x_.step() : nullptr;
      for (int k = 0; k < b.depth; k += kTileDepth, to += kLeftWords) {
        const int n = r < rows ? std::min(kTileDepth, b.depth - k) : 0;
        if (n == kTileDepth && x_.step() == 2) {
          std::memcpy(to, from + k * 2, kTileDepth * 2);
          continue;
        }
        if (n < kTileDepth) std::fill_n(to, kTileColumns, 0);
        if (n > 0) copy_halves(from + k * x_.step(), x_.step(), n, reinterpret_cast<char*>(to));
      }
    }
  }

  // Sums of some panels and all rows, by pairs of row tiles: their results lie side by side.
  void add(Buffers& w, Block b, Place at, std::int64_t panels) const {
    const std::int64_t tiles = divide_up(at.rows, kTileRows);
    for (std::int64_t t = 0; t < tiles; t += 2) {
      Place here = at;
      for (std::int64_t n = 0; n < panels; ++n, ++here.panel, ++here.place) {
        const Right right = p_.packed || t == 0 ? place_weight(w, b, here.panel) : Right{w.right, b.steps()};
        if (t + 1 < tiles)
          add_rows<2>(w, b, here, t, right);
        else
          add_rows<1>(w, b, here, t, right);
      }
    }
  }

  // A panel's part: so many steps as it lies, and the last one, where it is not whole, in the buffer; or all of it there.
  Right place_weight(Buffers& w, Block b, std::int64_t panel) const {
    if (!p_.packed) {
      pack_pairs_panel(p_.weight, panel * kColumns, columns_of(panel), b.start, b.depth, w.right, w.staging);
      std::fill(w.right + divide_up(b.depth, 2) * kColumns, w.right + b.steps() * kRightWords, 0);
      return {w.right, b.steps()};
    }
    const Right right{packed_panel(panel, b.start / 2), b.depth / kTileDepth};
    // Behind a panel's last pairs lies its bias, and behind that perhaps nothing.
    const std::int64_t words = divide_up(b.depth - right.whole * kTileDepth, 2) * kColumns;
    std::copy_n(right.words + right.whole * kRightWords, words, w.right);
    if (words > 0) std::fill(w.right + words, w.right + kRightWords, 0);
    return right;
  }

  // Sums of a panel and one or two row tiles: begun or taken up again, added to, and left to be finished or put down.
  template <int Rows> void add_rows(Buffers& w, Block b, Place at, std::int64_t t, Right right) const {
    float* const upper = w.sums + (one_block() ? 2 * w.turn : t * group_ + at.place) * kRightWords;
    float* const lower = upper + (one_block() ? 1 : group_) * kRightWords;
    const std::int32_t* const x = w.x + t * steps_ * kLeftWords;
    const bool last = b.start + b.depth >= p_.in_features();
    const std::int64_t i = at.i0 + t * kTileRows;
    const int rows = static_cast<int>(std::min<std::int64_t>(at.rows - t * kTileRows, Rows * kTileRows));
    const int pieces = static_cast<int>(divide_up(2 * kTileRows, std::max<std::int64_t>(1, b.steps())));
    int touched = last ? 0 : rows;
    const auto between = [&] {
      finish(w, pieces);
      for (int r = 0; r < pieces && touched < rows; ++r) touch(i + touched++, at.panel);
    };
    begin_panel<Rows>(b.start > 0, upper, lower);
    add_panel<Rows>(x, steps_ * kLeftWords, right.words, right.whole, between);
    if (right.whole < b.steps()) add_panel<Rows>(x + right.whole * kLeftWords, steps_ * kLeftWords, w.right, 1, between);
    end_panel<Rows>(upper, lower);
    finish(w, 2 * kTileRows);
    if (!last) return;
    w.rest = {i, at.panel, rows, 0, {upper, lower}};
    w.turn ^= 1;
    if (p_.packed)
      std::copy_n(packed_panel(at.panel, held_rows(p_.in_features(), p_.held)), kColumns, reinterpret_cast<std::int32_t*>(w.bias));
    else
      read_bias(p_.bias, at.panel * kColumns, columns_of(at.panel), w.bias, kColumns);
  }

  // Where a row will be written: memory is asked for while tiles are multiplied. 1024 x 768 x 768, Sapphire Rapids, the
  // result beyond L2: 1.12 ms, and 1.37 where rows were finished, and memory waited for, between products of tiles.
  void touch(std::int64_t i, std::int64_t panel) const {
    if (out_.step() != kOutBytes) return;
    const char* const at = out_.at(i) + panel * kColumns * kOutBytes;
    const std::int64_t bytes = columns_of(panel) * kOutBytes;
    for (std::int64_t k = 0; k < bytes; k += kLine) ask_to_write_line(at + k);
    ask_to_write_line(at + bytes - 1);
  }

  // Up to so many rows of the rest.
  void finish(Buffers& w, int most) const {
    const int next = w.rest.next;
    if (next == w.rest.rows) return;
    w.rest.next = std::min(next + most, w.rest.rows);
    finish_rows(w, next, w.rest.next);
  }

  [[gnu::noinline]] void finish_rows(Buffers& w, int next, int last) const {
    constexpr int vectors = kColumns / kW;
    const std::int64_t n0 = w.rest.panel * kColumns;
    const int columns = columns_of(w.rest.panel);
    const bool at_once = columns == kColumns && out_.step() == kOutBytes && !p_.residual.present();
    with_activation(p_.activation, [&](auto activation) {
      for (int r = next; r < last; ++r) {
        const float* const tiles = w.rest.tiles[r / kTileRows] + r % kTileRows * kTileColumns;
        char* const to = out_.at(w.rest.i0 + r) + n0 * out_.step();
        V y[vectors];
#pragma GCC unroll 6
        for (int v = 0; v < vectors; ++v) {
          const int j = v * kW;
          y[v] = activation(load<V>(tiles + j / kTileColumns * kTileFloats + j % kTileColumns) + load<V>(w.bias + j));
          if (at_once) store_as(reinterpret_cast<BFloat16*>(to) + j, y[v]);
        }
        if (!at_once) finish_apart(w.rest.i0 + r, n0, columns, y, to);
      }
    });
  }

  // The same for any residual, stride and number of columns.
  [[gnu::noinline]] void finish_apart(std::int64_t i, std::int64_t n0, int columns, const V* sums, char* to) const {
    alignas(64) float y[kColumns];
    alignas(64) float residual[kColumns];
    std::memcpy(y, sums, sizeof y);
    if (p_.residual.present()) add_residual(p_.residual, residual_.at(i) + n0 * residual_.step(), residual_.step(), columns, residual, y);
    write_row(DType::bfloat16, to, out_.step(), columns, y);
  }

  const LinearProblem& p_;
  Rows x_;
  Rows residual_;
  Rows out_;
  std::int64_t panels_;
  std::int64_t row_block_ = 0;
  std::int64_t row_blocks_ = 0;
  std::int64_t row_tiles_ = 0;
  std::int64_t group_ = 0;
  std::int64_t groups_ = 0;
  std::int64_t steps_ = 0;
  std::int64_t near_ = 1;  // panels that each pair of row tiles meets in turn
  std::int64_t depth_blocks_ = 0;
};

}  // namespace

bool is_for_tiles(const LinearProblem& problem) {
  return problem.x.dtype == DType::bfloat16 && (!problem.packed || problem.held == Held::bfloat16);
}

void linear_tiles(const LinearProblem& problem) {
  if (problem.packed || LinearTiles::packs_as_it_goes(problem)) return LinearTiles(problem).run();
  with_packed<float>(problem, Held::bfloat16, [](const LinearProblem& packed) { LinearTiles(packed).run(); });
}

}  // namespace regard::cpu

#endif
