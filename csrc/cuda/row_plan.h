// SPDX-License-Identifier: Apache-2.0
// How rows of head_dim elements are spread over threads: plain C++, no CUDA, no Torch.
#pragma once

#include <cstdint>
#include <initializer_list>

#include "dispatch.h"

namespace lychee::cuda {

constexpr int kLanesPerWarp = 32;

constexpr int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

constexpr int element_bytes(Dtype dtype) {
  if (dtype == Dtype::kFloat32) return 4;
  return dtype == Dtype::kInt8 || dtype == Dtype::kFloat8E4M3 ? 1 : 2;
}

// Elements of an input/output type in 16 bytes.
constexpr int fast_width(Dtype dtype) { return 16 / element_bytes(dtype); }

// Whether rows may be read and written in runs of `width` elements.
class Alignment {
 public:
  Alignment(int64_t width, int64_t half) : width_(width), holds_(half % width == 0) {}

  // Rows whose addresses are `data` plus multiples of `strides`; a null pointer stands for none.
  Alignment& rows(const void* data, int64_t element_size, std::initializer_list<int64_t> strides) {
    if (data == nullptr) return *this;
    const int64_t bytes = width_ * element_size < 16 ? width_ * element_size : 16;
    holds_ = holds_ && reinterpret_cast<uintptr_t>(data) % bytes == 0;
    for (int64_t stride : strides) holds_ = holds_ && stride % width_ == 0;
    return *this;
  }
  bool holds() const { return holds_; }

 private:
  int64_t width_;
  bool holds_;
};

// Lanes that share a row: each holds `width` elements of the first half and their partners in the
// second one. A power of two, so that shuffles stay among them; at most a warp, as half <= 128.
constexpr int lanes_per_row(int64_t half, int width) {
  int lanes = 1;
  while (lanes * width < half) lanes *= 2;
  return lanes;
}

}  // namespace lychee::cuda
