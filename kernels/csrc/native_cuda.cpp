// Python bindings of the CUDA extension; imports, and says what is missing, on a machine without a driver.
#include <nanobind/nanobind.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "accumulate.h"
#include "aggregation_cuda.h"

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

fedmoe::Rule rule_of(const std::string& name, std::size_t clients, std::size_t trim) {
  if (clients == 0) throw nb::value_error("at least one update is needed, got 0");
  if (name == "mean") return fedmoe::Rule::kMean;
  if (name == "median") return fedmoe::Rule::kMedian;
  if (name != "trimmed_mean")
    throw nb::value_error(("rule is '" + name + "', expected mean, median or trimmed_mean").c_str());
  if (trim > (clients - 1) / 2)
    throw nb::value_error(
        ("trim is " + std::to_string(trim) + ", must leave some of " + std::to_string(clients) + " updates").c_str());
  return fedmoe::Rule::kTrimmedMean;
}

void aggregate_on_device(const std::string& name, std::uintptr_t out, std::uintptr_t updates, std::uintptr_t weights,
                         std::size_t clients, std::size_t trim, std::size_t size, std::uintptr_t stream) {
  const char* reason = fedmoe::aggregate_on_device(
      rule_of(name, clients, trim), reinterpret_cast<float*>(out), reinterpret_cast<const float* const*>(updates),
      reinterpret_cast<const double*>(weights), clients, trim, size, reinterpret_cast<void*>(stream));
  if (reason) throw std::runtime_error(name + " of " + std::to_string(clients) + " clients: " + reason);
}

void aggregate_paged(const std::string& name, std::uintptr_t out, const std::vector<std::uintptr_t>& updates,
                     const std::vector<double>& weights, std::size_t trim, std::size_t size, std::size_t chunk) {
  const fedmoe::Rule rule = rule_of(name, updates.size(), trim);
  if (rule == fedmoe::Rule::kMean && weights.size() != updates.size())
    throw nb::value_error((std::to_string(updates.size()) + " updates, but " + std::to_string(weights.size()) +
                           " weights").c_str());
  std::vector<const float*> addresses;
  for (std::uintptr_t update : updates) addresses.push_back(reinterpret_cast<const float*>(update));
  const char* reason = nullptr;
  {
    nb::gil_scoped_release release;
    reason = fedmoe::aggregate_paged(rule, reinterpret_cast<float*>(out), addresses.data(),
                                     rule == fedmoe::Rule::kMean ? weights.data() : nullptr, addresses.size(), trim,
                                     size, chunk);
  }
  if (reason) throw std::runtime_error(name + " of " + std::to_string(updates.size()) + " clients, paged: " + reason);
}

}  // namespace

NB_MODULE(_native_cuda, module) {
  module.doc() = "Device arithmetic in CUDA C++, on raw pointers.";
  module.def("device_count", &device_count, "(number of usable CUDA devices, reason if there are none).");
  module.def("weighted_accumulate", &weighted_accumulate, nb::arg("theta_ptr"), nb::arg("update_ptr"),
             nb::arg("weight"), nb::arg("n"), nb::arg("stream"),
             "theta[:n] += weight * update[:n], fp32 device pointers, on `stream` of the current device; does not "
             "wait.\n\nRaises RuntimeError with CUDA's reason if the launch fails.");
  module.def("aggregate_on_device", &aggregate_on_device, nb::arg("rule"), nb::arg("out_ptr"), nb::arg("updates_ptr"),
             nb::arg("weights_ptr"), nb::arg("clients"), nb::arg("trim"), nb::arg("n"), nb::arg("stream"),
             "out[:n], fp32, by `rule` (mean, median, trimmed_mean) of fp32 device buffers, on `stream`; does not "
             "wait. `updates_ptr` and `weights_ptr` are of device memory that holds the buffers' addresses, and fp64 "
             "weights (mean alone).\n\nRaises RuntimeError with CUDA's reason if the launch fails.");
  module.def("aggregate_paged", &aggregate_paged, nb::arg("rule"), nb::arg("out_ptr"), nb::arg("updates_ptrs"),
             nb::arg("weights"), nb::arg("trim"), nb::arg("n"), nb::arg("chunk"),
             "The same of host buffers, `chunk` coordinates at a time through the device, without the GIL; waits. "
             "Copies overlap with the work where the buffers are pinned.\n\nRaises RuntimeError with CUDA's reason.");
}
