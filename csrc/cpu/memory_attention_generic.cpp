// SPDX-License-Identifier: Apache-2.0
// memory_attention compiled for any CPU.
#include <math.h>
#include <stdint.h>
#include <string.h>

#include <type_traits>

#define LYCHEE_VEC_HEADER "cpu/vec_generic.h"
#include "cpu/memory_attention_kernel.inl"

namespace lychee {

void memory_attention_generic(const MemoryAttentionParams& p, int64_t item, float* scratch) {
  memory_attention_kernel(p, item, scratch);
}

void merge_splits_generic(const MemoryAttentionParams& p, int64_t block) {
  merge_splits_kernel(p, block);
}

}  // namespace lychee
