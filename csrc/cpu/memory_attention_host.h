// SPDX-License-Identifier: Apache-2.0
// What memory_attention and its backward share on the host: checked arguments as parameters, and
// key tiles.
#pragma once

#include <optional>
#include <vector>

#include "check.h"
#include "cpu/memory_attention.h"

namespace lychee {

using OptionalTensor = std::optional<Tensor>;

struct MemoryAttentionInputs {
  const Tensor &q, &k, &v;
  const OptionalTensor &kv, &kv_scale;
  int64_t layer;
  const OptionalTensor &page_table, &page_len, &page_base, &num_pages, &valid, &cos, &sin;
  int64_t rope_mode, query_stride;
  double softmax_scale;
};

// Tiles of all batch entries, each entry's pages before its segment.
struct KeyTiles {
  std::vector<KeyTile> list;
  std::vector<int64_t> begin;  // [B + 1]
};

// Throws where an argument is wrong. The parameters point into the tensors and into `tiles`;
// outputs and partition are left to the caller.
MemoryAttentionParams read_inputs(const MemoryAttentionInputs& inputs, KeyTiles* tiles);

}  // namespace lychee
