// SPDX-License-Identifier: Apache-2.0
// memory_attention compiled for AVX2.
#if defined(__x86_64__)
#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

#include <type_traits>

// After the standard headers, so that nothing they define is compiled for this target.
#pragma GCC target("avx2,fma,f16c")

#define LYCHEE_VEC_HEADER "cpu/vec_avx2.h"
#include "cpu/memory_attention_kernel.inl"

namespace lychee {

void memory_attention_avx2(const MemoryAttentionParams& p, int64_t item, float* scratch) {
  memory_attention_kernel(p, item, scratch);
}

void merge_splits_avx2(const MemoryAttentionParams& p, int64_t block) {
  merge_splits_kernel(p, block);
}

}  // namespace lychee
#endif
