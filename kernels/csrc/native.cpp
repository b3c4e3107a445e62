// Python bindings of the host extension: checks every buffer, then works without the GIL.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <string>
#include <vector>

#include "averaging.h"

namespace nb = nanobind;

namespace {

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

void fail(const std::string& message) { throw nb::value_error(message.c_str()); }

// Memory safety rests on this check alone; Python callers check the meaning.
template <typename Array>
void check(const Array& array, const std::string& name, std::size_t size) {
  if (array.device_type() != nb::device::cpu::value)
    fail(name + " is on device type " + std::to_string(array.device_type()) + ", expected CPU (1)");
  if (array.dtype() != nb::dtype<float>()) fail(name + " is " + dtype_name(array.dtype()) + ", expected float32");
  if (array.ndim() != 1) fail(name + " has " + std::to_string(array.ndim()) + " dimensions, expected 1");
  if (array.shape(0) != size)
    fail(name + " has " + std::to_string(array.shape(0)) + " elements, updates[0] has " + std::to_string(size));
  if (size > 1 && array.stride(0) != 1)
    fail(name + " has stride " + std::to_string(array.stride(0)) + ", expected 1 (contiguous)");
}

void weighted_mean(nb::ndarray<> out, const std::vector<Buffer>& updates, const std::vector<double>& weights) {
  if (updates.empty()) fail("weighted_mean needs at least one update, got 0");
  if (updates.size() != weights.size())
    fail(std::to_string(updates.size()) + " updates, but " + std::to_string(weights.size()) + " weights");

  const std::size_t size = updates[0].ndim() == 1 ? updates[0].shape(0) : 0;
  std::vector<const float*> pointers;
  for (std::size_t k = 0; k < updates.size(); ++k) {
    check(updates[k], "updates[" + std::to_string(k) + "]", size);
    pointers.push_back(static_cast<const float*>(updates[k].data()));
  }
  check(out, "out", size);

  nb::gil_scoped_release release;
  fedmoe::weighted_mean(static_cast<float*>(out.data()), pointers, weights, size);
}

}  // namespace

NB_MODULE(_native, module) {
  module.doc() = "Host arithmetic in C++: see fedmoe.kernels.averaging for the checked entries.";
  module.def("weighted_mean", &weighted_mean, nb::arg("out"), nb::arg("updates"), nb::arg("weights"),
             "out = sum(w * x) / sum(w) over 1-D contiguous fp32 CPU buffers; fp64 sums in the order given.\n\n"
             "Raises ValueError naming the buffer and both values where length, dtype, device or stride differ.");
}
