// Kernels by name, their launch, and the tensor maps they read through.

#include "registry.h"

#include <cuda.h>
#include <cuda_runtime.h>

#include <mutex>
#include <set>
#include <utility>

#include "check.h"

namespace mixpert {
namespace {

const Kernel& find(const std::string& name) {
  const auto found = kernels().find(name);
  if (found == kernels().end()) throw std::invalid_argument("this build has no kernel " + name);
  return found->second;
}

// More than 48 KB of shared memory must be asked for, once a kernel and device.
void allow_shared(const Kernel& kernel, int device) {
  constexpr int kWithoutAsking = 48 * 1024;
  if (kernel.shared_bytes <= kWithoutAsking) return;
  static std::mutex mutex;
  static std::set<std::pair<const void*, int>> allowed;
  const std::lock_guard<std::mutex> lock(mutex);
  if (allowed.count({kernel.function, device})) return;
  check(cudaFuncSetAttribute(kernel.function, cudaFuncAttributeMaxDynamicSharedMemorySize, kernel.shared_bytes),
        "cudaFuncSetAttribute(MaxDynamicSharedMemorySize)");
  allowed.insert({kernel.function, device});
}

// From the driver that is loaded, not linked: the library must load where there is none.
decltype(&cuTensorMapEncodeTiled) encoder() {
  static void* found = [] {
    void* entry = nullptr;
    cudaDriverEntryPointQueryResult result{};
#if CUDART_VERSION >= 12050
    check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000, cudaEnableDefault, &result),
          "cudaGetDriverEntryPointByVersion(cuTensorMapEncodeTiled)");
#else
    check(cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &entry, cudaEnableDefault, &result),
          "cudaGetDriverEntryPoint(cuTensorMapEncodeTiled)");
#endif
    if (result != cudaDriverEntryPointSuccess || !entry) {
      throw std::runtime_error("cuTensorMapEncodeTiled: the driver has none");
    }
    return entry;
  }();
  return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(found);
}

}  // namespace

std::map<std::string, Kernel>& kernels() {
  static std::map<std::string, Kernel> all;
  return all;
}

Registration::Registration(const char* name, const void* function, std::size_t args_bytes, const Facts& facts,
                           int threads, int shared_bytes) {
  kernels()[name] = {function, args_bytes, std::string(facts.text, facts.size), threads, shared_bytes};
}

void launch(const std::string& name, int device, std::uintptr_t stream, unsigned grid, const std::string& args) {
  const Kernel& kernel = find(name);
  if (args.size() != kernel.args_bytes) {
    throw std::invalid_argument(name + " takes " + std::to_string(kernel.args_bytes) + " bytes of arguments, got " +
                                std::to_string(args.size()));
  }
  DeviceScope scope(device);
  allow_shared(kernel, device);
  void* values[] = {const_cast<char*>(args.data())};
  check(cudaLaunchKernel(kernel.function, dim3(grid), dim3(kernel.threads), values, kernel.shared_bytes,
                         reinterpret_cast<cudaStream_t>(stream)),
        "cudaLaunchKernel");
}

int resident_blocks(const std::string& name, int device) {
  const Kernel& kernel = find(name);
  DeviceScope scope(device);
  allow_shared(kernel, device);
  int blocks = 0;
  check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel.function, kernel.threads, kernel.shared_bytes),
        "cudaOccupancyMaxActiveBlocksPerMultiprocessor");
  return blocks;
}

std::string tensor_map(const TensorMapRequest& request) {
  alignas(64) CUtensorMap map;
  const std::vector<std::uint32_t> steps(request.sizes.size(), 1);
  const CUresult status = encoder()(
      &map, static_cast<CUtensorMapDataType>(request.dtype), static_cast<unsigned>(request.sizes.size()),
      reinterpret_cast<void*>(request.address), request.sizes.data(), request.strides.data(), request.box.data(),
      steps.data(), CU_TENSOR_MAP_INTERLEAVE_NONE, static_cast<CUtensorMapSwizzle>(request.swizzle),
      CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (status != CUDA_SUCCESS) {
    throw std::runtime_error("cuTensorMapEncodeTiled: error " + std::to_string(static_cast<int>(status)));
  }
  return {reinterpret_cast<const char*>(&map), sizeof map};
}

}  // namespace mixpert
