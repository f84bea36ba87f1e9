#include "cpu/parallel.h"

#include <omp.h>
#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdlib>
#include <exception>
#include <memory>
#include <mutex>
#include <new>
#include <utility>

namespace regard::cpu {
namespace {

using Clock = std::chrono::steady_clock;

// A Ctrl-C is seen within this time, well under the 0.2 s that the contract allows, at no measurable cost.
constexpr auto kPollInterval = std::chrono::milliseconds(20);

// Scratch kept by a thread between calls. Fresh pages cost 0.25 us each: 300 KiB would cost a short call 20 us.
constexpr std::size_t kKeptBytes = std::size_t{8} << 20;

std::atomic<int> num_threads{0};
std::atomic<bool (*)()> interrupt_poll{nullptr};
std::atomic<bool> in_forked_child{false};

// What the items of one parallel_for share.
struct Call {
  std::atomic<std::int64_t> next{0};
  std::atomic<bool> stop{false};
  std::atomic<bool> failed{false};
  std::exception_ptr failure;
  bool interrupted = false;
};

// Leaves the item that a rehearsal has started.
struct Rehearsed {};

// Of this thread; null where calls are meant.
thread_local Rehearsal* rehearsal = nullptr;
thread_local RehearsedStage* rehearsed_stage = nullptr;

thread_local Call* current_call = nullptr;
thread_local bool is_calling_thread = false;
// Kept from call to call: an operation of many short ones is interrupted like one long one.
thread_local Clock::time_point next_poll;

void run_items(Call& call, std::int64_t items, Body body, void* context, bool calling) {
  Call* const outer_call = current_call;
  const bool outer_calling = is_calling_thread;
  current_call = &call;
  is_calling_thread = calling;
  try {
    std::int64_t item = call.next.fetch_add(1, std::memory_order_relaxed);
    // The calling thread asks even where the others have left it nothing: of many short calls it may get no item for seconds.
    if (item >= items) stop_requested();
    for (; item < items && !stop_requested(); item = call.next.fetch_add(1, std::memory_order_relaxed)) body(context, item);
  } catch (...) {
    if (!call.failed.exchange(true)) call.failure = std::current_exception();
    call.stop = true;
  }
  current_call = outer_call;
  is_calling_thread = outer_calling;
}

struct KeptMemory {
  char* base = nullptr;
  std::size_t bytes = 0;
  bool taken = false;
  ~KeptMemory() { std::free(base); }
};
thread_local KeptMemory kept;

void rehearse(RehearsedStage stage, Body body, void* context, Rehearse how) {
  // The first and the last item: where one of them is a shorter rest, the other one is whole.
  for (const std::int64_t item : {std::int64_t{0}, stage.items - 1}) {
    if (how == Rehearse::nothing || stage.items == 0) break;
    const struct Scope {  // also where the item throws something else
      explicit Scope(RehearsedStage* s) { rehearsed_stage = s; }
      ~Scope() { rehearsed_stage = nullptr; }
    } scope(&stage);
    try {
      body(context, item);
    } catch (const Rehearsed&) {
    }
  }
  rehearsal->stages.push_back(stage);
}

char* allocate(std::size_t bytes) {
  void* p = nullptr;
  if (posix_memalign(&p, 64, std::max<std::size_t>(bytes, 64)) != 0) throw std::bad_alloc();
  return static_cast<char*>(p);
}

}  // namespace

void initialise() {
  // OpenMP's threads do not survive a fork, and waiting for them would hang: remember that we are a child.
  static std::once_flag once;
  std::call_once(once, [] { pthread_atfork(nullptr, nullptr, [] { in_forked_child = true; }); });
}

void set_num_threads(int n) { num_threads = n; }

int get_num_threads() {
  if (num_threads == 0) num_threads = std::max(1, std::min(omp_get_max_threads(), omp_get_num_procs()));
  return num_threads;
}

void set_interrupt_poll(bool (*poll)()) { interrupt_poll = poll; }

bool stop_requested() {
  Call* const call = current_call;
  if (call == nullptr) return false;
  if (call->stop.load(std::memory_order_relaxed)) return true;
  if (!is_calling_thread) return false;
  const auto now = Clock::now();
  if (now < next_poll) return false;
  next_poll = now + kPollInterval;
  const auto poll = interrupt_poll.load();
  if (poll == nullptr || !poll()) return false;
  call->interrupted = true;
  call->stop = true;
  return true;
}

void parallel_for(std::int64_t items, double work, Body body, void* context, const Site& site) {
  const std::int64_t useful = work < kWorkWorthThreads || in_forked_child || current_call != nullptr ? 1 : items;
  const int threads = static_cast<int>(std::min<std::int64_t>(get_num_threads(), useful));
  if (rehearsal != nullptr)
    return rehearse({site.at.file_name(), site.at.file_name(), items, threads, work, 0}, body, context, site.rehearse);
  Call call;
  if (threads <= 1) {
    run_items(call, items, body, context, true);
  } else {
#pragma omp parallel num_threads(threads)
    run_items(call, items, body, context, omp_get_thread_num() == 0);
  }
  if (call.failure) std::rethrow_exception(call.failure);
  if (call.interrupted) throw Interrupted{};
}

void note_memory(std::size_t bytes) {
  if (rehearsal != nullptr) rehearsal->shared += bytes;
}

bool rehearsing() { return rehearsal != nullptr; }

void start_rehearsal() {
  delete rehearsal;
  rehearsal = new Rehearsal;
}

Rehearsal end_rehearsal() {
  const std::unique_ptr<Rehearsal> ended(rehearsal);
  rehearsal = nullptr;
  return ended ? std::move(*ended) : Rehearsal{};
}

std::size_t Scratch::reserve_bytes(std::int64_t n, std::size_t size) {
  const std::size_t offset = bytes_;
  std::size_t more = 0;
  if (n < 0 || __builtin_mul_overflow(static_cast<std::size_t>(n), size, &more) || more > (std::size_t{1} << 46)) throw std::bad_alloc();
  bytes_ += (more + 63) / 64 * 64;
  return offset;
}

void Scratch::acquire(std::source_location at) {
  if (rehearsed_stage != nullptr) {
    rehearsed_stage->item = at.file_name();
    rehearsed_stage->scratch = std::max(rehearsed_stage->scratch, bytes_);
    throw Rehearsed{};
  }
  note_memory(bytes_);
  if (bytes_ == 0) return;
  if (bytes_ > kKeptBytes || kept.taken) {
    base_ = allocate(bytes_);
    return;
  }
  if (kept.bytes < bytes_) {
    std::free(kept.base);
    kept.base = nullptr;
    kept.bytes = 0;
    kept.base = allocate(bytes_);
    kept.bytes = bytes_;
  }
  kept.taken = true;
  base_ = kept.base;
}

Scratch::~Scratch() {
  if (base_ == nullptr) return;
  if (base_ == kept.base)
    kept.taken = false;
  else
    std::free(base_);
}

}  // namespace regard::cpu
