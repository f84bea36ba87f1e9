// The kernel tests alone: what test_mutations.py compiles.

#include "../native/check.h"

namespace regard::test {
void test_kernels();
}

int main() {
  regard::test::test_kernels();
  return regard::test::failures == 0 ? 0 : 1;
}
