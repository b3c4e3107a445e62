// Weighted accumulation on the device: theta += weight · update, bound by memory bandwidth alone.
#include <algorithm>
#include <cstdint>

#include "accumulate.h"

namespace fedmoe {
namespace {

constexpr unsigned kThreads = 256;

__device__ inline float add(float theta, float weight, float update) { return fmaf(weight, update, theta); }

__device__ inline float4 add(float4 theta, float weight, float4 update) {
  return {fmaf(weight, update.x, theta.x), fmaf(weight, update.y, theta.y), fmaf(weight, update.z, theta.z),
          fmaf(weight, update.w, theta.w)};
}

// No __restrict__: averaging a buffer into itself is legal.
template <typename Vector>
__global__ void accumulate(Vector* theta, const Vector* update, float weight, std::size_t count) {
  const std::size_t stride = std::size_t{gridDim.x} * blockDim.x;
  for (std::size_t i = std::size_t{blockIdx.x} * blockDim.x + threadIdx.x; i < count; i += stride)
    theta[i] = add(theta[i], weight, update[i]);
}

template <typename Vector>
cudaError_t launch(float* theta, const float* update, float weight, std::size_t count, cudaStream_t stream) {
  if (count == 0) return cudaSuccess;
  int device = 0;
  int processors = 0;
  if (cudaError_t error = cudaGetDevice(&device)) return error;
  if (cudaError_t error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device)) return error;
  // 8 blocks of 256 fill every multiprocessor of the supported GPUs; the grid-stride loop does the rest.
  const std::size_t wanted = (count + kThreads - 1) / kThreads;
  const auto blocks = static_cast<unsigned>(std::min<std::size_t>(wanted, 8 * static_cast<std::size_t>(processors)));
  accumulate<<<blocks, kThreads, 0, stream>>>(reinterpret_cast<Vector*>(theta),
                                              reinterpret_cast<const Vector*>(update), weight, count);
  return cudaGetLastError();
}

bool aligned(const void* pointer) { return reinterpret_cast<std::uintptr_t>(pointer) % sizeof(float4) == 0; }

}  // namespace

int device_count(const char** reason) {
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  cudaGetLastError();  // a question that failed must not surface in the next launch
  *reason = error ? cudaGetErrorString(error) : nullptr;
  return error ? 0 : count;
}

const char* weighted_accumulate(float* theta, const float* update, float weight, std::size_t size, void* stream) {
  const auto on = static_cast<cudaStream_t>(stream);
  const std::size_t vectors = aligned(theta) && aligned(update) ? size / 4 : 0;
  cudaError_t error = launch<float4>(theta, update, weight, vectors, on);
  if (!error) error = launch<float>(theta + 4 * vectors, update + 4 * vectors, weight, size - 4 * vectors, on);
  return error ? cudaGetErrorString(error) : nullptr;
}

}  // namespace fedmoe
