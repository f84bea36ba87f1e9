// The functions of cuda/runtime.h where kernels run on the emulator: one device, in order, in this process's memory.

#include <cstring>

#include "cuda/ptx_hopper.cuh"
#include "cuda/rehearsal.h"
#include "cuda/runtime.h"
#include "runtime_model.h"

namespace regard::cuda {
namespace model {
Device& device() {
  static Device d{90, 232448, 2};
  return d;
}
Clocks& clocks() {
  static Clocks c;
  return c;
}
}  // namespace model

// What the driver documents to refuse is refused here, and rows that overlap, which its formula for strides leaves out: no
// kernel's own rule (has_tensor_map) is asked.
TensorMap tensor_map_of(const Array& x, int rows) {
  constexpr std::int64_t kChunk = 16;
  bool valid = x.rank == 4 && size_of(x.dtype) == 2 && rows >= 1 && rows <= 256;
  valid = valid && x.data != nullptr && reinterpret_cast<std::intptr_t>(x.data) % kChunk == 0;
  const MapShape told(x);
  for (int axis = 0; axis < 4; ++axis) valid = valid && told.length[axis] >= 1 && told.length[axis] <= std::uint64_t{1} << 32;
  for (const std::uint64_t stride : told.stride) valid = valid && stride % kChunk == 0 && stride < std::uint64_t{1} << 40;
  valid = valid && told.stride[0] >= told.length[0] * 2;
  if (!valid || (x.shape[3] > 1 && x.stride[3] != 2)) throw Error("CUDA: the driver refuses a tensor map");
  model::MapContent m{x.data, {x.shape[3], x.shape[2], x.shape[1], x.shape[0]}, {2, x.stride[2], x.stride[1], x.stride[0]}, rows};
  for (int axis = 1; axis < 4; ++axis)
    if (m.shape[axis] == 1) m.stride[axis] = 0;
  TensorMap map{};
  std::memcpy(&map, &m, sizeof(m));
  return map;
}

void check(int) {}
const char* why_not() { return nullptr; }
Device device(int) { return model::device(); }
Clocks clocks(int) { return model::clocks(); }
OnDevice::OnDevice(int) {}
OnDevice::~OnDevice() = default;
void copy_to_device(void* to, const void* from, std::int64_t bytes, Stream) {
  if (rehearsal() == nullptr) std::memcpy(to, from, static_cast<std::size_t>(bytes));
}

}  // namespace regard::cuda
