// SPDX-License-Identifier: Apache-2.0
// Argument checks with one message format: "<op>: <argument>: expected <what>, got <value>".
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <functional>
#include <initializer_list>
#include <optional>
#include <stdexcept>
#include <string>
#include <string_view>

#include "dispatch.h"

namespace lychee {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

[[noreturn]] inline void fail(const char* op, const char* argument, const std::string& expected,
                              const std::string& got) {
  throw std::runtime_error(std::string(op) + ": " + argument + ": expected " + expected + ", got " +
                           got);
}

// Views, so that a check that passes builds no strings.
inline void check(bool condition, const char* op, const char* argument, std::string_view expected,
                  std::string_view got) {
  if (!condition) fail(op, argument, std::string(expected), std::string(got));
}

inline void check_range(int64_t value, int64_t low, int64_t high, const char* op,
                        const char* argument) {
  if (value < low || value > high) {
    fail(op, argument, std::to_string(low) + " <= value <= " + std::to_string(high),
         std::to_string(value));
  }
}

inline std::string shape_string(const Tensor& tensor) {
  std::string text = "[";
  for (int64_t i = 0; i < tensor.dim(); ++i) {
    text += (i ? ", " : "") + std::to_string(tensor.size(i));
  }
  return text + "]";
}

// The names Python prints.
inline std::string dtype_name(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float:
      return "float32";
    case ScalarType::Double:
      return "float64";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Half:
      return "float16";
    case ScalarType::Char:
      return "int8";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Long:
      return "int64";
    case ScalarType::Bool:
      return "bool";
    case ScalarType::Float8_e4m3fn:
      return "float8_e4m3fn";
    default:
      return torch::headeronly::toString(dtype);
  }
}

// A size of -1 in `sizes` matches anything.
inline void check_shape(const Tensor& tensor, std::initializer_list<int64_t> sizes, const char* op,
                        const char* argument) {
  bool same = tensor.dim() == static_cast<int64_t>(sizes.size());
  int64_t i = 0;
  for (int64_t size : sizes) {
    same = same && (size < 0 || tensor.size(i) == size);
    ++i;
  }
  if (same) return;
  std::string expected;
  for (int64_t size : sizes) {
    expected += (expected.empty() ? "" : ", ") + (size < 0 ? "*" : std::to_string(size));
  }
  fail(op, argument, "shape [" + expected + "]", shape_string(tensor));
}

inline void check_dtype(const Tensor& tensor, ScalarType dtype, const char* op,
                        const char* argument) {
  if (tensor.scalar_type() == dtype) return;
  fail(op, argument, "dtype " + dtype_name(dtype), dtype_name(tensor.scalar_type()));
}

inline void check_last_dim_contiguous(const Tensor& tensor, const char* op, const char* argument) {
  const int64_t last = tensor.dim() - 1;
  if (tensor.stride(last) == 1 || tensor.size(last) <= 1 || tensor.numel() == 0) return;
  fail(op, argument, "a contiguous last dimension",
       "stride " + std::to_string(tensor.stride(last)));
}

inline void check_contiguous(const Tensor& tensor, const char* op, const char* argument) {
  check(tensor.is_contiguous(), op, argument, "a contiguous tensor", "a strided view");
}

inline void check_cpu(const Tensor& tensor, const char* op, const char* argument) {
  check(tensor.is_cpu(), op, argument, "a CPU tensor", "a tensor on another device");
}

// That a tensor lies on the device an op runs on: check_cpu, or what CUDA has in its place.
using CheckDevice = std::function<void(const Tensor& tensor, const char* op, const char* argument)>;

inline Dtype io_dtype(ScalarType dtype, const char* op, const char* argument) {
  switch (dtype) {
    case ScalarType::Float:
      return Dtype::kFloat32;
    case ScalarType::BFloat16:
      return Dtype::kBFloat16;
    case ScalarType::Half:
      return Dtype::kFloat16;
    default:
      fail(op, argument, "dtype float32, bfloat16 or float16", dtype_name(dtype));
  }
}

inline Dtype io_dtype(const Tensor& tensor, const char* op, const char* argument) {
  return io_dtype(tensor.scalar_type(), op, argument);
}

inline Dtype bank_dtype(const Tensor& tensor, const char* op, const char* argument) {
  switch (tensor.scalar_type()) {
    case ScalarType::Char:
      return Dtype::kInt8;
    case ScalarType::Float8_e4m3fn:
      return Dtype::kFloat8E4M3;
    case ScalarType::Float:
    case ScalarType::BFloat16:
    case ScalarType::Half:
      return io_dtype(tensor, op, argument);
    default:
      fail(op, argument, "dtype float32, bfloat16, float16, int8 or float8_e4m3fn",
           dtype_name(tensor.scalar_type()));
  }
}

inline bool is_quantised(Dtype dtype) {
  return dtype == Dtype::kInt8 || dtype == Dtype::kFloat8E4M3;
}

// Head dimensions the kernels accept: the rotation needs halves, the row copies multiples of 8.
inline void check_head_dim(int64_t head_dim, const char* op, const char* argument) {
  check(head_dim % 8 == 0 && head_dim >= 8 && head_dim <= 256, op, argument,
        "a head dimension that is a multiple of 8, at most 256", std::to_string(head_dim));
}

}  // namespace lychee
