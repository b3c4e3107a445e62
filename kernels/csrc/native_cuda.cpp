// Python bindings of the CUDA extension; imports, and says what is missing, on a machine without a driver.
#include <nanobind/nanobind.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>

#include "accumulate.h"

namespace nb = nanobind;

namespace {

std::pair<int, std::string> device_count() {
  const char* reason = nullptr;
  const int count = fedmoe::device_count(&reason);
  return {count, reason ? reason : ""};
}

void weighted_accumulate(std::uintptr_t theta, std::uintptr_t update, float weight, std::size_t size,
                         std::uintptr_t stream) {
  const char* reason =
      fedmoe::weighted_accumulate(reinterpret_cast<float*>(theta), reinterpret_cast<const float*>(update), weight,
                                  size, reinterpret_cast<void*>(stream));
  if (reason) throw std::runtime_error("weighted_accumulate of " + std::to_string(size) + " elements: " + reason);
}

}  // namespace

NB_MODULE(_native_cuda, module) {
  module.doc() = "Device arithmetic in CUDA C++, on raw pointers.";
  module.def("device_count", &device_count, "(number of usable CUDA devices, reason if there are none).");
  module.def("weighted_accumulate", &weighted_accumulate, nb::arg("theta_ptr"), nb::arg("update_ptr"),
             nb::arg("weight"), nb::arg("n"), nb::arg("stream"),
             "theta[:n] += weight * update[:n], fp32 device pointers, on `stream` of the current device; does not "
             "wait.\n\nRaises RuntimeError with CUDA's reason if the launch fails.");
}
