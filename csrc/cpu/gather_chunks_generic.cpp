// SPDX-License-Identifier: Apache-2.0
// gather_chunks and its backward compiled for any CPU.
#include <math.h>
#include <stdint.h>
#include <string.h>

#define LYCHEE_VEC_HEADER "cpu/vec_generic.h"
#include "cpu/gather_chunks_kernel.inl"

namespace lychee {

void gather_chunks_generic(const GatherChunksParams& p, int64_t begin, int64_t end) {
  gather_chunks_kernel(p, begin, end);
}

void gather_chunks_bwd_generic(const GatherChunksBwdParams& p, int64_t begin, int64_t end) {
  gather_chunks_bwd_kernel(p, begin, end);
}

}  // namespace lychee
