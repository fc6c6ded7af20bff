// SPDX-License-Identifier: Apache-2.0
// run SEEDS [CASE...]: runs these cases, or all, under schedules 1 to SEEDS; stops at the first
// that fails, with what it reports on the last line.
#include <emulator.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <exception>

#include "harness.h"

int main(int count, char** arguments) {
  using lychee::emulator::cases;
  const uint64_t seeds = count > 1 ? std::strtoull(arguments[1], nullptr, 10) : 1;
  const std::vector<std::string> wanted(arguments + std::min(count, 2), arguments + count);
  size_t ran = 0;
  for (const auto& test : cases()) {
    if (!wanted.empty() && std::find(wanted.begin(), wanted.end(), test.name) == wanted.end()) {
      continue;
    }
    for (uint64_t seed = 1; seed <= seeds; ++seed) {
      lychee::emulator::options.seed = seed;
      lychee::emulator::statistics = {};
      try {
        test.run();
      } catch (const std::exception& error) {
        std::printf("%s, seed %lu: %s\n", test.name.c_str(), static_cast<unsigned long>(seed),
                    error.what());
        return 1;
      }
    }
    std::printf("%s passed\n", test.name.c_str());
    ++ran;
  }
  return ran == (wanted.empty() ? cases().size() : wanted.size()) ? 0 : 2;
}
