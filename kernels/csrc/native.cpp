// Python bindings of the host extension: checks every buffer, then works without the GIL; Ctrl-C ends it.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <cmath>
#include <cstdint>
#include <string>
#include <vector>

#include "aggregation.h"

namespace nb = nanobind;

namespace {

using fedmoe::Kind;
using Buffer = nb::ndarray<nb::ro>;

std::string dtype_name(nb::dlpack::dtype dtype) {
  const char* kind = "dtype code ";
  switch (static_cast<nb::dlpack::dtype_code>(dtype.code)) {
    case nb::dlpack::dtype_code::Int: kind = "int"; break;
    case nb::dlpack::dtype_code::UInt: kind = "uint"; break;
    case nb::dlpack::dtype_code::Float: kind = "float"; break;
    case nb::dlpack::dtype_code::Bfloat: kind = "bfloat"; break;
    case nb::dlpack::dtype_code::Bool: kind = "bool"; break;
    default: return kind + std::to_string(dtype.code);
  }
  return kind + std::to_string(dtype.bits);
}

[[noreturn]] void fail(const std::string& message) { throw nb::value_error(message.c_str()); }

struct Range {
  std::uintptr_t first, end;
  bool overlaps(const Range& other) const { return first < other.end && other.first < end; }
  bool operator==(const Range&) const = default;
};

template <typename Array>
Range range(const Array& array) {
  const auto first = reinterpret_cast<std::uintptr_t>(array.data());
  return {first, first + array.nbytes()};
}

// Memory safety rests on these checks alone; Python callers check the meaning.
template <typename Array>
void check_layout(const Array& array, const std::string& name, std::size_t size) {
  if (array.device_type() != nb::device::cpu::value)
    fail(name + " is on device type " + std::to_string(array.device_type()) + ", expected CPU (1)");
  if (array.ndim() != 1) fail(name + " has " + std::to_string(array.ndim()) + " dimensions, expected 1");
  if (array.shape(0) != size)
    fail(name + " has " + std::to_string(array.shape(0)) + " elements, expected " + std::to_string(size));
  if (size > 1 && array.stride(0) != 1)
    fail(name + " has stride " + std::to_string(array.stride(0)) + ", expected 1 (contiguous)");
  const auto first = reinterpret_cast<std::uintptr_t>(array.data());
  if (const std::size_t bytes = array.itemsize(); size && bytes && first % bytes)
    fail(name + " begins at an address that is not a multiple of its " + std::to_string(bytes) + " bytes");
}

Kind kind_of(nb::dlpack::dtype dtype, const std::string& name) {
  const auto code = static_cast<nb::dlpack::dtype_code>(dtype.code);
  if (dtype.lanes == 1 && code == nb::dlpack::dtype_code::Float && dtype.bits == 32) return Kind::kF32;
  if (dtype.lanes == 1 && code == nb::dlpack::dtype_code::Float && dtype.bits == 16) return Kind::kF16;
  if (dtype.lanes == 1 && code == nb::dlpack::dtype_code::Bfloat && dtype.bits == 16) return Kind::kBf16;
  fail(name + " is " + dtype_name(dtype) + ", expected float32, float16 or bfloat16");
}

template <typename Array>
void check_float64(const Array& array, const std::string& name) {
  if (array.dtype() != nb::dtype<double>()) fail(name + " is " + dtype_name(array.dtype()) + ", expected float64");
}

// K updates of one length and dtype; keeps their addresses.
struct Updates {
  std::vector<const void*> data;
  std::vector<Range> ranges;
  Kind kind = Kind::kF32;
  std::size_t size = 0;

  explicit Updates(const std::vector<Buffer>& updates) {
    if (updates.empty()) fail("at least one update is needed, got 0");
    size = updates[0].ndim() == 1 ? updates[0].shape(0) : 0;
    for (std::size_t k = 0; k < updates.size(); ++k) {
      const std::string name = "updates[" + std::to_string(k) + "]";
      check_layout(updates[k], name, size);
      const Kind own = kind_of(updates[k].dtype(), name);
      if (k == 0) kind = own;
      if (own != kind)
        fail(name + " is " + dtype_name(updates[k].dtype()) + ", updates[0] is " + dtype_name(updates[0].dtype()));
      data.push_back(updates[k].data());
      ranges.push_back(range(updates[k]));
    }
  }

  fedmoe::Inputs inputs() const { return {data, kind, size}; }

  void check_weights(const std::vector<double>& weights) const {
    if (weights.size() != data.size())
      fail(std::to_string(data.size()) + " updates, but " + std::to_string(weights.size()) + " weights");
  }

  template <typename Array>
  void check_apart(const Array& out, const std::string& name, bool whole) const {
    for (std::size_t k = 0; k < ranges.size(); ++k)
      if (const Range own = range(out); own.overlaps(ranges[k]) && !(whole && own == ranges[k]))
        fail(name + " overlaps updates[" + std::to_string(k) + "]" + (whole ? " partly" : ""));
  }

  fedmoe::Output output(const nb::ndarray<>& out) const {
    check_layout(out, "out", size);
    check_apart(out, "out", true);
    return {out.data(), kind_of(out.dtype(), "out")};
  }
};

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
  const auto to = all.output(out);
  run(threads, [&](fedmoe::Work work) { return fedmoe::weighted_mean(to, all.inputs(), weights, work); });
}

void accumulate(nb::ndarray<> sums, const std::vector<Buffer>& updates, const std::vector<double>& weights,
                unsigned threads) {
  const Updates all(updates);
  all.check_weights(weights);
  check_layout(sums, "sums", all.size);
  check_float64(sums, "sums");
  all.check_apart(sums, "sums", false);
  auto* to = static_cast<double*>(sums.data());
  run(threads, [&](fedmoe::Work work) { return fedmoe::accumulate(to, all.inputs(), weights, work); });
}

void median(nb::ndarray<> out, const std::vector<Buffer>& updates, unsigned threads) {
  const Updates all(updates);
  const auto to = all.output(out);
  run(threads, [&](fedmoe::Work work) { return fedmoe::median(to, all.inputs(), work); });
}

void trimmed_mean(nb::ndarray<> out, const std::vector<Buffer>& updates, std::size_t trim, unsigned threads) {
  const Updates all(updates);
  if (trim > (updates.size() - 1) / 2)
    fail("trim is " + std::to_string(trim) + ", must leave some of " + std::to_string(updates.size()) + " updates");
  const auto to = all.output(out);
  run(threads, [&](fedmoe::Work work) { return fedmoe::trimmed_mean(to, all.inputs(), trim, work); });
}

std::vector<double> squared_norms(const std::vector<Buffer>& updates, const Buffer& center, unsigned threads) {
  const Updates all(updates);
  check_layout(center, "center", all.size);
  if (kind_of(center.dtype(), "center") != all.kind)
    fail("center is " + dtype_name(center.dtype()) + ", updates[0] is " + dtype_name(updates[0].dtype()));
  std::vector<double> found(updates.size());
  run(threads, [&](fedmoe::Work work) { return fedmoe::squared_norms(found.data(), all.inputs(), center.data(), work); });
  return found;
}

void squared_distances(nb::ndarray<> out, const std::vector<Buffer>& updates, unsigned threads) {
  const Updates all(updates);
  check_layout(out, "out", updates.size() * updates.size());
  check_float64(out, "out");
  all.check_apart(out, "out", false);
  auto* to = static_cast<double*>(out.data());
  run(threads, [&](fedmoe::Work work) { return fedmoe::squared_distances(to, all.inputs(), work); });
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
