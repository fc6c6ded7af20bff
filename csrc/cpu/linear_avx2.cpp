// SPDX-License-Identifier: Apache-2.0
// linear compiled for AVX2.
#if defined(__x86_64__)
#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

// After the standard headers, so that nothing they define is compiled for this target.
#pragma GCC target("avx2,fma,f16c")

#define LYCHEE_VEC_HEADER "cpu/vec_avx2.h"
#include "cpu/linear_kernel.inl"

namespace lychee {

void linear_pack_avx2(const LinearParams& p, int64_t index) { pack_kernel(p, index); }

void linear_avx2(const LinearParams& p, int64_t item, float* scratch) {
  linear_kernel(p, item, scratch);
}

void linear_half_rows_avx2(const LinearParams& p, int64_t item, float* rows) {
  dispatch_io_dtype(p.dtype, [&](auto t) { half_rows_kernel<decltype(t)>(p, item, rows); });
}

void linear_half_avx2(const LinearParams& p, int64_t item, const float* rows, int64_t block) {
  dispatch_io_dtype(p.dtype, [&](auto t) { half_kernel<decltype(t)>(p, item, rows, block); });
}

}  // namespace lychee
#endif
