// The functions of cuda/device.cuh, on the emulator.
#pragma once

#include <cstdint>
#include <source_location>

#include "cuda/rehearsal.h"
#include "emulation.h"

#define REGARD_KERNEL(threads, blocks) inline void
#define REGARD_DEVICE inline
#define REGARD_GRID_CONSTANT
#define REGARD_DEVICE_CALL inline

namespace regard::cuda {

using emulation::kWarp;
using Where = std::source_location;

inline int thread_index() { return emulation::thread_index(); }
inline int block_index() { return emulation::block_index(); }
inline int block_count() { return emulation::block_count(); }
inline char* dynamic_shared() { return emulation::shared_memory(); }

inline void block_barrier(Where where = Where::current()) { emulation::block_barrier(where); }
inline void warp_barrier(Where where = Where::current()) {
  emulation::meet("a warp's barrier", nullptr, [](void* const*) {}, where);
}

namespace model {
template <class T> struct Exchange {
  T given;
  int from;
  T got;
};
template <class T> T exchange(const char* operation, T x, int from, Where where) {
  if (from < 0 || from >= kWarp) emulation::fail("a shuffle from no lane", where);
  Exchange<T> e{x, from, x};
  emulation::meet(
      operation, &e,
      [](void* const* all) {
        for (int i = 0; i < kWarp; ++i) {
          auto* e = static_cast<Exchange<T>*>(all[i]);
          e->got = static_cast<Exchange<T>*>(all[e->from])->given;
        }
      },
      where);
  return e.got;
}
}  // namespace model

template <class T> T shuffle_xor(T x, int lanes, Where where = Where::current()) {
  return model::exchange("shuffle_xor", x, (thread_index() % kWarp) ^ lanes, where);
}
template <class T> T shuffle(T x, int from, Where where = Where::current()) { return model::exchange("shuffle", x, from, where); }
inline bool any_lane(bool x, Where where = Where::current()) {
  emulation::meet(
      "any_lane", &x,
      [](void* const* all) {
        bool any = false;
        for (int i = 0; i < kWarp; ++i) any |= *static_cast<bool*>(all[i]);
        for (int i = 0; i < kWarp; ++i) *static_cast<bool*>(all[i]) = any;
      },
      where);
  return x;
}

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), std::int64_t blocks, int threads, int shared_bytes, LaunchPlace place, Arguments... arguments) {
  if (blocks > 0 && !rehearsed(place, blocks, threads, shared_bytes))
    emulation::run(blocks, threads, shared_bytes, [&] { kernel(arguments...); });
}

}  // namespace regard::cuda
