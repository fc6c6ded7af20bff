// SPDX-License-Identifier: Apache-2.0
// The backward of memory_attention compiled for any CPU.
#include <math.h>
#include <stdint.h>
#include <string.h>

#include <type_traits>

#define LYCHEE_VEC_HEADER "cpu/vec_generic.h"
#include "cpu/memory_attention_bwd_kernel.inl"

namespace lychee {

void memory_attention_bwd_generic(const MemoryAttentionBwdParams& p, int64_t item, float* scratch) {
  memory_attention_bwd_kernel(p, item, scratch);
}

void sum_slots_generic(const MemoryAttentionBwdParams& p, int64_t index) {
  sum_slots_kernel(p, index);
}

}  // namespace lychee
