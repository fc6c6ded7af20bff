// SPDX-License-Identifier: Apache-2.0
// The kernels of memory_attention without Torch, so that the sanitizers can watch them: every
// kernel against the one without tensor cores, over a bank past 2^31 elements. And its plan.
#include <sys/mman.h>

#include <algorithm>
#include <cmath>
#include <numbers>
#include <string>
#include <vector>

#include "cuda/memory_attention_decode.cuh"
#include "cuda/memory_attention_prefill.cuh"
#include "cuda/memory_attention_simple.cuh"
#include "harness.h"

namespace lychee::cuda {
namespace {

using emulator::expect;

constexpr int kBatch = 2, kKvHeads = 2, kMaxPages = 5;

// Numbers from -1 to 1, the same in every run.
class Numbers {
 public:
  float next() {
    state_ = state_ * 6364136223846793005u + 1442695040888963407u;
    return static_cast<float>(static_cast<int32_t>(state_ >> 32)) * 0x1p-31f;
  }

 private:
  uint64_t state_ = 1;
};

// A bank whose last page lies past 2^31 elements; only pages written take room.
class Bank {
 public:
  explicit Bank(int64_t bytes) : bytes_(bytes) {
    data_ = mmap(nullptr, bytes, PROT_READ | PROT_WRITE,
                 MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    expect(data_ != MAP_FAILED, "address space for the bank");
  }
  Bank(const Bank&) = delete;
  ~Bank() { munmap(data_, bytes_); }
  unsigned char* data() const { return static_cast<unsigned char*>(data_); }

 private:
  int64_t bytes_;
  void* data_;
};

struct Shape {
  int dim, group, queries, keys, page_tokens = 64;
  bool rotate = true;
};

template <class T>
uint16_t half_bits(float x) {
  return static_cast<uint16_t>(Pair<T>::pack(x, 0.0f));
}

// Inputs, room for results, and the parameters that point to them.
template <class Query, class Element>
class Problem {
 public:
  Problem(const Shape& shape, bool last_pages)
      : dim_(shape.dim),
        page_elements_(int64_t{kKvHeads} * 2 * shape.page_tokens * shape.dim),
        bank_pages_(last_pages ? (int64_t{1} << 31) / page_elements_ + 6 : 6),
        bank_(bank_pages_ * page_elements_ * sizeof(Element)) {
    set_segment(shape);
    set_bank(shape, static_cast<int32_t>(bank_pages_ - 6));
    p.dtype = std::is_same_v<Query, BFloat16> ? Dtype::kBFloat16 : Dtype::kFloat16;
    p.bank_dtype = std::is_same_v<Element, int8_t>       ? Dtype::kInt8
                   : std::is_same_v<Element, Float8E4M3> ? Dtype::kFloat8E4M3
                                                         : p.dtype;
  }

  // The plan's grid for a kernel, with room for its partial results.
  dim3 plan(AttentionKernel kernel) {
    const AttentionGrid grid =
        plan_grid(kernel, p.num_queries * p.group, p.max_pages * p.tiles_per_page,
                  divide_up(p.num_keys, kTileKeys));
    p.block_rows = static_cast<int32_t>(grid.block_rows);
    p.page_splits = static_cast<int32_t>(grid.page_splits);
    p.segment_splits = static_cast<int32_t>(grid.segment_splits);
    const int64_t entries = int64_t{kBatch} * kKvHeads;
    partial_.assign(entries * grid.splits() * partial_floats(grid.block_rows, dim_), NAN);
    tickets_.assign(entries, 0);
    out_.assign(entries * p.group * p.num_queries * dim_, 0xffff);
    lse_.assign(entries * p.group * p.num_queries, NAN);
    p.partial = partial_.data(), p.tickets = tickets_.data();
    p.out = out_.data(), p.lse = lse_.data();
    return {static_cast<unsigned>(grid.blocks()), kKvHeads, kBatch};
  }

  std::vector<float> results() const {
    std::vector<float> all;
    for (uint16_t bits : out_) all.push_back(Pair<Query>::low(bits));
    all.insert(all.end(), lse_.begin(), lse_.end());
    return all;
  }

  MemoryAttentionParams p{};

 private:
  std::vector<uint16_t> random_rows(int64_t rows, float largest) {
    std::vector<uint16_t> data(rows * dim_);
    for (uint16_t& x : data) x = half_bits<Query>(numbers_.next() * largest);
    return data;
  }

  void set_segment(const Shape& shape) {
    const int heads = kKvHeads * shape.group;
    q_ = random_rows(int64_t{kBatch} * heads * shape.queries, 6.0f);
    k_ = random_rows(int64_t{kBatch} * kKvHeads * shape.keys, 1.0f);
    v_ = random_rows(int64_t{kBatch} * kKvHeads * shape.keys, 1.0f);
    p.num_queries = shape.queries, p.num_keys = shape.keys;
    p.num_heads = heads, p.num_kv_heads = kKvHeads, p.head_dim = dim_, p.group = shape.group;
    p.q = q_.data(), p.k = k_.data(), p.v = v_.data();
    p.q_token_stride = p.k_token_stride = p.v_token_stride = dim_;
    p.q_head_stride = int64_t{shape.queries} * dim_, p.q_batch_stride = heads * p.q_head_stride;
    p.k_head_stride = p.v_head_stride = int64_t{shape.keys} * dim_;
    p.k_batch_stride = p.v_batch_stride = kKvHeads * p.k_head_stride;
    p.query_stride = 1;
    p.scale_log2 = 1.4426950408889634f / std::sqrt(static_cast<float>(dim_));
    // every fifth key is hidden, and its value NaN
    for (int i = 0; i < kBatch * shape.keys; ++i) valid_.push_back(i % 5 != 0);
    for (int64_t row = 0; row < int64_t{kBatch} * kKvHeads * shape.keys; ++row) {
      const int64_t key = row / (kKvHeads * shape.keys) * shape.keys + row % shape.keys;
      if (!valid_[key]) std::fill_n(v_.begin() + row * dim_, dim_, 0x7fff);
    }
    p.valid = reinterpret_cast<const bool*>(valid_.data()), p.valid_stride = shape.keys;
  }

  void fill_page(int64_t page) {
    unsigned char* const data = bank_.data() + page * page_elements_ * sizeof(Element);
    for (int64_t i = 0; i < page_elements_; ++i) {
      const float x = numbers_.next();
      if constexpr (sizeof(Element) == 2) {
        reinterpret_cast<uint16_t*>(data)[i] = half_bits<Query>(x);
      } else if constexpr (std::is_same_v<Element, int8_t>) {
        data[i] = static_cast<unsigned char>(round_to_int8(x * 127.0f));
      } else {
        data[i] = static_cast<unsigned char>(round_to_e4m3(x * 448.0f));
      }
    }
  }

  void set_bank(const Shape& shape, int32_t first_page) {
    for (int page = 0; page < 6; ++page) fill_page(first_page + page);
    p.kv = bank_.data();
    p.page_stride = page_elements_, p.page_head_stride = page_elements_ / kKvHeads;
    p.page_part_stride = p.page_head_stride / 2, p.page_token_stride = dim_;
    if (sizeof(Element) == 1) {
      // one set of scales for all pages
      for (int i = 0; i < kKvHeads * 2 * shape.page_tokens; ++i) {
        scales_.push_back((1.5f + numbers_.next()) / 200.0f);
      }
      p.kv_scale = scales_.data();
      p.scale_head_stride = 2 * shape.page_tokens, p.scale_part_stride = shape.page_tokens;
    }
    p.bank_pages = static_cast<int32_t>(bank_pages_), p.page_tokens = shape.page_tokens;
    p.tiles_per_page = static_cast<int32_t>(divide_up(shape.page_tokens, kTileKeys));
    p.max_pages = kMaxPages;
    // the second row has no page; entries that are not used hold garbage
    table_.assign(kBatch * kMaxPages, INT32_MAX);
    len_ = base_ = table_;
    for (int i = 0; i < kMaxPages - 1; ++i) {
      table_[i] = first_page + (i * 5 + 1) % 6;
      len_[i] = i == 1 ? shape.page_tokens : 1 + i * 17 % shape.page_tokens;
      base_[i] = i * 71 + 3;
    }
    // an empty page is looked up nowhere, whatever its position
    len_[2] = 0, base_[2] = INT32_MAX;
    num_pages_ = {kMaxPages - 1, 0};
    p.page_table = table_.data(), p.page_len = len_.data(), p.num_pages = num_pages_.data();
    if (!shape.rotate) return;
    p.page_base = base_.data();
    p.positions = kMaxPages * 71 + shape.page_tokens;
    for (int i = 0; i < p.positions * dim_ / 2; ++i) {
      const double frequency = std::pow(1e4, -2.0 * (i % (dim_ / 2)) / dim_);
      const double angle = i / (dim_ / 2) * frequency;
      cos_.push_back(static_cast<float>(std::cos(angle)));
      sin_.push_back(static_cast<float>(std::sin(angle)));
    }
    p.cos = cos_.data(), p.sin = sin_.data();
  }

  int dim_;
  int64_t page_elements_, bank_pages_;
  Numbers numbers_;
  Bank bank_;
  std::vector<uint16_t> q_, k_, v_, out_;
  std::vector<unsigned char> valid_;
  std::vector<float> scales_, cos_, sin_, partial_, lse_;
  std::vector<int32_t> table_, len_, base_, num_pages_;
  std::vector<unsigned> tickets_;
};

void expect_close(const std::vector<float>& actual, const std::vector<float>& expected) {
  for (size_t i = 0; i < expected.size(); ++i) {
    const bool same = actual[i] == expected[i];  // both -inf
    expect(same || std::abs(actual[i] - expected[i]) < 0.008f,
           std::to_string(expected[i]) + " as result " + std::to_string(i) + ", got " +
               std::to_string(actual[i]));
  }
}

template <class Query, class Element, int D, bool kRotate, bool kPrefill>
void check_kernel(const Shape& shape, bool last_pages = false) {
  Problem<Query, Element> problem(shape, last_pages);
  MemoryAttentionParams& p = problem.p;
  const dim3 simple_grid = problem.plan(AttentionKernel::kSimple);
  emulator::launch(simple_grid, {kAttentionThreads}, simple_shared_bytes(D),
                   [&] { memory_attention_simple(p); });
  const std::vector<float> expected = problem.results();
  if (kPrefill) {
    const dim3 grid = problem.plan(AttentionKernel::kPrefill);
    emulator::launch(grid, {kAttentionThreads}, PrefillLayout<D>::kBytes,
                     [&] { memory_attention_prefill<Query, D>(p); });
  } else {
    const dim3 grid = problem.plan(AttentionKernel::kDecode);
    const int64_t bytes =
        decode_shared_bytes<Query, Element, D, kRotate>(p.page_splits > 0, p.segment_splits > 0);
    emulator::launch(grid, {kAttentionThreads}, bytes,
                     [&] { memory_attention_decode<Query, Element, D, kRotate>(p); });
  }
  expect_close(problem.results(), expected);
}

EMULATOR_CASE(decode_bf16) {
  check_kernel<BFloat16, BFloat16, 128, true, false>({128, 7, 1, 150, 600});
}

EMULATOR_CASE(decode_f16_long_pages) {
  check_kernel<Float16, Float16, 64, false, false>({64, 3, 4, 9, 100, false}, true);
}

EMULATOR_CASE(decode_int8_past_two_billion) {
  check_kernel<BFloat16, int8_t, 64, true, false>({64, 8, 2, 0, 1000}, true);
}

EMULATOR_CASE(decode_float8) {
  check_kernel<Float16, Float8E4M3, 128, true, false>({128, 1, 1, 70});
}

EMULATOR_CASE(prefill_bf16_past_two_billion) {
  check_kernel<BFloat16, BFloat16, 64, true, true>({64, 5, 14, 80}, true);
}

EMULATOR_CASE(prefill_int8) {
  check_kernel<Float16, int8_t, 128, true, true>({128, 2, 9, 70, 100});
}

EMULATOR_CASE(plan_covers_every_tile) {
  int64_t most = 0;
  for (int64_t tiles = 0; tiles < 10000; ++tiles) {
    const int64_t share = tiles_per_split(tiles), splits = num_splits(tiles);
    expect(splits * share >= tiles && (splits - 1) * share < tiles, "splits that are all used");
    expect(splits <= 64 && (share >= 2 && (tiles < 1024 || splits > 32)), "few and large splits");
    most = std::max(most, splits);
    expect(max_splits(tiles) >= most && max_splits(tiles) <= 64, "room for a shorter row's splits");
  }
}

EMULATOR_CASE(plan_chooses_kernels) {
  using enum AttentionKernel;
  constexpr Dtype kBf16 = Dtype::kBFloat16, kF16 = Dtype::kFloat16, kF32 = Dtype::kFloat32;
  expect(choose_kernel({kBf16, Dtype::kInt8, 128, 16, true}) == kDecode, "decode of 16 rows");
  expect(choose_kernel({kF16, kF16, 64, 17, true}) == kPrefill, "prefill of 17 rows");
  expect(choose_kernel({kBf16, kF16, 128, 7, true}) == kSimple, "no mixture on tensor cores");
  expect(choose_kernel({kF32, kF32, 128, 7, true}) == kSimple, "no float32 on tensor cores");
  expect(choose_kernel({kBf16, kBf16, 96, 7, true}) == kSimple, "two tuned head dimensions");
  expect(choose_kernel({kBf16, kBf16, 128, 7, false}) == kSimple, "aligned rows");
}

EMULATOR_CASE(plan_splits_one_row_block_only) {
  const AttentionGrid decode = plan_grid(AttentionKernel::kDecode, 7, 16, 24);
  expect(decode.blocks() == 8 + 12 && decode.block_rows == 7, "20 splits of two tiles");
  const AttentionGrid simple = plan_grid(AttentionKernel::kSimple, 40, 16, 24);
  expect(simple.blocks() == 3 && simple.splits() == 0, "three row blocks without splits");
  const AttentionGrid prefill = plan_grid(AttentionKernel::kPrefill, 40, 16, 24);
  expect(prefill.blocks() == 1 && prefill.block_rows == 40, "one block of 40 rows");
  expect(plan_grid(AttentionKernel::kDecode, 0, 4, 4).blocks() == 0, "nothing without queries");
  expect(plan_grid(AttentionKernel::kDecode, 7, 0, 0).blocks() == 1, "a block that writes zeros");
}

}  // namespace
}  // namespace lychee::cuda
