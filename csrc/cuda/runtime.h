// What host code asks of the CUDA runtime. runtime.cu answers with the real one, tests/cuda_emulation/ with its own.
#pragma once

#include <cstdint>
#include <stdexcept>

namespace regard::cuda {

using Stream = void*;  // cudaStream_t; null: the legacy default stream

class Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// What there is no kernel for: Python's NotImplementedError, with the operation's name before it.
class NoKernel : public Error {
 public:
  using Error::Error;
};

void check(int status);  // throws Error for anything but cudaSuccess

// Null where kernels can run, else the reason why not: it needs neither a driver nor a device to answer.
const char* why_not();

struct Device {
  int capability = 0;    // major * 10 + minor
  int shared_bytes = 0;  // the most that one block may have
  int processors = 0;
};
Device device(int id);

// What the driver says of a device's speed; 0 where it does not say.
struct Clocks {
  double core_hz = 0;           // the highest
  double bytes_per_second = 0;  // of its memory
};
Clocks clocks(int id);

// Makes a device current for a block of host code.
class OnDevice {
 public:
  explicit OnDevice(int id);
  ~OnDevice();
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

 private:
  int before_ = 0;
};

// Enqueues a copy, unless the call is rehearsed; `from` may be changed as soon as this returns.
void copy_to_device(void* to, const void* from, std::int64_t bytes, Stream stream);

}  // namespace regard::cuda
