#include "emulation.h"

#include <boost/context/detail/fcontext.hpp>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <memory>
#include <vector>

#include "../native/check.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#define REGARD_ASAN 1
#else
#define REGARD_ASAN 0
#endif

namespace regard::emulation {
namespace {

namespace context = boost::context::detail;

// A kernel's frames are small, but AddressSanitizer's red zones multiply them.
constexpr std::size_t kStack = 256 * 1024;

struct Copy {
  std::uint32_t to;
  std::vector<char> bytes;
};
using Group = std::vector<Copy>;

enum class State : std::uint8_t { ready, at_barrier, in_warp, waiting, done };

struct Lane {
  int index = 0;
  State state = State::ready;
  context::fcontext_t resume = nullptr;
  void* fake_stack = nullptr;  // AddressSanitizer's, while the lane rests
  void* payload = nullptr;
  Group open;                     // copies since the last close
  std::deque<Group> flying;       // closed groups that have not landed
  std::function<bool()> goes_on;  // what it waits for
  std::source_location where;
};

// What the lanes of a block or warp wait for.
struct Meeting {
  int present = 0;
  const char* operation = nullptr;
  std::source_location where;
};

bool same_place(const std::source_location& a, const std::source_location& b) {
  return a.line() == b.line() && a.column() == b.column() && std::strcmp(a.file_name(), b.file_name()) == 0;
}

std::string place(const std::source_location& w) { return std::string(w.file_name()) + ":" + std::to_string(w.line()); }

struct Stack {
  Stack() : memory(static_cast<char*>(std::malloc(kStack))) {}
  ~Stack() { std::free(memory); }
  Stack(const Stack&) = delete;
  Stack& operator=(const Stack&) = delete;
  char* memory;
};

struct Machine {
  std::vector<Lane> lanes;
  std::vector<Meeting> warps;
  std::vector<Meeting> warpgroups;
  Meeting barrier;
  std::deque<std::function<void()>> events;
  std::unique_ptr<BlockState> state;
  std::vector<std::unique_ptr<Stack>> stacks;
  std::unique_ptr<char, void (*)(void*)> shared{nullptr, std::free};
  int shared_bytes = 0;
  std::int64_t block = 0;
  std::int64_t blocks = 0;
  const std::function<void()>* kernel = nullptr;
  Lane* current = nullptr;
  std::string failure;
  test::Random random{settings().seed};
  std::uint64_t left_behind = 0;  // one bit a warp

  context::fcontext_t scheduler = nullptr;
  void* scheduler_fake_stack = nullptr;
  const void* scheduler_bottom = nullptr;
  std::size_t scheduler_size = 0;

  void run_block();
  void finish_block();
  void resume(Lane& lane);
  void happen();
  Meeting& meeting(int lane, int lanes) {
    return lanes == kWarp ? warps[static_cast<std::size_t>(lane / kWarp)] : warpgroups[static_cast<std::size_t>(lane / kWarpgroup)];
  }
  void rest();
  void disorder(std::vector<Lane*>& order);
  std::string waiting() const;
};

thread_local Machine* machine = nullptr;

void start_switch([[maybe_unused]] void** keep, [[maybe_unused]] const void* bottom, [[maybe_unused]] std::size_t size) {
#if REGARD_ASAN
  __sanitizer_start_switch_fiber(keep, bottom, size);
#endif
}
void finish_switch([[maybe_unused]] void* kept, [[maybe_unused]] const void** bottom, [[maybe_unused]] std::size_t* size) {
#if REGARD_ASAN
  __sanitizer_finish_switch_fiber(kept, bottom, size);
#endif
}

void enter(context::transfer_t from) {
  Machine& m = *static_cast<Machine*>(from.data);
  m.scheduler = from.fctx;
  finish_switch(nullptr, &m.scheduler_bottom, &m.scheduler_size);
  (*m.kernel)();
  Lane& lane = *m.current;
  await_copies(0);
  lane.state = State::done;
  if (m.barrier.present > 0) m.failure = "divergence: a lane has left while others wait at the barrier at " + place(m.barrier.where);
  for (const int lanes : {kWarp, kWarpgroup}) {
    const Meeting& others = m.meeting(lane.index, lanes);
    if (others.present > 0) m.failure = "divergence: a lane has left while its warp waits at " + place(others.where);
  }
  start_switch(nullptr, m.scheduler_bottom, m.scheduler_size);
  context::jump_fcontext(m.scheduler, nullptr);
}

void Machine::resume(Lane& lane) {
  current = &lane;
  start_switch(&scheduler_fake_stack, stacks[static_cast<std::size_t>(lane.index)]->memory, kStack);
  const context::transfer_t back = context::jump_fcontext(lane.resume, this);
  finish_switch(scheduler_fake_stack, nullptr, nullptr);
  lane.resume = back.fctx;
}

// The current lane stops; the scheduler goes on.
void Machine::rest() {
  Lane& lane = *current;
  start_switch(&lane.fake_stack, scheduler_bottom, scheduler_size);
  const context::transfer_t back = context::jump_fcontext(scheduler, nullptr);
  scheduler = back.fctx;
  finish_switch(lane.fake_stack, &scheduler_bottom, &scheduler_size);
}

std::string Machine::waiting() const {
  std::string all = "divergence: nobody can go on;";
  if (barrier.present > 0) all += " " + std::to_string(barrier.present) + " lanes wait at the barrier at " + place(barrier.where) + ";";
  for (std::size_t w = 0; w < warps.size(); ++w)
    if (warps[w].present > 0)
      all += " " + std::to_string(warps[w].present) + " lanes of warp " + std::to_string(w) + " wait at " + place(warps[w].where) + ";";
  for (std::size_t w = 0; w < warpgroups.size(); ++w)
    if (warpgroups[w].present > 0)
      all += " " + std::to_string(warpgroups[w].present) + " lanes of warpgroup " + std::to_string(w) + " wait at " +
             place(warpgroups[w].where) + ";";
  for (const Lane& lane : lanes)
    if (lane.state == State::waiting) all += " lane " + std::to_string(lane.index) + " waits at " + place(lane.where) + ";";
  return all;
}

// Shuffles the lanes, and leaves some warps behind for a while: those ahead then meet what others have not finished.
void Machine::disorder(std::vector<Lane*>& order) {
  if (random.bits() % 64 == 0) left_behind = random.bits();
  std::vector<Lane*> ahead;
  for (Lane* lane : order)
    if ((left_behind >> lane->index / kWarp & 1) == 0) ahead.push_back(lane);
  if (!ahead.empty()) order.swap(ahead);
  for (std::size_t i = order.size(); i > 1; --i) std::swap(order[i - 1], order[random.bits() % i]);
}

// One of the events that are due: the first, or in random order any.
void Machine::happen() {
  const std::size_t n = settings().random ? random.bits() % events.size() : 0;
  const std::function<void()> event = std::move(events[n]);
  events.erase(events.begin() + static_cast<std::ptrdiff_t>(n));
  event();
}

void Machine::finish_block() {
  const char* const left = state != nullptr ? state->left_behind() : nullptr;
  if (!events.empty())
    failure = "asynchronous work goes on though all lanes have left";
  else if (left != nullptr)
    failure = std::string("all lanes have left: ") + left;
}

void Machine::run_block() {
  if (shared_bytes > 0) {
    void* memory = nullptr;
    if (posix_memalign(&memory, 1024, static_cast<std::size_t>(shared_bytes)) != 0) throw std::bad_alloc();
    std::memset(memory, kPoison, static_cast<std::size_t>(shared_bytes));
    shared.reset(static_cast<char*>(memory));
  }
  barrier = {};
  for (Meeting& w : warps) w = {};
  for (Meeting& w : warpgroups) w = {};
  events.clear();
  state.reset();
  for (std::size_t i = 0; i < lanes.size(); ++i) {
    lanes[i] = {};
    lanes[i].index = static_cast<int>(i);
#if REGARD_ASAN
    __asan_unpoison_memory_region(stacks[i]->memory, kStack);  // frames of a lane that was abandoned by a failure
#endif
    lanes[i].resume = context::make_fcontext(stacks[i]->memory + kStack, kStack, enter);
  }
  std::vector<Lane*> order;
  while (failure.empty()) {
    order.clear();
    std::size_t done = 0;
    if (settings().random && !events.empty() && random.bits() % 8 == 0) happen();
    for (Lane& lane : lanes) {
      if (lane.state == State::waiting && lane.goes_on()) lane.state = State::ready;
      if (lane.state == State::ready) order.push_back(&lane);
      if (lane.state == State::done) ++done;
    }
    if (done == lanes.size()) return finish_block();
    if (order.empty() && !events.empty()) {
      happen();
      continue;
    }
    if (order.empty()) {
      failure = waiting();
      return;
    }
    if (settings().random) disorder(order);
    for (Lane* lane : order) {
      resume(*lane);
      if (!failure.empty()) return;
    }
  }
}

// Notes one more lane at a meeting; a lane that comes to another operation or place has diverged.
void arrive(Meeting& meeting, const char* operation, const std::source_location& where) {
  if (meeting.present > 0 && (std::strcmp(meeting.operation, operation) != 0 || !same_place(meeting.where, where)))
    fail("divergence: others wait elsewhere", where);
  meeting.operation = operation;
  meeting.where = where;
  ++meeting.present;
}

void land(const Group& group) {
  for (const Copy& c : group) std::memcpy(machine->shared.get() + c.to, c.bytes.data(), c.bytes.size());
}

}  // namespace

Settings& settings() {
  static Settings s;
  return s;
}
Counters& counters() {
  static Counters c;
  return c;
}

void run(std::int64_t blocks, int threads, int shared_bytes, const std::function<void()>& kernel) {
  if (blocks > 0x7fffffff || threads < 1 || threads > 1024 || threads % kWarp != 0 || shared_bytes > settings().shared_bytes)
    throw Failure("a launch that no GPU takes");
  Machine m;
  m.lanes.resize(static_cast<std::size_t>(threads));
  m.warps.resize(static_cast<std::size_t>(threads / kWarp));
  m.warpgroups.resize(static_cast<std::size_t>((threads + kWarpgroup - 1) / kWarpgroup));
  static thread_local std::vector<std::unique_ptr<Stack>> kept;
  m.stacks.swap(kept);
  while (m.stacks.size() < m.lanes.size()) m.stacks.push_back(std::make_unique<Stack>());
  m.shared_bytes = shared_bytes;
  m.blocks = blocks;
  m.kernel = &kernel;
  ++counters().launches;
  machine = &m;
  for (m.block = 0; m.block < blocks && m.failure.empty(); ++m.block) m.run_block();
  machine = nullptr;
  if (!m.failure.empty()) throw Failure(m.failure);
  kept.swap(m.stacks);
}

int thread_index() { return machine->current->index; }
int block_index() { return static_cast<int>(machine->block); }
int block_count() { return static_cast<int>(machine->blocks); }
int block_threads() { return static_cast<int>(machine->lanes.size()); }
char* shared_memory() { return machine->shared.get(); }
int shared_size() { return machine->shared_bytes; }

// The lane's frames are abandoned: nothing on them may own memory.
void fail(const char* what, std::source_location where) {
  machine->failure.assign(what).append(" at ").append(place(where));
  machine->failure.append(", block ")
      .append(std::to_string(machine->block))
      .append(", lane ")
      .append(std::to_string(machine->current->index));
  machine->rest();
  std::abort();  // a failed block is never resumed
}

void block_barrier(std::source_location where) {
  Machine& m = *machine;
  for (const Lane& lane : m.lanes)
    if (lane.state == State::done) fail("divergence: a barrier after a lane has left", where);
  arrive(m.barrier, "a barrier", where);
  if (m.barrier.present < static_cast<int>(m.lanes.size())) {
    m.current->state = State::at_barrier;
    m.rest();
    return;
  }
  m.barrier = {};
  for (Lane& lane : m.lanes) lane.state = State::ready;
}

void meet(const char* operation, void* payload, Together together, std::source_location where, int lanes) {
  Machine& m = *machine;
  Lane& self = *m.current;
  const int first = self.index / lanes * lanes;
  if (first + lanes > static_cast<int>(m.lanes.size())) fail("an operation of a warpgroup that is not whole", where);
  Meeting& meeting = m.meeting(self.index, lanes);
  for (int i = first; i < first + lanes; ++i)
    if (m.lanes[static_cast<std::size_t>(i)].state == State::done) fail("divergence: a warp operation after a lane has left", where);
  self.payload = payload;
  arrive(meeting, operation, where);
  if (meeting.present < lanes) {
    self.state = State::in_warp;
    m.rest();
    return;
  }
  void* payloads[kWarpgroup];
  for (int i = 0; i < lanes; ++i) payloads[i] = m.lanes[static_cast<std::size_t>(first + i)].payload;
  together(payloads);
  meeting = {};
  for (int i = first; i < first + lanes; ++i) m.lanes[static_cast<std::size_t>(i)].state = State::ready;
}

void wait_until(std::function<bool()> ready, std::source_location where) {
  if (ready()) return;
  Lane& lane = *machine->current;
  lane.goes_on = std::move(ready);
  lane.where = where;
  lane.state = State::waiting;
  machine->rest();
}

void later(std::function<void()> event) { machine->events.push_back(std::move(event)); }

std::unique_ptr<BlockState>& block_state() { return machine->state; }

void copy_async(std::uint32_t to, const void* from, int bytes, int size, std::source_location where) {
  Machine& m = *machine;
  if (to % static_cast<unsigned>(size) != 0 || (bytes > 0 && reinterpret_cast<std::uintptr_t>(from) % static_cast<unsigned>(size) != 0))
    fail("a misaligned asynchronous copy", where);
  if (static_cast<int>(to) + size > m.shared_bytes) fail("an asynchronous copy beyond shared memory", where);
  Copy copy{to, std::vector<char>(static_cast<std::size_t>(size), 0)};
  if (bytes > 0) std::memcpy(copy.bytes.data(), from, static_cast<std::size_t>(bytes));
  std::memset(m.shared.get() + to, kPoison, static_cast<std::size_t>(size));
  m.current->open.push_back(std::move(copy));
}

void close_copies() {
  Lane& lane = *machine->current;
  lane.flying.push_back(std::move(lane.open));
  lane.open.clear();
}

void await_copies(int groups) {
  Lane& lane = *machine->current;
  while (static_cast<int>(lane.flying.size()) > groups) {
    land(lane.flying.front());
    lane.flying.pop_front();
  }
}

}  // namespace regard::emulation
