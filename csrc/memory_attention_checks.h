// SPDX-License-Identifier: Apache-2.0
// Checks of memory_attention's arguments, for every device. No value that may lie on a device is
// read: page tables are checked for shape and dtype only.
#pragma once

#include <optional>
#include <utility>

#include "check.h"

namespace lychee {

using OptionalTensor = std::optional<Tensor>;

struct MemoryAttentionInputs {
  const Tensor &q, &k, &v;
  const OptionalTensor &kv, &kv_scale;
  int64_t layer;
  const OptionalTensor &page_table, &page_len, &page_base, &num_pages, &valid, &cos, &sin;
  int64_t rope_mode, query_stride;
  double softmax_scale;

  bool rotated() const { return kv.has_value() && rope_mode == 1; }
};

// Calls check_device(tensor, op, argument) for every tensor.
template <class CheckDevice>
class MemoryAttentionCheck {
 public:
  MemoryAttentionCheck(const MemoryAttentionInputs& inputs, const CheckDevice& check_device,
                       const char* op)
      : in_(inputs), check_device_(check_device), op_(op) {}

  void run() const {
    const Tensor &q = in_.q, &k = in_.k;
    check_device_(q, op_, "q");
    check_shape(q, {-1, -1, -1, -1}, op_, "q");
    check_last_dim_contiguous(q, op_, "q");
    check_shape(k, {q.size(0), -1, -1, q.size(3)}, op_, "k");
    check_range(in_.query_stride, 0, INT32_MAX, op_, "query_stride");
    check_range(in_.rope_mode, 0, 1, op_, "rope_mode");
    io_dtype(q, op_, "q");
    check_head_dim(q.size(3), op_, "q");
    check(q.size(1) > 0, op_, "q", "at least one head", "0");
    check(k.size(1) > 0 && q.size(1) % k.size(1) == 0, op_, "k", "a head count that divides q's",
          std::to_string(k.size(1)));
    check_segment(k, "k");
    check_segment(in_.v, "v");
    if (in_.valid.has_value()) check_valid(*in_.valid);
    if (!in_.kv.has_value()) return;
    check_bank(*in_.kv);
    if (in_.rotated()) check_tables();
    check_pages();
  }

 private:
  void check_segment(const Tensor& t, const char* argument) const {
    const Tensor &q = in_.q, &k = in_.k;
    check_device_(t, op_, argument);
    check_shape(t, {q.size(0), k.size(1), k.size(2), q.size(3)}, op_, argument);
    check_dtype(t, q.scalar_type(), op_, argument);
    check_last_dim_contiguous(t, op_, argument);
  }

  void check_valid(const Tensor& valid) const {
    check_device_(valid, op_, "valid");
    check_shape(valid, {in_.q.size(0), in_.k.size(2)}, op_, "valid");
    check_dtype(valid, ScalarType::Bool, op_, "valid");
    check_last_dim_contiguous(valid, op_, "valid");
  }

  void check_bank(const Tensor& kv) const {
    check_device_(kv, op_, "kv");
    check_shape(kv, {-1, -1, in_.k.size(1), 2, -1, in_.q.size(3)}, op_, "kv");
    check_last_dim_contiguous(kv, op_, "kv");
    check_range(in_.layer, 0, kv.size(1) - 1, op_, "layer");
    const bool quantised = is_quantised(bank_dtype(kv, op_, "kv"));
    const OptionalTensor& scale = in_.kv_scale;
    check(quantised == scale.has_value(), op_, "kv_scale",
          quantised ? "a tensor with this bank dtype" : "None with this bank dtype",
          scale.has_value() ? "a tensor" : "None");
    if (!quantised) return;
    check_device_(*scale, op_, "kv_scale");
    check_shape(*scale, {kv.size(0), kv.size(1), in_.k.size(1), 2, kv.size(4)}, op_, "kv_scale");
    check_dtype(*scale, ScalarType::Float, op_, "kv_scale");
    check_last_dim_contiguous(*scale, op_, "kv_scale");
  }

  void check_tables() const {
    const int64_t half = in_.q.size(3) / 2;
    check(in_.cos.has_value() && in_.sin.has_value(), op_, "cos",
          "cos and sin when rope_mode is affine", "None");
    check_shape(*in_.cos, {-1, half}, op_, "cos");
    check_shape(*in_.sin, {in_.cos->size(0), half}, op_, "sin");
    for (const auto& [table, name] : {std::pair(*in_.cos, "cos"), std::pair(*in_.sin, "sin")}) {
      check_device_(table, op_, name);
      check_dtype(table, ScalarType::Float, op_, name);
      check_contiguous(table, op_, name);
    }
  }

  void check_pages() const {
    const int64_t batch = in_.q.size(0);
    check_page_ints(in_.page_table, {batch, -1}, "page_table");
    const int64_t max_pages = in_.page_table->size(1);
    check_page_ints(in_.page_len, {batch, max_pages}, "page_len");
    check_page_ints(in_.num_pages, {batch}, "num_pages");
    if (in_.rotated()) check_page_ints(in_.page_base, {batch, max_pages}, "page_base");
  }

  void check_page_ints(const OptionalTensor& t, std::initializer_list<int64_t> sizes,
                       const char* argument) const {
    check(t.has_value(), op_, argument, "a tensor when kv is given", "None");
    check_device_(*t, op_, argument);
    check_shape(*t, sizes, op_, argument);
    check_dtype(*t, ScalarType::Int, op_, argument);
    check_contiguous(*t, op_, argument);
  }

  const MemoryAttentionInputs& in_;
  const CheckDevice& check_device_;
  const char* op_;
};

}  // namespace lychee
