// Dot-product attention, forward, for float16 and bfloat16 on tensor cores (sm_80 and newer).
//
//   a block of four warps has kQueries queries of one head; keys come in tiles of kKeys, two of them in shared memory
//     S = Q K^T        the fragments of Q and K by ldmatrix, mma.sync m16n8k16, S in registers
//     P = exp2(S - max), rounded to 16 bits: the registers of S are, in pairs, the fragments that P V wants
//     out = out * alpha + P V        V by ldmatrix.trans
//   while a tile is multiplied the next one is on its way (cp.async)
//
// Rows of shared memory hold kDim elements in chunks of 16 bytes; chunk c of row r lies at c ^ (r % 8), so that the eight
// rows of an ldmatrix and the lanes of a copy touch all banks. Scores are computed for whole tiles; only tiles that some
// query sees in part compare positions.
//
// Dao, "FlashAttention-2" (2023); Milakov & Gimelshein, "Online normalizer calculation for softmax" (2018).
#pragma once

#include "cuda/attention_fragments.cuh"

namespace regard::cuda {

constexpr int kTensorThreads = 128;

// A tile in shared memory: rows of kDim 16-bit elements, swizzled.
template <int kDim> struct SharedTile {
  static constexpr int kChunks = kDim / 8;
  SharedAddress base;

  REGARD_DEVICE SharedAddress at(int row, int chunk) const {
    return base + static_cast<SharedAddress>((row * kChunks + (chunk ^ (row & 7))) * 16);
  }
  // From the address of (row, chunk) to that of (row + down, chunk + right): `down` is a multiple of 8, and `right` has
  // no bit that chunk has. Tiles start at multiples of a row's length. One address then serves a whole tile.
  static REGARD_DEVICE SharedAddress moved(SharedAddress from, int down, int right) {
    return (from ^ static_cast<SharedAddress>(right * 16)) + static_cast<SharedAddress>(down * kChunks * 16);
  }

  // Starts copying rows of `chunks` chunks from global memory; zeros beyond `rows` and `chunks`.
  template <int kRows> REGARD_DEVICE void fetch(const char* from, std::int64_t row_stride, int rows, int chunks) const {
    // A lane keeps its chunk and steps down the rows: one address to carry, where one a copy cost 60 registers.
    constexpr int kStep = kTensorThreads / kChunks;
    static_assert(kTensorThreads % kChunks == 0 && kRows % kStep == 0);
    const int thread = opaque(thread_index());
    const int chunk = thread % kChunks;
    const int first = thread / kChunks;
    const int end = chunk < chunks ? rows : 0;
    from += first * row_stride + chunk * 16;
#pragma unroll
    for (int r = 0; r < kRows; r += kStep) {
      copy_async(at(first + r, chunk), from, first + r < end);
      from += kStep * row_stride;
    }
  }

  // The same for rows that lie anywhere: row_at(r) is asked for those below `rows` only.
  template <int kRows, class RowAt> REGARD_DEVICE void gather(RowAt&& row_at, const char* nowhere, int rows, int chunks) const {
    constexpr int kStep = kTensorThreads / kChunks;
    const int chunk = opaque(thread_index()) % kChunks;
#pragma unroll 1
    for (int r = opaque(thread_index()) / kChunks; r < kRows; r += kStep) {
      const bool there = r < rows && chunk < chunks;
      copy_async(at(r, chunk), there ? row_at(r) + chunk * 16 : nowhere, there);
    }
  }
};

template <int kDim, int kQueries, int kKeys> struct TensorShape {
  static constexpr int kRowTiles = kQueries / 64;  // of 16 queries, a warp
  static constexpr int kKeyTiles = kKeys / 8;
  static constexpr int kDimTiles = kDim / 8;
  static constexpr int kKeyBytes = kKeys * kDim * 2;
  static constexpr int kSharedBytes = kQueries * kDim * 2 + 4 * kKeyBytes;  // Q; two stages of K and V
};

// Which row of the block a lane's fragments have first (the others are 8 and multiples of 16 below), and which column of
// every eight (and the next). Found anew where they are needed: registers are short.
struct LanePlace {
  int row;
  int column;
  REGARD_DEVICE LanePlace(int thread, int row_tiles) : row(thread / kWarp * row_tiles * 16 + thread % kWarp / 4), column(thread % 4 * 2) {}
};

// kPlain: no bias, ALiBi, softcap, mask, blocks or dropout, and a positive scale: scores stay unscaled until exp2.
template <class T, int kDim, int kQueries, int kKeys, bool kPlain>
REGARD_KERNEL(kTensorThreads, 1)
attention_tensor(const REGARD_GRID_CONSTANT AttentionArguments a) {
  using Shape = TensorShape<kDim, kQueries, kKeys>;
  constexpr int kRowTiles = Shape::kRowTiles;
  constexpr int kKeyTiles = Shape::kKeyTiles;
  constexpr int kDimTiles = Shape::kDimTiles;

  const auto [b, h, i0, rows] = block_of(a, block_index(), kQueries);
  if (i0 >= rows) return;
  // Found again where it is needed: a length that is not given is a constant of the launch, and takes no register.
  const auto sequence = [&] { return sequence_of(a, opaque(b)); };
  const SequenceMask whole = sequence();
  const LanePlace at_start(thread_index(), kRowTiles);

  using Tile = SharedTile<kDim>;
  const Tile queries{shared_address(dynamic_shared())};
  const auto key_tile = [&](int stage) {
    return Tile{queries.base + static_cast<SharedAddress>(kQueries * kDim * 2 + (stage & 1) * 2 * Shape::kKeyBytes)};
  };
  const auto value_tile = [&](int stage) { return Tile{key_tile(stage).base + static_cast<SharedAddress>(Shape::kKeyBytes)}; };

  // What the block's queries see, in whole tiles of keys.
  const int end = whole.len_q < i0 + kQueries ? static_cast<int>(whole.len_q) : i0 + kQueries;
  const KeyRange any = whole.seen_by_any(i0, end);
  const KeyRange all = i0 < end ? whole.seen_by_all(i0, end) : KeyRange{0, 0};
  const int all_first = static_cast<int>(all.first);
  const int all_last = static_cast<int>(all.last);
  const int first_tile = static_cast<int>(any.first) / kKeys;
  const int last_tile = any.last > any.first ? static_cast<int>((any.last + kKeys - 1) / kKeys) : first_tile;

  const auto fetch = [&](int tile, int stage) {
    const int j0 = tile * kKeys;
    const int keys = static_cast<int>(sequence().len_kv) - j0;
    const int head = opaque(h) / a.group;
    if (a.tiles_are_paged) {
      const auto row_of = [&](const View& x) { return [&, j0, head](int r) { return paged_row(a, x, b, head, j0 + r); }; };
      key_tile(stage).template gather<kKeys>(row_of(a.tile_key), a.tile_key.data, keys, (a.dim_qk + 7) / 8);
      value_tile(stage).template gather<kKeys>(row_of(a.tile_value), a.tile_value.data, keys, (a.dim_v + 7) / 8);
      return;
    }
    const int first = first_key(a, b) + j0;
    key_tile(stage).template fetch<kKeys>(a.tile_key.at(b, head, first), a.tile_key.stride[2], keys, (a.dim_qk + 7) / 8);
    value_tile(stage).template fetch<kKeys>(a.tile_value.at(b, head, first), a.tile_value.stride[2], keys, (a.dim_v + 7) / 8);
  };
  // The first tile from this one on that the block mask lets any query see.
  const auto wanted = [&](int tile) {
    if (kPlain || !a.blocks.present() || tile >= last_tile) return tile;
    return a.blocks.next(b, h, i0, end, tile * kKeys) / kKeys;
  };

  queries.template fetch<kQueries>(query_row(a, a.query, b, h, i0), a.query.stride[2], end - i0, (a.dim_qk + 7) / 8);
  const int start = wanted(first_tile);
  if (start < last_tile) fetch(start, 0);
  close_copies();

  float o[kRowTiles][kDimTiles][4] = {};
  RowState state[kRowTiles][2];
  const RowState before = row_before(a, h, at_start.column, kPlain ? a.scale_float : 1.0f);
#pragma unroll
  for (int r = 0; r < kRowTiles; ++r)
#pragma unroll
    for (int half = 0; half < 2; ++half) state[r][half] = before;
  const auto factor = [&] { return kPlain ? a.scale_to_exp2 : kLog2E; };  // from a score's unit to powers of two
  const float slope = kPlain ? 0.0f : slope_of<float>(a, b, h);

  for (int tile = start, following, stage = 0; tile < last_tile; tile = following, ++stage) {
    const int j0 = tile * kKeys;
    following = wanted(tile + 1);
    if (following < last_tile) fetch(following, stage + 1);
    close_copies();
    await_copies<1>();
    block_barrier();
    const int lane = opaque(thread_index()) % kWarp;
    const SharedAddress query_at = queries.at(opaque(thread_index()) / kWarp * kRowTiles * 16 + lane % 16, lane / 16);
    const SharedAddress key_at = key_tile(stage).at(lane / 16 * 8 + lane % 8, lane / 8 % 2);
    const SharedAddress value_at = value_tile(stage).at(lane % 16, lane / 16);

    float s[kRowTiles][kKeyTiles][4] = {};
#pragma unroll
    for (int depth = 0; depth < kDim / 16; ++depth) {
      std::uint32_t q[kRowTiles][4];
#pragma unroll
      for (int r = 0; r < kRowTiles; ++r) load_matrices(q[r], Tile::moved(query_at, r * 16, depth * 2));
#pragma unroll
      for (int n = 0; n < kKeyTiles; n += 2) {
        std::uint32_t k[4];
        load_matrices(k, Tile::moved(key_at, n * 8, depth * 2));
#pragma unroll
        for (int r = 0; r < kRowTiles; ++r) {
          multiply_add<T>(s[r][n], q[r], k[0], k[1]);
          multiply_add<T>(s[r][n + 1], q[r], k[2], k[3]);
        }
      }
    }

    const bool partial = all_first > j0 || all_last < j0 + kKeys;
    const bool blocked = !kPlain && a.blocks.present() && !a.blocks.all(b, h, i0, end, j0, j0 + kKeys);
    if (!kPlain || partial) {
#pragma unroll
      for (int r = 0; r < kRowTiles; ++r)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const LanePlace place(opaque(thread_index()), kRowTiles);
          const int i = i0 + place.row + r * 16 + half * 8;
          finish_fragments<kPlain>(a, sequence(), b, h, i, j0 + place.column, slope, blocked, s[r], half);
        }
    }

#pragma unroll
    for (int r = 0; r < kRowTiles; ++r)
#pragma unroll
      for (int half = 0; half < 2; ++half) rescale(o[r], half, take_in(state[r][half], s[r], half, factor()));
    if (!kPlain && a.dropout.present()) {
#pragma unroll
      for (int r = 0; r < kRowTiles; ++r) {
        Kept<kKeyTiles> kept;
        kept.draw(a, b, h, i0 + LanePlace(opaque(thread_index()), kRowTiles).row + r * 16, j0);
        kept.apply(s[r]);
      }
    }

#pragma unroll
    for (int k = 0; k < kKeys / 16; ++k) {
      std::uint32_t p[kRowTiles][4];
#pragma unroll
      for (int r = 0; r < kRowTiles; ++r) pack_weights<T>(p[r], s[r], k);
#pragma unroll
      for (int n = 0; n < kDimTiles; n += 2) {
        std::uint32_t v[4];
        load_matrices_transposed(v, Tile::moved(value_at, k * 16, n));
#pragma unroll
        for (int r = 0; r < kRowTiles; ++r) {
          multiply_add<T>(o[r][n], p[r], v[0], v[1]);
          multiply_add<T>(o[r][n + 1], p[r], v[2], v[3]);
        }
      }
    }
    block_barrier();  // the next fetch but one writes where this tile lies
  }
  await_copies<0>();

  const LanePlace place(opaque(thread_index()), kRowTiles);
  const int len_q = static_cast<int>(sequence().len_q);
  unsigned bad_rows = 0;  // one bit for each row that this lane has a part of
  const bool pairs = writes_pairs(a);
#pragma unroll
  for (int r = 0; r < kRowTiles; ++r)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int i = i0 + place.row + r * 16 + half * 8;
      if (!write_row<T>(a, b, h, i, place.column, i < len_q, pairs, state[r][half], o[r], half, kPlain ? a.scale_float : 1.0f))
        bad_rows |= 1u << (r * 2 + half);
    }

  mend_rows(a, b, h, i0 + thread_index() / kWarp * kRowTiles * 16, kRowTiles * 16, bad_rows);
}

}  // namespace regard::cuda
