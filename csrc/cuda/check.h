// Errors of the CUDA runtime as exceptions, and the device of a scope.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

namespace mixpert {

inline void check(cudaError_t status, const char* call) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // reading clears it, so that the next call does not report it again
  throw std::runtime_error(std::string(call) + ": " + cudaGetErrorString(status));
}

// Sets the current device and puts the caller's back: torch shares the thread's current device.
class DeviceScope {
 public:
  explicit DeviceScope(int index) {
    check(cudaGetDevice(&previous_), "cudaGetDevice");
    if (index != previous_) check(cudaSetDevice(index), "cudaSetDevice");
    changed_ = index != previous_;
  }
  ~DeviceScope() {
    if (changed_) cudaSetDevice(previous_);
  }
  DeviceScope(const DeviceScope&) = delete;
  DeviceScope& operator=(const DeviceScope&) = delete;

 private:
  int previous_ = 0;
  bool changed_ = false;
};

}  // namespace mixpert
