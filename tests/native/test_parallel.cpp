// Threads, scratch memory, failures and interruption.

#include "cpu/parallel.h"

#include <atomic>
#include <cstring>
#include <memory>
#include <new>
#include <stdexcept>
#include <thread>

#include "check.h"

namespace regard::test {
namespace {

using namespace cpu;

constexpr double kMuchWork = 1e12;

void test_each_item_once() {
  for (const int threads : {1, 2, 3, 16})
    for (const std::int64_t items : {0, 1, 2, 15, 16, 17, 1000})
      for (const double work : {0.0, kMuchWork}) {
        set_num_threads(threads);
        CHECK(get_num_threads() == threads);
        const std::unique_ptr<std::atomic<int>[]> counts(new std::atomic<int>[static_cast<std::size_t>(items + 1)] {});
        parallel_for(items, work, [&](std::int64_t i) { ++counts[static_cast<std::size_t>(i)]; });
        bool once = true;
        for (std::int64_t i = 0; i < items; ++i) once = once && counts[static_cast<std::size_t>(i)] == 1;
        CHECK(once && counts[static_cast<std::size_t>(items)] == 0);
      }
}

void test_nested_and_concurrent() {
  set_num_threads(4);
  std::atomic<int> inner{0};
  parallel_for(6, kMuchWork, [&](std::int64_t) { parallel_for(5, kMuchWork, [&](std::int64_t) { ++inner; }); });
  CHECK(inner == 30);
  std::atomic<int> total{0};
  const auto call = [&] {
    for (int k = 0; k < 20; ++k) parallel_for(9, kMuchWork, [&](std::int64_t) { ++total; });
  };
  std::thread other(call);
  call();
  other.join();
  CHECK(total == 360);
}

void test_exceptions() {
  for (const int threads : {1, 4}) {
    set_num_threads(threads);
    bool caught = false;
    try {
      parallel_for(1000, kMuchWork, [&](std::int64_t i) {
        if (i == 37) throw std::runtime_error("thirty-seven");
      });
    } catch (const std::runtime_error& e) {
      caught = std::strcmp(e.what(), "thirty-seven") == 0;
    }
    CHECK(caught);
    // The next call starts afresh.
    std::atomic<int> count{0};
    parallel_for(10, kMuchWork, [&](std::int64_t) { ++count; });
    CHECK(count == 10);
  }
}

void test_interrupt() {
  CHECK(!stop_requested());
  set_interrupt_poll([] { return true; });
  for (const int threads : {1, 3}) {
    set_num_threads(threads);
    bool interrupted = false;
    std::atomic<std::int64_t> done{0};
    try {
      // An hour of work, were it not stopped.
      parallel_for(3600000, kMuchWork, [&](std::int64_t) {
        std::this_thread::sleep_for(std::chrono::milliseconds(1));
        ++done;
      });
    } catch (const Interrupted&) {
      interrupted = true;
    }
    CHECK(interrupted && done < 3600000);
  }
  set_interrupt_poll(nullptr);
}

bool refuses(std::int64_t n) {
  try {
    Scratch s;
    s.reserve<double>(n);
    s.acquire();
  } catch (const std::bad_alloc&) {
    return true;
  }
  return false;
}

void test_scratch() {
  CHECK(refuses(-1));
  CHECK(refuses(std::int64_t{1} << 45));  // 2^48 bytes: beyond any machine
  CHECK(refuses(std::int64_t{1} << 61));  // times 8: overflows to 0
  CHECK(refuses(INT64_MAX));
  for (const std::int64_t n : {0, 1, 7, 1000, 3 << 20}) {
    Scratch s;
    const std::size_t bytes = s.reserve<char>(n);
    const std::size_t doubles = s.reserve<double>(n);
    s.acquire();
    if (n == 0) continue;  // nothing to point at
    CHECK(reinterpret_cast<std::uintptr_t>(s.at<char>(bytes)) % 64 == 0 && reinterpret_cast<std::uintptr_t>(s.at<char>(doubles)) % 64 == 0);
    std::memset(s.at<char>(bytes), 1, static_cast<std::size_t>(n));
    for (std::int64_t i = 0; i < n; ++i) s.at<double>(doubles)[i] = 2;
    CHECK(s.at<char>(bytes)[n - 1] == 1 && s.at<double>(doubles)[0] == 2);
    // A second user on the same thread gets memory of its own.
    Scratch inner;
    const std::size_t again = inner.reserve<char>(n);
    inner.acquire();
    std::memset(inner.at<char>(again), 3, static_cast<std::size_t>(n));
    CHECK(s.at<char>(bytes)[0] == 1);
  }
}

void test_rehearsal() {
  set_num_threads(3);
  int started = 0, ended = 0;
  const auto item = [&](std::int64_t i) {
    ++started;
    Scratch s;
    s.reserve<char>(i == 0 ? 64 : 640);
    s.acquire();
    ++ended;
  };
  start_rehearsal();
  CHECK(rehearsing());
  parallel_for(7, kMuchWork, item);
  CHECK(started == 0);
  parallel_for(7, kMuchWork, Rehearse::scratch, item);
  parallel_for(1, 0, Rehearse::scratch, item);
  parallel_for(0, kMuchWork, Rehearse::scratch, item);
  note_memory(100);
  const Rehearsal r = end_rehearsal();
  CHECK(!rehearsing() && started == 4 && ended == 0);
  CHECK(r.stages.size() == 4 && r.shared == 100);
  CHECK(r.stages[0].items == 7 && r.stages[0].threads == 3 && r.stages[0].scratch == 0);
  CHECK(r.stages[1].scratch == 640 && r.stages[2].threads == 1 && r.stages[3].items == 0);
  CHECK(std::strstr(r.stages[1].file, "test_parallel") != nullptr);
  parallel_for(7, 0, Rehearse::scratch, item);
  CHECK(ended == 7);
  CHECK(end_rehearsal().stages.empty());  // none was started
}

}  // namespace

void test_parallel() {
  const int before = get_num_threads();
  test_each_item_once();
  test_nested_and_concurrent();
  test_exceptions();
  test_interrupt();
  test_scratch();
  test_rehearsal();
  set_num_threads(before);
}

}  // namespace regard::test
