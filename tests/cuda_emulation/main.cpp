#include "../native/check.h"

namespace regard::test {
void test_models();
void test_hopper_models();
void test_kernels();
void test_hopper_kernels();
void test_row_kernels();
void test_byte_kernels();
}  // namespace regard::test

int main() {
  using namespace regard::test;
  test_models();
  test_hopper_models();
  std::printf("models  %9d checks\n", checks);
  const int before = checks;
  test_kernels();
  test_hopper_kernels();
  test_row_kernels();
  test_byte_kernels();
  std::printf("kernels %9d checks\n", checks - before);
  std::printf("%s: %d of %d checks failed\n", failures == 0 ? "passed" : "FAILED", failures, checks);
  return failures == 0 ? 0 : 1;
}
