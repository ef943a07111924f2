// The only file that knows Python. std::runtime_error from below arrives there as RuntimeError.

#include <pybind11/pybind11.h>

#include "cuda/device.h"

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
}
