// SPDX-License-Identifier: Apache-2.0
// What host code needs around a launch: current device and stream, output allocation, errors.
#pragma once

#include <cuda_runtime.h>

#include "device.h"
#include "stable.h"

// Weak, and declared here: torch declares it only for builds that need a CUDA torch to load.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t index,
                                                                                   void** stream);

namespace lychee::cuda {

inline void check_success(cudaError_t error, const char* op, const char* what) {
  if (error != cudaSuccess) fail(op, what, "success", cudaGetErrorString(error));
}

// Makes a device current for its lifetime; calls nothing where it is so already.
class DeviceGuard {
 public:
  DeviceGuard(Device device, const char* op) : wanted_(device.index) {
    check_success(cudaGetDevice(&previous_), op, "device");
    if (previous_ != wanted_) check_success(cudaSetDevice(wanted_), op, "device");
  }
  ~DeviceGuard() {
    if (previous_ != wanted_) cudaSetDevice(previous_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int previous_ = 0, wanted_;
};

inline cudaStream_t current_stream(Device device, const char* op) {
  if (aoti_torch_get_current_cuda_stream == nullptr) {
    fail(op, "torch", "a build with CUDA", "one without");
  }
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device.index, &stream));
  return static_cast<cudaStream_t>(stream);
}

// A dense tensor whose dimensions lie in memory in the order `memory_order` (outermost first).
// LYCHEE_POISON fills it as on CPU.
inline Tensor new_output(Device device, const char* op, const std::vector<int64_t>& sizes,
                         ScalarType dtype, const std::vector<int>& memory_order = {}) {
  Tensor output = lychee::new_output_on(device.type, device.index, sizes, dtype, memory_order);
  if (poison_outputs() && output.numel() > 0) {
    const size_t bytes = output.numel() * output.element_size();
    check_success(
        cudaMemsetAsync(output.mutable_data_ptr(), 0xFF, bytes, current_stream(device, op)), op,
        "poison");
  }
  return output;
}

inline int multiprocessors(Device device, const char* op) {
  int count = 0;
  check_success(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device.index), op,
                "device");
  return count;
}

inline void check_launch(const char* op) { check_success(cudaGetLastError(), op, "launch"); }

}  // namespace lychee::cuda
