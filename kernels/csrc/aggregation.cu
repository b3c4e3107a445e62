// Aggregation on the device: a thread a coordinate; neighbours read neighbouring numbers of one client after another.
// Squares: a block a sum, whose tiles are added in their order, without atomics.
#include <algorithm>
#include <cstdint>
#include <vector>

#include "aggregation_cuda.h"
#include "coordinates.h"

namespace fedmoe {
namespace {

using namespace coordinates;

constexpr unsigned kThreads = 128;
constexpr unsigned kSquareThreads = 512;
constexpr unsigned kTilesAtATime = kSquareThreads / kStripes;

// What a kernel reads, all of it in device memory.
struct Held {
  const void* const* updates;
  const double* weights;
  const void* center;
  double* sums;  // of squares, added to
};

// ---- kernels

template <class Type>
struct Mean {
  const void* const* updates;
  std::size_t clients;
  const double* weights;
  double total;
  __device__ float operator()(std::size_t i) const { return mean<Type>(updates, clients, weights, total, i); }
};

template <class Type>
struct Median {
  const void* const* updates;
  std::size_t clients;
  __device__ float operator()(std::size_t i) const { return median<Type>(updates, clients, i); }
};

template <class Type>
struct TrimmedMean {
  const void* const* updates;
  std::size_t clients, trim;
  __device__ float operator()(std::size_t i) const { return trimmed_mean<Type>(updates, clients, trim, i); }
};

// No __restrict__: the result may be one of the updates.
template <class Out, class Each>
__global__ void coordinatewise(void* out, std::size_t size, Each each) {
  const std::size_t i = std::size_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (i < size) static_cast<typename Out::Stored*>(out)[i] = Out::narrow(each(i));
}

// By all of a block: adds Σ_i (a[i] - b[i])² to *sum, tile after tile; a tile is that of kStripes threads.
template <class Type>
__device__ void add_squares(double* sum, const void* a, const void* b, std::size_t size, std::size_t tile) {
  __shared__ double tiles[kTilesAtATime];
  const unsigned stripe = threadIdx.x % kStripes, own = threadIdx.x / kStripes;
  double total = threadIdx.x == 0 ? *sum : 0.0;
  for (std::size_t first = 0; first < size; first += kTilesAtATime * tile) {
    const std::size_t start = first + own * tile;
    double x = 0.0;
    if (start < size) x = squared_stripe<Type>(a, b, start, min(tile, size - start), stripe);
    for (unsigned half = kStripes / 2; half; half /= 2) x += __shfl_down_sync(0xffffffff, x, half, kStripes);
    if (stripe == 0) tiles[own] = x;
    __syncthreads();
    if (threadIdx.x == 0)
      for (double each : tiles) total += each;  // 0 beyond the last
    __syncthreads();
  }
  if (threadIdx.x == 0) *sum = total;
}

template <class Type>
__global__ void squared_norms(Held held, std::size_t size) {
  add_squares<Type>(held.sums + blockIdx.x, held.updates[blockIdx.x], held.center, size, kNormTile);
}

// A block for each pair, the later client's row; the others end at once.
template <class Type>
__global__ void squared_distances(Held held, std::size_t size) {
  const std::size_t k = blockIdx.x, l = blockIdx.y;
  if (l < k) add_squares<Type>(held.sums + k * gridDim.x + l, held.updates[k], held.updates[l], size, kPairTile);
}

template <class Type, class Each>
void launch_each(const Job& job, void* out, std::size_t size, Each each, cudaStream_t stream) {
  const auto blocks = static_cast<unsigned>((size + kThreads - 1) / kThreads);
  of(job.out_kind, [&](auto to) {
    coordinatewise<decltype(to)><<<blocks, kThreads, 0, stream>>>(out, size, each);
  });
}

// `size` coordinates of what is held, to `out` or its sums; the job says how.
cudaError_t launch(const Job& job, const Held& held, void* out, std::size_t size, cudaStream_t stream) {
  const auto clients = static_cast<unsigned>(job.clients);
  of(job.kind, [&](auto type) {
    using Type = decltype(type);
    switch (job.rule) {
      case Rule::kMean: {
        double total = 0.0;
        for (std::size_t k = 0; k < job.clients; ++k) total += job.weights[k];
        launch_each<Type>(job, out, size, Mean<Type>{held.updates, job.clients, held.weights, total}, stream);
        break;
      }
      case Rule::kMedian: launch_each<Type>(job, out, size, Median<Type>{held.updates, job.clients}, stream); break;
      case Rule::kTrimmedMean:
        launch_each<Type>(job, out, size, TrimmedMean<Type>{held.updates, job.clients, job.trim}, stream);
        break;
      case Rule::kSquaredNorms: squared_norms<Type><<<clients, kSquareThreads, 0, stream>>>(held, size); break;
      case Rule::kSquaredDistances:
        squared_distances<Type><<<dim3(clients, clients), kSquareThreads, 0, stream>>>(held, size);
        break;
    }
  });
  return cudaGetLastError();
}

// ---- memory

std::size_t sums_of(const Job& job) {
  if (job.rule == Rule::kSquaredNorms) return job.clients;
  return job.rule == Rule::kSquaredDistances ? job.clients * job.clients : 0;
}

// The lower triangle is what the device finds.
void mirror(const Job& job) {
  if (job.rule != Rule::kSquaredDistances) return;
  auto* to = static_cast<double*>(job.out);
  for (std::size_t k = 0; k < job.clients; ++k)
    for (std::size_t l = 0; l < k; ++l) to[l * job.clients + k] = to[k * job.clients + l];
}

// Device memory that is taken and given back in the order of a stream.
struct Memory {
  cudaStream_t stream = nullptr;
  void* data = nullptr;

  cudaError_t open(std::size_t bytes, cudaStream_t on) {
    stream = on;
    return bytes ? cudaMallocAsync(&data, bytes, stream) : cudaSuccess;
  }
  Memory() = default;
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  ~Memory() {
    if (data) cudaFreeAsync(data, stream);
  }
};

// Addresses, weights and sums beside them, for kernels on a stream.
struct Lists {
  Memory addresses, weights, sums;

  // `updates` is in host memory that may be pageable: it is read before this returns.
  cudaError_t open(const Job& job, const void* const* updates, bool with_sums, cudaStream_t stream) {
    const std::size_t bytes = job.clients * sizeof(double), all = with_sums ? sums_of(job) * sizeof(double) : 0;
    if (cudaError_t error = addresses.open(job.clients * sizeof(void*), stream)) return error;
    if (cudaError_t error = cudaMemcpyAsync(addresses.data, updates, job.clients * sizeof(void*),
                                            cudaMemcpyHostToDevice, stream))
      return error;
    if (job.weights) {
      if (cudaError_t error = weights.open(bytes, stream)) return error;
      if (cudaError_t error = cudaMemcpyAsync(weights.data, job.weights, bytes, cudaMemcpyHostToDevice, stream))
        return error;
    }
    if (cudaError_t error = sums.open(all, stream)) return error;
    return all ? cudaMemsetAsync(sums.data, 0, all, stream) : cudaSuccess;
  }

  Held held(const void* center) const {
    return {static_cast<const void* const*>(addresses.data), static_cast<const double*>(weights.data), center,
            static_cast<double*>(sums.data)};
  }
};

// The sums, on the stream that their last kernel is on; waits.
cudaError_t fetch_sums(const Job& job, const double* sums, cudaStream_t stream) {
  if (cudaError_t error =
          cudaMemcpyAsync(job.out, sums, sums_of(job) * sizeof(double), cudaMemcpyDeviceToHost, stream))
    return error;
  if (cudaError_t error = cudaStreamSynchronize(stream)) return error;
  mirror(job);
  return cudaSuccess;
}

cudaError_t on_device(const Job& job, cudaStream_t stream) {
  Lists lists;
  if (cudaError_t error = lists.open(job, job.updates, true, stream)) return error;
  const Held held = lists.held(job.center);
  if (cudaError_t error = launch(job, held, job.out, job.size, stream)) return error;
  return held.sums ? fetch_sums(job, held.sums, stream) : cudaSuccess;
}

// ---- paging

std::size_t bytes_of(Kind kind) { return kind == Kind::kF32 ? 4 : 2; }

struct Stream {
  cudaStream_t handle = nullptr;
  cudaEvent_t done = nullptr;  // its last kernel

  cudaError_t open() {
    if (cudaError_t error = cudaStreamCreateWithFlags(&handle, cudaStreamNonBlocking)) return error;
    return cudaEventCreateWithFlags(&done, cudaEventDisableTiming);
  }
  Stream() = default;
  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;
  ~Stream() {
    if (handle) cudaStreamSynchronize(handle);  // what failed must not write into memory that is gone
    if (done) cudaEventDestroy(done);
    if (handle) cudaStreamDestroy(handle);
  }
};

// One of two rooms: a chunk of every client, and of the center after them; the result of it; and their addresses.
struct Room {
  Stream stream;  // the first, so that it ends last
  Memory chunks, out;
  Lists lists;
  std::size_t row = 0;  // bytes

  cudaError_t open(const Job& job, std::size_t chunk, bool first) {
    row = chunk * bytes_of(job.kind);
    if (cudaError_t error = stream.open()) return error;
    if (cudaError_t error = chunks.open((job.clients + 1) * row, stream.handle)) return error;
    if (cudaError_t error = out.open(chunk * bytes_of(job.out_kind), stream.handle)) return error;
    std::vector<const void*> own(job.clients);
    for (std::size_t k = 0; k < job.clients; ++k) own[k] = at(k);
    if (cudaError_t error = lists.open(job, own.data(), first, stream.handle)) return error;
    return cudaStreamSynchronize(stream.handle);
  }

  char* at(std::size_t k) const { return static_cast<char*>(chunks.data) + k * row; }
};

cudaError_t paged(const Job& job, std::size_t chunk) {
  Room rooms[2];
  for (Room& room : rooms)
    if (cudaError_t error = room.open(job, chunk, &room == rooms)) return error;
  auto* sums = static_cast<double*>(rooms[0].lists.sums.data);  // of both
  const std::size_t from = bytes_of(job.kind), to = bytes_of(job.out_kind);
  for (std::size_t start = 0, turn = 0; start < job.size; start += chunk, turn ^= 1) {
    Room& room = rooms[turn];  // its stream keeps the next chunk behind the last one's result
    const cudaStream_t stream = room.stream.handle;
    const std::size_t count = std::min(chunk, job.size - start);
    for (std::size_t k = 0; k < job.clients + (job.center ? 1 : 0); ++k) {
      const void* whole = k < job.clients ? job.updates[k] : job.center;
      if (cudaError_t error = cudaMemcpyAsync(room.at(k), static_cast<const char*>(whole) + start * from, count * from,
                                              cudaMemcpyHostToDevice, stream))
        return error;
    }
    // Sums go from chunk to chunk in order.
    if (cudaError_t error = cudaStreamWaitEvent(stream, rooms[turn ^ 1].stream.done, 0)) return error;
    Held held = room.lists.held(room.at(job.clients));
    held.sums = sums;
    if (cudaError_t error = launch(job, held, room.out.data, count, stream)) return error;
    if (cudaError_t error = cudaEventRecord(room.stream.done, stream)) return error;
    if (!sums)
      if (cudaError_t error = cudaMemcpyAsync(static_cast<char*>(job.out) + start * to, room.out.data, count * to,
                                              cudaMemcpyDeviceToHost, stream))
        return error;
  }
  for (Room& room : rooms)
    if (cudaError_t error = cudaStreamSynchronize(room.stream.handle)) return error;
  return sums ? fetch_sums(job, sums, rooms[0].stream.handle) : cudaSuccess;
}

const char* reason_of(cudaError_t error) {
  if (error) cudaGetLastError();  // it must not surface in another's next launch
  return error ? cudaGetErrorString(error) : nullptr;
}

bool is_empty(const Job& job) {
  if (job.size == 0) std::fill_n(static_cast<double*>(job.out), sums_of(job), 0.0);
  return job.size == 0;
}

}  // namespace

int device_count(const char** reason) {
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  *reason = reason_of(error);
  return error ? 0 : count;
}

const char* aggregate_on_device(const Job& job, int device, void* stream) {
  if (is_empty(job)) return nullptr;
  int before = 0;
  if (cudaError_t error = cudaGetDevice(&before)) return reason_of(error);
  if (cudaError_t error = cudaSetDevice(device)) return reason_of(error);
  const char* reason = reason_of(on_device(job, static_cast<cudaStream_t>(stream)));
  cudaSetDevice(before);
  return reason;
}

const char* aggregate_paged(const Job& job, std::size_t chunk) {
  if (is_empty(job)) return nullptr;
  chunk = std::clamp<std::size_t>(chunk, 1, job.size);
  if (sums_of(job)) chunk = (chunk + kNormTile - 1) / kNormTile * kNormTile;
  return reason_of(paged(job, chunk));
}

}  // namespace fedmoe
