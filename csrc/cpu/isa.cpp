// SPDX-License-Identifier: Apache-2.0
// Run-time choice of the CPU instruction set, and the op that reports it.
#include "cpu/isa.h"

#include <torch/csrc/stable/library.h>

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace lychee {
namespace {

Isa best_isa() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl");
  if (avx512 && may_use_amx()) return Isa::kAmx;
  return avx512 ? Isa::kAvx512 : avx2 ? Isa::kAvx2 : Isa::kGeneric;
#else
  return Isa::kGeneric;
#endif
}

Isa choose_isa() {
  const Isa best = best_isa();
  const char* forced = std::getenv("LYCHEE_CPU_ISA");
  if (forced == nullptr || *forced == '\0') return best;
  for (Isa isa : {Isa::kGeneric, Isa::kAvx2, Isa::kAvx512, Isa::kAmx}) {
    if (std::string(forced) != isa_name(isa)) continue;
    if (isa <= best) return isa;
    throw std::runtime_error(std::string("cpu_isa: LYCHEE_CPU_ISA: expected at most ") +
                             isa_name(best) + " on this machine, got " + forced);
  }
  throw std::runtime_error(
      std::string("cpu_isa: LYCHEE_CPU_ISA: expected generic, avx2, avx512 or amx, got ") + forced);
}

std::string cpu_isa_op() { return isa_name(cpu_isa()); }

}  // namespace

Isa cpu_isa() {
  static const Isa isa = choose_isa();
  return isa;
}

const char* isa_name(Isa isa) {
  static constexpr const char* kNames[] = {"generic", "avx2", "avx512", "amx"};
  return kNames[static_cast<int>(isa)];
}

}  // namespace lychee

STABLE_TORCH_LIBRARY_IMPL(lychee, CompositeExplicitAutograd, m) {
  m.impl("cpu_isa", TORCH_BOX(&lychee::cpu_isa_op));
}
