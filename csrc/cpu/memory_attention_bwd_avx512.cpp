// SPDX-License-Identifier: Apache-2.0
// The backward of memory_attention compiled for AVX-512.
#if defined(__x86_64__)
#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

#include <type_traits>

// After the standard headers, so that nothing they define is compiled for this target.
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")

#define LYCHEE_VEC_HEADER "cpu/vec_avx512.h"
#include "cpu/memory_attention_bwd_kernel.inl"

namespace lychee {

void memory_attention_bwd_avx512(const MemoryAttentionBwdParams& p, int64_t item, float* scratch) {
  memory_attention_bwd_kernel(p, item, scratch);
}

void sum_slots_avx512(const MemoryAttentionBwdParams& p, int64_t index) {
  sum_slots_kernel(p, index);
}

}  // namespace lychee
#endif
