#include "cuda/runtime.h"

#include <cuda_runtime.h>

#include <string>

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
  check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, id));
  check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, id));
  check(cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, id));
  return {major * 10 + minor, shared};
}

OnDevice::OnDevice(int id) {
  check(cudaGetDevice(&before_));
  if (id != before_) check(cudaSetDevice(id));
}

OnDevice::~OnDevice() { cudaSetDevice(before_); }

// From pageable memory the runtime has staged the bytes when it returns.
void copy_to_device(void* to, const void* from, std::int64_t bytes, Stream stream) {
  check(cudaMemcpyAsync(to, from, static_cast<std::size_t>(bytes), cudaMemcpyHostToDevice, static_cast<cudaStream_t>(stream)));
}

}  // namespace regard::cuda
