// SPDX-License-Identifier: Apache-2.0
// A small test program for the emulator, free of Torch, so that the sanitizers can watch all of it.
#pragma once

#include <functional>
#include <stdexcept>
#include <string>
#include <vector>

namespace lychee::emulator {

struct Case {
  std::string name;
  std::function<void()> run;
};

// Every case of the program, in no particular order.
inline std::vector<Case>& cases() {
  static std::vector<Case> all;
  return all;
}

// EMULATOR_CASE(name) { ... } defines one; it fails by throwing.
struct RegisterCase {
  RegisterCase(const char* name, void (*run)()) { cases().push_back({name, run}); }
};
#define EMULATOR_CASE(name)                                                          \
  static void case_##name();                                                         \
  static const ::lychee::emulator::RegisterCase register_##name(#name, case_##name); \
  static void case_##name()

inline void expect(bool condition, const std::string& what) {
  if (!condition) throw std::runtime_error("expected " + what);
}

}  // namespace lychee::emulator
