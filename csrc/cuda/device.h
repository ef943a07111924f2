// What CUDA says about this machine. Plain C++: neither Python nor torch is known here.
#pragma once

#include <cstddef>
#include <string>

namespace mixpert {

struct Device {
  std::string name;
  int major;
  int minor;
  std::size_t memory;  // bytes
  int processors;      // streaming multiprocessors
};

int runtime_version();        // 13000 for CUDA 13.0
int driver_version();         // the newest CUDA the driver supports; 0 without a driver
int device_count();           // throws "cudaGetDeviceCount: ..." without a driver or a GPU
Device device(int index);
int code_version(int index);  // 80 where this build's sm_80 code runs on the device

}  // namespace mixpert
