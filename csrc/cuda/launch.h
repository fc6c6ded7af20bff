// SPDX-License-Identifier: Apache-2.0
// What the .cu file of every op needs on the host: device check, outputs, launch, registration.
// A test build compiles the same .cu files with the C++ compiler and runs them, on CPU tensors, in
// the emulator.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <atomic>
#include <stdexcept>
#include <string>
#include <vector>

#include "check.h"
#include "cuda/device.cuh"
#include "stable.h"

// Registers an op's CUDA kernels: LYCHEE_CUDA_KERNELS(m) { m.impl("op", TORCH_BOX(&op_cuda)); }
#if defined(__CUDACC__)
#define LYCHEE_CUDA_KERNELS(m) STABLE_TORCH_LIBRARY_IMPL(lychee, CUDA, m)
#else
#define LYCHEE_CUDA_KERNELS(m) STABLE_TORCH_LIBRARY_IMPL(lychee_emulated, CPU, m)
#endif

namespace lychee::cuda {

#if defined(__CUDACC__)
using DeviceGuard = torch::stable::accelerator::DeviceGuard;

inline bool on_device(const Tensor& tensor) { return tensor.is_cuda(); }

inline void check_runtime(cudaError_t status, const char* op) {
  if (status != cudaSuccess) fail(op, "launch", "success", cudaGetErrorString(status));
}

inline void fill_bytes(const Tensor& tensor, int value) {
  void* stream = current_cuda_stream(tensor.get_device_index());
  check_runtime(
      cudaMemsetAsync(tensor.mutable_data_ptr(), value, tensor.numel() * tensor.element_size(),
                      static_cast<cudaStream_t>(stream)),
      "memset");
}
#else
struct DeviceGuard {
  explicit DeviceGuard(int32_t) {}
};

inline bool on_device(const Tensor& tensor) { return tensor.is_cpu(); }

inline void fill_bytes(const Tensor& tensor, int value) {
  std::memset(tensor.mutable_data_ptr(), value, tensor.numel() * tensor.element_size());
}
#endif

inline void check_cuda(const Tensor& tensor, const char* op, const char* argument) {
  check(on_device(tensor), op, argument, "a CUDA tensor", "a tensor on another device");
}

// All tensors of a call live on the device of its first one.
inline void check_same_device(const Tensor& tensor, const Tensor& first, const char* op,
                              const char* argument) {
  check_cuda(tensor, op, argument);
  const int32_t device = tensor.get_device_index(), expected = first.get_device_index();
  if (device == expected) return;
  fail(op, argument, "a tensor on cuda:" + std::to_string(expected),
       "one on cuda:" + std::to_string(device));
}

// check_same_device for checks that serve every device.
inline CheckDevice same_device_as(const Tensor& first) {
  return [first](const Tensor& t, const char* op, const char* argument) {
    check_same_device(t, first, op, argument);
  };
}

// What plans divide work by; in the emulator few, so that small cases are split too.
inline int multiprocessors(const Tensor& on, [[maybe_unused]] const char* op) {
  int count = 4;
#if defined(__CUDACC__)
  check_runtime(
      cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, on.get_device_index()), op);
#endif
  return count;
}

// A dense tensor on the device of `like`, laid out in memory as lychee::new_output does.
inline Tensor new_output_like(const Tensor& like, const std::vector<int64_t>& sizes,
                              ScalarType dtype, const std::vector<int>& memory_order = {}) {
#if defined(__CUDACC__)
  const int32_t device_type = aoti_torch_device_type_cuda();
#else
  const int32_t device_type = aoti_torch_device_type_cpu();
#endif
  Tensor output = empty_dense(sizes, dtype, memory_order, device_type, like.get_device_index());
  if (poison_outputs()) fill_bytes(output, 0xff);
  return output;
}

#if defined(__CUDACC__)
// Shared memory beyond 48 KiB must be asked for, once per kernel and device.
template <auto kKernel>
void allow_shared_memory(size_t bytes, int32_t device, const char* op) {
  constexpr size_t kAlwaysAllowed = 48 << 10;
  constexpr int32_t kMaxDevices = 64;
  static std::atomic<size_t> allowed[kMaxDevices];
  if (bytes <= kAlwaysAllowed) return;
  if (device < kMaxDevices && allowed[device].load(std::memory_order_relaxed) >= bytes) return;
  check_runtime(cudaFuncSetAttribute(kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                     static_cast<int>(bytes)),
                op);
  if (device < kMaxDevices) allowed[device].store(bytes, std::memory_order_relaxed);
}
#endif

// launch<kernel<...>>(op, q, grid, threads, shared_bytes, params): on q's device and its current
// stream. An empty grid launches nothing. The caller holds a DeviceGuard of that device.
template <auto kKernel, class Params>
void launch(const char* op, const Tensor& on, dim3 grid, dim3 threads, size_t shared_bytes,
            const Params& params) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
#if defined(__CUDACC__)
  const int32_t device = on.get_device_index();
  allow_shared_memory<kKernel>(shared_bytes, device, op);
  const auto stream = static_cast<cudaStream_t>(current_cuda_stream(device));
  kKernel<<<grid, threads, shared_bytes, stream>>>(params);
  check_runtime(cudaGetLastError(), op);
#else
  try {
    emulator::launch(grid, threads, shared_bytes, [&] { kKernel(params); });
  } catch (const std::runtime_error& error) {
    fail(op, "launch", "success", error.what());
  }
#endif
}

}  // namespace lychee::cuda
