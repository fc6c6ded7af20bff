// SPDX-License-Identifier: Apache-2.0
// Runs every case; with the argument `planted` reads one element past a row instead, which must
// stop the program.
#include "harness.h"

using sanitizer_test::cases;
using sanitizer_test::Rows;

int main(int argc, char** argv) {
  if (argc > 1 && strcmp(argv[1], "planted") == 0) {
    Rows rows(3, 8, 8, lychee::Dtype::kFloat32);
    volatile int64_t past = 8;
    printf("read %f\n", sanitizer_test::get(rows.dtype, rows.row(1), past));
    return 0;
  }
  for (const auto& test : cases()) {
    test.run();
    printf("%s passed\n", test.name);
  }
  return cases().empty();
}
