// SPDX-License-Identifier: Apache-2.0
// gated_mlp compiled for any CPU.
#include <math.h>
#include <stdint.h>
#include <string.h>

#define LYCHEE_VEC_HEADER "cpu/vec_generic.h"
#include "cpu/gated_mlp_kernel.inl"

namespace lychee {

void gated_mlp_norm_generic(const GatedMlpParams& p, int64_t item) { norm_kernel(p, item); }

void gated_mlp_pack_generic(const GatedMlpParams& p, int64_t index) { pack_kernel(p, index); }

void gated_mlp_generic(const GatedMlpParams& p, int64_t item, float* scratch) {
  gated_mlp_kernel(p, item, scratch);
}

}  // namespace lychee
