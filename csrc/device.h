// SPDX-License-Identifier: Apache-2.0
// The device an op runs on, and the check that an argument lies there: for host code that serves
// CPU and CUDA alike.
#pragma once

#include <torch/csrc/stable/device.h>

#include "check.h"

namespace lychee {

struct Device {
  int32_t type, index;
};

inline Device device_of(const Tensor& tensor) {
  Device device{};
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(tensor.get(), &device.type));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(tensor.get(), &device.index));
  return device;
}

inline Device cpu_device() { return {aoti_torch_device_type_cpu(), 0}; }

inline std::string device_name(Device device) {
  if (device.type == aoti_torch_device_type_cpu()) return "cpu";
  if (device.type != aoti_torch_device_type_cuda()) return "another device";
  return "cuda:" + std::to_string(device.index);
}

inline void check_device(const Tensor& tensor, Device device, const char* op,
                         const char* argument) {
  if (device.type == aoti_torch_device_type_cpu()) return check_cpu(tensor, op, argument);
  const Device got = device_of(tensor);
  if (got.type == device.type && got.index == device.index) return;
  fail(op, argument, "a tensor on " + device_name(device), device_name(got));
}

}  // namespace lychee
