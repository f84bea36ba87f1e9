// native_tests_<isa> <isa>: runs every native test, or exits 77 ("skipped") where the machine lacks the instruction set.

#include <cstring>

#include "check.h"
#include "cpu/features.h"
#include "cpu/parallel.h"

int main(int argc, char** argv) {
  using namespace regard;
  for (const auto& set : cpu::instruction_sets())
    if (argc > 1 && std::strcmp(set.name, argv[1]) == 0 && set.lacks != nullptr) {
      std::printf("skipped: %s\n", set.lacks);
      return 77;
    }
  cpu::initialise();
  const struct {
    const char* name;
    void (*run)();
  } tests[] = {{"dtype", test::test_dtype},       {"simd", test::test_simd},           {"strided", test::test_strided},
               {"parallel", test::test_parallel}, {"sequences", test::test_sequences}, {"attention", test::test_attention},
               {"cache", test::test_cache},       {"recurrent", test::test_recurrent}, {"tiles", test::test_tiles}};
  for (const auto& t : tests) {
    const int before = test::checks;
    t.run();
    std::printf("%-10s %9d checks\n", t.name, test::checks - before);
  }
  std::printf("%s: %d of %d checks failed\n", test::failures == 0 ? "passed" : "FAILED", test::failures, test::checks);
  return test::failures == 0 ? 0 : 1;
}
