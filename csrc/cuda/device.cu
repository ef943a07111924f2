// Facts about the CUDA runtime, the driver and the GPUs. Nothing here launches work.

#include "device.h"

#include <cuda_runtime.h>

#include <stdexcept>

namespace mixpert {
namespace {

// Never launched: cudaFuncGetAttributes tells which of the compiled architectures a device would take.
__global__ void probe_kernel() {}

void check(cudaError_t status, const char* call) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // reading clears it, so that the next call does not report it again
  throw std::runtime_error(std::string(call) + ": " + cudaGetErrorString(status));
}

// Sets the current device and puts the caller's back: torch shares the thread's current device.
class DeviceScope {
 public:
  explicit DeviceScope(int index) {
    check(cudaGetDevice(&previous_), "cudaGetDevice");
    check(cudaSetDevice(index), "cudaSetDevice");
  }
  ~DeviceScope() { cudaSetDevice(previous_); }
  DeviceScope(const DeviceScope&) = delete;
  DeviceScope& operator=(const DeviceScope&) = delete;

 private:
  int previous_ = 0;
};

}  // namespace

int runtime_version() {
  int version = 0;
  check(cudaRuntimeGetVersion(&version), "cudaRuntimeGetVersion");
  return version;
}

int driver_version() {
  int version = 0;
  check(cudaDriverGetVersion(&version), "cudaDriverGetVersion");
  return version;
}

int device_count() {
  int count = 0;
  check(cudaGetDeviceCount(&count), "cudaGetDeviceCount");
  return count;
}

Device device(int index) {
  cudaDeviceProp properties;
  check(cudaGetDeviceProperties(&properties, index), "cudaGetDeviceProperties");
  return {properties.name, properties.major, properties.minor, properties.totalGlobalMem,
          properties.multiProcessorCount};
}

int code_version(int index) {
  DeviceScope scope(index);
  cudaFuncAttributes attributes;
  check(cudaFuncGetAttributes(&attributes, probe_kernel), "cudaFuncGetAttributes");
  return attributes.binaryVersion;
}

}  // namespace mixpert
