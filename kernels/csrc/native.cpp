// Python bindings of the host extension: checks every buffer, then works without the GIL; Ctrl-C ends it.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <string>
#include <vector>

#include "aggregation.h"
#include "buffers.h"

namespace nb = nanobind;

namespace {

using namespace fedmoe::buffers;

fedmoe::Inputs inputs_of(const Updates& updates) { return {updates.data, updates.kind, updates.size}; }

fedmoe::Output output_of(const Updates& updates, const nb::ndarray<>& out) {
  return {out.data(), updates.check_output(out)};
}

bool interrupted() {
  nb::gil_scoped_acquire acquire;
  return PyErr_CheckSignals() != 0;
}

// Without the GIL, on so many threads; raises what a signal's handler raised.
template <typename Act>
void run(unsigned threads, Act act) {
  if (threads == 0) fail("threads is 0, expected 1 or more");
  bool done = false;
  {
    nb::gil_scoped_release release;
    done = act(fedmoe::Work{threads, &interrupted});
  }
  if (!done) throw nb::python_error();
}

void weighted_mean(nb::ndarray<> out, const std::vector<Buffer>& updates, const std::vector<double>& weights,
                   unsigned threads) {
  const Updates all(updates);
  all.check_weights(weights);
  const auto to = output_of(all, out);
  run(threads, [&](fedmoe::Work work) { return fedmoe::weighted_mean(to, inputs_of(all), weights, work); });
}

void accumulate(nb::ndarray<> sums, const std::vector<Buffer>& updates, const std::vector<double>& weights,
                unsigned threads) {
  const Updates all(updates);
  all.check_weights(weights);
  check_layout(sums, "sums", all.size, Place::kHost);
  check_float64(sums, "sums");
  all.check_apart(sums, "sums", false);
  auto* to = static_cast<double*>(sums.data());
  run(threads, [&](fedmoe::Work work) { return fedmoe::accumulate(to, inputs_of(all), weights, work); });
}

void median(nb::ndarray<> out, const std::vector<Buffer>& updates, unsigned threads) {
  const Updates all(updates);
  const auto to = output_of(all, out);
  run(threads, [&](fedmoe::Work work) { return fedmoe::median(to, inputs_of(all), work); });
}

void trimmed_mean(nb::ndarray<> out, const std::vector<Buffer>& updates, std::size_t trim, unsigned threads) {
  const Updates all(updates);
  all.check_trim(trim);
  const auto to = output_of(all, out);
  run(threads, [&](fedmoe::Work work) { return fedmoe::trimmed_mean(to, inputs_of(all), trim, work); });
}

std::vector<double> squared_norms(const std::vector<Buffer>& updates, const Buffer& center, unsigned threads) {
  const Updates all(updates);
  all.check_center(center);
  std::vector<double> found(updates.size());
  run(threads, [&](fedmoe::Work work) {
    return fedmoe::squared_norms(found.data(), inputs_of(all), center.data(), work);
  });
  return found;
}

void squared_distances(nb::ndarray<> out, const std::vector<Buffer>& updates, unsigned threads) {
  const Updates all(updates);
  all.check_distances(out);
  auto* to = static_cast<double*>(out.data());
  run(threads, [&](fedmoe::Work work) { return fedmoe::squared_distances(to, inputs_of(all), work); });
}

void use_instruction_set(const std::string& name) {
  if (fedmoe::use_instruction_set(name)) return;
  std::string known;
  for (const auto& each : fedmoe::instruction_sets()) known += (known.empty() ? "" : ", ") + each;
  fail("this processor has no instruction set '" + name + "', only: " + known);
}

}  // namespace

NB_MODULE(_native, module) {
  module.doc() =
      "Aggregation on the host in C++: see fedmoe.kernels.averaging and fedmoe.kernels.robust for the checked entries.\n"
      "\n"
      "Updates are K 1-D contiguous CPU buffers of one length and dtype: float32, float16 or bfloat16; `out` is of that "
      "length and any of these dtypes. It may be one of the updates, but not overlap one partly. ValueError names the "
      "buffer and both values where that is not so. Results are the same bits for every number of threads and every "
      "instruction set.";
  const auto out = nb::arg("out"), updates = nb::arg("updates"), weights = nb::arg("weights"), sums = nb::arg("sums");
  const auto threads = nb::arg("threads") = 1;
  module.def("weighted_mean", &weighted_mean, out, updates, weights, threads,
             "out = sum(w * x) / sum(w); fp64 sums in the order given.");
  module.def("accumulate", &accumulate, sums, updates, weights, threads, "sums += sum(w * x), float64, in that order.");
  module.def("median", &median, out, updates, threads, "The middle number of each coordinate; NaN is the largest.");
  module.def("trimmed_mean", &trimmed_mean, out, updates, nb::arg("trim"), threads,
             "The mean of each coordinate without its `trim` lowest and highest numbers.");
  module.def("squared_norms", &squared_norms, updates, nb::arg("center"), threads,
             "|x - center|^2 of each update, in fp64.");
  module.def("squared_distances", &squared_distances, out, updates, threads,
             "out [K * K], float64: |x_k - x_l|^2 of each pair.");
  module.def("instruction_sets", &fedmoe::instruction_sets, "Those this processor has, the best first.");
  module.def("instruction_set", &fedmoe::instruction_set, "That in use.");
  module.def("use_instruction_set", &use_instruction_set, nb::arg("name"), "Take another: for tests and benchmarks.");
}
