// SPDX-License-Identifier: Apache-2.0
// memory_attention and its backward against scalar formulas in double precision. Bank rows that no
// page covers must not be touched, masked rows of the segment hold NaN, scratch has no byte more
// than the kernels ask for.
#include "cpu/memory_attention.h"

#include "cpu/isa.h"
#include "cpu/memory_attention_bwd.h"
#include "harness.h"

namespace {

using namespace lychee;
using sanitizer_test::is_close;
using sanitizer_test::is_quantised;
using sanitizer_test::random_below;
using sanitizer_test::round_to;
using sanitizer_test::Rows;

struct Shape {
  int64_t batch, queries, keys, heads, kv_heads, dim, gap;
  int64_t pages, page_tokens;  // of the bank; each row reads up to pages + 1 of them
  Dtype dtype, bank;
  bool rotate, holes;
  int64_t query_stride;
};

// One query token takes the decode loops where vectors divide half the head, else the tiles. Row
// counts 1 to 8 of a kv head, several blocks and splits, tails of every vector width.
const Shape kShapes[] = {
    {1, 1, 1, 1, 1, 8, 0, 0, 0, Dtype::kFloat32, Dtype::kFloat32, false, false, 1},
    {3, 1, 5, 7, 1, 32, 8, 3, 70, Dtype::kFloat32, Dtype::kInt8, true, true, 1},
    {2, 1, 0, 2, 2, 64, 0, 2, 33, Dtype::kBFloat16, Dtype::kFloat8E4M3, true, false, 1},
    {2, 1, 3, 16, 2, 32, 0, 18, 3, Dtype::kFloat32, Dtype::kBFloat16, false, false, 1},
    {1, 1, 67, 4, 1, 128, 8, 0, 0, Dtype::kFloat16, Dtype::kFloat16, false, true, 1},
    {3, 7, 13, 3, 1, 24, 8, 3, 7, Dtype::kFloat32, Dtype::kInt8, true, true, 1},
    {2, 5, 2, 2, 2, 40, 8, 2, 65, Dtype::kBFloat16, Dtype::kBFloat16, true, false, 3},
    {1, 150, 150, 2, 1, 8, 0, 1, 5, Dtype::kFloat32, Dtype::kFloat32, false, false, 1},
    {2, 2, 3, 2, 1, 16, 0, 20, 1, Dtype::kFloat32, Dtype::kFloat8E4M3, true, false, 0},
    {1, 3, 4, 1, 1, 256, 0, 1, 66, Dtype::kFloat32, Dtype::kFloat16, true, false, 1},
    {1, 0, 3, 1, 1, 8, 0, 0, 0, Dtype::kFloat32, Dtype::kFloat32, false, false, 1},
    // of those that AMX takes, every way to its tiles, and rows in groups that are not full
    {2, 9, 12, 4, 2, 64, 8, 3, 70, Dtype::kBFloat16, Dtype::kInt8, true, true, 1},
    {1, 150, 150, 2, 1, 32, 0, 1, 5, Dtype::kBFloat16, Dtype::kBFloat16, false, false, 1},
    {1, 21, 70, 1, 1, 96, 8, 2, 33, Dtype::kBFloat16, Dtype::kFloat8E4M3, false, true, 3},
    {2, 2, 2, 16, 2, 32, 0, 20, 3, Dtype::kBFloat16, Dtype::kBFloat16, true, false, 1},
    {1, 16, 1, 1, 1, 128, 0, 2, 66, Dtype::kBFloat16, Dtype::kFloat32, true, false, 0},
};
constexpr int64_t kPositions = 150;

float* floats(Rows& rows) { return reinterpret_cast<float*>(rows.data()); }

// Inputs, and the keys each row sees, in double.
struct Problem {
  explicit Problem(const Shape& s)
      : shape(s),
        group(s.heads / s.kv_heads),
        scale(1 / sqrt(static_cast<double>(s.dim))),
        q(s.batch * s.heads * s.queries, s.dim, s.gap, s.dtype),
        k(s.batch * s.kv_heads * s.keys, s.dim, s.gap, s.dtype),
        v(s.batch * s.kv_heads * s.keys, s.dim, s.gap, s.dtype),
        kv(s.pages * s.kv_heads * 2 * s.page_tokens, s.dim, s.gap, s.bank),
        kv_scale(s.pages * s.kv_heads * 2, s.page_tokens, s.gap, Dtype::kFloat32),
        cos(kPositions, s.dim / 2, 0, Dtype::kFloat32),
        sin(kPositions, s.dim / 2, 0, Dtype::kFloat32),
        valid(new bool[s.batch * s.keys]) {
    for (Rows* x : {&q, &k, &v}) x->fill_random();
    kv.fill_random(is_quantised(s.bank) ? 120 : 1);
    kv_scale.fill_random(0.01);
    for (int64_t i = 0; i < kPositions; ++i) {
      for (int64_t d = 0; d < s.dim / 2; ++d) {
        const double angle = i * pow(100, -2.0 * d / s.dim);
        cos.put(i, d, round_to(Dtype::kFloat32, ::cos(angle)));
        sin.put(i, d, round_to(Dtype::kFloat32, ::sin(angle)));
      }
    }
    hide_keys();
    list_tiles();
    fill_params();
  }
  ~Problem() { delete[] valid; }

  void hide_keys() {
    for (int64_t i = 0; i < shape.batch * shape.keys; ++i) {
      valid[i] = !shape.holes || random_below(3) > 0;
      for (int64_t h = 0; h < shape.kv_heads && !valid[i]; ++h) {
        const int64_t row = (i / shape.keys * shape.kv_heads + h) * shape.keys + i % shape.keys;
        // every bit of these is set, which is NaN
        memset(k.row(row), 0xff, shape.dim * sanitizer_test::size_of(shape.dtype));
        memset(v.row(row), 0xff, shape.dim * sanitizer_test::size_of(shape.dtype));
      }
    }
  }

  void add_tiles(int64_t page, int64_t count, int64_t position) {
    for (int64_t j = 0; j < count; j += kTileKeys) {
      tiles.push_back({page, j, count - j < kTileKeys ? count - j : kTileKeys, position + j});
    }
  }

  // The first batch entry of several reads no page; pages may be empty, partial, read twice.
  void list_tiles() {
    std::vector<int64_t> covered(shape.pages);
    begin.push_back(0);
    for (int64_t b = 0; b < shape.batch; ++b) {
      const bool reads = shape.pages > 0 && (b > 0 || shape.batch == 1);
      for (int64_t i = 0; reads && i <= shape.pages; ++i) {
        const int64_t page = random_below(shape.pages), tokens = shape.page_tokens;
        const int64_t count = i == 0 ? tokens : random_below(tokens + 1);
        add_tiles(page, count, random_below(kPositions - count + 1));
        if (count > covered[page]) covered[page] = count;
      }
      add_tiles(-1, shape.keys, 0);
      begin.push_back(static_cast<int64_t>(tiles.size()));
    }
    for (int64_t block = 0; block < shape.pages * shape.kv_heads * 2; ++block) {
      const int64_t first = covered[block / (shape.kv_heads * 2)];
      kv_scale.forbid(block, first);
      for (int64_t j = first; j < shape.page_tokens; ++j) kv.forbid(block * shape.page_tokens + j);
    }
  }

  void fill_params() {
    const Shape& s = shape;
    p.batch = s.batch, p.num_queries = s.queries, p.num_keys = s.keys;
    p.num_heads = s.heads, p.num_kv_heads = s.kv_heads, p.head_dim = s.dim, p.dtype = s.dtype;
    p.q = q.data(), p.k = k.data(), p.v = v.data();
    p.q_token_stride = q.stride(), p.k_token_stride = k.stride(), p.v_token_stride = v.stride();
    p.q_head_stride = s.queries * q.stride(), p.q_batch_stride = s.heads * p.q_head_stride;
    p.k_head_stride = s.keys * k.stride(), p.k_batch_stride = s.kv_heads * p.k_head_stride;
    p.v_head_stride = s.keys * v.stride(), p.v_batch_stride = s.kv_heads * p.v_head_stride;
    p.kv = kv.data(), p.kv_scale = is_quantised(s.bank) ? floats(kv_scale) : nullptr;
    p.page_token_stride = kv.stride(), p.page_part_stride = s.page_tokens * kv.stride();
    p.page_head_stride = 2 * p.page_part_stride, p.page_stride = s.kv_heads * p.page_head_stride;
    p.scale_part_stride = kv_scale.stride(), p.scale_head_stride = 2 * kv_scale.stride();
    p.scale_page_stride = s.kv_heads * p.scale_head_stride, p.bank_dtype = s.bank;
    p.valid = s.holes ? valid : nullptr, p.valid_stride = s.keys;
    p.cos = s.rotate ? floats(cos) : nullptr, p.sin = s.rotate ? floats(sin) : nullptr;
    p.query_stride = s.query_stride, p.softmax_scale = static_cast<float>(scale);
    p.tiles = tiles.data(), p.tile_begin = begin.data();
  }

  // Where key j of a tile lies: a row of kv, whose value follows page_tokens later, or of k and v.
  int64_t row_of(const KeyTile& tile, int64_t b, int64_t head, int64_t j) const {
    return tile.page < 0
               ? (b * shape.kv_heads + head) * shape.keys + tile.first + j
               : (tile.page * shape.kv_heads + head) * 2 * shape.page_tokens + tile.first + j;
  }
  bool sees(const KeyTile& tile, int64_t b, int64_t t, int64_t j) const {
    if (tile.page >= 0) return true;
    const int64_t last = shape.keys - 1 - (shape.queries - 1 - t) * shape.query_stride;
    return tile.first + j <= last && valid[b * shape.keys + tile.first + j];
  }
  // Element d of x rotated to where key j stands, or back from there.
  double rotated(const std::vector<double>& x, const KeyTile& tile, int64_t j, int64_t d,
                 bool back) {
    if (tile.page < 0 || !shape.rotate) return x[d];
    const int64_t half = shape.dim / 2, e = d % half;
    const double c = cos.at(tile.position + j, e);
    const double s = sin.at(tile.position + j, e) * (back ? -1 : 1);
    return d < half ? x[e] * c - x[e + half] * s : x[e + half] * c + x[e] * s;
  }
  std::vector<double> key(const KeyTile& tile, int64_t row, int64_t j) {
    std::vector<double> x(shape.dim), out(shape.dim);
    const double factor = tile.page >= 0 ? scale_of(row) : 1;
    for (int64_t d = 0; d < shape.dim; ++d) x[d] = factor * (tile.page < 0 ? k : kv).at(row, d);
    for (int64_t d = 0; d < shape.dim; ++d) out[d] = rotated(x, tile, j, d, false);
    return out;
  }
  double value(const KeyTile& tile, int64_t row, int64_t d) {
    if (tile.page < 0) return v.at(row, d);
    return scale_of(row + shape.page_tokens) * kv.at(row + shape.page_tokens, d);
  }
  double scale_of(int64_t row) {
    return p.kv_scale ? kv_scale.at(row / shape.page_tokens, row % shape.page_tokens) : 1;
  }

  // Calls fn(tile, token of it, row of its key, score) for what query t of a head sees.
  template <class Fn>
  void for_each_key(int64_t b, int64_t h, int64_t t, const Fn& fn) {
    const int64_t query = (b * shape.heads + h) * shape.queries + t;
    for (int64_t i = begin[b]; i < begin[b + 1]; ++i) {
      for (int64_t j = 0; j < tiles[i].count; ++j) {
        if (!sees(tiles[i], b, t, j)) continue;
        const int64_t row = row_of(tiles[i], b, h / group, j);
        const std::vector<double> x = key(tiles[i], row, j);
        double score = 0;
        for (int64_t d = 0; d < shape.dim; ++d) score += q.at(query, d) * x[d];
        fn(tiles[i], j, row, score * scale);
      }
    }
  }
  // The log-sum-exp of a query and its output.
  double attend(int64_t b, int64_t h, int64_t t, std::vector<double>* out) {
    double sum = 0;
    out->assign(shape.dim, 0);
    for_each_key(b, h, t, [&](const KeyTile& tile, int64_t, int64_t row, double score) {
      sum += exp(score);
      for (int64_t d = 0; d < shape.dim; ++d) (*out)[d] += exp(score) * value(tile, row, d);
    });
    for (double& x : *out) x = sum > 0 ? x / sum : 0;
    return log(sum);
  }

  const Shape& shape;
  const int64_t group;
  const double scale;
  Rows q, k, v, kv, kv_scale, cos, sin;
  bool* valid;
  std::vector<KeyTile> tiles;
  std::vector<int64_t> begin;
  MemoryAttentionParams p{};
};

// `slack`: how far outputs may be off beyond their rounding.
void check_forward(const Shape& s, MemoryAttentionFn attend, MergeSplitsFn merge, double slack) {
  Problem problem(s);
  MemoryAttentionParams p = problem.p;
  p.block_tokens = kBlockRows / problem.group < s.queries ? kBlockRows / problem.group : s.queries;
  p.block_rows = p.block_tokens * problem.group;
  p.num_blocks = s.queries == 0 ? 0 : (s.queries - 1) / p.block_tokens + 1;
  p.num_splits = 1;
  for (int64_t b = 0; b < s.batch && p.num_blocks == 1; ++b) {
    const int64_t count = problem.begin[b + 1] - problem.begin[b];
    const int64_t splits = splits_of(count, p.block_rows);
    if (splits > p.num_splits) p.num_splits = splits;
  }
  const int64_t blocks = s.batch * s.kv_heads * p.num_blocks;
  p.partial_stride = padded_dim(s.dim) + kPadLanes;
  Rows partial(blocks * p.num_splits * p.block_rows, p.partial_stride, 0, Dtype::kFloat32);
  if (p.num_splits > 1) p.partial = floats(partial);
  const bool amx = attend == memory_attention_amx;
  if (amx && !amx_takes(p)) return;
  const auto scratch_floats = amx ? memory_attention_amx_scratch : memory_attention_scratch;
  Rows scratch(1, scratch_floats(s.dim, p.block_rows), 0, Dtype::kFloat32);
  Rows out(s.batch * s.queries * s.heads, s.dim, 0, s.dtype);
  Rows lse(s.batch * s.heads, s.queries, 0, Dtype::kFloat32);
  p.out = out.data(), p.lse = floats(lse);
  for (int64_t item = 0; item < blocks * p.num_splits; ++item) attend(p, item, floats(scratch));
  for (int64_t block = 0; block < blocks && p.num_splits > 1; ++block) merge(p, block);

  std::vector<double> wanted;
  for (int64_t i = 0; i < s.batch * s.heads * s.queries; ++i) {
    const int64_t b = i / s.queries / s.heads, h = i / s.queries % s.heads, t = i % s.queries;
    const double total = problem.attend(b, h, t, &wanted), actual = lse.at(b * s.heads + h, t);
    EXPECT(total == -INFINITY ? actual == total : fabs(actual - total) < 4e-6);
    for (int64_t d = 0; d < s.dim; ++d) {
      EXPECT(is_close(out.at((b * s.queries + t) * s.heads + h, d), wanted[d], s.dtype, slack));
    }
  }
}

// Every tile of a page has its own slot; those of a page add up in the end.
struct Slots {
  Slots(const Problem& problem, MemoryAttentionBwdParams* p) {
    const Shape& s = problem.shape;
    std::vector<std::vector<int64_t>> of_page(s.pages);
    int64_t count = 0;
    for (int64_t b = 0; b < s.batch; ++b) {
      if (b % p->chunk_batch == 0) begin.push_back(count);
      for (int64_t i = problem.begin[b]; i < problem.begin[b + 1]; ++i) {
        const int64_t page = problem.tiles[i].page;
        of_tile.push_back(page < 0 ? -1 : count);
        if (page >= 0) of_page[page].push_back(count++);
      }
    }
    begin.push_back(count);
    page_begin.push_back(0);
    for (int64_t page = 0; page < s.pages; ++page) {
      if (of_page[page].empty()) continue;
      pages.push_back(page);
      page_slots.insert(page_slots.end(), of_page[page].begin(), of_page[page].end());
      page_begin.push_back(static_cast<int64_t>(page_slots.size()));
    }
    sums.assign(count * s.kv_heads * 2 * s.page_tokens * s.dim, 7.0f);
    p->tile_slot = of_tile.data(), p->slot_begin = begin.data(), p->slots = sums.data();
    p->page_tokens = s.page_tokens, p->pages = pages.data(), p->page_begin = page_begin.data();
    p->page_slots = page_slots.data();
  }
  std::vector<int64_t> of_tile, begin, pages, page_begin, page_slots;
  std::vector<float> sums;
};

// Gradients in double, rows as in the buffers they stand for.
struct Wanted {
  explicit Wanted(const Shape& s)
      : dim(s.dim),
        dq(s.batch * s.heads * s.queries * s.dim),
        dk(s.batch * s.kv_heads * s.keys * s.dim),
        dv(dk.size()),
        dkv(s.pages * s.kv_heads * 2 * s.page_tokens * s.dim) {}
  // What query t of a head adds.
  void add(Problem& problem, int64_t b, int64_t h, int64_t t, Rows& dout, Rows& out, double lse) {
    const int64_t query = (b * problem.shape.heads + h) * problem.shape.queries + t;
    double delta = 0;
    for (int64_t d = 0; d < dim; ++d) delta += dout.at(query, d) * out.at(query, d);
    problem.for_each_key(b, h, t, [&](const KeyTile& tile, int64_t j, int64_t row, double score) {
      const double weight = exp(score - lse);
      const std::vector<double> key = problem.key(tile, row, j);
      std::vector<double> dkey(dim);
      double dscore = 0;
      for (int64_t d = 0; d < dim; ++d) dscore += dout.at(query, d) * problem.value(tile, row, d);
      dscore = weight * (dscore - delta) * problem.scale;
      const bool page = tile.page >= 0;
      const int64_t value = page ? row + problem.shape.page_tokens : row;
      for (int64_t d = 0; d < dim; ++d) {
        dq[query * dim + d] += dscore * key[d];
        dkey[d] = dscore * problem.q.at(query, d);
        (page ? dkv : dv)[value * dim + d] += weight * dout.at(query, d);
      }
      for (int64_t d = 0; d < dim; ++d) {
        (page ? dkv : dk)[row * dim + d] += problem.rotated(dkey, tile, j, d, true);
      }
    });
  }
  const int64_t dim;
  std::vector<double> dq, dk, dv, dkv;
};

void expect_close(Rows& actual, const std::vector<double>& wanted, int64_t dim) {
  for (int64_t i = 0; i < static_cast<int64_t>(wanted.size()); ++i) {
    EXPECT(is_close(actual.at(i / dim, i % dim), wanted[i], actual.dtype, 2e-5));
  }
}

void check_backward(const Shape& s, MemoryAttentionBwdFn kernel, SumSlotsFn sum) {
  Problem problem(s);
  Wanted wanted(s);
  const int64_t query_rows = s.batch * s.heads * s.queries, page = s.kv_heads * 2 * s.page_tokens;
  Rows dout(query_rows, s.dim, s.gap, s.dtype), out(query_rows, s.dim, s.gap, s.dtype);
  Rows lse(1, query_rows, 0, Dtype::kFloat32);
  dout.fill_random();
  std::vector<double> row;
  for (int64_t i = 0; i < query_rows; ++i) {
    const int64_t b = i / s.queries / s.heads, h = i / s.queries % s.heads, t = i % s.queries;
    const double total = problem.attend(b, h, t, &row);
    lse.put(0, i, total);
    for (int64_t d = 0; d < s.dim; ++d) out.put(i, d, round_to(s.dtype, row[d]));
    wanted.add(problem, b, h, t, dout, out, total);
  }
  Rows dq(query_rows, s.dim, 0, s.dtype), dk(s.batch * s.kv_heads * s.keys, s.dim, 0, s.dtype);
  Rows dv(s.batch * s.kv_heads * s.keys, s.dim, 0, s.dtype);
  Rows dkv(s.pages * page, s.dim, 0, s.bank);
  Rows scratch(1, memory_attention_bwd_scratch(s.dim, s.queries * problem.group), 0,
               Dtype::kFloat32);

  MemoryAttentionBwdParams p{};
  p.in = problem.p, p.chunk_batch = 2;
  p.dout = dout.data(), p.out = out.data(), p.lse = floats(lse);
  p.dout_token_stride = dout.stride(), p.out_token_stride = out.stride();
  p.dout_head_stride = s.queries * dout.stride(), p.out_head_stride = s.queries * out.stride();
  p.dout_batch_stride = s.heads * p.dout_head_stride;
  p.out_batch_stride = s.heads * p.out_head_stride;
  p.dq = dq.data(), p.dk = dk.data(), p.dv = dv.data(), p.dkv = dkv.data();
  p.dkv_page_stride = page * s.dim;
  const bool bank_wanted = s.pages > 0 && !is_quantised(s.bank);
  const Slots slots(problem, &p);
  if (!bank_wanted) p.tile_slot = nullptr;
  const int64_t items = (s.batch + 1) / p.chunk_batch * s.kv_heads;
  for (int64_t item = 0; item < items; ++item) kernel(p, item, floats(scratch));
  const int64_t sums = bank_wanted ? static_cast<int64_t>(slots.pages.size()) * s.kv_heads : 0;
  memset(dkv.data(), 0, wanted.dkv.size() * sanitizer_test::size_of(s.bank));
  for (int64_t index = 0; index < sums; ++index) sum(p, index);
  expect_close(dq, wanted.dq, s.dim);
  expect_close(dk, wanted.dk, s.dim);
  expect_close(dv, wanted.dv, s.dim);
  if (bank_wanted) expect_close(dkv, wanted.dkv, s.dim);
}

CASE(memory_attention) {
  const auto attend = RUNNABLE(memory_attention);
  const auto merge = RUNNABLE(merge_splits);
  for (const Shape& shape : kShapes) {
    for (size_t i = 0; i < attend.size(); ++i) check_forward(shape, attend[i], merge[i], 4e-6);
  }
}

// Its weights and dequantised values, of at most 1.2, are rounded to bfloat16.
CASE(memory_attention_in_tiles) {
  if (!may_use_amx()) return;
  for (const Shape& shape : kShapes) {
    check_forward(shape, memory_attention_amx, RUNNABLE(merge_splits).back(), 0x1p-8);
  }
}

CASE(memory_attention_bwd) {
  const auto kernel = RUNNABLE(memory_attention_bwd);
  const auto sum = RUNNABLE(sum_slots);
  for (const Shape& shape : kShapes) {
    for (size_t i = 0; i < kernel.size(); ++i) check_backward(shape, kernel[i], sum[i]);
  }
}

}  // namespace
