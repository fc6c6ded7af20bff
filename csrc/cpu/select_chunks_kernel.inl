// SPDX-License-Identifier: Apache-2.0
// The two halves of select_chunks, one row of scores at a time: which chunks pass, and the table
// of their pages. Scalar code: a row is read once, and the work that follows is small.
#pragma once

#include <math.h>
#include <string.h>

#include <algorithm>

#include "cpu/vec_generic.h"
#include "select_chunks_params.h"

namespace lychee {
namespace {

// `candidates` has room for num_chunks indices.
template <class T>
inline void choose_chunks(const SelectChunksParams& p, int64_t row, int32_t* candidates) {
  const T* scores = static_cast<const T*>(p.scores) + row * p.score_batch_stride;
  const auto score = [&](int64_t chunk) { return to_float(scores[chunk * p.score_stride]); };
  // The comparison happens in the dtype of the scores, as in PyTorch.
  T rounded;
  from_float(&rounded, static_cast<float>(p.threshold));
  const float threshold = to_float(rounded);

  int64_t count = 0;
  for (int64_t chunk = 0; chunk < p.num_chunks; ++chunk) {
    candidates[count] = static_cast<int32_t>(chunk);
    count += score(chunk) >= threshold;  // false for NaN
  }
  if (count > p.slots) {
    const auto better = [&](int32_t a, int32_t b) {
      const float x = score(a), y = score(b);
      return x > y || (x == y && a < b);
    };
    std::nth_element(candidates, candidates + p.slots, candidates + count, better);
    count = p.slots;
    std::sort(candidates, candidates + count);
  }
  int32_t* chunks = p.chunks + row * p.slots;
  std::copy(candidates, candidates + count, chunks);
  std::fill(chunks + count, chunks + p.slots, -1);
  p.num_chunks_out[row] = static_cast<int32_t>(count);
}

inline void choose_chunks_kernel(const SelectChunksParams& p, int64_t row, int32_t* candidates) {
  dispatch_io_dtype(p.dtype, [&](auto tag) { choose_chunks<decltype(tag)>(p, row, candidates); });
}

// Tokens of a chosen chunk lie in 0 .. pages_per_chunk * page_tokens.
inline void list_pages_kernel(const SelectChunksParams& p, int64_t row) {
  const int32_t* pages = p.chunk_pages + row * p.pages_batch_stride;
  const int32_t* tokens = p.chunk_tokens + row * p.tokens_batch_stride;
  const int64_t width = p.slots * p.pages_per_chunk;
  int32_t* table = p.page_table + row * width;
  int32_t* length = p.page_len + row * width;
  int32_t* base = p.page_base + row * width;
  int64_t entry = 0, position = 0;
  for (int64_t i = 0; i < p.num_chunks_out[row]; ++i) {
    const int64_t chunk = p.chunks[row * p.slots + i], count = tokens[chunk * p.tokens_stride];
    for (int64_t first = 0, page = 0; first < count; first += p.page_tokens, ++page, ++entry) {
      table[entry] = pages[chunk * p.pages_chunk_stride + page * p.pages_stride];
      length[entry] = static_cast<int32_t>(std::min(p.page_tokens, count - first));
      base[entry] = static_cast<int32_t>(position + first);
    }
    position += count;
  }
  p.num_pages[row] = static_cast<int32_t>(entry);
  p.num_tokens[row] = static_cast<int32_t>(position);
  std::fill(table + entry, table + width, -1);
  std::fill(length + entry, length + width, 0);
  std::fill(base + entry, base + width, 0);
}

}  // namespace
}  // namespace lychee
