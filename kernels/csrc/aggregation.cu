// Aggregation on the device: a thread a coordinate; neighbours read neighbouring numbers of one client after another.
#include <algorithm>
#include <cstdint>
#include <vector>

#include "aggregation_cuda.h"

namespace fedmoe {
namespace {

constexpr unsigned kThreads = 128;

__device__ inline std::int32_t flip(std::int32_t bits) { return bits ^ ((bits >> 31) & 0x7fffffff); }

__device__ inline std::int32_t key(float x) {
  const std::int32_t bits = __float_as_int(x);
  return (bits & 0x7fffffff) > 0x7f800000 ? 0x7fc00000 : flip(bits);
}

__device__ inline float number(std::int32_t key) { return __int_as_float(flip(key)) + 0.0f; }

// Product and sum rounded apart, as on the host.
__global__ void mean(float* out, const float* const* updates, const double* weights, std::size_t clients,
                     std::size_t size) {
  const std::size_t i = std::size_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (i >= size) return;
  double sum = 0.0, total = 0.0;
  for (std::size_t k = 0; k < clients; ++k) {
    sum = __dadd_rn(sum, __dmul_rn(weights[k], static_cast<double>(updates[k][i])));
    total = __dadd_rn(total, weights[k]);
  }
  out[i] = static_cast<float>(sum / total);
}

// The key of rank `rank` among those of coordinate i, by bisection; all passes but the first find them in the cache.
__device__ std::int32_t select(const float* const* updates, std::size_t clients, std::size_t rank, std::size_t i) {
  std::int32_t low = INT32_MAX, high = INT32_MIN;
  for (std::size_t k = 0; k < clients; ++k) {
    const std::int32_t x = key(updates[k][i]);
    low = min(low, x);
    high = max(high, x);
  }
  while (low < high) {
    const std::int32_t middle = (low & high) + ((low ^ high) >> 1);  // rounded down, without overflow
    std::size_t below = 0;
    for (std::size_t k = 0; k < clients; ++k) below += key(updates[k][i]) <= middle;
    if (below > rank)
      high = middle;
    else
      low = middle + 1;
  }
  return low;
}

__global__ void median(float* out, const float* const* updates, std::size_t clients, std::size_t size) {
  const std::size_t i = std::size_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (i >= size) return;
  const std::int32_t low = select(updates, clients, (clients - 1) / 2, i);
  const std::int32_t high = clients % 2 ? low : select(updates, clients, clients / 2, i);
  const double both = static_cast<double>(number(low)) + static_cast<double>(number(high));
  out[i] = low == high ? number(low) : static_cast<float>(both / 2);
}

__global__ void trimmed_mean(float* out, const float* const* updates, std::size_t clients, std::size_t trim,
                             std::size_t size) {
  const std::size_t i = std::size_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (i >= size) return;
  const std::int32_t low = select(updates, clients, trim, i), high = select(updates, clients, clients - 1 - trim, i);
  if (low == high) {
    out[i] = number(low);
    return;
  }
  double sum = 0.0;
  std::size_t lower = 0, upper = 0;
  for (std::size_t k = 0; k < clients; ++k) {
    const float x = updates[k][i];
    const std::int32_t own = key(x);
    if (own > low && own < high) sum += static_cast<double>(x);
    lower += own <= low;
    upper += own >= high;
  }
  const double a = __dmul_rn(static_cast<double>(lower - trim), static_cast<double>(number(low)));
  const double b = __dmul_rn(static_cast<double>(upper - trim), static_cast<double>(number(high)));
  out[i] = static_cast<float>(__dadd_rn(__dadd_rn(sum, a), b) / static_cast<double>(clients - 2 * trim));
}

cudaError_t launch(Rule rule, float* out, const float* const* updates, const double* weights, std::size_t clients,
                   std::size_t trim, std::size_t size, cudaStream_t stream) {
  if (size == 0) return cudaSuccess;
  const auto blocks = static_cast<unsigned>((size + kThreads - 1) / kThreads);
  switch (rule) {
    case Rule::kMean: mean<<<blocks, kThreads, 0, stream>>>(out, updates, weights, clients, size); break;
    case Rule::kMedian: median<<<blocks, kThreads, 0, stream>>>(out, updates, clients, size); break;
    case Rule::kTrimmedMean: trimmed_mean<<<blocks, kThreads, 0, stream>>>(out, updates, clients, trim, size); break;
  }
  return cudaGetLastError();
}

// One of two rooms: a chunk of every client, the result of it, and their addresses.
struct Room {
  cudaStream_t stream = nullptr;
  float* chunks = nullptr;
  float* out = nullptr;
  const float** addresses = nullptr;
  double* weights = nullptr;

  cudaError_t open(const double* host_weights, std::size_t clients, std::size_t chunk) {
    if (cudaError_t error = cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking)) return error;
    if (cudaError_t error = cudaMalloc(&chunks, clients * chunk * sizeof(float))) return error;
    if (cudaError_t error = cudaMalloc(&out, chunk * sizeof(float))) return error;
    if (cudaError_t error = cudaMalloc(&addresses, clients * sizeof(float*))) return error;
    if (cudaError_t error = cudaMalloc(&weights, clients * sizeof(double))) return error;
    std::vector<const float*> own(clients);
    for (std::size_t k = 0; k < clients; ++k) own[k] = chunks + k * chunk;
    // On this stream, which waits for no other: cudaMemcpy of pageable memory may return before the device has it.
    if (cudaError_t error =
            cudaMemcpyAsync(addresses, own.data(), clients * sizeof(float*), cudaMemcpyHostToDevice, stream))
      return error;
    if (host_weights)
      if (cudaError_t error =
              cudaMemcpyAsync(weights, host_weights, clients * sizeof(double), cudaMemcpyHostToDevice, stream))
        return error;
    return cudaStreamSynchronize(stream);
  }

  ~Room() {
    if (stream) cudaStreamSynchronize(stream);  // what failed must not write into memory that is gone
    cudaFree(weights);
    cudaFree(addresses);
    cudaFree(out);
    cudaFree(chunks);
    if (stream) cudaStreamDestroy(stream);
  }
};

cudaError_t paged(Rule rule, float* out, const float* const* updates, const double* weights, std::size_t clients,
                  std::size_t trim, std::size_t size, std::size_t chunk) {
  Room rooms[2];
  for (Room& room : rooms)
    if (cudaError_t error = room.open(weights, clients, chunk)) return error;
  for (std::size_t start = 0, turn = 0; start < size; start += chunk, turn ^= 1) {
    Room& room = rooms[turn];  // its stream keeps the next chunk behind the last one's result
    const std::size_t count = std::min(chunk, size - start);
    for (std::size_t k = 0; k < clients; ++k)
      if (cudaError_t error = cudaMemcpyAsync(room.chunks + k * chunk, updates[k] + start, count * sizeof(float),
                                              cudaMemcpyHostToDevice, room.stream))
        return error;
    if (cudaError_t error = launch(rule, room.out, room.addresses, room.weights, clients, trim, count, room.stream))
      return error;
    if (cudaError_t error =
            cudaMemcpyAsync(out + start, room.out, count * sizeof(float), cudaMemcpyDeviceToHost, room.stream))
      return error;
  }
  for (Room& room : rooms)
    if (cudaError_t error = cudaStreamSynchronize(room.stream)) return error;
  return cudaSuccess;
}

}  // namespace

const char* aggregate_on_device(Rule rule, float* out, const float* const* updates, const double* weights,
                                std::size_t clients, std::size_t trim, std::size_t size, void* stream) {
  const cudaError_t error =
      launch(rule, out, updates, weights, clients, trim, size, static_cast<cudaStream_t>(stream));
  return error ? cudaGetErrorString(error) : nullptr;
}

const char* aggregate_paged(Rule rule, float* out, const float* const* updates, const double* weights,
                            std::size_t clients, std::size_t trim, std::size_t size, std::size_t chunk) {
  if (size == 0) return nullptr;
  const cudaError_t error =
      paged(rule, out, updates, weights, clients, trim, size, std::clamp<std::size_t>(chunk, 1, size));
  return error ? cudaGetErrorString(error) : nullptr;
}

}  // namespace fedmoe
