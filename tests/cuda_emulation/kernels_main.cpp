// One of the kernel tests alone: what test_mutations.py compiles. REGARD_TEST names it.

#include "../native/check.h"

namespace regard::test {
void REGARD_TEST();
}

int main() {
  regard::test::REGARD_TEST();
  return regard::test::failures == 0 ? 0 : 1;
}
