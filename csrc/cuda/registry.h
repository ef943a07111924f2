// The kernels of this build by name, and the one place that launches them. Plain C++: neither Python nor torch is known.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "facts.h"

namespace mixpert {

struct Kernel {
  const void* function;
  std::size_t args_bytes;
  std::string facts;
  int threads;
  int shared_bytes;
};

// Filled before main by the registrations of the .cu files.
std::map<std::string, Kernel>& kernels();

struct Registration {
  Registration(const char* name, const void* function, std::size_t args_bytes, const Facts& facts, int threads,
               int shared_bytes);
};

// Launches `grid` blocks on the device's stream; the caller's current device is put back. Throws std::runtime_error with
// CUDA's own words, std::invalid_argument for an unknown name or arguments of another size.
void launch(const std::string& name, int device, std::uintptr_t stream, unsigned grid, const std::string& args);

// How many blocks of the kernel a multiprocessor of the device holds.
int resident_blocks(const std::string& name, int device);

struct TensorMapRequest {
  std::uintptr_t address;
  int dtype;                            // CUtensorMapDataType
  std::vector<std::uint64_t> sizes;     // innermost first, elements
  std::vector<std::uint64_t> strides;   // bytes, of all dimensions but the innermost
  std::vector<std::uint32_t> box;       // innermost first, elements
  int swizzle;                          // CUtensorMapSwizzle
};

// The 128 bytes of a CUtensorMap. Throws where the driver refuses or lacks it.
std::string tensor_map(const TensorMapRequest& request);

}  // namespace mixpert
