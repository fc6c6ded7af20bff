// SPDX-License-Identifier: Apache-2.0
// compress_pack, its backward and write_memory compiled for any CPU.
#include <math.h>
#include <stdint.h>
#include <string.h>

#define LYCHEE_VEC_HEADER "cpu/vec_generic.h"
#include "cpu/compress_pack_bwd_kernel.inl"

namespace lychee {

void compress_pack_generic(const CompressPackParams& p, int64_t begin, int64_t end) {
  compress_pack_kernel(p, begin, end);
}

void write_memory_generic(const CompressPackParams& p, int64_t begin, int64_t end) {
  write_memory_kernel(p, begin, end);
}

void compress_pack_bwd_generic(const CompressPackBwdParams& p, int64_t begin, int64_t end) {
  compress_pack_bwd_kernel(p, begin, end);
}

}  // namespace lychee
