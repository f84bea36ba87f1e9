// The warpgroup kernel, as test_kernels.cpp has the others.

#include "cuda/attention_hopper_launch.cuh"
#include "kernel_check.h"

namespace regard::test {
namespace {

template <int kDim> void launch_two_blocks(const AttentionProblem& p, const AttentionArguments& a, bool plain) {
  const HopperArguments arguments = hopper_arguments(p, a, hopper_keys(kDim));
  launch(plain ? attention_hopper<BFloat16, kDim, true> : attention_hopper<BFloat16, kDim, false>, 2, kHopperThreads,
         HopperShared<kDim>::kSharedBytes, nullptr, arguments);
}

// Several items a block, blocks without one, several tiles of keys, rows that see nothing, a panel, two and four.
void test_hopper() {
  constexpr Shape kHopperShapes[] = {{2, 2, 130, 400, 64, 64, false, false},
                                     {3, 1, 300, 300, 64, 64, true, false},
                                     {1, 1, 200, 150, 40, 56, true, true},
                                     {1, 1, 70, 300, 128, 72, true, false},
                                     {1, 1, 70, 200, 136, 256, true, true}};
  for (const bool random : {false, true}) {
    emulation::settings() = {random, 5};
    emulation::counters() = {};
    for (const Shape& x : kHopperShapes)
      compare<BFloat16>(x, 2 * 3 * 0x1p-8, [&](const AttentionProblem& p, AttentionArguments& a) {
        if (x.dim > 128)
          launch_two_blocks<256>(p, a, !x.masked);
        else if (x.dim > 64)
          launch_two_blocks<128>(p, a, !x.masked);
        else
          launch_two_blocks<64>(p, a, !x.masked);
      });
    CHECK(emulation::counters().group_products > 0 && emulation::counters().boxes > 0);
  }
  emulation::settings() = {};
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
  } catch (const emulation::Failure& f) {
    std::printf("%s\n", f.what());
    CHECK(false);
  }
}

}  // namespace regard::test
