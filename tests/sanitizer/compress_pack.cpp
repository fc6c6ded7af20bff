// SPDX-License-Identifier: Apache-2.0
// compress_pack, its backward and write_memory against scalar formulas in double precision.
#include "cpu/compress_pack.h"

#include "harness.h"

namespace {

using namespace lychee;
using sanitizer_test::get;
using sanitizer_test::is_close;
using sanitizer_test::is_quantised;
using sanitizer_test::round_to;
using sanitizer_test::Rows;
using sanitizer_test::size_of;

struct Shape {
  int64_t batch, groups, ratio, heads, kv_heads, dim, gap;
  Dtype dtype, bank;
  bool memory_only, stream;
};

// Sizes 1, primes, the tuned 64 and 128, tails of every vector width, several row tiles.
const Shape kShapes[] = {
    {1, 1, 1, 1, 1, 8, 0, Dtype::kFloat32, Dtype::kFloat32, false, false},
    {3, 7, 5, 3, 1, 24, 8, Dtype::kFloat32, Dtype::kInt8, false, false},
    {2, 5, 3, 2, 2, 40, 8, Dtype::kBFloat16, Dtype::kFloat8E4M3, true, false},
    {1, 9, 4, 3, 1, 64, 0, Dtype::kBFloat16, Dtype::kInt8, false, true},
    {2, 4, 4, 2, 1, 128, 8, Dtype::kBFloat16, Dtype::kBFloat16, false, false},
    {1, 4, 4, 2, 2, 128, 0, Dtype::kFloat32, Dtype::kFloat8E4M3, false, true},
    {1, 3, 2, 1, 1, 72, 8, Dtype::kFloat16, Dtype::kFloat16, true, false},
    {1, 2, 2, 1, 1, 64, 0, Dtype::kFloat16, Dtype::kInt8, false, true},
    {1, 2, 3, 1, 1, 256, 0, Dtype::kFloat32, Dtype::kBFloat16, false, false},
};
constexpr int64_t kPositions = 50, kPageTokens = 3, kPages = 40;

// A window's tables and row order; positions are scattered.
struct Window {
  explicit Window(const Shape& s)
      : shape(s),
        rows(s.groups * (s.ratio + 1)),
        half(s.dim / 2),
        cos(kPositions, half, 0, Dtype::kFloat32),
        sin(kPositions, half, 0, Dtype::kFloat32),
        positions(s.batch * rows) {
    cos.fill_random();
    sin.fill_random();
    for (int64_t& x : positions) {
      x = static_cast<int64_t>((sanitizer_test::random_value() + 1) * (kPositions / 2 - 0.5));
    }
    order.batch = s.batch, order.ratio = s.ratio;
    order.window = s.groups * s.ratio, order.memory = s.groups, order.half = half;
    order.cos = reinterpret_cast<const float*>(cos.data());
    order.sin = reinterpret_cast<const float*>(sin.data());
    order.positions = positions.data();
  }
  bool is_memory(int64_t row) const { return row % (shape.ratio + 1) == shape.ratio; }
  int64_t group(int64_t row) const { return row / (shape.ratio + 1); }
  int64_t segment(int64_t b, int64_t row) const {
    return is_memory(row) ? shape.batch * order.window + b * shape.groups + group(row)
                          : b * order.window + row - group(row);
  }
  // Element d of R(position) x, or of R(-position) x.
  double rotated(const double* x, int64_t b, int64_t row, int64_t d, bool back) {
    const int64_t position = positions[b * rows + row], e = d % half;
    const double c = cos.at(position, e), s = sin.at(position, e) * (back ? -1 : 1);
    return d < half ? x[e] * c - x[e + half] * s : x[e + half] * c + x[e] * s;
  }

  const Shape& shape;
  const int64_t rows, half;
  Rows cos, sin;
  std::vector<int64_t> positions;
  RowOrder order{};
};

std::vector<double> values(Rows& rows, int64_t i, int64_t size) {
  std::vector<double> x(size);
  for (int64_t d = 0; d < size; ++d) x[d] = rows.at(i, d);
  return x;
}

// One row as a bank stores it: exactly the kernel's float arithmetic, and another rounding.
void check_stored(const std::vector<double>& x, const char* stored, double scale, Dtype bank) {
  const int64_t size = static_cast<int64_t>(x.size());
  if (!is_quantised(bank)) {
    for (int64_t d = 0; d < size; ++d) EXPECT(get(bank, stored, d) == round_to(bank, x[d]));
    return;
  }
  const float level = bank == Dtype::kInt8 ? 127.0f : 448.0f;
  float amax = 0;
  for (double value : x) amax = fmaxf(amax, fabsf(static_cast<float>(value)));
  EXPECT(scale == (amax == 0 ? 0 : amax / level));
  for (int64_t d = 0; d < size; ++d) {
    float y = amax == 0 ? 0 : static_cast<float>(x[d]) * (level / amax);
    y = fminf(fmaxf(y, -level), level);
    EXPECT(get(bank, stored, d) == round_to(bank, y));
  }
}

// A bank of kPages pages, and slots for each memory row, some of them skipped.
struct Bank {
  explicit Bank(const Shape& s)
      : shape(s),
        kv(kPages * s.kv_heads * 2 * kPageTokens, s.dim, s.gap, s.bank),
        scale(kPages * s.kv_heads * 2, kPageTokens, s.gap, Dtype::kFloat32) {
    for (int64_t i = 0; i < s.batch * s.groups; ++i) slots.push_back(i % 5 == 3 ? -1 : 2 * i + 1);
    writer.data = kv.data();
    writer.scale = is_quantised(s.bank) ? reinterpret_cast<float*>(scale.data()) : nullptr;
    writer.dtype = s.bank;
    writer.page_tokens = kPageTokens;
    writer.token_stride = kv.stride();
    writer.part_stride = kPageTokens * writer.token_stride;
    writer.head_stride = 2 * writer.part_stride;
    writer.page_stride = s.kv_heads * writer.head_stride;
    writer.scale_part_stride = scale.stride();
    writer.scale_head_stride = 2 * writer.scale_part_stride;
    writer.scale_page_stride = s.kv_heads * writer.scale_head_stride;
    writer.slots = slots.data();
  }
  // k and v hold rows of kv_heads heads; memory row i is row first + i of them.
  void check(Rows& k, Rows& v, int64_t first) {
    std::vector<bool> written(kPages * kPageTokens);
    for (int64_t i = 0; i < static_cast<int64_t>(slots.size()); ++i) {
      if (slots[i] < 0) continue;
      written[slots[i]] = true;
      for (int64_t h = 0; h < shape.kv_heads; ++h) {
        for (int part = 0; part < 2; ++part) {
          const int64_t block = (slots[i] / kPageTokens * shape.kv_heads + h) * 2 + part;
          const int64_t token = slots[i] % kPageTokens;
          check_stored(values(part ? v : k, (first + i) * shape.kv_heads + h, shape.dim),
                       kv.row(block * kPageTokens + token),
                       writer.scale ? scale.at(block, token) : 0, shape.bank);
        }
      }
    }
    for (int64_t slot = 0; slot < kPages * kPageTokens; ++slot) {
      for (int64_t block = 0; block < 2 * shape.kv_heads && !written[slot]; ++block) {
        const int64_t at = slot / kPageTokens * 2 * shape.kv_heads + block;
        EXPECT(kv.untouched(at * kPageTokens + slot % kPageTokens));
      }
    }
    kv.check_gaps();
    scale.check_gaps();
  }

  const Shape& shape;
  Rows kv, scale;
  std::vector<int64_t> slots;
  BankWriter writer{};
};

void check_forward(const Shape& s, CompressPackFn kernel) {
  Window window(s);
  Bank bank(s);
  const int64_t rows = window.rows, all = s.batch * rows,
                query_rows = s.memory_only ? s.groups : rows;
  Rows q(s.batch * query_rows * s.heads, s.dim, s.gap, s.dtype);
  Rows k(all * s.kv_heads, s.dim, s.gap, s.dtype), v(all * s.kv_heads, s.dim, s.gap, s.dtype);
  for (Rows* x : {&q, &k, &v}) x->fill_random();
  memset(k.row(all * s.kv_heads - 1), 0, s.dim * size_of(s.dtype));  // a row with scale 0
  Rows q_rot(s.batch * s.heads * query_rows, s.dim, 0, s.dtype);
  Rows k_rot(all * s.kv_heads, s.dim, 0, s.dtype), v_out(all * s.kv_heads, s.dim, 0, s.dtype);
  const int64_t kept = s.batch * s.groups * s.kv_heads;
  Rows mem_k(kept, s.dim, 0, s.dtype), mem_v(kept, s.dim, 0, s.dtype);

  CompressPackParams p{};
  p.order = window.order;
  p.num_heads = s.heads, p.num_kv_heads = s.kv_heads, p.head_dim = s.dim;
  p.memory_queries_only = s.memory_only;
  p.dtype = s.dtype;
  p.q = q.data(), p.q_head_stride = q.stride(), p.q_row_stride = s.heads * q.stride();
  p.k = k.data(), p.k_head_stride = k.stride(), p.k_row_stride = s.kv_heads * k.stride();
  p.v = v.data(), p.v_head_stride = v.stride(), p.v_row_stride = s.kv_heads * v.stride();
  p.q_rot = q_rot.data(), p.k_rot = k_rot.data(), p.v_out = v_out.data();
  p.stream_q = p.stream_kv = s.stream;
  p.mem_k = mem_k.data(), p.mem_v = mem_v.data();
  p.bank = bank.writer;
  kernel(p, 0, all / 3);
  kernel(p, all / 3, all);

  for (int64_t i = 0; i < all; ++i) {
    const int64_t b = i / rows, row = i % rows, from = window.segment(b, row);
    const bool memory = window.is_memory(row);
    for (int64_t h = 0; h < s.heads && (memory || !s.memory_only); ++h) {
      const int64_t at = s.memory_only ? window.group(row) : row;
      const auto x = values(q, (s.memory_only ? b * s.groups + at : from) * s.heads + h, s.dim);
      for (int64_t d = 0; d < s.dim; ++d) {
        const double exact = window.rotated(x.data(), b, row, d, false);
        EXPECT(is_close(q_rot.at((b * s.heads + h) * query_rows + at, d), exact, s.dtype));
      }
    }
    for (int64_t h = 0; h < s.kv_heads; ++h) {
      const int64_t in = from * s.kv_heads + h, out = (b * s.kv_heads + h) * rows + row;
      const int64_t mem = (b * s.kv_heads + h) * s.groups + window.group(row);
      const auto x = values(k, in, s.dim);
      for (int64_t d = 0; d < s.dim; ++d) {
        const double exact = window.rotated(x.data(), b, row, d, false);
        EXPECT(is_close(k_rot.at(out, d), exact, s.dtype));
        EXPECT(v_out.at(out, d) == v.at(in, d));
        if (memory) EXPECT(mem_k.at(mem, d) == k.at(in, d) && mem_v.at(mem, d) == v.at(in, d));
      }
    }
  }
  bank.check(k, v, s.batch * window.order.window);
}

void check_backward(const Shape& s, CompressPackBwdFn kernel, bool with_grad, bool rotate) {
  Window window(s);
  const int64_t rows = window.rows, all = s.batch * rows,
                grad_rows = s.memory_only ? s.groups : rows;
  Rows grad(s.batch * s.heads * grad_rows, s.dim, s.gap, s.dtype);
  Rows mem_grad(s.batch * s.heads * s.groups, s.dim, s.gap, s.dtype);
  Rows out(s.batch * grad_rows * s.heads, s.dim, 0, s.dtype);
  grad.fill_random();
  mem_grad.fill_random();

  CompressPackBwdParams p{};
  p.order = window.order;
  if (!rotate) p.order.cos = p.order.sin = nullptr;
  p.num_heads = s.heads, p.head_dim = s.dim;
  p.memory_only = s.memory_only;
  p.dtype = s.dtype;
  p.grad = with_grad ? grad.data() : nullptr;
  p.grad_row_stride = grad.stride(), p.grad_head_stride = grad_rows * grad.stride();
  p.grad_batch_stride = s.heads * p.grad_head_stride;
  p.mem_grad = mem_grad.data();
  p.mem_row_stride = mem_grad.stride(), p.mem_head_stride = s.groups * mem_grad.stride();
  p.mem_batch_stride = s.heads * p.mem_head_stride;
  p.out = out.data();
  p.stream = s.stream;
  kernel(p, 0, all / 2);
  kernel(p, all / 2, all);

  for (int64_t i = 0; i < all; ++i) {
    const int64_t b = i / rows, row = i % rows, j = window.group(row);
    if (s.memory_only && !window.is_memory(row)) continue;
    for (int64_t h = 0; h < s.heads; ++h) {
      const int64_t at = s.memory_only ? j : row;
      const int64_t to = s.memory_only ? b * s.groups + j : window.segment(b, row);
      const auto x = values(grad, (b * s.heads + h) * grad_rows + at, s.dim);
      for (int64_t d = 0; d < s.dim; ++d) {
        double exact = rotate ? window.rotated(x.data(), b, row, d, true) : x[d];
        if (!with_grad) exact = 0;
        if (window.is_memory(row)) exact += mem_grad.at((b * s.heads + h) * s.groups + j, d);
        EXPECT(is_close(out.at(to * s.heads + h, d), exact, s.dtype));
      }
    }
  }
}

CASE(compress_pack) {
  for (const Shape& shape : kShapes) {
    for (auto kernel : RUNNABLE(compress_pack)) check_forward(shape, kernel);
  }
}

CASE(compress_pack_bwd) {
  for (const Shape& shape : kShapes) {
    for (auto kernel : RUNNABLE(compress_pack_bwd)) {
      check_backward(shape, kernel, true, true);
      check_backward(shape, kernel, true, false);
      check_backward(shape, kernel, false, false);
    }
  }
}

CASE(write_memory) {
  for (const Shape& s : kShapes) {
    for (auto kernel : RUNNABLE(write_memory)) {
      Bank bank(s);
      const int64_t memory = s.batch * s.groups;
      Rows k(memory * s.kv_heads, s.dim, s.gap, s.dtype),
          v(memory * s.kv_heads, s.dim, s.gap, s.dtype);
      k.fill_random();
      v.fill_random();
      CompressPackParams p{};
      p.num_kv_heads = s.kv_heads, p.head_dim = s.dim, p.dtype = s.dtype;
      p.k = k.data(), p.k_head_stride = k.stride(), p.k_row_stride = s.kv_heads * k.stride();
      p.v = v.data(), p.v_head_stride = v.stride(), p.v_row_stride = s.kv_heads * v.stride();
      p.bank = bank.writer;
      kernel(p, 0, memory / 2);
      kernel(p, memory / 2, memory);
      bank.check(k, v, 0);
    }
  }
}

}  // namespace
