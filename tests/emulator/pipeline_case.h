// SPDX-License-Identifier: Apache-2.0
// Runs the pipeline and compares with a plain loop; small whole numbers make every sum exact.
#pragma once

#include <string>
#include <vector>

#include "harness.h"
#include "pipeline.cuh"

namespace lychee::cuda {

template <Bug kBug>
void check_pipeline() {
  constexpr int kTiles = 5, kRow = kRowBytes / 2, kTile = kTileRows * kRow;
  std::vector<uint16_t> tiles(kTiles * kTile);
  for (size_t i = 0; i < tiles.size(); ++i) {
    tiles[i] = emulator::float_to_bf16(static_cast<float>(i * 7 % 11) - 5.0f);
  }
  std::vector<float> out(kTileRows * 8);
  const PipelineParams p{tiles.data(), out.data(), kTiles};
  emulator::launch({1}, {kPipelineThreads}, kPipelineShared, [&] { pipeline<kBug>(p); });
  for (int i = 0; i < kTileRows; ++i) {
    for (int j = 0; j < 8; ++j) {
      float sum = 0;
      for (int k = 0; k < kTiles * kRow; ++k) {
        const uint16_t* tile = tiles.data() + k / kRow * kTile + k % kRow;
        sum += emulator::bf16_to_float(tile[i * kRow]) * emulator::bf16_to_float(tile[j * kRow]);
      }
      emulator::expect(out[i * 8 + j] == sum,
                       std::to_string(sum) + ", got " + std::to_string(out[i * 8 + j]));
    }
  }
  emulator::expect(emulator::statistics.bank_conflicts == 0, "no bank conflicts");
}

}  // namespace lychee::cuda
