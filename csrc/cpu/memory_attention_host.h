// SPDX-License-Identifier: Apache-2.0
// What memory_attention and its backward share on the host: checked arguments as parameters, and
// key tiles.
#pragma once

#include <vector>

#include "cpu/memory_attention.h"
#include "memory_attention_checks.h"

namespace lychee {

// Tiles of all batch entries, each entry's pages before its segment.
struct KeyTiles {
  std::vector<KeyTile> list;
  std::vector<int64_t> begin;  // [B + 1]
};

// Throws where an argument is wrong. The parameters point into the tensors and into `tiles`;
// outputs and partition are left to the caller.
MemoryAttentionParams read_inputs(const MemoryAttentionInputs& inputs, KeyTiles* tiles);

}  // namespace lychee
