// The warpgroup kernel, as test_kernels.cpp has the others.

#include "cuda/attention_hopper_launch.cuh"
#include "kernel_check.h"

namespace regard::test {
namespace {

void launch_two_blocks(const TileArrays& tiles, const AttentionArguments& a) {
  launch_hopper<BFloat16>(tiles, a, {90, 232448, 2}, nullptr);
}

// Several items a block, blocks without one, several tiles of keys, rows that see nothing, one panel to four.
void test_hopper() {
  constexpr Shape kHopperShapes[] = {
      {2, 2, 130, 400, 64, 64, false, false},  {3, 1, 300, 300, 64, 64, true, false},        {1, 1, 200, 150, 40, 56, true, true},
      {1, 1, 70, 300, 128, 72, true, false},   {1, 1, 70, 200, 136, 256, true, true},        {1, 1, 70, 200, 136, 256, false, false, 0.25},
      {1, 1, 200, 300, 192, 128, true, false}, {1, 1, 70, 300, 136, 72, false, false, 0.25}, {2, 1, 70, 200, 64, 64, true, false, 0.25}};
  for (const bool random : {false, true}) {
    emulation::settings() = {random, 5};
    emulation::counters() = {};
    for (const Shape& x : kHopperShapes)
      compare<BFloat16>(x, 2 * 3 * 0x1p-8,
                        [&](const AttentionProblem& p, AttentionArguments& a) { launch_two_blocks({p.query, p.key, p.value}, a); });
    CHECK(emulation::counters().group_products > 0 && emulation::counters().boxes > 0);
  }
  emulation::settings() = {};
}

// Keys or values in pages, the last sequence's page first.
struct Pages {
  Pages(const Array& x, int size)
      : heads(static_cast<int>(x.shape[1])),
        pages(static_cast<int>((x.shape[2] + size - 1) / size)),
        data(static_cast<std::int64_t>(pages) * heads * size * x.shape[3]),
        array(rows_of(data.data(), x.dtype, heads, size, static_cast<int>(x.shape[3]))) {
    array.shape[0] = pages;
    array.stride[0] = heads * array.stride[1];
    std::memset(data.memory, emulation::kPoison, data.bytes);  // finite: what is behind the last key would else be mended
    for (int h = 0; h < heads; ++h)
      for (int j = 0; j < x.shape[2]; ++j)
        std::memcpy(array.data + (pages - 1 - j / size) * array.stride[0] + h * array.stride[1] + j % size * array.stride[2],
                    x.data + h * x.stride[1] + j * x.stride[2], static_cast<std::size_t>(x.shape[3]) * 2);
  }
  int heads;
  int pages;
  Buffer<BFloat16> data;
  Array array;
};

// Pages smaller than a tile, larger than one, and of a size that has little in common with it.
void test_pages() {
  struct Case {
    Shape shape;
    int page_size;
  };
  constexpr Case kCases[] = {{{2, 2, 40, 300, 64, 56, true, false}, 16},
                             {{1, 1, 40, 300, 64, 64, true, false}, 256},
                             {{1, 1, 40, 200, 136, 256, false, false}, 8},
                             {{1, 1, 40, 300, 192, 128, true, false}, 64},
                             {{1, 1, 40, 200, 256, 256, true, true}, 120}};
  for (const auto& [x, page_size] : kCases)
    compare<BFloat16>(x, 2 * 3 * 0x1p-8, [&x = x, page_size = page_size](AttentionProblem p, AttentionArguments& whole) {
      const Pages key(p.key, page_size);
      const Pages value(p.value, page_size);
      Buffer<std::int32_t> table(key.pages);
      for (int n = 0; n < key.pages; ++n) table[n] = key.pages - 1 - n;
      p.page_table = rows_of(table.data(), DType::int32, 1, 1, key.pages);
      p.key = key.array;
      p.value = value.array;
      AttentionArguments a = arguments_of(p);
      a.page_table.view.stride[1] = a.page_table.view.stride[3];
      a.batch = whole.batch;
      a.len_kv = x.len_kv;
      a.tiles_are_paged = true;
      launch_two_blocks({p.query, p.key, p.value}, a);
    });
}

// Every tile of every head is some block's, once; in a section the longest, the last, go first.
void test_items() {
  HopperArguments p{};
  p.a.batch = 2;
  p.a.heads = 5;
  p.a.group = 1;
  p.a.len_q = 3 * kHopperQueries;
  p.a.len_kv = 700;
  p.a.left = p.a.right = kUnlimited;
  p.a.tiles = 3;
  p.items = 2 * 5 * 3;
  for (const int section : {1, 3, 4, 10}) {
    p.section = section;
    for (const int blocks : {1, 4, 30}) {
      std::vector<int> seen(static_cast<std::size_t>(p.items), 0);
      emulation::run(blocks, kWarp, 0, [&] {
        int last = p.a.len_q;
        for (int round = 0; round * blocks < p.items && thread_index() == 0; ++round)
          if (item_of(round) < p.items) {
            const HopperItem x = hopper_item<128>(p, item_of(round));
            ++seen[static_cast<std::size_t>((x.b * 5 + x.h) * 3 + x.i0 / kHopperQueries)];
            CHECK(x.first == 0 && x.last == 6);
            if (section == 10) CHECK(x.i0 <= last);
            last = x.i0;
          }
      });
      for (const int n : seen) CHECK(n == 1);
    }
  }
}

}  // namespace

void test_hopper_kernels() {
  try {
    test_items();
    test_hopper();
    test_pages();
  } catch (const emulation::Failure& f) {
    std::printf("%s\n", f.what());
    CHECK(false);
  }
}

}  // namespace regard::test
