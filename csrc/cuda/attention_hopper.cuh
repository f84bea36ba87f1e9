// Dot-product attention, forward, for float16 and bfloat16 on sm_90a: products by whole warpgroups, bulk copies.
//
//   a block stays on its SM and goes through items: 128 queries of one head each, the longest first; of its warpgroups
//     one has a single warp that orders copies: Q once an item, K and V in tiles of keys, two stages of each
//     two compute, 64 queries each:
//       S = Q K^T                  wgmma, both in shared memory
//       P = exp2(S - max)          while out += P V of the tile before runs
//       out = out * alpha + P V    P in registers: those of S are, in pairs, what wgmma wants on the left
//     and take turns in ordering products: one's softmax runs beside the other's products
//   each tile has a barrier that counts its bytes as they land, and one that counts the warps that are done with it
//
// A tile lies in panels of 64 columns, its chunks of 16 bytes swizzled as tensor maps and wgmma both have it (128 bytes), so
// that neither copies nor products meet in a bank. Maps fill with zeros beyond an array's end; keys beyond a sequence's own
// length weigh nothing, and what they spoil all the same (0 x inf) the plain path mends.
//
// What bounds it, a tile of 128 queries and 128 keys, at 2048 multiply-adds and 16 powers of two a clock and SM:
//   products 1024 clocks at kDim 64, 2048 at 128, 2560 at 192 and 128, 4096 at 256; exp2 1024; Q and K read by wgmma at
//   128 bytes a clock: 3/4 of the products' time, 9/10 where a tile has 80 keys. So from 128 on the products bound it, at 64
//   they and exp2 alike. None of this has been measured.
//
// Shah et al., "FlashAttention-3" (2024).
#pragma once

#include "cuda/attention_fragments.cuh"
#include "cuda/ptx_hopper.cuh"

namespace regard::cuda {

constexpr int kHopperThreads = 3 * kWarpgroup;
constexpr int kHopperQueries = 128;
constexpr int kHopperStages = 2;
constexpr int kTurn = 1;  // the named barriers kTurn and kTurn + 1: the turns of the computing warpgroups

// Keys of a tile, as many as a block may have room for: 227 KiB of shared memory, and 64 K registers, 128 x 24 + 256 x 240.
// One block an SM, whatever the dimension. Without kPlain scores need some 50 registers for themselves.
//   kDim, kDimV  keys          shared memory: Q, two stages of K and V    of a computing lane's 240 registers: S, P, out
//            64   128             16 +  64 =  80 KiB                          64 + 32 +  32 = 128
//           128   128             32 + 128 = 160 KiB                          64 + 32 +  64 = 160
//      192, 128   128             48 + 160 = 208 KiB                          64 + 32 +  64 = 160
//           256    80  kPlain     64 + 160 = 224 KiB  (96 keys: 256 KiB)      40 + 20 + 128 = 188
//           256    64             64 + 128 = 192 KiB                          32 + 16 + 128 = 176  (80 keys: spills with dropout)
// P V takes 16 keys at a time.
constexpr int hopper_keys(int dim_v, bool plain) { return dim_v <= 128 ? 128 : plain ? 80 : 64; }

struct HopperArguments {
  AttentionArguments a;
  TensorMap query;
  TensorMap key;
  TensorMap value;
  int box;      // rows of keys that are copied at once: a tile, or what divides it and the pages
  int items;    // tiles of queries, of all heads
  int section;  // heads that are gone through together: their keys and values fit the L2 cache
};

// Where a block's things lie in shared memory.
template <int kDim, int kDimV, bool kPlain> struct HopperShared {
  static constexpr int kKeys = hopper_keys(kDimV, kPlain);
  static constexpr int kRowBytes = kPanelColumns * 2;  // of a panel
  static constexpr int kQueryBytes = kDim / kPanelColumns * kHopperQueries * kRowBytes;
  static constexpr int kKeyBytes = kDim / kPanelColumns * kKeys * kRowBytes;  // of a tile
  static constexpr int kValueBytes = kDimV / kPanelColumns * kKeys * kRowBytes;
  static constexpr int kBarriers = 2 + 4 * kHopperStages;
  static constexpr int kSharedBytes = kQueryBytes + kHopperStages * (kKeyBytes + kValueBytes) + kBarriers * 8;
  static_assert(kKeys % 16 == 0 && kKeys <= kMostTileKeys && kSharedBytes <= 227 * 1024);

  SharedAddress base;

  REGARD_DEVICE SharedAddress query() const { return base; }
  REGARD_DEVICE SharedAddress key(int stage) const { return base + static_cast<SharedAddress>(kQueryBytes + stage * kKeyBytes); }
  REGARD_DEVICE SharedAddress value(int stage) const { return key(kHopperStages) + static_cast<SharedAddress>(stage * kValueBytes); }

  REGARD_DEVICE SharedAddress barrier(int n) const { return value(kHopperStages) + static_cast<SharedAddress>(n * 8); }
  REGARD_DEVICE SharedAddress query_landed() const { return barrier(0); }
  REGARD_DEVICE SharedAddress query_free() const { return barrier(1); }
  REGARD_DEVICE SharedAddress key_landed(int stage) const { return barrier(2 + stage); }
  REGARD_DEVICE SharedAddress value_landed(int stage) const { return barrier(2 + kHopperStages + stage); }
  REGARD_DEVICE SharedAddress key_free(int stage) const { return barrier(2 + 2 * kHopperStages + stage); }
  REGARD_DEVICE SharedAddress value_free(int stage) const { return barrier(2 + 3 * kHopperStages + stage); }

  // By one lane, once.
  REGARD_DEVICE void start() const {
    constexpr int kWarps = 2 * kWarpgroup / kWarp;
    start_barrier(query_landed(), 1);
    start_barrier(query_free(), kWarps);
    for (int stage = 0; stage < kHopperStages; ++stage) {
      start_barrier(key_landed(stage), 1);
      start_barrier(value_landed(stage), 1);
      start_barrier(key_free(stage), kWarps);
      start_barrier(value_free(stage), kWarps);
    }
    publish_barriers();
  }
};

// One box of each panel of a tile of so many rows and columns.
template <int kRows, int kColumns>
REGARD_DEVICE void fetch_panels(SharedAddress to, const TensorMap& map, int row, int head, int batch, SharedAddress landed) {
  for (int panel = 0; panel < kColumns / kPanelColumns; ++panel)
    copy_box(to + static_cast<SharedAddress>(panel * kRows * kPanelColumns * 2), map, panel * kPanelColumns, row, head, batch, landed);
}

// Tiles of keys and values go through their stages in a ring: tile n of all that the block has.
struct Ring {
  int n = 0;
  REGARD_DEVICE int stage() const { return n % kHopperStages; }
  REGARD_DEVICE int parity() const { return n / kHopperStages & 1; }
};

// The block's item in its round, or one beyond the last: every other round runs backwards, so that who had the longest of
// one has the shortest of the next.
REGARD_DEVICE int item_of(int round) {
  const int blocks = block_count();
  return round * blocks + (round % 2 == 0 ? block_index() : blocks - 1 - block_index());
}

struct HopperItem {
  int b;
  int h;
  int i0;
  int rows;   // of the sequence: none of the item's where that is i0 or less
  int end;    // of the queries that see anything
  int first;  // tiles of keys that some query sees, but for the block mask
  int last;
};

// The first tile from this one on that the block mask lets any query see.
template <int kKeys> REGARD_DEVICE int seen_tile(const AttentionArguments& a, const HopperItem& x, int tile) {
  if (!a.blocks.present() || tile >= x.last) return tile;
  return a.blocks.next(x.b, x.h, x.i0, x.end, tile * kKeys) / kKeys;
}

// Late queries see the most keys under a causal mask: of the heads of a section, they go first.
template <int kKeys> REGARD_DEVICE HopperItem hopper_item(const HopperArguments& p, int item) {
  const AttentionArguments& a = p.a;
  const int full = p.section * a.tiles;
  const int section = item / full;
  const int heads = p.items / a.tiles - section * p.section;
  const int width = heads < p.section ? heads : p.section;
  const int head = section * p.section + item % full % width;
  const BlockOf block = block_of(a, head * a.tiles + item % full / width, kHopperQueries);
  HopperItem x{block.b, block.h, block.i0, block.rows, block.i0, 0, 0};
  if (x.i0 >= x.rows) return x;
  const SequenceMask sequence = sequence_of(a, x.b);
  const int end = x.i0 + kHopperQueries;
  x.end = static_cast<int>(sequence.len_q) < end ? static_cast<int>(sequence.len_q) : end;
  const KeyRange any = sequence.seen_by_any(x.i0, end);
  if (any.last <= any.first) return x;
  x.last = static_cast<int>((any.last + kKeys - 1) / kKeys);
  x.first = seen_tile<kKeys>(a, x, static_cast<int>(any.first) / kKeys);
  return x;
}

// A tile of keys or values, whose first row is `row` where sequences lie in one piece: one lane orders it. Pages give it box by
// box, to each of which there is a lane: table entries and divisions take long, and all boxes wait for them together. Boxes
// behind the sequence's end are asked for behind the last page: zeros, and nothing is read.
template <int kKeys, int kColumns>
REGARD_DEVICE void fetch_tile(const HopperArguments& p, SharedAddress to, const TensorMap& map, int b, int head, int row, int tile,
                              SharedAddress landed) {
  const AttentionArguments& a = p.a;
  if (thread_index() == 0) arrive_expecting(landed, kKeys * kColumns * 2);
  if (!a.tiles_are_paged) {
    if (thread_index() == 0) fetch_panels<kKeys, kColumns>(to, map, row + tile * kKeys, head, a.key_starts.present() ? 0 : b, landed);
    return;
  }
  static_assert(kKeys / 8 <= kWarp, "a box has eight rows or more");
  const int r = thread_index() * p.box;
  if (r >= kKeys) return;
  const int j = tile * kKeys + r;
  const int keys = length_of(a.key_lengths, b, a.len_kv);
  fetch_panels<kKeys, kColumns>(to + static_cast<SharedAddress>(r * kPanelColumns * 2), map, j % a.page_size, head,
                                j < keys ? page_of(a, b, j) : a.pages, landed);
}

// Of the warp that orders copies no lane goes on before all have seen the phase: one left behind by two would wait for ever.
REGARD_DEVICE void await_room(SharedAddress barrier, int parity) {
  await_phase(barrier, parity);
  warp_barrier();
}

template <int kDim, int kDimV, bool kPlain>
REGARD_DEVICE void fetch_items(const HopperArguments& p, const HopperShared<kDim, kDimV, kPlain>& shared) {
  constexpr int kKeys = hopper_keys(kDimV, kPlain);
  const AttentionArguments& a = p.a;
  Ring key;
  Ring value;
  int queries = 0;
  for (int round = 0, item = item_of(0); round * block_count() < p.items; item = item_of(++round)) {
    if (item >= p.items) continue;
    const HopperItem x = hopper_item<kKeys>(p, item);
    if (x.first >= x.last) continue;
    const int head = x.h / a.group;
    const int first = first_key(a, x.b);
    await_room(shared.query_free(), (queries++ & 1) ^ 1);
    if (thread_index() == 0) {
      arrive_expecting(shared.query_landed(), kHopperQueries * kDim * 2);
      fetch_panels<kHopperQueries, kDim>(shared.query(), p.query, first_query(a, x.b) + x.i0, x.h, a.query_starts.present() ? 0 : x.b,
                                         shared.query_landed());
    }
    // A tile's keys are wanted before the values of the tile before.
    int before = -1;
    for (int tile = x.first; before < x.last; before = tile, tile = seen_tile<kKeys>(a, x, tile + 1)) {
      if (tile < x.last) {
        await_room(shared.key_free(key.stage()), key.parity() ^ 1);
        fetch_tile<kKeys, kDim>(p, shared.key(key.stage()), p.key, x.b, head, first, tile, shared.key_landed(key.stage()));
        ++key.n;
      }
      if (before >= 0) {
        await_room(shared.value_free(value.stage()), value.parity() ^ 1);
        fetch_tile<kKeys, kDimV>(p, shared.value(value.stage()), p.value, x.b, head, first, before, shared.value_landed(value.stage()));
        ++value.n;
      }
    }
  }
}

// What one warpgroup has of its item, and the steps of its loop.
template <class T, int kDim, int kDimV, bool kPlain> struct HopperRows {
  using Shared = HopperShared<kDim, kDimV, kPlain>;
  static constexpr int kKeys = Shared::kKeys;
  static constexpr int kKeyTiles = kKeys / 8;
  static constexpr int kDimTiles = kDimV / 8;

  const HopperArguments& p;
  const Shared shared;
  const int group;  // 0 or 1

  HopperItem x;
  int i0;         // of the warpgroup
  int all_first;  // the keys that all of its queries see
  int all_last;
  float slope;
  RowState state[2];
  float s[kKeyTiles][4];
  std::uint32_t weights[kKeys / 16][4];
  float o[kDimTiles][4];

  REGARD_DEVICE HopperRows(const HopperArguments& arguments, const Shared& at, int which) : p(arguments), shared(at), group(which) {}

  // Found again where they are needed: registers are short.
  REGARD_DEVICE SequenceMask sequence() const { return sequence_of(p.a, opaque(x.b)); }
  REGARD_DEVICE int row() const { return i0 + opaque(thread_index()) % kWarpgroup / kWarp * 16 + opaque(thread_index()) % kWarp / 4; }
  REGARD_DEVICE int column() const { return opaque(thread_index()) % 4 * 2; }
  // From a score's unit to powers of two.
  REGARD_DEVICE float factor() const { return kPlain ? p.a.scale_to_exp2 : kLog2E; }

  // The warp is done with what the barrier guards.
  static REGARD_DEVICE void release(SharedAddress barrier) {
    if (thread_index() % kWarp == 0) arrive(barrier);
  }

  REGARD_DEVICE void begin(int item) {
    x = hopper_item<kKeys>(p, item);
    i0 = x.i0 + group * (kHopperQueries / 2);
    const SequenceMask whole = sequence();
    const int end = static_cast<int>(whole.len_q) < i0 + kHopperQueries / 2 ? static_cast<int>(whole.len_q) : i0 + kHopperQueries / 2;
    const KeyRange all = i0 < end ? whole.seen_by_all(i0, end) : KeyRange{0, 0};
    all_first = static_cast<int>(all.first);
    all_last = static_cast<int>(all.last);
    slope = kPlain ? 0.0f : slope_of<float>(p.a, x.b, x.h);
    state[0] = state[1] = row_before(p.a, x.h, column(), kPlain ? p.a.scale_float : 1.0f);
#pragma unroll
    for (int n = 0; n < kDimTiles; ++n)
#pragma unroll
      for (int c = 0; c < 4; ++c) o[n][c] = 0;
  }

  // s = Q K^T
  REGARD_DEVICE void order_scores(int stage) {
    const std::uint64_t query =
        panel_descriptor(shared.query() + static_cast<SharedAddress>(group * (kHopperQueries / 2) * Shared::kRowBytes), 0);
    const std::uint64_t key = panel_descriptor(shared.key(stage), 0);
    pin(s);
    open_products();
#pragma unroll
    for (int k = 0; k < kDim / 16; ++k) {
      const auto at = [k](int rows) { return static_cast<std::uint64_t>(k / 4 * rows * Shared::kRowBytes + k % 4 * 32) >> 4; };
      if (k == 0)
        multiply_panels<T, false>(s, query + at(kHopperQueries), key + at(kKeys));
      else
        multiply_panels<T, true>(s, query + at(kHopperQueries), key + at(kKeys));
    }
    close_products();
  }

  // o += P V
  REGARD_DEVICE void order_outputs(int stage) {
    const std::uint64_t value = panel_descriptor(shared.value(stage), kKeys * Shared::kRowBytes);
    pin(o);
    pin(weights);
    open_products();
#pragma unroll
    for (int k = 0; k < kKeys / 16; ++k)
      multiply_rows<T>(o, weights[k], value + static_cast<std::uint64_t>(k * 16 * Shared::kRowBytes >> 4));
    close_products();
  }

  // Scores to weights; what earlier outputs are to be multiplied by.
  REGARD_DEVICE void weigh(int tile, float (&alpha)[2]) {
    const int j0 = tile * kKeys;
    const bool blocked = !kPlain && p.a.blocks.present() && i0 < x.end && !p.a.blocks.all(x.b, x.h, i0, x.end, j0, j0 + kKeys);
    if (!kPlain || all_first > j0 || all_last < j0 + kKeys) {
#pragma unroll
      for (int half = 0; half < 2; ++half)
        finish_fragments<kPlain>(p.a, sequence(), x.b, x.h, row() + half * 8, j0 + column(), slope, blocked, s, half);
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) alpha[half] = take_in(state[half], s, half, factor());
  }

  REGARD_DEVICE void pack() {
#pragma unroll
    for (int k = 0; k < kKeys / 16; ++k) pack_weights<T>(weights[k], s, k);
  }

  // The scores are there, and their keys are not wanted any more.
  template <int kRunning> REGARD_DEVICE void end_scores(const Ring& ring) {
    await_products<kRunning>();
    pin(s);
    release(shared.key_free(ring.stage()));
  }

  REGARD_DEVICE void end_outputs(const Ring& ring) {
    await_products<0>();
    pin(o);
    pin(weights);
    release(shared.value_free(ring.stage()));
  }

  REGARD_DEVICE void rescale_outputs(const float (&alpha)[2]) {
#pragma unroll
    for (int half = 0; half < 2; ++half) rescale(o, half, alpha[half]);
  }

  REGARD_DEVICE void await_turn() const { named_barrier(kTurn + group, 2 * kWarpgroup); }
  REGARD_DEVICE void pass_turn() const { arrive_named(kTurn + 1 - group, 2 * kWarpgroup); }

  // A tile's softmax runs beside the products of the tile before, and beside the other warpgroup's.
  REGARD_DEVICE void compute_beside(Ring& ring) {
    float alpha[2];
    await_phase(shared.key_landed(ring.stage()), ring.parity());
    order_scores(ring.stage());
    end_scores<0>(ring);
    weigh(x.first, alpha);
    pack();
    for (int tile = x.first + 1; tile < x.last; ++tile) {
      const Ring before = ring;
      ++ring.n;
      await_phase(shared.key_landed(ring.stage()), ring.parity());
      await_turn();
      order_scores(ring.stage());
      await_phase(shared.value_landed(before.stage()), before.parity());
      order_outputs(before.stage());
      pass_turn();
      end_scores<1>(ring);
      weigh(tile, alpha);
      finish_before_waiting(state[0].l + state[1].l);
      end_outputs(before);
      rescale_outputs(alpha);
      pack();
    }
    release(shared.query_free());
    await_phase(shared.value_landed(ring.stage()), ring.parity());
    order_outputs(ring.stage());
    end_outputs(ring);
    ++ring.n;
  }

  // Beside the other warpgroup's alone: masks, biases and softcaps take long, many registers, and some 20000 instructions wherever
  // they stand.
  REGARD_DEVICE void compute_apart(Ring& ring) {
    float alpha[2];
    for (int tile = x.first; tile < x.last; tile = seen_tile<kKeys>(p.a, x, tile + 1)) {
      await_phase(shared.key_landed(ring.stage()), ring.parity());
      await_turn();
      order_scores(ring.stage());
      pass_turn();
      Kept<kKeyTiles> kept;
      if (p.a.dropout.present()) kept.draw(p.a, x.b, x.h, row(), tile * kKeys);
      end_scores<0>(ring);
      weigh(tile, alpha);
      rescale_outputs(alpha);
      if (p.a.dropout.present()) kept.apply(s);
      pack();
      await_phase(shared.value_landed(ring.stage()), ring.parity());
      order_outputs(ring.stage());
      end_outputs(ring);
      ++ring.n;
    }
    release(shared.query_free());
  }

  REGARD_DEVICE void compute(Ring& ring, int queries) {
    await_phase(shared.query_landed(), queries & 1);
    if constexpr (kPlain)
      compute_beside(ring);
    else
      compute_apart(ring);
  }

  REGARD_DEVICE void finish() {
    const AttentionArguments& a = p.a;
    const bool pairs = writes_pairs(a);
    const int len_q = static_cast<int>(sequence().len_q);
    unsigned bad = 0;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int i = row() + half * 8;
      if (!write_row<T>(a, x.b, x.h, i, column(), i < len_q, pairs, state[half], o, half, kPlain ? a.scale_float : 1.0f)) bad |= 1u << half;
    }
    mend_rows(a, x.b, x.h, i0 + thread_index() % kWarpgroup / kWarp * 16, 16, bad);
  }
};

template <class T, int kDim, int kDimV, bool kPlain>
REGARD_KERNEL(kHopperThreads, 1)
attention_hopper(const REGARD_GRID_CONSTANT HopperArguments p) {
  const HopperShared<kDim, kDimV, kPlain> shared{shared_address(dynamic_shared())};
  if (thread_index() == 0) shared.start();
  block_barrier();
  const int warpgroup = shuffle(thread_index() / kWarpgroup, 0);  // the same for a warp, as the compiler sees
  if (warpgroup == 0) {
    give_up_registers<24>();
    if (thread_index() < kWarp) fetch_items(p, shared);
    return;
  }
  take_registers<240>();
  const int group = warpgroup - 1;
  HopperRows<T, kDim, kDimV, kPlain> rows(p, shared, group);
  Ring ring;
  int queries = 0;
  if (group == 1) rows.pass_turn();  // the first is the other's
  for (int round = 0, item = item_of(0); round * block_count() < p.items; item = item_of(++round)) {
    if (item >= p.items) continue;
    rows.begin(item);
    if (rows.x.i0 >= rows.x.rows) continue;
    if (rows.x.first < rows.x.last) rows.compute(ring, queries++);
    rows.finish();
  }
  if (group == 0) rows.await_turn();  // the last: none is left behind
}

}  // namespace regard::cuda
