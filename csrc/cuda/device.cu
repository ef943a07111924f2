// Facts about the CUDA runtime, the driver and the GPUs. Nothing here launches work.

#include "device.h"

#include <cuda_runtime.h>

#include "check.h"

namespace mixpert {
namespace {

// Never launched: cudaFuncGetAttributes tells which of the compiled architectures a device would take.
__global__ void probe_kernel() {}

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
