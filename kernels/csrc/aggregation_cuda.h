// Aggregation on the device, free of Python, and of CUDA's types: only nvcc needs to find CUDA's headers.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fedmoe {

// The rules that have a device twin, with the arithmetic of loops.inl: fp64 sums in the order of the clients, numbers
// ordered as integers, NaN above infinity.
enum class Rule : std::uint8_t { kMean, kMedian, kTrimmedMean };

// out[i], fp32, of `clients` fp32 buffers of `size` on the current device. `updates` are their addresses and `weights`
// (kMean alone) doubles, both in device memory; `trim` is for kTrimmedMean. Work goes to the cudaStream_t `stream`.
// Returns without waiting: null, or CUDA's reason why the launch failed.
const char* aggregate_on_device(Rule rule, float* out, const float* const* updates, const double* weights,
                                std::size_t clients, std::size_t trim, std::size_t size, void* stream);

// The same for host buffers (`updates` and `weights` in host memory, `out` too; pinned ones are copied while the device
// works): `chunk` coordinates of all clients at a time, two chunks in device memory. Waits for the result.
const char* aggregate_paged(Rule rule, float* out, const float* const* updates, const double* weights,
                            std::size_t clients, std::size_t trim, std::size_t size, std::size_t chunk);

}  // namespace fedmoe
