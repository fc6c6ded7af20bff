// SPDX-License-Identifier: Apache-2.0
// The emulator as a Python module: its options and counts. The ops themselves, csrc/cuda/*.cu
// linked into the same library, register with torch.
#include <emulator.h>
#include <pybind11/pybind11.h>

namespace {

void set_options(uint64_t seed, bool poison) { lychee::emulator::options = {seed, poison}; }

// Counts since the last call.
pybind11::dict take_statistics() {
  using namespace pybind11::literals;
  const lychee::emulator::Statistics s = lychee::emulator::statistics;
  lychee::emulator::statistics = {};
  return pybind11::dict("blocks"_a = s.blocks, "switches"_a = s.switches, "barriers"_a = s.barriers,
                        "collectives"_a = s.collectives, "mma"_a = s.mma,
                        "matrix_loads"_a = s.matrix_loads, "bank_conflicts"_a = s.bank_conflicts,
                        "copies"_a = s.copies);
}

}  // namespace

PYBIND11_MODULE(_emulated, m) {
  m.def("set_options", &set_options, pybind11::arg("seed") = 1, pybind11::arg("poison") = true);
  m.def("take_statistics", &take_statistics);
}
