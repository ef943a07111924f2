// The only file that knows Python. std::runtime_error from below arrives there as RuntimeError,
// std::invalid_argument as ValueError.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cuda/device.h"
#include "cuda/registry.h"

namespace py = pybind11;

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled part of mixpert_kernels; knows nothing of torch.";

  m.def("runtime_version", &mixpert::runtime_version, "CUDA runtime in this file: 13000 is 13.0.");
  m.def("driver_version", &mixpert::driver_version, "Newest CUDA the driver supports; 0: no driver.");
  m.def("device_count", &mixpert::device_count, "Number of GPUs; RuntimeError without a driver.");
  m.def("code_version", &mixpert::code_version, py::arg("index"),
        "Architecture of the code in this file that the GPU would run: 80 is sm_80.");
  m.def(
      "device",
      [](int index) {
        const mixpert::Device found = mixpert::device(index);
        py::dict facts;
        facts["name"] = found.name;
        facts["capability"] = py::make_tuple(found.major, found.minor);
        facts["memory"] = found.memory;
        facts["processors"] = found.processors;
        return facts;
      },
      py::arg("index"), "Name, capability, memory (bytes) and multiprocessors of one GPU.");

  m.def(
      "kernels",
      [] {
        py::dict all;
        for (const auto& [name, kernel] : mixpert::kernels()) {
          all[name.c_str()] = py::make_tuple(kernel.facts, kernel.args_bytes);
        }
        return all;
      },
      "Kernels of this build by name: (facts, bytes of arguments); csrc/cuda/facts.h has the format of the facts.");
  m.def(
      "launch",
      [](const std::string& name, int device, std::uintptr_t stream, unsigned grid, const py::bytes& args) {
        mixpert::launch(name, device, stream, grid, args);
      },
      py::arg("name"), py::arg("device"), py::arg("stream"), py::arg("grid"), py::arg("args"),
      "Launch a kernel with its packed arguments; RuntimeError with CUDA's words.");
  m.def("resident_blocks", &mixpert::resident_blocks, py::arg("name"), py::arg("device"),
        "Blocks of a kernel that one multiprocessor holds.");
  m.def(
      "tensor_map",
      [](std::uintptr_t address, int dtype, std::vector<std::uint64_t> sizes, std::vector<std::uint64_t> strides,
         std::vector<std::uint32_t> box, int swizzle) {
        return py::bytes(mixpert::tensor_map({address, dtype, sizes, strides, box, swizzle}));
      },
      py::arg("address"), py::arg("dtype"), py::arg("sizes"), py::arg("strides"), py::arg("box"), py::arg("swizzle"),
      "The 128 bytes of a CUtensorMap; sizes, strides (bytes) and box innermost first.");
}
