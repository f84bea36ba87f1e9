#include "cuda/runtime.h"

#include <cuda.h>
#include <cuda_runtime.h>

#include <string>

#include "cuda/rehearsal.h"
#include "cuda/tensor_map.h"

namespace regard::cuda {

void check(int status) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // a refused launch must not be reported again by the next call
  throw Error(std::string("CUDA: ") + cudaGetErrorString(static_cast<cudaError_t>(status)));
}

const char* why_not() {
  static thread_local std::string reason;
  int driver = 0;
  if (cudaDriverGetVersion(&driver) != cudaSuccess || driver == 0) return "no NVIDIA driver is installed";
  // Minor versions are compatible: a driver serves every toolkit of its own major version.
  if (driver / 1000 < CUDART_VERSION / 1000) {
    const auto version = [](int v) { return std::to_string(v / 1000) + "." + std::to_string(v % 1000 / 10); };
    reason = "the driver serves CUDA up to " + version(driver) + ", and this build needs " + version(CUDART_VERSION);
    return reason.c_str();
  }
  int devices = 0;
  const cudaError_t status = cudaGetDeviceCount(&devices);
  if (status != cudaSuccess) {
    cudaGetLastError();
    reason = cudaGetErrorString(status);
    return reason.c_str();
  }
  return devices > 0 ? nullptr : "no device";
}

Device device(int id) {
  int major = 0;
  int minor = 0;
  int shared = 0;
  int processors = 0;
  check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, id));
  check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, id));
  check(cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, id));
  check(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, id));
  return {major * 10 + minor, shared, processors};
}

Clocks clocks(int id) {
  int core = 0;    // kHz, as the next
  int memory = 0;  // whose data comes twice a clock
  int bus = 0;     // bits
  check(cudaDeviceGetAttribute(&core, cudaDevAttrClockRate, id));
  check(cudaDeviceGetAttribute(&memory, cudaDevAttrMemoryClockRate, id));
  check(cudaDeviceGetAttribute(&bus, cudaDevAttrGlobalMemoryBusWidth, id));
  return {core * 1e3, 2 * (memory * 1e3) * (bus / 8.0)};
}

TensorMap tensor_map_of(const Array& x, int rows) {
  // The driver's own function, found at run time: the module does not link with it, and imports where there is none.
  static const auto encode = [] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result{};
    check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result));
    if (result != cudaDriverEntryPointSuccess) throw Error("CUDA: the driver has no cuTensorMapEncodeTiled");
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(found);
  }();
  static_assert(sizeof(TensorMap) == sizeof(CUtensorMap) && alignof(TensorMap) >= alignof(CUtensorMap));
  const MapShape shape(x);
  const cuuint32_t box[4] = {kPanelColumns, static_cast<cuuint32_t>(rows), 1, 1};
  const cuuint32_t steps[4] = {1, 1, 1, 1};
  TensorMap map{};
  const CUresult status = encode(reinterpret_cast<CUtensorMap*>(&map),
                                 x.dtype == DType::float16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 4, x.data,
                                 shape.length, shape.stride, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                                 CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (status != CUDA_SUCCESS) throw Error("CUDA: the driver refuses a tensor map, with code " + std::to_string(status));
  return map;
}

OnDevice::OnDevice(int id) {
  check(cudaGetDevice(&before_));
  if (id != before_) check(cudaSetDevice(id));
}

OnDevice::~OnDevice() { cudaSetDevice(before_); }

// From pageable memory the runtime has staged the bytes when it returns.
void copy_to_device(void* to, const void* from, std::int64_t bytes, Stream stream) {
  if (rehearsal() != nullptr) return;
  check(cudaMemcpyAsync(to, from, static_cast<std::size_t>(bytes), cudaMemcpyHostToDevice, static_cast<cudaStream_t>(stream)));
}

}  // namespace regard::cuda
