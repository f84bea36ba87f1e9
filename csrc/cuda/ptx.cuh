// Instructions that CUDA C++ does not reach, each behind a function: with ptx_hopper.cuh the only file with PTX.
//
// "PTX ISA", sections on mma.m16n8k16, mma.m16n8k32, ldmatrix and cp.async, gives the lane maps; tests/cuda_emulation/ models them.
#pragma once

#include <cstdint>

#include "core/dtype.h"
#include "cuda/device.cuh"

#ifdef REGARD_EMULATED
#include "ptx_model.h"
#else

namespace regard::cuda {

// An address in shared memory, as ldmatrix and cp.async want it.
using SharedAddress = std::uint32_t;
REGARD_DEVICE SharedAddress shared_address(const void* p) { return static_cast<SharedAddress>(__cvta_generic_to_shared(p)); }

// ---- Conversions -----------------------------------------------------------------------------------------------------

// core/dtype.h has them in some six and ten instructions.
REGARD_DEVICE float widened(Half x) {
  float y;
  asm("cvt.f32.f16 %0, %1;\n" : "=f"(y) : "h"(x.bits));
  return y;
}
REGARD_DEVICE Half rounded_to_half(float x) {
  Half y;
  asm("cvt.rn.f16.f32 %0, %1;\n" : "=h"(y.bits) : "f"(x));
  return y;
}

// ---- Copies from global to shared memory that run beside the lane --------------------------------------------------

// 16 bytes, both sides aligned to 16; with `valid` false zeros are written and nothing is read.
REGARD_DEVICE void copy_async(SharedAddress to, const void* from, bool valid) {
  const int bytes = valid ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(to), "l"(__cvta_generic_to_global(from)), "r"(bytes) : "memory");
}
// Copies issued since the last close form a group.
REGARD_DEVICE void close_copies() { asm volatile("cp.async.commit_group;\n" ::: "memory"); }
// Waits until all but the latest kGroups groups of this lane have landed; other lanes need a barrier to see them.
template <int kGroups> REGARD_DEVICE void await_copies() { asm volatile("cp.async.wait_group %0;\n" ::"n"(kGroups) : "memory"); }

// ---- Matrix fragments ----------------------------------------------------------------------------------------------

// Four 8 x 8 matrices of 16-bit elements: lane 8 m + r names row r of matrix m.
REGARD_DEVICE void load_matrices(std::uint32_t (&to)[4], SharedAddress row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(row)
               : "memory");
}
REGARD_DEVICE void load_matrices_transposed(std::uint32_t (&to)[4], SharedAddress row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(row)
               : "memory");
}

// c[16][8] += a[16][16] b[16][8], summed in float32.
template <class T> REGARD_DEVICE void multiply_add(float (&c)[4], const std::uint32_t (&a)[4], std::uint32_t b0, std::uint32_t b1);
template <> REGARD_DEVICE void multiply_add<Half>(float (&c)[4], const std::uint32_t (&a)[4], std::uint32_t b0, std::uint32_t b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};\n"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <> REGARD_DEVICE void multiply_add<BFloat16>(float (&c)[4], const std::uint32_t (&a)[4], std::uint32_t b0, std::uint32_t b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};\n"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// c[16][8] += a[16][32] b[32][8] of signed bytes, summed exactly.
REGARD_DEVICE void multiply_add_bytes(std::int32_t (&c)[4], const std::uint32_t (&a)[4], std::uint32_t b0, std::uint32_t b1) {
  asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};\n"
               : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// ---- Scalars -------------------------------------------------------------------------------------------------------

// Two floats rounded to 16 bits, the first in the low half.
template <class T> REGARD_DEVICE std::uint32_t pack_pair(float low, float high);
template <> REGARD_DEVICE std::uint32_t pack_pair<Half>(float low, float high) {
  std::uint32_t pair;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;\n" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}
template <> REGARD_DEVICE std::uint32_t pack_pair<BFloat16>(float low, float high) {
  std::uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;\n" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

// sum + the products of four signed bytes and four others.
REGARD_DEVICE std::int32_t dot_bytes(std::uint32_t a, std::uint32_t b, std::int32_t sum) {
  std::int32_t made;
  asm("dp4a.s32.s32 %0, %1, %2, %3;\n" : "=r"(made) : "r"(a), "r"(b), "r"(sum));
  return made;
}

// Four of eight bytes, the lower four those of `low`: which, a hexadecimal digit of `which` each, the last digit for the first.
REGARD_DEVICE std::uint32_t pick_bytes(std::uint32_t low, std::uint32_t high, std::uint32_t which) {
  std::uint32_t made;
  asm("prmt.b32 %0, %1, %2, %3;\n" : "=r"(made) : "r"(low), "r"(high), "r"(which));
  return made;
}

// a b + c of two 16-bit numbers each, each rounded once.
template <class T> REGARD_DEVICE std::uint32_t fused_pairs(std::uint32_t a, std::uint32_t b, std::uint32_t c);
template <> REGARD_DEVICE std::uint32_t fused_pairs<Half>(std::uint32_t a, std::uint32_t b, std::uint32_t c) {
  std::uint32_t made;
  asm("fma.rn.f16x2 %0, %1, %2, %3;\n" : "=r"(made) : "r"(a), "r"(b), "r"(c));
  return made;
}
template <> REGARD_DEVICE std::uint32_t fused_pairs<BFloat16>(std::uint32_t a, std::uint32_t b, std::uint32_t c) {
  std::uint32_t made;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;\n" : "=r"(made) : "r"(a), "r"(b), "r"(c));
  return made;
}

// x, of which the compiler knows nothing: what is computed from it in a loop stays there, and takes no registers outside.
REGARD_DEVICE int opaque(int x) {
  asm volatile("" : "+r"(x));
  return x;
}

// a b, rounded before a sum takes it: the compiler would make one rounding of the two.
REGARD_DEVICE float rounded_product(float a, float b) {
  float made;
  asm("mul.rn.f32 %0, %1, %2;\n" : "=f"(made) : "f"(a), "f"(b));
  return made;
}

// 2^x to 2 units in the last place of float32; subnormal results are 0.
REGARD_DEVICE float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;\n" : "=f"(y) : "f"(x));
  return y;
}

}  // namespace regard::cuda

#endif
