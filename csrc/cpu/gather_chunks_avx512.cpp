// SPDX-License-Identifier: Apache-2.0
// gather_chunks and its backward compiled for AVX-512.
#if defined(__x86_64__)
#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

// After the standard headers, so that nothing they define is compiled for this target.
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")

#define LYCHEE_VEC_HEADER "cpu/vec_avx512.h"
#include "cpu/gather_chunks_kernel.inl"

namespace lychee {

void gather_chunks_avx512(const GatherChunksParams& p, int64_t begin, int64_t end) {
  gather_chunks_kernel(p, begin, end);
}

void gather_chunks_bwd_avx512(const GatherChunksBwdParams& p, int64_t begin, int64_t end) {
  gather_chunks_bwd_kernel(p, begin, end);
}

}  // namespace lychee
#endif
