// Python bindings of the CUDA extension; imports, and says what is missing, on a machine without a driver.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "aggregation_cuda.h"
#include "buffers.h"

namespace nb = nanobind;

namespace {

using namespace fedmoe::buffers;
using fedmoe::Job;
using fedmoe::Rule;

std::pair<int, std::string> device_count() {
  const char* reason = nullptr;
  const int count = fedmoe::device_count(&reason);
  return {count, reason ? reason : ""};
}

Job job_of(Rule rule, const Updates& all, void* out) {
  return {rule, all.data.data(), all.data.size(), all.size, all.kind, out};
}

// `how` is the stream of device buffers, the chunk of those that are paged.
void run(const char* name, const Job& job, const Updates& all, std::uintptr_t how) {
  const bool paged = all.place == Place::kPaged;
  if (paged && how == 0) fail("chunk is 0, expected 1 or more");
  const char* reason = nullptr;
  {
    nb::gil_scoped_release release;
    reason = paged ? fedmoe::aggregate_paged(job, how)
                   : fedmoe::aggregate_on_device(job, all.device, reinterpret_cast<void*>(how));
  }
  if (reason)
    throw std::runtime_error(std::string(name) + " of " + std::to_string(job.clients) + " updates" +
                             (paged ? ", paged: " : ": ") + reason);
}

template <Place kPlace>
void weighted_mean(nb::ndarray<> out, const std::vector<Buffer>& updates, const std::vector<double>& weights,
                   std::uintptr_t how) {
  const Updates all(updates, kPlace);
  all.check_weights(weights);
  Job job = job_of(Rule::kMean, all, out.data());
  job.out_kind = all.check_output(out);
  job.weights = weights.data();
  run("weighted_mean", job, all, how);
}

template <Place kPlace>
void median(nb::ndarray<> out, const std::vector<Buffer>& updates, std::uintptr_t how) {
  const Updates all(updates, kPlace);
  Job job = job_of(Rule::kMedian, all, out.data());
  job.out_kind = all.check_output(out);
  run("median", job, all, how);
}

template <Place kPlace>
void trimmed_mean(nb::ndarray<> out, const std::vector<Buffer>& updates, std::size_t trim, std::uintptr_t how) {
  const Updates all(updates, kPlace);
  all.check_trim(trim);
  Job job = job_of(Rule::kTrimmedMean, all, out.data());
  job.out_kind = all.check_output(out);
  job.trim = trim;
  run("trimmed_mean", job, all, how);
}

template <Place kPlace>
std::vector<double> squared_norms(const std::vector<Buffer>& updates, const Buffer& center, std::uintptr_t how) {
  const Updates all(updates, kPlace);
  all.check_center(center);
  std::vector<double> found(updates.size());
  Job job = job_of(Rule::kSquaredNorms, all, found.data());
  job.center = center.data();
  run("squared_norms", job, all, how);
  return found;
}

template <Place kPlace>
void squared_distances(nb::ndarray<> out, const std::vector<Buffer>& updates, std::uintptr_t how) {
  const Updates all(updates, kPlace);
  all.check_distances(out);
  run("squared_distances", job_of(Rule::kSquaredDistances, all, out.data()), all, how);
}

template <Place kPlace>
void define(nb::module_& module) {
  const std::string suffix = kPlace == Place::kPaged ? "_paged" : "";
  const auto out = nb::arg("out"), updates = nb::arg("updates"), weights = nb::arg("weights");
  const auto how = nb::arg(kPlace == Place::kPaged ? "chunk" : "stream");
  module.def(("weighted_mean" + suffix).c_str(), &weighted_mean<kPlace>, out, updates, weights, how);
  module.def(("median" + suffix).c_str(), &median<kPlace>, out, updates, how);
  module.def(("trimmed_mean" + suffix).c_str(), &trimmed_mean<kPlace>, out, updates, nb::arg("trim"), how);
  module.def(("squared_norms" + suffix).c_str(), &squared_norms<kPlace>, updates, nb::arg("center"), how);
  module.def(("squared_distances" + suffix).c_str(), &squared_distances<kPlace>, out, updates, how);
}

}  // namespace

NB_MODULE(_native_cuda, module) {
  module.doc() =
      "Aggregation on the device in CUDA C++: see fedmoe.kernels.cuda for the checked entries.\n"
      "\n"
      "Functions, buffers and errors are those of fedmoe.kernels._native, and so are the bits; but all buffers are of "
      "one device's memory, and work goes to `stream`, a cudaStream_t, without waiting. Names that end in `_paged` take "
      "buffers in host memory, `chunk` coordinates at a time, on the current device, and wait; copies overlap with the "
      "work where the buffers are pinned. Squared norms and distances are waited for: they end in host memory. "
      "RuntimeError gives CUDA's reason where it fails.";
  module.def("device_count", &device_count, "(number of usable CUDA devices, reason if there are none).");
  define<Place::kDevice>(module);
  define<Place::kPaged>(module);
}
