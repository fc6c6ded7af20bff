// SPDX-License-Identifier: Apache-2.0
// select_chunks on a GPU: one block per row finds the best scores that pass by a radix select over
// ordered keys, keeps them in order by block scans, and lists their pages. Torch-free; strides are
// in elements.
#pragma once

#include "cuda/device.cuh"
#include "cuda/row_vector.cuh"
#include "cuda/select_chunks_plan.h"
#include "select_chunks_params.h"

namespace lychee::cuda {

constexpr int kRadixBits = 8;
constexpr int kBins = 1 << kRadixBits;

struct SelectShared {
  uint64_t warp_sum[kSelectMostThreads / kLanesPerWarp];
  int histogram[kBins];
  int bin, rest, total;
};

// Of a row's keys: those above `cut` are selected, and of those equal to it the first `ties`.
struct Cut {
  uint32_t cut;
  int ties;
};

template <class T>
LYCHEE_DEVICE float score_to_float(T score) {
  if constexpr (std::is_same_v<T, float>) {
    return score;
  } else if constexpr (std::is_same_v<T, BFloat16>) {
    return bf16_low(score.bits);
  } else {
    return f16_low(score.bits);
  }
}

// The threshold as the scores' type has it: the comparison happens there, as in PyTorch.
template <class T>
LYCHEE_DEVICE float round_threshold(double threshold) {
  const float x = static_cast<float>(threshold);
  if constexpr (std::is_same_v<T, float>) {
    return x;
  } else if constexpr (std::is_same_v<T, BFloat16>) {
    return bf16_low(pack_bf16(x, 0.0f));
  } else {
    return f16_low(pack_f16(x, 0.0f));
  }
}

// A number that orders as the score does, or 0 where the score does not pass; NaN never passes.
template <class T>
LYCHEE_DEVICE uint32_t key_of_chunk(const SelectChunksParams& p, int64_t row, int64_t chunk,
                                    float threshold) {
  if (chunk >= p.num_chunks) return 0;
  const T* scores = static_cast<const T*>(p.scores) + row * p.score_batch_stride;
  const float score = score_to_float(scores[chunk * p.score_stride]);
  if (!(score >= threshold)) return 0;
  const uint32_t bits = as_bits(score == 0.0f ? 0.0f : score);  // -0 equals 0
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// The sum over earlier threads of the block and over all of them; every thread calls it.
struct BlockSum {
  uint64_t before, total;
};

LYCHEE_DEVICE uint64_t sum_up_to_lane(uint64_t value) {
  const int lane = threadIdx.x % kLanesPerWarp;
  for (int delta = 1; delta < kLanesPerWarp; delta *= 2) {
    const uint64_t other = __shfl_up_sync(~0u, value, delta);
    if (lane >= delta) value += other;
  }
  return value;
}

LYCHEE_DEVICE BlockSum sum_over_block(uint64_t value, SelectShared* shared) {
  const int lane = threadIdx.x % kLanesPerWarp, warp = threadIdx.x / kLanesPerWarp;
  const int warps = blockDim.x / kLanesPerWarp;
  const uint64_t up_to = sum_up_to_lane(value);
  __syncthreads();  // nobody needs the last sums any longer
  if (lane == kLanesPerWarp - 1) shared->warp_sum[warp] = up_to;
  __syncthreads();
  const uint64_t up_to_warp = sum_up_to_lane(lane < warps ? shared->warp_sum[lane] : 0);
  const uint64_t warps_before = __shfl_sync(~0u, up_to_warp, warp > 0 ? warp - 1 : 0);
  return {(warp > 0 ? warps_before : 0) + up_to - value,
          __shfl_sync(~0u, up_to_warp, kLanesPerWarp - 1)};
}

// The first warp finds the bin, from the highest down, that holds the `wanted`-th key, how many of
// that bin are wanted, and how many keys there are.
LYCHEE_DEVICE void find_bin(int wanted, SelectShared* shared) {
  constexpr int kBinsPerLane = kBins / kLanesPerWarp;
  const int lane = threadIdx.x % kLanesPerWarp, highest = kBins - 1 - lane * kBinsPerLane;
  int own = 0;
  for (int i = 0; i < kBinsPerLane; ++i) own += shared->histogram[highest - i];
  const int up_to = static_cast<int>(sum_up_to_lane(own));
  if (lane == kLanesPerWarp - 1) shared->total = up_to;
  int above = up_to - own;
  if (above >= wanted || wanted > up_to) return;
  for (int i = 0; i < kBinsPerLane; ++i) {
    const int count = shared->histogram[highest - i];
    if (above + count >= wanted) {
      shared->bin = highest - i;
      shared->rest = wanted - above;
      return;
    }
    above += count;
  }
}

// Where more keys than `slots` pass: the key of the last one kept, found digit by digit.
template <class T>
LYCHEE_DEVICE Cut find_cut(const SelectChunksParams& p, int64_t row, float threshold,
                           SelectShared* shared) {
  constexpr Cut kKeepAll{0, 0};
  if (p.slots >= p.num_chunks) return kKeepAll;
  uint32_t prefix = 0, known = 0;
  int wanted = static_cast<int>(p.slots);
  for (int shift = 32 - kRadixBits; shift >= 0; shift -= kRadixBits) {
    for (int bin = threadIdx.x; bin < kBins; bin += blockDim.x) shared->histogram[bin] = 0;
    __syncthreads();
    for (int64_t chunk = threadIdx.x; chunk < p.num_chunks; chunk += blockDim.x) {
      const uint32_t key = key_of_chunk<T>(p, row, chunk, threshold);
      if (key != 0 && (key & known) == prefix) {
        atomicAdd(&shared->histogram[key >> shift & (kBins - 1)], 1);
      }
    }
    __syncthreads();
    if (threadIdx.x < kLanesPerWarp) find_bin(wanted, shared);
    __syncthreads();
    if (shared->total <= wanted && known == 0) return kKeepAll;
    prefix |= static_cast<uint32_t>(shared->bin) << shift;
    known |= static_cast<uint32_t>(kBins - 1) << shift;
    wanted = shared->rest;
  }
  return {prefix, wanted};
}

// Writes the selected chunks of a row in ascending order, -1 behind them; returns how many.
template <class T>
LYCHEE_DEVICE int keep_chunks(const SelectChunksParams& p, int64_t row, float threshold, Cut cut,
                              SelectShared* shared) {
  int32_t* chunks = p.chunks + row * p.slots;
  int above = 0, ties = 0;  // of all chunks so far
  for (int64_t first = 0; first < p.num_chunks; first += blockDim.x) {
    const uint32_t key = key_of_chunk<T>(p, row, first + threadIdx.x, threshold);
    const bool is_above = key > cut.cut, is_tie = key == cut.cut;
    const BlockSum sum = sum_over_block(uint64_t{is_above} << 32 | uint64_t{is_tie}, shared);
    const int above_before = above + static_cast<int>(sum.before >> 32);
    const int ties_before = ties + static_cast<int>(sum.before & 0xffffffffu);
    if (is_above || (is_tie && ties_before < cut.ties)) {
      chunks[above_before + min(ties_before, cut.ties)] = static_cast<int32_t>(first + threadIdx.x);
    }
    above += static_cast<int>(sum.total >> 32);
    ties += static_cast<int>(sum.total & 0xffffffffu);
  }
  const int count = above + min(ties, cut.ties);
  for (int64_t slot = count + threadIdx.x; slot < p.slots; slot += blockDim.x) chunks[slot] = -1;
  return count;
}

// A selected chunk: what it needs of the page table, and where that begins.
struct ListedChunk {
  int64_t chunk;
  uint32_t tokens, pages;
  uint32_t position, entry;  // of its first token; of its first page
};

// The pages of a warp's chunks, one lane per entry: each looks up the chunk its entry belongs to.
LYCHEE_DEVICE void list_pages_of_warp(const SelectChunksParams& p, int64_t row,
                                      const ListedChunk& own) {
  const int lane = threadIdx.x % kLanesPerWarp;
  const int64_t width = p.slots * p.pages_per_chunk;
  const uint32_t begin = __shfl_sync(~0u, own.entry, 0);
  const uint32_t end = __shfl_sync(~0u, own.entry + own.pages, kLanesPerWarp - 1);
  for (uint32_t first = begin; first < end; first += kLanesPerWarp) {
    const uint32_t entry = first + lane;
    int from = 0;  // the last lane whose entries begin here or before
    for (int step = kLanesPerWarp / 2; step > 0; step /= 2) {
      if (__shfl_sync(~0u, own.entry, from + step) <= entry) from += step;
    }
    const int64_t chunk = __shfl_sync(~0u, own.chunk, from);
    const uint32_t tokens = __shfl_sync(~0u, own.tokens, from);
    const uint32_t position = __shfl_sync(~0u, own.position, from);
    const int64_t page = entry - __shfl_sync(~0u, own.entry, from);
    if (entry >= end) continue;
    const int64_t offset = page * p.page_tokens, out = row * width + entry;
    p.page_table[out] = p.chunk_pages[row * p.pages_batch_stride + chunk * p.pages_chunk_stride +
                                      page * p.pages_stride];
    p.page_len[out] = static_cast<int32_t>(min(p.page_tokens, int64_t{tokens} - offset));
    p.page_base[out] = static_cast<int32_t>(position + static_cast<uint32_t>(offset));
  }
}

// The page table of the `count` chunks that were kept. A number of tokens that the chunk's pages
// cannot hold is cut to what they can.
LYCHEE_DEVICE void list_pages(const SelectChunksParams& p, int64_t row, int count,
                              SelectShared* shared) {
  const int64_t width = p.slots * p.pages_per_chunk;
  const int64_t most_tokens = p.pages_per_chunk * p.page_tokens;
  uint32_t positions = 0, entries = 0;  // of all chunks so far
  for (int first = 0; first < count; first += blockDim.x) {
    const int slot = first + static_cast<int>(threadIdx.x);
    ListedChunk own{};
    if (slot < count) {
      own.chunk = p.chunks[row * p.slots + slot];
      const int64_t tokens =
          p.chunk_tokens[row * p.tokens_batch_stride + own.chunk * p.tokens_stride];
      own.tokens = static_cast<uint32_t>(max(int64_t{0}, min(tokens, most_tokens)));
      own.pages = static_cast<uint32_t>((own.tokens + p.page_tokens - 1) / p.page_tokens);
    }
    const BlockSum sum = sum_over_block(uint64_t{own.tokens} << 32 | own.pages, shared);
    own.position = positions + static_cast<uint32_t>(sum.before >> 32);
    own.entry = entries + static_cast<uint32_t>(sum.before);
    list_pages_of_warp(p, row, own);
    positions += static_cast<uint32_t>(sum.total >> 32);
    entries += static_cast<uint32_t>(sum.total);
  }
  for (int64_t entry = entries + threadIdx.x; entry < width; entry += blockDim.x) {
    p.page_table[row * width + entry] = -1;
    p.page_len[row * width + entry] = p.page_base[row * width + entry] = 0;
  }
  if (threadIdx.x > 0) return;
  p.num_pages[row] = static_cast<int32_t>(entries);
  p.num_tokens[row] = static_cast<int32_t>(positions);
  p.num_chunks_out[row] = count;
}

template <class T>
__global__ void __launch_bounds__(kSelectMostThreads)
    select_chunks_kernel(const SelectChunksParams p) {
  LYCHEE_SHARED(bytes);
  SelectShared* shared = reinterpret_cast<SelectShared*>(bytes);
  const int64_t row = blockIdx.x;
  const float threshold = round_threshold<T>(p.threshold);
  const Cut cut = find_cut<T>(p, row, threshold, shared);
  const int count = keep_chunks<T>(p, row, threshold, cut, shared);
  __syncthreads();  // the chunks are written
  list_pages(p, row, count, shared);
}

}  // namespace lychee::cuda
