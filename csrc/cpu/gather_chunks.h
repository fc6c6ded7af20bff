// SPDX-License-Identifier: Apache-2.0
// Entry points of the gather_chunks kernels on CPU. Torch-free.
#pragma once

#include "gather_chunks_params.h"

namespace lychee {

// Handles items [begin, end) of batch * max_pages * layers * num_kv_heads, in this order: a page of
// the bank is one run of memory, and its rows of the tables serve all layers and heads.
using GatherChunksFn = void (*)(const GatherChunksParams&, int64_t begin, int64_t end);
void gather_chunks_generic(const GatherChunksParams&, int64_t begin, int64_t end);
void gather_chunks_avx2(const GatherChunksParams&, int64_t begin, int64_t end);
void gather_chunks_avx512(const GatherChunksParams&, int64_t begin, int64_t end);

// Handles items [begin, end) of bank pages * bank_layers * num_kv_heads.
using GatherChunksBwdFn = void (*)(const GatherChunksBwdParams&, int64_t begin, int64_t end);
void gather_chunks_bwd_generic(const GatherChunksBwdParams&, int64_t begin, int64_t end);
void gather_chunks_bwd_avx2(const GatherChunksBwdParams&, int64_t begin, int64_t end);
void gather_chunks_bwd_avx512(const GatherChunksBwdParams&, int64_t begin, int64_t end);

}  // namespace lychee
