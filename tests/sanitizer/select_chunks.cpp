// SPDX-License-Identifier: Apache-2.0
// select_chunks against the definition, one chunk at a time; its kernels have one build.
#include "cpu/select_chunks_kernel.inl"
#include "harness.h"

namespace {

using namespace lychee;
using sanitizer_test::random_value;
using sanitizer_test::round_to;
using sanitizer_test::Rows;

struct Shape {
  int64_t batch, chunks, slots, pages_per_chunk, page_tokens, gap;
  Dtype dtype;
  bool shared;  // one list of pages and tokens for all rows
};

const Shape kShapes[] = {
    {1, 1, 1, 1, 1, 0, Dtype::kFloat32, true},    {2, 0, 0, 2, 4, 0, Dtype::kFloat32, true},
    {3, 7, 3, 3, 5, 3, Dtype::kFloat32, false},   {2, 13, 13, 2, 4, 0, Dtype::kBFloat16, true},
    {2, 61, 20, 1, 64, 5, Dtype::kFloat16, true}, {1, 5, 2, 0, 3, 0, Dtype::kFloat32, false},
};
constexpr double kThresholds[] = {-INFINITY, -0.5, 0.25, 2, NAN};

// What chunks that are not selected have: no size, and no page of any bank.
constexpr int32_t kGarbage = INT32_MIN;

// Indices of row `b`'s best chunks in order; equal scores favour the lower index.
std::vector<int64_t> best_chunks(const Shape& s, Rows& scores, int64_t b, double threshold) {
  const double limit = round_to(s.dtype, threshold);
  std::vector<int64_t> chosen;
  for (int64_t c = 0; c < s.chunks; ++c) {
    if (!(scores.at(b, c) >= limit)) continue;
    int64_t better = 0;
    for (int64_t other = 0; other < s.chunks; ++other) {
      const double x = scores.at(b, other), y = scores.at(b, c);
      better += x >= limit && (x > y || (x == y && other < c));
    }
    if (better < s.slots) chosen.push_back(c);
  }
  return chosen;
}

void check(const Shape& s, double threshold) {
  const int64_t lists = s.shared ? 1 : s.batch, width = s.slots * s.pages_per_chunk;
  Rows scores(s.batch, s.chunks, s.gap, s.dtype);
  scores.fill_random();
  std::vector<std::vector<int64_t>> chosen;
  std::vector<int32_t> tokens(lists * s.chunks, kGarbage);
  std::vector<int32_t> pages(lists * s.chunks * s.pages_per_chunk, kGarbage);
  for (int64_t b = 0; b < s.batch; ++b) {
    // NaN is never selected; put() knows none in float16
    if (s.chunks > 2 && s.dtype != Dtype::kFloat16) scores.put(b, 2, NAN);
    chosen.push_back(best_chunks(s, scores, b, threshold));
    for (int64_t c : chosen[b]) {
      const int64_t chunk = (s.shared ? 0 : b) * s.chunks + c;
      const int64_t most = s.pages_per_chunk * s.page_tokens;
      tokens[chunk] = static_cast<int32_t>((random_value() + 1) / 2 * (most + 1));
      for (int64_t i = 0; i * s.page_tokens < tokens[chunk]; ++i) {
        pages[chunk * s.pages_per_chunk + i] = static_cast<int32_t>(100 * chunk + i);
      }
    }
  }
  std::vector<int32_t> table(s.batch * width, 7), length(table), base(table), count(s.batch, 7);
  std::vector<int32_t> total(count), chunks(s.batch * s.slots, 7), num_chunks(count);
  std::vector<int32_t> candidates(s.chunks);
  SelectChunksParams p{};
  p.num_chunks = s.chunks, p.slots = s.slots, p.pages_per_chunk = s.pages_per_chunk;
  p.page_tokens = s.page_tokens, p.dtype = s.dtype, p.threshold = threshold;
  p.scores = scores.data(), p.score_batch_stride = scores.stride(), p.score_stride = 1;
  p.chunk_pages = pages.data(), p.chunk_tokens = tokens.data();
  p.pages_batch_stride = s.shared ? 0 : s.chunks * s.pages_per_chunk;
  p.pages_chunk_stride = s.pages_per_chunk, p.pages_stride = 1;
  p.tokens_batch_stride = s.shared ? 0 : s.chunks, p.tokens_stride = 1;
  p.page_table = table.data(), p.page_len = length.data(), p.page_base = base.data();
  p.num_pages = count.data(), p.num_tokens = total.data();
  p.chunks = chunks.data(), p.num_chunks_out = num_chunks.data();
  for (int64_t b = 0; b < s.batch; ++b) choose_chunks_kernel(p, b, candidates.data());
  for (int64_t b = 0; b < s.batch; ++b) list_pages_kernel(p, b);

  for (int64_t b = 0; b < s.batch; ++b) {
    const int64_t found = static_cast<int64_t>(chosen[b].size());
    EXPECT(num_chunks[b] == found);
    int64_t entry = b * width, position = 0;
    for (int64_t i = 0; i < s.slots; ++i) {
      EXPECT(chunks[b * s.slots + i] == (i < found ? chosen[b][i] : -1));
      if (i >= found) continue;
      const int64_t chunk = (s.shared ? 0 : b) * s.chunks + chosen[b][i];
      for (int64_t j = 0; j * s.page_tokens < tokens[chunk]; ++j, ++entry) {
        const int64_t left = tokens[chunk] - j * s.page_tokens;
        EXPECT(table[entry] == 100 * chunk + j);
        EXPECT(length[entry] == (left < s.page_tokens ? left : s.page_tokens));
        EXPECT(base[entry] == position + j * s.page_tokens);
      }
      position += tokens[chunk];
    }
    EXPECT(count[b] == entry - b * width && total[b] == position);
    for (; entry < (b + 1) * width; ++entry) {
      EXPECT(table[entry] == -1 && length[entry] == 0 && base[entry] == 0);
    }
  }
}

CASE(select_chunks) {
  for (const Shape& shape : kShapes) {
    for (double threshold : kThresholds) check(shape, threshold);
  }
}

}  // namespace
