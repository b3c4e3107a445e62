// Aggregation on the device, free of Python, and of CUDA's types: only nvcc needs to find CUDA's headers.
#pragma once

#include <cstddef>
#include <cstdint>

#include "loops.h"

namespace fedmoe {

// The functions of aggregation.h that have a device twin, of the same bits.
enum class Rule : std::uint8_t { kMean, kMedian, kTrimmedMean, kSquaredNorms, kSquaredDistances };

struct Job {
  Rule rule;
  const void* const* updates;  // K addresses; the array itself is in host memory
  std::size_t clients;
  std::size_t size;
  Kind kind;
  void* out;  // beside the updates, and as aggregation.h says; but of squares in host memory: K or K · K doubles
  Kind out_kind = Kind::kF32;
  const double* weights = nullptr;  // K, in host memory: of the mean
  std::size_t trim = 0;             // of the trimmed mean, 2 · trim < K
  const void* center = nullptr;     // beside the updates: of the norms
};

// Number of usable CUDA devices; with none, `reason` says why, otherwise it is null.
int device_count(const char** reason);

// The job of buffers in the memory of one device, on its cudaStream_t `stream`. Waits for squares alone, which end in
// host memory. Null, or CUDA's reason why it failed.
const char* aggregate_on_device(const Job& job, int device, void* stream);

// The job of buffers in host memory, on the current device: `chunk` coordinates of all clients at a time (of squares,
// rounded up to kNormTile), two chunks in device memory; pinned ones are copied while the device works. Waits.
const char* aggregate_paged(const Job& job, std::size_t chunk);

}  // namespace fedmoe
