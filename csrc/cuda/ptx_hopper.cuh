// Instructions of sm_90a, each behind a function: barriers that count bytes, bulk copies, products of whole warpgroups.
//
// "PTX ISA", sections on mbarrier, cp.async.bulk.tensor, wgmma.mma_async (matrix descriptors, register fragments) and
// setmaxnreg; tests/cuda_emulation/ models them.
#pragma once

#include "cuda/ptx.cuh"
#include "cuda/tensor_map.h"

namespace regard::cuda {

constexpr int kWarpgroup = 128;

// A matrix in shared memory as wgmma wants it, of 16-bit elements in panels: rows of 64 elements (128 bytes), swizzled as
// a tensor map's boxes are, each panel at a multiple of 1024 bytes. The fields count 16 bytes.
//   bits 0 to 13: where it starts; 16 to 29: from panel to panel, where a product needs columns of several;
//   32 to 45: from eight rows to the next eight; 62 and 63: 1, the swizzle of 128 bytes
REGARD_DEVICE std::uint64_t panel_descriptor(SharedAddress start, int panel_bytes) {
  constexpr std::uint64_t kEightRows = 8 * 128;
  return (std::uint64_t{start & 0x3ffffu} >> 4) | static_cast<std::uint64_t>(panel_bytes >> 4) << 16 | (kEightRows >> 4) << 32 |
         std::uint64_t{1} << 62;
}

}  // namespace regard::cuda

#ifdef REGARD_EMULATED
#include "ptx_hopper_model.h"
#else

namespace regard::cuda {

// ---- Barriers in shared memory -------------------------------------------------------------------------------------
//
// Eight bytes. A phase is over when so many lanes have arrived and all bytes that they expect have landed; phases are told
// apart by parity, the first has 0.

REGARD_DEVICE void start_barrier(SharedAddress barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;\n" ::"r"(barrier), "r"(arrivals) : "memory");
}
// After barriers are started, before a block barrier: the copies' unit sees them too.
REGARD_DEVICE void publish_barriers() {
  asm volatile("fence.mbarrier_init.release.cluster;\nfence.proxy.async.shared::cta;\n" ::: "memory");
}
REGARD_DEVICE void arrive(SharedAddress barrier) { asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];\n" ::"r"(barrier) : "memory"); }
REGARD_DEVICE void arrive_expecting(SharedAddress barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;\n" ::"r"(barrier), "r"(bytes) : "memory");
}
// Returns once the phase of that parity is over.
REGARD_DEVICE void await_phase(SharedAddress barrier, int parity) {
  asm volatile(
      "{\n"
      ".reg .pred over;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 over, [%0], %1;\n"
      "@over bra done;\n"
      "bra again;\n"
      "done:\n"
      "}\n" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

// ---- Bulk copies ---------------------------------------------------------------------------------------------------

// One lane starts copying a box of the map's array; `barrier` counts the box's bytes as they land.
REGARD_DEVICE void copy_box(SharedAddress to, const TensorMap& map, int column, int row, int head, int batch, SharedAddress barrier) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4, %5}], [%6];\n" ::"r"(to),
      "l"(&map), "r"(column), "r"(row), "r"(head), "r"(batch), "r"(barrier)
      : "memory");
}

// ---- Barriers of some of a block's warps ---------------------------------------------------------------------------

// `threads` counts those who wait and those who only arrive; barrier 0 is the block's.
REGARD_DEVICE void named_barrier(int id, int threads) { asm volatile("bar.sync %0, %1;\n" ::"r"(id), "r"(threads) : "memory"); }
REGARD_DEVICE void arrive_named(int id, int threads) { asm volatile("bar.arrive %0, %1;\n" ::"r"(id), "r"(threads) : "memory"); }

// ---- Registers -----------------------------------------------------------------------------------------------------

// Registers a lane from here on, for a whole warpgroup.
template <int kRegisters> REGARD_DEVICE void give_up_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;\n" ::"n"(kRegisters));
}
template <int kRegisters> REGARD_DEVICE void take_registers() { asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;\n" ::"n"(kRegisters)); }

// ---- Products of a warpgroup ---------------------------------------------------------------------------------------
//
// They run beside the lanes: between open_products and the await_products that covers them nobody may touch their
// registers, nor what they read in shared memory. Warp w of the four has rows 16 w to 16 w + 15, laid over its lanes as the
// sums and the left operand of mma.m16n8k16 are.

// The compiler must not move what it does with these registers across: it takes a product for done when it is issued.
template <int kTiles> REGARD_DEVICE void pin(float (&c)[kTiles][4]) {
#pragma unroll
  for (int n = 0; n < kTiles; ++n) asm volatile("" : "+f"(c[n][0]), "+f"(c[n][1]), "+f"(c[n][2]), "+f"(c[n][3])::"memory");
}
template <int kSteps> REGARD_DEVICE void pin(std::uint32_t (&a)[kSteps][4]) {
#pragma unroll
  for (int k = 0; k < kSteps; ++k) asm volatile("" : "+r"(a[k][0]), "+r"(a[k][1]), "+r"(a[k][2]), "+r"(a[k][3])::"memory");
}

// Before the first product that reads or writes registers which the lanes have changed.
REGARD_DEVICE void open_products() { asm volatile("wgmma.fence.sync.aligned;\n" ::: "memory"); }
// Products issued since the last close form a group.
REGARD_DEVICE void close_products() { asm volatile("wgmma.commit_group.sync.aligned;\n" ::: "memory"); }
// Waits for all but the latest kGroups groups.
template <int kGroups> REGARD_DEVICE void await_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;\n" ::"n"(kGroups) : "memory");
}

// What `sum`, which is never negative, is made of stands before what follows. ptxas knows of nothing that await_products waits
// for but products: it moved the wait up, past all that was to run beside them. It moves none past a branch.
REGARD_DEVICE void finish_before_waiting(float sum) {
  asm volatile(
      "{\n"
      ".reg .pred never;\n"
      "setp.lt.f32 never, %0, 0f00000000;\n"
      "@never nanosleep.u32 0;\n"
      "}\n" ::"f"(sum)
      : "memory");
}

// c[64][8 kTiles] (+)= a[64][16] b[8 kTiles][16]^T: both in shared memory, 16 columns of a panel.
template <class T, bool kAdd, int kTiles> REGARD_DEVICE void multiply_panels(float (&c)[kTiles][4], std::uint64_t a, std::uint64_t b);
// c[64][8 kTiles] += a[64][16] b[16][8 kTiles]: a in registers, b 16 rows of panels.
template <class T, int kTiles> REGARD_DEVICE void multiply_rows(float (&c)[kTiles][4], const std::uint32_t (&a)[4], std::uint64_t b);

#define REGARD_SUMS_1(n) "+f"(c[n][0]), "+f"(c[n][1]), "+f"(c[n][2]), "+f"(c[n][3])
#define REGARD_SUMS_2(n) REGARD_SUMS_1(n), REGARD_SUMS_1(n + 1)
#define REGARD_SUMS_8(n) REGARD_SUMS_2(n), REGARD_SUMS_2(n + 2), REGARD_SUMS_2(n + 4), REGARD_SUMS_2(n + 6)
#define REGARD_SUMS_10(n) REGARD_SUMS_8(n), REGARD_SUMS_2(n + 8)
#define REGARD_SUMS_16(n) REGARD_SUMS_8(n), REGARD_SUMS_8(n + 8)
#define REGARD_SUMS_32(n) REGARD_SUMS_16(n), REGARD_SUMS_16(n + 16)
#define REGARD_NAMES_32                                                                                                                \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, " \
  "%28, %29, %30, %31"
#define REGARD_NAMES_40 REGARD_NAMES_32 ", %32, %33, %34, %35, %36, %37, %38, %39"
#define REGARD_NAMES_64                                                                                                   \
  REGARD_NAMES_40                                                                                                         \
  ", %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, " \
  "%63"
#define REGARD_NAMES_128                                                                                                            \
  REGARD_NAMES_64                                                                                                                   \
  ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, %83, %84, %85, %86, %87, %88, " \
  "%89, %90, %91, %92, %93, %94, %95, %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, " \
  "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"

#define REGARD_PRODUCT_OF_PANELS(T, name, adds, add, tiles, shape, names, a, b)                                                   \
  template <> REGARD_DEVICE void multiply_panels<T, adds>(float (&c)[tiles][4], std::uint64_t left, std::uint64_t right) {        \
    asm volatile("wgmma.mma_async.sync.aligned." shape ".f32." name "." name " {" names "}, " a ", " b ", " add ", 1, 1, 0, 0;\n" \
                 : REGARD_SUMS_##tiles(0)                                                                                         \
                 : "l"(left), "l"(right));                                                                                        \
  }
#define REGARD_PRODUCT_OF_ROWS(T, name, tiles, shape, names, a, b)                                                             \
  template <> REGARD_DEVICE void multiply_rows<T>(float (&c)[tiles][4], const std::uint32_t (&left)[4], std::uint64_t right) { \
    asm volatile("wgmma.mma_async.sync.aligned." shape ".f32." name "." name " {" names "}, {" a "}, " b ", 1, 1, 1, 1;\n"     \
                 : REGARD_SUMS_##tiles(0)                                                                                      \
                 : "r"(left[0]), "r"(left[1]), "r"(left[2]), "r"(left[3]), "l"(right));                                        \
  }
#define REGARD_PRODUCTS(T, name)                                                                  \
  REGARD_PRODUCT_OF_PANELS(T, name, false, "0", 8, "m64n64k16", REGARD_NAMES_32, "%32", "%33")    \
  REGARD_PRODUCT_OF_PANELS(T, name, true, "1", 8, "m64n64k16", REGARD_NAMES_32, "%32", "%33")     \
  REGARD_PRODUCT_OF_PANELS(T, name, false, "0", 10, "m64n80k16", REGARD_NAMES_40, "%40", "%41")   \
  REGARD_PRODUCT_OF_PANELS(T, name, true, "1", 10, "m64n80k16", REGARD_NAMES_40, "%40", "%41")    \
  REGARD_PRODUCT_OF_PANELS(T, name, false, "0", 16, "m64n128k16", REGARD_NAMES_64, "%64", "%65")  \
  REGARD_PRODUCT_OF_PANELS(T, name, true, "1", 16, "m64n128k16", REGARD_NAMES_64, "%64", "%65")   \
  REGARD_PRODUCT_OF_ROWS(T, name, 8, "m64n64k16", REGARD_NAMES_32, "%32, %33, %34, %35", "%36")   \
  REGARD_PRODUCT_OF_ROWS(T, name, 16, "m64n128k16", REGARD_NAMES_64, "%64, %65, %66, %67", "%68") \
  REGARD_PRODUCT_OF_ROWS(T, name, 32, "m64n256k16", REGARD_NAMES_128, "%128, %129, %130, %131", "%132")
REGARD_PRODUCTS(Half, "f16")
REGARD_PRODUCTS(BFloat16, "bf16")
#undef REGARD_PRODUCTS
#undef REGARD_PRODUCT_OF_ROWS
#undef REGARD_PRODUCT_OF_PANELS
#undef REGARD_NAMES_128
#undef REGARD_NAMES_64
#undef REGARD_NAMES_40
#undef REGARD_NAMES_32
#undef REGARD_SUMS_32
#undef REGARD_SUMS_16
#undef REGARD_SUMS_10
#undef REGARD_SUMS_8
#undef REGARD_SUMS_2
#undef REGARD_SUMS_1

}  // namespace regard::cuda

#endif
