// SPDX-License-Identifier: Apache-2.0
// Which instruction set the CPU kernels use, decided once per process.
#pragma once

// Where tile registers can be compiled for and asked for.
#if defined(__x86_64__) && defined(__linux__)
#if defined(__clang__) ? __clang_major__ >= 12 : __GNUC__ >= 11
#define LYCHEE_HAS_AMX
#endif
#endif

namespace lychee {

// kAmx: AVX-512 with products of bfloat16 tiles, which attention in bfloat16 uses.
enum class Isa { kGeneric, kAvx2, kAvx512, kAmx };

// The best set this machine has, or the one LYCHEE_CPU_ISA=generic|avx2|avx512|amx names (an error
// if the machine lacks it).
Isa cpu_isa();

const char* isa_name(Isa isa);

// Whether the processor multiplies bfloat16 tiles and the system lets this process keep them.
bool may_use_amx();

// One kernel entry per instruction set; pick() chooses one.
template <class Fn>
struct IsaTable {
  Fn generic, avx2, avx512;
  Fn pick() const {
    const Isa isa = cpu_isa();
    return isa >= Isa::kAvx512 ? avx512 : isa == Isa::kAvx2 ? avx2 : generic;
  }
};

// The table of kernel `fn`, whose builds are fn_generic, fn_avx2 and fn_avx512.
#if defined(__x86_64__)
#define LYCHEE_ISA_TABLE(Fn, fn) (::lychee::IsaTable<Fn>{fn##_generic, fn##_avx2, fn##_avx512})
#else
#define LYCHEE_ISA_TABLE(Fn, fn) (::lychee::IsaTable<Fn>{fn##_generic, fn##_generic, fn##_generic})
#endif

}  // namespace lychee
