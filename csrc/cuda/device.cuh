// Where kernels meet their machine: who am I, barriers, shuffles, dynamic shared memory, launch().
//
// Kernels name nothing of CUDA beyond this header and ptx.cuh, so that the same sources compile for the host: with
// REGARD_EMULATED the functions below come from tests/cuda_emulation/, which runs kernels on the CPU.
// Blocks and grids have one dimension.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cuda/rehearsal.h"
#include "cuda/runtime.h"

#ifdef REGARD_EMULATED
#include "device_model.h"
#else

#include <cuda_runtime.h>

#define REGARD_KERNEL(threads, blocks) __global__ void __launch_bounds__(threads, blocks)
#define REGARD_DEVICE __device__ __forceinline__
#define REGARD_GRID_CONSTANT __grid_constant__             // arguments stay where the launch put them: no copy on the stack
#define REGARD_DEVICE_CALL inline __device__ __noinline__  // rare paths: their registers must not burden the caller

namespace regard::cuda {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

REGARD_DEVICE int thread_index() { return static_cast<int>(threadIdx.x); }
REGARD_DEVICE int block_index() { return static_cast<int>(blockIdx.x); }
REGARD_DEVICE int block_count() { return static_cast<int>(gridDim.x); }

// Warp operations are for whole warps: every lane takes part.
REGARD_DEVICE void block_barrier() { __syncthreads(); }
REGARD_DEVICE void warp_barrier() { __syncwarp(); }
template <class T> REGARD_DEVICE T shuffle_xor(T x, int lanes) { return __shfl_xor_sync(kAllLanes, x, lanes); }
template <class T> REGARD_DEVICE T shuffle(T x, int from) { return __shfl_sync(kAllLanes, x, from); }
REGARD_DEVICE bool any_lane(bool x) { return __any_sync(kAllLanes, x) != 0; }

// Aligned to 1024 bytes.
REGARD_DEVICE char* dynamic_shared() {
  extern __shared__ __align__(1024) char regard_dynamic_shared[];
  return regard_dynamic_shared;
}

constexpr int kSharedByDefault = 48 * 1024;  // bytes; more has to be asked for, kernel by kernel

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), std::int64_t blocks, int threads, int shared_bytes, LaunchPlace place, Arguments... arguments) {
  if (blocks == 0) return;
  if (blocks > 0x7fffffff) throw NoKernel("no CUDA kernel for so many elements: the grid has at most 2^31 - 1 blocks");
  if (rehearsed(place, blocks, threads, shared_bytes)) return;
  if (shared_bytes > kSharedByDefault)
    check(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes));
  kernel<<<static_cast<unsigned>(blocks), threads, static_cast<std::size_t>(shared_bytes), static_cast<cudaStream_t>(place.stream)>>>(
      arguments...);
  check(cudaGetLastError());
}

}  // namespace regard::cuda

#endif
