// The functions of cuda/ptx_hopper.cuh, as the PTX ISA documents the instructions behind them.
//
// What runs beside the lanes shows what did not wait for it: the target of a bulk copy is poisoned until it lands, the sums
// of a product until it is awaited; a product's operands, in shared memory and in registers, must be the same when it is
// issued and when it is awaited, since it may read them at any time between.
#pragma once

#include <array>
#include <cstdint>
#include <cstring>
#include <map>
#include <memory>
#include <vector>

#include "ptx_model.h"

namespace regard::cuda {
namespace model {

struct PhaseBarrier {
  int arrivals = 0;  // a phase
  int pending = 0;
  std::int64_t bytes = 0;
  int phases = 0;  // that are over
  bool published = false;

  void settle() {
    if (pending > 0 || bytes != 0) return;
    ++phases;
    pending = arrivals;
  }
};

struct NamedBarrier {
  int threads = 0;
  int present = 0;
  int rounds = 0;
};

// 16-bit elements that a product reads from shared memory: so many rows of panels, so many elements of each.
struct Operand {
  std::uint64_t descriptor;
  int rows;
  int columns;
  std::vector<std::uint16_t> seen;
};

// What one lane has of a product that runs.
struct Running {
  float* sums;
  std::vector<float> result;
  const std::uint32_t* left;  // in registers, or null
  std::array<std::uint32_t, 4> left_seen;
  std::shared_ptr<const std::vector<Operand>> operands;
  int group;
};

struct LaneState {
  std::vector<Running> running;
  int group = 0;        // the one that is open
  bool fenced = false;  // since the last group was closed or awaited
  int registers = 0;
};

class Hopper : public emulation::BlockState {
 public:
  std::map<SharedAddress, PhaseBarrier> barriers;
  std::array<NamedBarrier, 16> named;
  std::vector<LaneState> lanes{static_cast<std::size_t>(emulation::block_threads())};
  int free_registers = 0;

  const char* left_behind() const override {
    for (const auto& [at, b] : barriers)
      if (b.bytes != 0) return "a barrier expects bytes";
    for (const NamedBarrier& b : named)
      if (b.present > 0) return "lanes have arrived at a named barrier that nobody passes";
    for (const LaneState& lane : lanes)
      if (!lane.running.empty()) return "a product was not awaited";
    return nullptr;
  }
  LaneState& lane() { return lanes[static_cast<std::size_t>(thread_index())]; }
};

inline Hopper& hopper() {
  auto& state = emulation::block_state();
  if (state == nullptr) state = std::make_unique<Hopper>();
  return static_cast<Hopper&>(*state);
}

inline PhaseBarrier& barrier_at(SharedAddress at, Where where) {
  auto& all = hopper().barriers;
  const auto found = all.find(at);
  if (found == all.end()) emulation::fail("a barrier that was not started", where);
  return found->second;
}

// What runtime_model.cpp puts into a TensorMap.
struct MapContent {
  const char* data;
  std::int64_t shape[4];   // columns first
  std::int64_t stride[4];  // bytes
  std::int64_t rows;       // a box
};
static_assert(sizeof(MapContent) <= sizeof(TensorMap));

// The swizzle of 128 bytes, of an address whose pattern starts at a multiple of 1024.
inline SharedAddress swizzled(SharedAddress at) { return at ^ (at >> 7 & 7) << 4; }

// Where the element of a panelled matrix lies: `across` counts along rows of 128 bytes, `down` from row to row.
inline SharedAddress element_at(std::uint64_t descriptor, int down, int across) {
  const auto start = static_cast<SharedAddress>((descriptor & 0x3fff) << 4);
  const auto panel = static_cast<SharedAddress>((descriptor >> 16 & 0x3fff) << 4);
  const auto eight = static_cast<SharedAddress>((descriptor >> 32 & 0x3fff) << 4);
  const auto d = static_cast<SharedAddress>(down);
  const auto a = static_cast<SharedAddress>(across);
  return swizzled(start + a / 64 * panel + a % 64 / 8 * 16 + d / 8 * eight + d % 8 * 128) + a % 8 * 2;
}

inline void check_operand(std::uint64_t descriptor, int down, int across, Where where) {
  if (descriptor >> 62 != 1 || (descriptor >> 49 & 7) != 0) emulation::fail("a descriptor of a swizzle that is not modelled", where);
  for (int d = 0; d < down; ++d)
    for (int a = 0; a < across; a += 8)
      if (static_cast<int>(element_at(descriptor, d, a)) + 16 > emulation::shared_size())
        emulation::fail("an operand beyond shared memory", where);
}

// [down][across] elements; chunks of eight lie together.
inline void gather(std::uint64_t descriptor, int down, int across, std::uint16_t* to) {
  for (int d = 0; d < down; ++d)
    for (int a = 0; a < across; a += 8) std::memcpy(to + d * across + a, emulation::shared_memory() + element_at(descriptor, d, a), 16);
}

inline Operand operand_of(std::uint64_t descriptor, int down, int across) {
  Operand x{descriptor, down, across, std::vector<std::uint16_t>(static_cast<std::size_t>(down * across))};
  gather(descriptor, down, across, x.seen.data());
  return x;
}

inline bool is_unchanged(const Operand& x) {
  static thread_local std::vector<std::uint16_t> now;
  now.resize(x.seen.size());
  gather(x.descriptor, x.rows, x.columns, now.data());
  return now == x.seen;
}

struct GroupProduct {
  float* sums;
  const std::uint32_t* left;  // null: from shared memory
  std::uint64_t a;
  std::uint64_t b;
  bool add;
  LaneState* lane;
};

// Sums of lane t, kTiles x 4 of them: row 16 (t / 32) + l / 4 (+ 8 in the upper two), columns 8 n + 2 (l % 4) and the next,
// with l = t % 32. A left operand in registers lies as that of mma.m16n8k16, a warp's 16 rows each.
template <class T, int kTiles, bool kRows> void group_product(void* const* all) {
  constexpr int kColumns = kTiles * 8;
  ++emulation::counters().group_products;
  const auto& first = *static_cast<GroupProduct*>(all[0]);
  auto operands = std::make_shared<std::vector<Operand>>();
  static thread_local float a[64][16];
  static thread_local float b[16][kColumns];
  static thread_local float c[64][kColumns];
  const auto value = [](std::uint16_t bits) { return to_float(T{bits}); };

  operands->push_back(kRows ? operand_of(first.b, 16, kColumns) : operand_of(first.b, kColumns, 16));
  const std::vector<std::uint16_t>& right = operands->back().seen;
  for (int k = 0; k < 16; ++k)
    for (int n = 0; n < kColumns; ++n) b[k][n] = value(right[static_cast<std::size_t>(kRows ? k * kColumns + n : n * 16 + k)]);
  if (first.left == nullptr) {
    operands->push_back(operand_of(first.a, 64, 16));
    for (int i = 0; i < 64 * 16; ++i) a[i / 16][i % 16] = value(operands->back().seen[static_cast<std::size_t>(i)]);
  }

  const auto row_of = [](int t, int i) { return t / kWarp * 16 + t % kWarp / 4 + i / 2 * 8; };
  for (int t = 0; t < kWarpgroup; ++t) {
    const auto& p = *static_cast<GroupProduct*>(all[t]);
    if (p.left != nullptr)
      for (int part = 0; part < 4; ++part)
        for (int half = 0; half < 2; ++half) a[row_of(t, part % 2 * 2)][t % 4 * 2 + half + part / 2 * 8] = half_of<T>(p.left[part], half);
    const float* from = p.sums;
    for (const Running& r : p.lane->running)
      if (r.sums == p.sums) from = r.result.data();  // a product of the same sums before it
    for (int n = 0; n < kTiles; ++n)
      for (int i = 0; i < 4; ++i) c[row_of(t, i)][n * 8 + t % 4 * 2 + i % 2] = p.add ? from[n * 4 + i] : 0.0f;
  }
  for (int row = 0; row < 64; ++row)
    for (int k = 0; k < 16; ++k)
      for (int n = 0; n < kColumns; ++n) c[row][n] += a[row][k] * b[k][n];

  for (int t = 0; t < kWarpgroup; ++t) {
    const auto& p = *static_cast<GroupProduct*>(all[t]);
    Running r{p.sums, std::vector<float>(kTiles * 4), p.left, {}, operands, p.lane->group};
    for (int n = 0; n < kTiles; ++n)
      for (int i = 0; i < 4; ++i) r.result[static_cast<std::size_t>(n * 4 + i)] = c[row_of(t, i)][n * 8 + t % 4 * 2 + i % 2];
    if (p.left != nullptr) std::memcpy(r.left_seen.data(), p.left, sizeof(r.left_seen));
    std::memset(p.sums, emulation::kPoison, kTiles * 4 * sizeof(float));
    p.lane->running.push_back(std::move(r));
  }
}

template <class T, int kTiles, bool kRows>
void issue(float (&c)[kTiles][4], const std::uint32_t* left, std::uint64_t a, std::uint64_t b, bool add, Where where) {
  LaneState& lane = hopper().lane();
  // Sums that a product of the same shape has in hand need none.
  bool in_hand = false;
  for (const Running& r : lane.running) in_hand |= r.sums == &c[0][0] && r.result.size() == kTiles * 4;
  if (!lane.fenced && !in_hand) emulation::fail("a product without a fence before it", where);
  if (thread_index() % kWarpgroup == 0) {
    check_operand(b, kRows ? 16 : kTiles * 8, kRows ? kTiles * 8 : 16, where);
    if (left == nullptr) check_operand(a, 64, 16, where);
  }
  GroupProduct p{&c[0][0], left, a, b, add, &lane};
  emulation::meet("wgmma", &p, group_product<T, kTiles, kRows>, where, kWarpgroup);
}

// The lane's products of all but the latest `groups` closed groups are done.
inline void await_group_products(int groups, Where where) {
  LaneState& lane = hopper().lane();
  const int end = lane.group - groups;
  for (const Running& r : lane.running) {
    if (r.group >= end) continue;
    if (r.left != nullptr && std::memcmp(r.left, r.left_seen.data(), sizeof(r.left_seen)) != 0)
      emulation::fail("a product's left operand has changed while it ran", where);
    for (std::size_t i = 0; i < r.result.size(); ++i)
      if (bits_of(r.sums[i]) != emulation::kPoison * 0x01010101u) emulation::fail("a product's sums were written while it ran", where);
    if (thread_index() % kWarp == 0)
      for (const Operand& x : *r.operands)
        if (!is_unchanged(x)) emulation::fail("a product's operand in shared memory has changed while it ran", where);
  }
  for (const Running& r : lane.running) {
    if (r.group >= end) continue;
    bool later = false;
    for (const Running& other : lane.running) later |= other.sums == r.sums && other.group >= end;
    if (later) continue;
    for (const Running& last : lane.running)  // of those that add to the same sums the last has them all
      if (last.sums == r.sums) std::memcpy(r.sums, last.result.data(), last.result.size() * sizeof(float));
  }
  std::erase_if(lane.running, [&](const Running& r) { return r.group < end; });
  lane.fenced = false;
}

inline void meet_named(int id, int threads, bool waits, Where where) {
  if (id < 1 || id > 15 || threads % kWarp != 0) emulation::fail("a named barrier that there is not", where);
  NamedBarrier& b = hopper().named[static_cast<std::size_t>(id)];
  if (b.present > 0 && b.threads != threads) emulation::fail("a named barrier of two sizes", where);
  b.threads = threads;
  const int round = b.rounds;
  if (++b.present == threads) {
    b.present = 0;
    ++b.rounds;
  }
  if (waits) emulation::wait_until([&b, round] { return b.rounds != round; }, where);
}

// Of a block that has an SM's registers for itself.
inline int& registers_of_lane() {
  int& n = hopper().lane().registers;
  if (n == 0) n = 65536 / emulation::block_threads() / 8 * 8;
  return n;
}

}  // namespace model

inline void start_barrier(SharedAddress barrier, int arrivals, Where where = Where::current()) {
  if (barrier % 8 != 0 || static_cast<int>(barrier) + 8 > emulation::shared_size()) emulation::fail("a barrier at no place for one", where);
  model::hopper().barriers[barrier] = {arrivals, arrivals};
}
// A barrier is started as lanes write shared memory; bulk copies go another way to it and see it after a fence.
inline void publish_barriers() {
  for (auto& [at, b] : model::hopper().barriers) b.published = true;
}

inline void arrive(SharedAddress barrier, Where where = Where::current()) {
  model::PhaseBarrier& b = model::barrier_at(barrier, where);
  if (b.pending == 0) emulation::fail("one arrival too many in a phase", where);
  --b.pending;
  b.settle();
}
inline void arrive_expecting(SharedAddress barrier, int bytes, Where where = Where::current()) {
  model::PhaseBarrier& b = model::barrier_at(barrier, where);
  if (b.pending == 0) emulation::fail("one arrival too many in a phase", where);
  b.bytes += bytes;
  --b.pending;
  b.settle();
}
inline void await_phase(SharedAddress barrier, int parity, Where where = Where::current()) {
  const model::PhaseBarrier& b = model::barrier_at(barrier, where);
  if (parity != 0 && parity != 1) emulation::fail("a parity that is none", where);
  emulation::wait_until([&b, parity] { return (b.phases & 1) != parity; }, where);
}

inline void copy_box(SharedAddress to, const TensorMap& map, int column, int row, int head, int batch, SharedAddress barrier,
                     Where where = Where::current()) {
  model::MapContent m;
  std::memcpy(&m, &map, sizeof(m));
  constexpr int kRowBytes = kPanelColumns * 2;
  const auto size = static_cast<std::size_t>(m.rows) * kRowBytes;
  if (to % 1024 != 0) emulation::fail("a box that does not start where its swizzle does", where);
  if (to + size > static_cast<std::size_t>(emulation::shared_size())) emulation::fail("a box beyond shared memory", where);
  model::PhaseBarrier& b = model::barrier_at(barrier, where);
  if (!b.published) emulation::fail("a copy to a barrier that was not published", where);
  ++emulation::counters().boxes;
  std::memset(emulation::shared_memory() + to, emulation::kPoison, size);
  emulation::later([=, &b] {
    for (int r = 0; r < m.rows; ++r) {
      char line[kRowBytes] = {};
      const std::int64_t at[3] = {row + r, head, batch};
      bool inside = column >= 0 && column < m.shape[0];
      const char* from = m.data + column * 2;
      for (int axis = 1; axis < 4; ++axis) {
        inside = inside && at[axis - 1] >= 0 && at[axis - 1] < m.shape[axis];
        from += at[axis - 1] * m.stride[axis];
      }
      if (inside) std::memcpy(line, from, static_cast<std::size_t>(std::min<std::int64_t>(kPanelColumns, m.shape[0] - column)) * 2);
      for (int chunk = 0; chunk < kRowBytes; chunk += 16)
        std::memcpy(emulation::shared_memory() + model::swizzled(to + static_cast<SharedAddress>(r * kRowBytes + chunk)), line + chunk, 16);
    }
    b.bytes -= static_cast<std::int64_t>(size);
    b.settle();
  });
}

inline void named_barrier(int id, int threads, Where where = Where::current()) { model::meet_named(id, threads, true, where); }
inline void arrive_named(int id, int threads, Where where = Where::current()) { model::meet_named(id, threads, false, where); }

template <int kRegisters> void give_up_registers(Where where = Where::current()) {
  static_assert(kRegisters >= 24 && kRegisters <= 256 && kRegisters % 8 == 0);
  int& mine = model::registers_of_lane();
  if (mine < kRegisters) emulation::fail("registers given up that the lane does not have", where);
  model::hopper().free_registers += mine - kRegisters;
  mine = kRegisters;
}
template <int kRegisters> void take_registers(Where where = Where::current()) {
  static_assert(kRegisters >= 24 && kRegisters <= 256 && kRegisters % 8 == 0);
  int& mine = model::registers_of_lane();
  const int more = kRegisters - mine;
  if (more < 0) emulation::fail("registers taken that the lane has already", where);
  int& free = model::hopper().free_registers;
  while (free < more) emulation::wait_until([&free, more] { return free >= more; }, where);
  free -= more;
  mine = kRegisters;
}

template <int kTiles> void pin(float (&)[kTiles][4]) {}
template <int kSteps> void pin(std::uint32_t (&)[kSteps][4]) {}

inline void finish_before_waiting(float) {}

inline void open_products() { model::hopper().lane().fenced = true; }
inline void close_products() {
  ++model::hopper().lane().group;
  model::hopper().lane().fenced = false;
}
template <int kGroups> void await_products(Where where = Where::current()) { model::await_group_products(kGroups, where); }

template <class T, bool kAdd, int kTiles>
void multiply_panels(float (&c)[kTiles][4], std::uint64_t a, std::uint64_t b, Where where = Where::current()) {
  model::issue<T, kTiles, false>(c, nullptr, a, b, kAdd, where);
}
template <class T, int kTiles>
void multiply_rows(float (&c)[kTiles][4], const std::uint32_t (&a)[4], std::uint64_t b, Where where = Where::current()) {
  model::issue<T, kTiles, true>(c, a, 0, b, true, where);
}

}  // namespace regard::cuda
