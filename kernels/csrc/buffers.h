// What the bindings check of the buffers that Python hands over: for host memory and device memory alike.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "loops.h"

namespace fedmoe::buffers {

namespace nb = nanobind;

using Buffer = nb::ndarray<nb::ro>;

inline std::string dtype_name(nb::dlpack::dtype dtype) {
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

[[noreturn]] inline void fail(const std::string& message) { throw nb::value_error(message.c_str()); }

// Where buffers lie: in host memory, for the host or, pinned or not, to be paged; or on one device.
enum class Place { kHost, kPaged, kDevice };

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
void check_layout(const Array& array, const std::string& name, std::size_t size, Place place) {
  const int type = array.device_type();
  const bool fits = place == Place::kDevice ? type == nb::device::cuda::value
                                            : type == nb::device::cpu::value ||
                                                  (place == Place::kPaged && type == nb::device::cuda_host::value);
  if (!fits)
    fail(name + " is on device type " + std::to_string(type) + ", expected " +
         (place == Place::kDevice ? "CUDA (2)" : "CPU (1)"));
  if (array.ndim() != 1) fail(name + " has " + std::to_string(array.ndim()) + " dimensions, expected 1");
  if (array.shape(0) != size)
    fail(name + " has " + std::to_string(array.shape(0)) + " elements, expected " + std::to_string(size));
  if (size > 1 && array.stride(0) != 1)
    fail(name + " has stride " + std::to_string(array.stride(0)) + ", expected 1 (contiguous)");
  const auto first = reinterpret_cast<std::uintptr_t>(array.data());
  if (const std::size_t bytes = array.itemsize(); size && bytes && first % bytes)
    fail(name + " begins at an address that is not a multiple of its " + std::to_string(bytes) + " bytes");
}

inline Kind kind_of(nb::dlpack::dtype dtype, const std::string& name) {
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
  Place place;
  int device = 0;  // its number, of Place::kDevice
  nb::dlpack::dtype dtype{};

  explicit Updates(const std::vector<Buffer>& updates, Place where = Place::kHost) : place(where) {
    if (updates.empty()) fail("at least one update is needed, got 0");
    size = updates[0].ndim() == 1 ? updates[0].shape(0) : 0;
    for (std::size_t k = 0; k < updates.size(); ++k) {
      const std::string name = "updates[" + std::to_string(k) + "]";
      if (k == 0) device = updates[0].device_id();
      check(updates[k], name);
      if (k == 0) kind = kind_of(dtype = updates[0].dtype(), name);
      check_kind(updates[k], name);
      data.push_back(updates[k].data());
      ranges.push_back(range(updates[k]));
    }
  }

  void check(const auto& array, const std::string& name) const {
    check_layout(array, name, size, place);
    if (place == Place::kDevice && array.device_id() != device)
      fail(name + " is on CUDA device " + std::to_string(array.device_id()) + ", updates[0] on " +
           std::to_string(device));
  }

  void check_kind(const Buffer& buffer, const std::string& name) const {
    if (kind_of(buffer.dtype(), name) != kind)
      fail(name + " is " + dtype_name(buffer.dtype()) + ", updates[0] is " + dtype_name(dtype));
  }

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

  void check_trim(std::size_t trim) const {
    if (trim > (data.size() - 1) / 2)
      fail("trim is " + std::to_string(trim) + ", must leave some of " + std::to_string(data.size()) + " updates");
  }

  void check_center(const Buffer& center) const {
    check(center, "center");
    check_kind(center, "center");
  }

  Kind check_output(const nb::ndarray<>& out) const {
    check(out, "out");
    check_apart(out, "out", true);
    return kind_of(out.dtype(), "out");
  }

  // In host memory, wherever the updates are.
  void check_distances(const nb::ndarray<>& out) const {
    check_layout(out, "out", data.size() * data.size(), place == Place::kHost ? place : Place::kPaged);
    check_float64(out, "out");
    check_apart(out, "out", false);
  }
};

}  // namespace fedmoe::buffers
