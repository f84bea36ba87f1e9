// What regard.explain asks of a call: which kernels it launches, with what memory, and nothing of it done.
//
// A rehearsal belongs to a thread. While there is one, launch() and copy_to_device() write into it instead of into a
// stream; all else (checks, choice of the kernel, allocation) is the call's own.
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

#include "cuda/runtime.h"

namespace regard::cuda {

// A kernel that is one of several for its operation: what docs/cuda.md calls it, its tile, and what multiplies in it.
struct Choice {
  const char* name = "";
  int queries = 0;
  int keys = 0;
  bool matrix_units = false;
};

struct Launch {
  const char* file;  // that launches it
  Choice choice;
  std::int64_t blocks;
  int threads;  // of a block
  int shared_bytes;
};

struct Rehearsal {
  std::vector<Launch> launches;
  std::int64_t scratch = 0;  // bytes
  Choice choice;             // of the next launch
};

// This thread's, or null.
inline Rehearsal*& rehearsal() {
  static thread_local Rehearsal* current = nullptr;
  return current;
}

// Says what the next launch is, to whoever asks.
inline void chosen(const Choice& choice) {
  if (Rehearsal* r = rehearsal()) r->choice = choice;
}

// A stream, and the file that launches something there.
struct LaunchPlace {
  LaunchPlace(Stream s, const char* f = __builtin_FILE()) : stream(s), file(f) {}
  Stream stream;
  const char* file;
};

// Whether the launch is only rehearsed.
inline bool rehearsed(const LaunchPlace& place, std::int64_t blocks, int threads, int shared_bytes) {
  Rehearsal* r = rehearsal();
  if (r == nullptr) return false;
  r->launches.push_back({place.file, std::exchange(r->choice, {}), blocks, threads, shared_bytes});
  return true;
}

}  // namespace regard::cuda
