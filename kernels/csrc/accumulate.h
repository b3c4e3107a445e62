// Device-side accumulation, free of Python, and of CUDA's types: only nvcc needs to find CUDA's headers.
#pragma once

#include <cstddef>

namespace fedmoe {

// Number of usable CUDA devices; with none, `reason` says why, otherwise it is null.
int device_count(const char** reason);

// theta[i] += weight · update[i] for i < size, both fp32 on the current device, on its cudaStream_t `stream`.
// Returns without waiting: null, or CUDA's reason why the launch failed.
const char* weighted_accumulate(float* theta, const float* update, float weight, std::size_t size, void* stream);

}  // namespace fedmoe
