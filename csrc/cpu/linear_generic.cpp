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

void linear_half_rows_generic(const LinearParams& p, int64_t item, float* rows) {
  dispatch_io_dtype(p.dtype, [&](auto t) { half_rows_kernel<decltype(t)>(p, item, rows); });
}

void linear_half_generic(const LinearParams& p, int64_t item, const float* rows, int64_t block) {
  dispatch_io_dtype(p.dtype, [&](auto t) { half_kernel<decltype(t)>(p, item, rows, block); });
}

}  // namespace lychee
