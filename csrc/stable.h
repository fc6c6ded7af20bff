// SPDX-License-Identifier: Apache-2.0
// What the kernels need of the stable ABI beyond tensors: output allocation, its poison, the
// current CUDA stream.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/shim_utils.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <vector>

#include "huge_pages.h"

// Only a torch with CUDA has it: weak, so that the library also loads into others.
extern "C" __attribute__((weak)) AOTITorchError
aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);

namespace lychee {

// LYCHEE_POISON=1 fills every fresh output with 0xFF bytes: NaN in every float type, -1 in signed
// integers, so that an element a kernel forgot to write cannot pass a test.
inline bool poison_outputs() {
  const char* value = std::getenv("LYCHEE_POISON");
  return value != nullptr && std::strcmp(value, "1") == 0;
}

// A dense tensor whose dimensions lie in memory in the order `memory_order` (outermost first).
inline torch::stable::Tensor empty_dense(const std::vector<int64_t>& sizes,
                                         torch::headeronly::ScalarType dtype,
                                         const std::vector<int>& memory_order, int32_t device_type,
                                         int32_t device_index) {
  const int ndim = static_cast<int>(sizes.size());
  std::vector<int64_t> strides(ndim);
  int64_t numel = 1;
  for (int i = ndim - 1; i >= 0; --i) {
    const int dim = memory_order.empty() ? i : memory_order[i];
    strides[dim] = numel;
    numel *= sizes[dim] > 0 ? sizes[dim] : 1;
  }
  const int32_t type = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(ndim, sizes.data(), strides.data(), type,
                                                  device_type, device_index, &handle));
  return torch::stable::Tensor(handle);
}

// A fresh CPU tensor, laid out as empty_dense does.
inline torch::stable::Tensor new_output(const std::vector<int64_t>& sizes,
                                        torch::headeronly::ScalarType dtype,
                                        const std::vector<int>& memory_order = {}) {
  torch::stable::Tensor output =
      empty_dense(sizes, dtype, memory_order, aoti_torch_device_type_cpu(), 0);
  if (poison_outputs()) {
    std::memset(output.mutable_data_ptr(), 0xFF, output.numel() * output.element_size());
  }
  return output;
}

// The stream on which torch expects work on this device.
inline void* current_cuda_stream(int32_t device_index) {
  if (aoti_torch_get_current_cuda_stream == nullptr) {
    throw std::runtime_error("lychee_kernels: torch: expected a build with CUDA, got one without");
  }
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device_index, &stream));
  return stream;
}

inline void prefer_huge_pages(const torch::stable::Tensor& output) {
  prefer_huge_pages(output.mutable_data_ptr(), output.numel() * output.element_size());
}

}  // namespace lychee
