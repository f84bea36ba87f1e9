// Runs CUDA kernels on the CPU, one block after the other, each lane a fiber.
//
// A lane runs until it comes to a barrier or a warp operation; there it rests until the others have come. Results are
// those of a GPU if the kernel is right; what is wrong shows:
//   - shared memory starts poisoned, has its exact size on the heap (AddressSanitizer sees a stray access), and
//     asynchronous copies land only where their lane waits for them: until then their target is poisoned too; what runs
//     beside the lanes (bulk copies) lands when none of them can go on;
//   - lanes that come to different barriers or warp operations, or leave while others wait, are reported as divergence;
//   - with Settings::random lanes run in random order: a missing barrier changes the result.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <source_location>
#include <stdexcept>
#include <string>

namespace regard::emulation {

constexpr int kWarp = 32;
constexpr int kWarpgroup = 128;

// The byte of poison: a number like others in every float type (3, 2.1 in float16). Kernels mend rows that come out
// non-finite by their plain path: NaN would hide a mistake, and so did numbers whose products overflow an exponential.
constexpr int kPoison = 0x40;

class Failure : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

struct Settings {
  bool random = false;
  std::uint64_t seed = 0;
  int shared_bytes = 232448;  // the most that a block may have: an H100's
};
Settings& settings();

struct Counters {
  std::int64_t launches = 0;
  std::int64_t products = 0;        // mma, counted once a warp
  std::int64_t matrix_loads = 0;    // ldmatrix, likewise
  std::int64_t group_products = 0;  // wgmma, once a warpgroup
  std::int64_t boxes = 0;           // bulk copies
  std::int64_t bank_conflicts = 0;  // 8 x 8 matrices whose rows do not lie in eight different bank groups
};
Counters& counters();

// Runs `kernel` for every lane of every block; throws Failure.
void run(std::int64_t blocks, int threads, int shared_bytes, const std::function<void()>& kernel);

// ---- For the lane that runs now ------------------------------------------------------------------------------------

int thread_index();
int block_index();
int block_count();
int block_threads();
char* shared_memory();
int shared_size();

[[noreturn]] void fail(const char* what, std::source_location where);

void block_barrier(std::source_location where);

// All lanes of the warp, or of the warpgroup, meet; the last to come calls together(payloads in the order of lanes) for all.
using Together = void (*)(void* const* payloads);
void meet(const char* operation, void* payload, Together together, std::source_location where, int lanes = kWarp);

// The lane rests until `ready` holds.
void wait_until(std::function<bool()> ready, std::source_location where);

// Something that happens beside the lanes: later, at the latest when none of them can go on; in random order at any time,
// and before or after others.
void later(std::function<void()> event);

// What models of instructions keep of a block. It is made anew for each.
class BlockState {
 public:
  virtual ~BlockState() = default;
  virtual const char* left_behind() const = 0;  // what is unfinished though all lanes have left; null: nothing
};
std::unique_ptr<BlockState>& block_state();

// One asynchronous copy: `bytes` read now, the rest of `size` zeros; written at the wait. `to` counts from shared memory's start.
void copy_async(std::uint32_t to, const void* from, int bytes, int size, std::source_location where);
void close_copies();
void await_copies(int groups);

}  // namespace regard::emulation
