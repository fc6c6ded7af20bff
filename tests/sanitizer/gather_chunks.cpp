// SPDX-License-Identifier: Apache-2.0
// gather_chunks and its backward against scalar formulas in double precision. Table entries that
// are not in use hold garbage, and bank rows that no page in use covers must not be touched.
#include "cpu/gather_chunks.h"

#include "harness.h"

namespace {

using namespace lychee;
using sanitizer_test::is_close;
using sanitizer_test::is_quantised;
using sanitizer_test::random_below;
using sanitizer_test::Rows;

struct Shape {
  int64_t batch, max_pages, bank_pages, layers, heads, page_tokens, dim, gap;
  Dtype bank, dtype;
  bool rotate, streamed;
};

// Sizes 1, primes, the tuned 64 and 128, tails of every vector width; aligned rows and others.
const Shape kShapes[] = {
    {1, 1, 1, 1, 1, 1, 8, 0, Dtype::kFloat32, Dtype::kFloat32, true, false},
    {3, 5, 4, 2, 3, 3, 24, 8, Dtype::kInt8, Dtype::kBFloat16, true, false},
    {2, 4, 3, 1, 1, 7, 40, 8, Dtype::kFloat8E4M3, Dtype::kFloat32, true, true},
    {2, 3, 5, 2, 1, 5, 64, 0, Dtype::kInt8, Dtype::kBFloat16, true, true},
    {1, 3, 2, 1, 2, 6, 128, 0, Dtype::kBFloat16, Dtype::kBFloat16, false, true},
    {2, 3, 2, 1, 2, 6, 128, 8, Dtype::kBFloat16, Dtype::kFloat32, true, true},
    {2, 2, 2, 1, 2, 4, 72, 0, Dtype::kFloat16, Dtype::kFloat16, true, false},
    {1, 2, 2, 2, 1, 3, 256, 0, Dtype::kFloat32, Dtype::kFloat16, true, false},
    {2, 3, 0, 1, 1, 4, 16, 0, Dtype::kFloat32, Dtype::kFloat32, false, false},
    {0, 3, 2, 1, 1, 4, 16, 0, Dtype::kFloat32, Dtype::kFloat32, false, false},
};
constexpr int64_t kPositions = 90;
constexpr int32_t kGarbage = INT32_MIN;

// Pages of every batch entry: none in the first one, some of the others shared, full and empty.
struct Pages {
  explicit Pages(const Shape& s)
      : shape(s),
        page(s.batch * s.max_pages, kGarbage),
        len(page.size(), INT32_MAX),
        base(page),
        count(s.batch),
        covered(s.bank_pages),
        cos(kPositions, s.dim / 2, 0, Dtype::kFloat32),
        sin(kPositions, s.dim / 2, 0, Dtype::kFloat32) {
    cos.fill_random();
    sin.fill_random();
    for (int64_t b = 0; b < s.batch && s.bank_pages > 0; ++b) {
      count[b] = static_cast<int32_t>(s.batch == 1 ? s.max_pages : b * s.max_pages / s.batch);
      for (int64_t i = 0; i < count[b]; ++i) {
        const int64_t entry = b * s.max_pages + i;
        page[entry] = static_cast<int32_t>(random_below(s.bank_pages));
        len[entry] = static_cast<int32_t>(i == 0 ? s.page_tokens : random_below(s.page_tokens));
        base[entry] = static_cast<int32_t>(random_below(kPositions - s.page_tokens + 1));
        if (len[entry] > covered[page[entry]]) covered[page[entry]] = len[entry];
      }
    }
    table.batch = s.batch, table.max_pages = s.max_pages;
    table.page = page.data(), table.len = len.data(), table.num_pages = count.data();
    if (!s.rotate) return;
    table.base = base.data();
    table.cos = reinterpret_cast<const float*>(cos.data());
    table.sin = reinterpret_cast<const float*>(sin.data());
  }
  int64_t tokens(int64_t entry) const {
    return entry % shape.max_pages < count[entry / shape.max_pages] ? len[entry] : 0;
  }
  // Element d of R(base + token) x, or of R(-base - token) x, for row x of `rows`.
  double rotated(Rows& rows, int64_t row, int64_t d, int64_t entry, int64_t token, bool back) {
    const int64_t half = shape.dim / 2, e = d % half;
    if (!shape.rotate) return rows.at(row, d);
    const double c = cos.at(base[entry] + token, e), s = sin.at(base[entry] + token, e);
    const double x1 = rows.at(row, e), x2 = rows.at(row, e + half), sign = back ? -1 : 1;
    return d < half ? x1 * c - sign * x2 * s : x2 * c + sign * x1 * s;
  }

  const Shape& shape;
  std::vector<int32_t> page, len, base, count;
  std::vector<int64_t> covered;  // tokens of each page of the bank that somebody reads
  Rows cos, sin;
  PageTable table{};
};

// Calls fn(layer, batch entry, head, entry of the table, token) for all rows of the output.
template <class Fn>
void for_each_row(const Shape& s, const Fn& fn) {
  for (int64_t layer = 0; layer < s.layers; ++layer) {
    for (int64_t b = 0; b < s.batch; ++b) {
      for (int64_t head = 0; head < s.heads; ++head) {
        for (int64_t row = 0; row < s.max_pages * s.page_tokens; ++row) {
          fn(layer, b, head, b * s.max_pages + row / s.page_tokens, row % s.page_tokens);
        }
      }
    }
  }
}

void check_forward(const Shape& s, GatherChunksFn kernel) {
  Pages pages(s);
  const int64_t blocks = s.layers * s.heads * 2, tokens = s.max_pages * s.page_tokens;
  Rows kv(s.bank_pages * blocks * s.page_tokens, s.dim, s.gap, s.bank);
  Rows scale(s.bank_pages * blocks, s.page_tokens, s.gap, Dtype::kFloat32);
  kv.fill_random(is_quantised(s.bank) ? 120 : 1);
  scale.fill_random(0.01);
  for (int64_t block = 0; block < s.bank_pages * blocks; ++block) {
    const int64_t covered = pages.covered[block / blocks];
    scale.forbid(block, covered);
    for (int64_t j = covered; j < s.page_tokens; ++j) kv.forbid(block * s.page_tokens + j);
  }
  Rows k(s.layers * s.batch * s.heads * tokens, s.dim, s.gap, s.dtype);
  Rows v(s.layers * s.batch * s.heads * tokens, s.dim, s.gap, s.dtype);

  GatherChunksParams p{};
  p.table = pages.table;
  p.layers = s.layers, p.num_kv_heads = s.heads, p.page_tokens = s.page_tokens;
  p.head_dim = s.dim, p.bank_dtype = s.bank, p.dtype = s.dtype, p.streamed = s.streamed;
  p.kv = kv.data(), p.token_stride = kv.stride(), p.part_stride = s.page_tokens * kv.stride();
  p.head_stride = 2 * p.part_stride, p.layer_stride = s.heads * p.head_stride;
  p.page_stride = s.layers * p.layer_stride;
  p.kv_scale = is_quantised(s.bank) ? reinterpret_cast<float*>(scale.data()) : nullptr;
  p.scale_part_stride = scale.stride(), p.scale_head_stride = 2 * scale.stride();
  p.scale_layer_stride = s.heads * p.scale_head_stride;
  p.scale_page_stride = s.layers * p.scale_layer_stride;
  for (auto [rows, out] : {std::pair(&k, &p.k), std::pair(&v, &p.v)}) {
    out->data = rows->data(), out->token_stride = rows->stride();
    out->head_stride = tokens * rows->stride(), out->batch_stride = s.heads * out->head_stride;
    out->layer_stride = s.batch * out->batch_stride;
  }
  const int64_t items = s.batch * s.max_pages * s.layers * s.heads;
  kernel(p, 0, items / 3);
  kernel(p, items / 3, items);

  for_each_row(s, [&](int64_t layer, int64_t b, int64_t head, int64_t entry, int64_t token) {
    const int64_t out = ((layer * s.batch + b) * s.heads + head) * tokens +
                        entry % s.max_pages * s.page_tokens + token;
    const bool used = token < pages.tokens(entry);
    const int64_t block = used ? pages.page[entry] * blocks + (layer * s.heads + head) * 2 : 0;
    const int64_t key = block * s.page_tokens + token, value = key + s.page_tokens;
    const double key_scale = used && p.kv_scale ? scale.at(block, token) : 1;
    const double value_scale = used && p.kv_scale ? scale.at(block + 1, token) : 1;
    for (int64_t d = 0; d < s.dim; ++d) {
      const double wanted = used ? key_scale * pages.rotated(kv, key, d, entry, token, false) : 0;
      EXPECT(is_close(k.at(out, d), wanted, s.dtype));
      EXPECT(is_close(v.at(out, d), used ? value_scale * kv.at(value, d) : 0, s.dtype));
    }
  });
  k.check_gaps();
  v.check_gaps();
}

void check_backward(const Shape& s, GatherChunksBwdFn kernel) {
  Pages pages(s);
  const int64_t bank_layers = s.layers + 2, tokens = s.max_pages * s.page_tokens;
  const int64_t run = s.page_tokens, blocks = bank_layers * s.heads * 2;
  const Dtype bank = is_quantised(s.bank) ? Dtype::kFloat32 : s.bank;
  Rows dk(s.layers * s.batch * s.heads * tokens, s.dim, 0, s.dtype);
  Rows dv(s.layers * s.batch * s.heads * tokens, s.dim, 0, s.dtype);
  Rows dkv(s.bank_pages * blocks * run, s.dim, 0, bank);
  dk.fill_random();
  dv.fill_random();
  std::vector<double> wanted(s.bank_pages * blocks * run * s.dim);
  for_each_row(s, [&](int64_t layer, int64_t b, int64_t head, int64_t entry, int64_t token) {
    const int64_t from = ((layer * s.batch + b) * s.heads + head) * tokens +
                         entry % s.max_pages * s.page_tokens + token;
    if (token >= pages.tokens(entry)) {
      dk.forbid(from);
      dv.forbid(from);
      return;
    }
    const int64_t key =
        (pages.page[entry] * blocks + ((layer + 1) * s.heads + head) * 2) * run + token;
    for (int64_t d = 0; d < s.dim; ++d) {
      wanted[key * s.dim + d] += pages.rotated(dk, from, d, entry, token, true);
      wanted[(key + run) * s.dim + d] += dv.at(from, d);
    }
  });
  std::vector<int64_t> readers, begin(1);
  for (int64_t page = 0; page < s.bank_pages; ++page) {
    for (int64_t entry = 0; entry < s.batch * s.max_pages; ++entry) {
      const bool used = entry % s.max_pages < pages.count[entry / s.max_pages];
      if (used && pages.page[entry] == page) readers.push_back(entry);
    }
    begin.push_back(static_cast<int64_t>(readers.size()));
  }

  GatherChunksBwdParams p{};
  p.table = pages.table;
  p.layers = s.layers, p.num_kv_heads = s.heads, p.page_tokens = s.page_tokens;
  p.head_dim = s.dim, p.bank_layers = bank_layers, p.first_layer = 1;
  p.dk = dk.data(), p.dv = dv.data(), p.dkv = dkv.data();
  p.readers = readers.data(), p.reader_begin = begin.data();
  p.dtype = s.dtype, p.bank_dtype = bank;
  const int64_t items = s.bank_pages * bank_layers * s.heads;
  kernel(p, 0, items / 2);
  kernel(p, items / 2, items);
  for (int64_t row = 0; row < s.bank_pages * blocks * run; ++row) {
    for (int64_t d = 0; d < s.dim; ++d) {
      EXPECT(is_close(dkv.at(row, d), wanted[row * s.dim + d], bank, 4e-6));
    }
  }
}

CASE(gather_chunks) {
  for (const Shape& shape : kShapes) {
    for (auto kernel : RUNNABLE(gather_chunks)) check_forward(shape, kernel);
  }
}

CASE(gather_chunks_bwd) {
  for (const Shape& shape : kShapes) {
    for (auto kernel : RUNNABLE(gather_chunks_bwd)) check_backward(shape, kernel);
  }
}

}  // namespace
