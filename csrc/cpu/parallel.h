// Threads, scratch memory and interruption: all that kernels know of the machine they share.
#pragma once

#include <cstddef>
#include <cstdint>
#include <source_location>
#include <type_traits>
#include <utility>
#include <vector>

namespace regard::cpu {

// Called once before any kernel, by whoever loads them. No static initialiser does this: those would run compiled for
// this instruction set before anyone could ask whether the machine has it.
void initialise();

// How many threads a call may use; may exceed the cores. Results never depend on it.
void set_num_threads(int n);
int get_num_threads();

// `poll` answers whether the caller wants to stop (Ctrl-C). Only the calling thread asks, some times a second.
void set_interrupt_poll(bool (*poll)());

// Thrown out of parallel_for on the calling thread when poll() said stop.
struct Interrupted {};

// Inside an item: leaves the item when the call is being interrupted. Cheap enough for once a tile.
bool stop_requested();

// Waking a second thread costs about 5 us: below this many operations (some 20 us of work) it does not pay.
constexpr double kWorkWorthThreads = 1e6;

// Runs body(context, item) for items 0..items-1, each once, in order of claim, on up to get_num_threads() threads.
// `work` is a rough count of operations for the whole: small work stays on the calling thread.
// A forked child runs serially (the parent's threads do not exist there). The first exception is thrown again.
using Body = void (*)(void* context, std::int64_t item);

// What a rehearsal may do with the items: nothing, or start the first and the last one, if every item takes its Scratch
// before it writes anything.
enum class Rehearse : std::uint8_t { nothing, scratch };

struct Site {
  Rehearse rehearse;
  std::source_location at;
};

void parallel_for(std::int64_t items, double work, Body body, void* context, const Site& site);

template <class F>
void parallel_for(std::int64_t items, double work, Rehearse rehearse, F&& body, std::source_location at = std::source_location::current()) {
  const Body call = [](void* f, std::int64_t item) { (*static_cast<std::remove_reference_t<F>*>(f))(item); };
  parallel_for(items, work, call, const_cast<void*>(static_cast<const void*>(&body)), {rehearse, at});
}

template <class F> void parallel_for(std::int64_t items, double work, F&& body, std::source_location at = std::source_location::current()) {
  parallel_for(items, work, Rehearse::nothing, std::forward<F>(body), at);
}

// A rehearsal: from its start to its end, calls of this thread do all but their items, and tell what they would have done.
// It is the call itself, so it cuts the work and refuses arguments as the call does. Results are allocated and hold nothing.
struct RehearsedStage {
  const char* file;  // that calls parallel_for
  const char* item;  // that takes an item's Scratch, where one was started; else file
  std::int64_t items;
  int threads;  // that would share them
  double work;
  std::size_t scratch;  // bytes an item takes, at most
};
struct Rehearsal {
  std::vector<RehearsedStage> stages;
  std::size_t shared = 0;  // bytes that all items share
};
// For writing done outside of items.
bool rehearsing();
void start_rehearsal();
Rehearsal end_rehearsal();

// Tells a rehearsal of memory that all items share and that is no Scratch.
void note_memory(std::size_t bytes);

// This thread's scratch memory, kept between calls up to a few MiB. Contents are unspecified. Throws std::bad_alloc.
// One user at a time: a kernel takes all it needs in one piece through Scratch below.
class Scratch {
 public:
  // Adds room for n values of T, 64-byte aligned; returns its offset. Throws std::bad_alloc where the size overflows.
  template <class T> std::size_t reserve(std::int64_t n) { return reserve_bytes(n, sizeof(T)); }
  // Takes the memory; pointers stay valid until the next acquire() on this thread.
  void acquire(std::source_location at = std::source_location::current());
  template <class T> T* at(std::size_t offset) const { return reinterpret_cast<T*>(base_ + offset); }
  ~Scratch();
  Scratch() = default;
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

 private:
  std::size_t reserve_bytes(std::int64_t n, std::size_t size);
  char* base_ = nullptr;
  std::size_t bytes_ = 0;
};

}  // namespace regard::cpu
