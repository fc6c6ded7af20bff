// SPDX-License-Identifier: Apache-2.0
// linear compiled for any CPU.
#include <math.h>
#include <stdint.h>
#include <string.h>

#define LYCHEE_VEC_HEADER "cpu/vec_generic.h"
#include "cpu/linear_kernel.inl"

namespace lychee {

void linear_pack_generic(const LinearParams& p, int64_t index) { pack_kernel(p, index); }

void linear_generic(const LinearParams& p, int64_t item, float* scratch) {
  linear_kernel(p, item, scratch);
}

}  // namespace lychee
