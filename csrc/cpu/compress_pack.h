// SPDX-License-Identifier: Apache-2.0
// Entry points of the compress_pack kernels on CPU. Torch-free.
#pragma once

#include "compress_pack_params.h"

namespace lychee {

// Handles rows [begin, end) of the batch * (window + memory) interleaved rows.
using CompressPackFn = void (*)(const CompressPackParams&, int64_t begin, int64_t end);
void compress_pack_generic(const CompressPackParams&, int64_t begin, int64_t end);
void compress_pack_avx2(const CompressPackParams&, int64_t begin, int64_t end);
void compress_pack_avx512(const CompressPackParams&, int64_t begin, int64_t end);

// Writes memory rows [begin, end) of batch * memory; k and v hold memory rows only.
using WriteMemoryFn = void (*)(const CompressPackParams&, int64_t begin, int64_t end);
void write_memory_generic(const CompressPackParams&, int64_t begin, int64_t end);
void write_memory_avx2(const CompressPackParams&, int64_t begin, int64_t end);
void write_memory_avx512(const CompressPackParams&, int64_t begin, int64_t end);

// Handles rows [begin, end) of the batch * (window + memory) interleaved rows.
using CompressPackBwdFn = void (*)(const CompressPackBwdParams&, int64_t begin, int64_t end);
void compress_pack_bwd_generic(const CompressPackBwdParams&, int64_t begin, int64_t end);
void compress_pack_bwd_avx2(const CompressPackBwdParams&, int64_t begin, int64_t end);
void compress_pack_bwd_avx512(const CompressPackBwdParams&, int64_t begin, int64_t end);

}  // namespace lychee
