// SPDX-License-Identifier: Apache-2.0
// compress_pack, its backward and write_memory compiled for AVX2.
#if defined(__x86_64__)
#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

// After the standard headers, so that nothing they define is compiled for this target.
#pragma GCC target("avx2,fma,f16c")

#define LYCHEE_VEC_HEADER "cpu/vec_avx2.h"
#include "cpu/compress_pack_bwd_kernel.inl"

namespace lychee {

void compress_pack_avx2(const CompressPackParams& p, int64_t begin, int64_t end) {
  compress_pack_kernel(p, begin, end);
}

void write_memory_avx2(const CompressPackParams& p, int64_t begin, int64_t end) {
  write_memory_kernel(p, begin, end);
}

void compress_pack_bwd_avx2(const CompressPackBwdParams& p, int64_t begin, int64_t end) {
  compress_pack_bwd_kernel(p, begin, end);
}

}  // namespace lychee
#endif
