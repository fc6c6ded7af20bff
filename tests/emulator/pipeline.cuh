// SPDX-License-Identifier: Apache-2.0
// A kernel in miniature of what the emulator is for: two-stage asynchronous copies, swizzled matrix
// loads, tensor-core products; and the same with one bug planted in it.
#pragma once

#include <cstdint>

#include "cuda/device.cuh"

namespace lychee::cuda {

enum class Bug { kNone, kNoBarrierBeforeReuse, kNoWait, kNoBarrierAfterWait, kNoSwizzle };

// Tiles of 64 x 64 bf16; out[i, j] sums x[i] . x[j] over the tiles, for i < 64 and j < 8.
struct PipelineParams {
  const uint16_t* tiles;
  float* out;
  int num_tiles;
};

constexpr int kPipelineThreads = 128, kTileRows = 64, kRowBytes = 128;
constexpr int kTileBytes = kTileRows * kRowBytes, kPipelineShared = 2 * kTileBytes;

// Sixteen bytes `chunk` of a row; neighbouring rows start in different banks.
template <Bug kBug>
LYCHEE_DEVICE unsigned char* chunk_address(unsigned char* tile, int row, int chunk) {
  const int place = kBug == Bug::kNoSwizzle ? chunk : chunk ^ (row & 7);
  return tile + row * kRowBytes + place * 16;
}

template <Bug kBug>
LYCHEE_DEVICE void start_tile(const PipelineParams& p, unsigned char* shared, int tile) {
  if (tile < p.num_tiles) {
    const auto* source = reinterpret_cast<const unsigned char*>(p.tiles) + tile * kTileBytes;
    for (int i = threadIdx.x; i < kTileBytes / 16; i += kPipelineThreads) {
      unsigned char* target = chunk_address<kBug>(shared + tile % 2 * kTileBytes, i / 8, i % 8);
      copy_async(target, source + i * 16, true);
    }
  }
  copy_commit();
}

template <Bug kBug>
__global__ void __launch_bounds__(kPipelineThreads) pipeline(const PipelineParams p) {
  LYCHEE_SHARED(shared);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, matrix = lane / 8;
  float sums[4] = {};
  start_tile<kBug>(p, shared, 0);
  for (int tile = 0; tile < p.num_tiles; ++tile) {
    start_tile<kBug>(p, shared, tile + 1);
    if constexpr (kBug != Bug::kNoWait) copy_wait<1>();
    if constexpr (kBug != Bug::kNoBarrierAfterWait) __syncthreads();
    unsigned char* stage = shared + tile % 2 * kTileBytes;
    uint32_t a[4], b[4];
    for (int step = 0; step < 4; ++step) {
      if (step % 2 == 0) load_matrix(b, chunk_address<kBug>(stage, lane % 8, step * 2 + matrix));
      const int row = warp * 16 + matrix % 2 * 8 + lane % 8;
      load_matrix(a, chunk_address<kBug>(stage, row, step * 2 + matrix / 2));
      const uint32_t half[2] = {b[step % 2 * 2], b[step % 2 * 2 + 1]};
      mma_bf16(sums, a, half);
    }
    if constexpr (kBug != Bug::kNoBarrierBeforeReuse) __syncthreads();
  }
  copy_wait<0>();
  for (int i = 0; i < 4; ++i) {
    p.out[(warp * 16 + i / 2 * 8 + lane / 4) * 8 + lane % 4 * 2 + i % 2] = sums[i];
  }
}

}  // namespace lychee::cuda
