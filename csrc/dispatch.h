// SPDX-License-Identifier: Apache-2.0
// Element types of tensors as the kernels see them, and the switches from run-time codes to types.
// Torch-free. ISA files include it after their target pragma; nothing here has external linkage.
#pragma once

#include <stdint.h>

namespace lychee {

enum class Dtype : int { kFloat32, kBFloat16, kFloat16, kInt8, kFloat8E4M3 };

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};
struct Float8E4M3 {
  uint8_t bits;
};

namespace {

// Calls fn(T{}) with the input/output type T that `dtype` stands for.
template <class Fn>
inline void dispatch_io_dtype(Dtype dtype, const Fn& fn) {
  switch (dtype) {
    case Dtype::kBFloat16:
      return fn(BFloat16{});
    case Dtype::kFloat16:
      return fn(Float16{});
    default:
      return fn(0.0f);
  }
}

// The same for the types a bank page may have.
template <class Fn>
inline void dispatch_bank_dtype(Dtype dtype, const Fn& fn) {
  switch (dtype) {
    case Dtype::kInt8:
      return fn(int8_t{});
    case Dtype::kFloat8E4M3:
      return fn(Float8E4M3{});
    default:
      return dispatch_io_dtype(dtype, fn);
  }
}

}  // namespace
}  // namespace lychee
