// Aggregation: which coordinates, in which pieces, by which thread. The loops over them are in loops.inl.
#include "aggregation.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <memory>
#include <new>

#include "network.h"
#include "parallel.h"

namespace fedmoe {
namespace {

// 32 KiB of sums stay in the first-level cache while each client gives 16 KiB in a row.
constexpr std::size_t kTile = 4096;
// Lanes that a thread takes at a time when it orders coordinates: two pages of every client.
constexpr std::size_t kOrdered = 32 * kLanes;
// 4 KiB of each client: those of 100 stay in the second-level cache while all pairs are compared.
constexpr std::size_t kCompared = kPairTile;

std::vector<const Loops*> available() {
  std::vector<const Loops*> found;
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl"))
    found.push_back(&kAvx512);
  if (__builtin_cpu_supports("avx2")) found.push_back(&kAvx2);
#endif
  found.push_back(&kPortable);
  return found;
}

std::atomic<const Loops*>& in_use() {
  static std::atomic<const Loops*> loops{available().front()};
  return loops;
}

const Loops& loops() { return *in_use().load(std::memory_order_relaxed); }

std::size_t pieces(std::size_t size, std::size_t piece) { return (size + piece - 1) / piece; }

// Keys of K clients, [K][kLanes], on cache lines.
struct Keys {
  struct Delete {
    void operator()(std::int32_t* keys) const { ::operator delete[](keys, std::align_val_t{64}); }
  };
  std::unique_ptr<std::int32_t[], Delete> data;
  explicit Keys(std::size_t clients)
      : data(static_cast<std::int32_t*>(
            ::operator new[](clients * kLanes * sizeof(std::int32_t), std::align_val_t{64}))) {}
};

// Calls finish(start, count, low, high) with the keys of two ranks, for kLanes coordinates after kLanes coordinates.
template <class Finish>
bool ordered(const Inputs& inputs, std::size_t low, std::size_t high, Work work, Finish finish) {
  const Loops& with = loops();
  const std::size_t clients = inputs.data.size();
  const bool by_network = clients <= kNetwork;
  const auto exchanges = by_network ? network(clients, {low, high}) : std::vector<Exchange>{};
  const std::size_t tasks = pieces(inputs.size, kOrdered);
  std::vector<Keys> memory;  // here, where running out of it can be told
  for (unsigned n = 0; n < std::clamp<std::size_t>(tasks, 1, work.threads); ++n) memory.emplace_back(clients);
  std::atomic<std::size_t> taken{0};
  return in_parallel(tasks, work.threads, work.stop, [&] {
    return [&, keys = memory[taken.fetch_add(1)].data.get()](std::size_t task) {
      alignas(64) std::array<std::int32_t, kLanes> found[2];
      const std::size_t end = std::min(inputs.size, (task + 1) * kOrdered);
      for (std::size_t start = task * kOrdered; start < end; start += kLanes) {
        const std::size_t count = std::min(kLanes, end - start);
        with.keys(inputs.kind, keys, inputs.data.data(), clients, start, count);
        if (by_network) {
          with.exchange(keys, exchanges.data(), exchanges.size());
          finish(with, start, count, keys + low * kLanes, keys + high * kLanes);
          continue;
        }
        with.select(keys, clients, low, found[0].data(), high == low + 1 ? found[1].data() : nullptr);
        if (high != low + 1) with.select(keys, clients, high, found[1].data(), nullptr);
        finish(with, start, count, found[0].data(), found[1].data());
      }
    };
  });
}

}  // namespace

bool weighted_mean(Output out, const Inputs& inputs, std::span<const double> weights, Work work) {
  const Loops& with = loops();
  double total = 0.0;
  for (double weight : weights) total += weight;
  return in_parallel(pieces(inputs.size, kTile), work.threads, work.stop, [&] {
    return [&](std::size_t task) {
      alignas(64) std::array<double, kTile> sums;
      const std::size_t start = task * kTile, count = std::min(kTile, inputs.size - start);
      std::fill_n(sums.begin(), count, 0.0);
      with.accumulate(inputs.kind, sums.data(), inputs.data.data(), weights.data(), inputs.data.size(), start, count);
      with.divide(out.kind, out.data, sums.data(), total, start, count);
    };
  });
}

bool accumulate(double* sums, const Inputs& inputs, std::span<const double> weights, Work work) {
  const Loops& with = loops();
  return in_parallel(pieces(inputs.size, kTile), work.threads, work.stop, [&] {
    return [&](std::size_t task) {
      const std::size_t start = task * kTile, count = std::min(kTile, inputs.size - start);
      with.accumulate(inputs.kind, sums + start, inputs.data.data(), weights.data(), inputs.data.size(), start, count);
    };
  });
}

bool median(Output out, const Inputs& inputs, Work work) {
  const std::size_t clients = inputs.data.size();
  return ordered(inputs, (clients - 1) / 2, clients / 2, work,
                 [&](const Loops& with, std::size_t start, std::size_t count, const std::int32_t* low,
                     const std::int32_t* high) { with.middle(out.kind, out.data, low, high, start, count); });
}

bool trimmed_mean(Output out, const Inputs& inputs, std::size_t trim, Work work) {
  const std::size_t clients = inputs.data.size();
  return ordered(inputs, trim, clients - 1 - trim, work,
                 [&](const Loops& with, std::size_t start, std::size_t count, const std::int32_t* low,
                     const std::int32_t* high) {
                   with.between(inputs.kind, out.kind, out.data, inputs.data.data(), clients, trim, low, high, start,
                                count);
                 });
}

bool squared_norms(double* distances, const Inputs& inputs, const void* center, Work work) {
  const Loops& with = loops();
  return in_parallel(inputs.data.size(), work.threads, work.stop, [&] {
    return [&](std::size_t k) {
      double sum = 0.0;
      for (std::size_t start = 0; start < inputs.size; start += kNormTile)
        sum += with.squared_distance(inputs.kind, inputs.data[k], center, start,
                                     std::min(kNormTile, inputs.size - start));
      distances[k] = sum;
    };
  });
}

bool squared_distances(double* distances, const Inputs& inputs, Work work) {
  const Loops& with = loops();
  const std::size_t clients = inputs.data.size();
  std::fill_n(distances, clients * clients, 0.0);
  // A share of the rows for each thread, over pieces of about 2^28 products; every pair's sum has one order.
  const std::size_t shares = std::clamp<std::size_t>(work.threads, 1, clients);
  const std::size_t piece = kCompared * std::max<std::size_t>(1, (std::size_t{1} << 28) / (kCompared * clients * clients));
  for (std::size_t first = 0; first < inputs.size; first += piece) {
    const std::size_t end = std::min(inputs.size, first + piece);
    const bool done = in_parallel(shares, work.threads, work.stop, [&] {
      return [&](std::size_t share) {
        for (std::size_t start = first; start < end; start += kCompared)
          for (std::size_t k = share; k < clients; k += shares)
            for (std::size_t l = 0; l < k; ++l)
              distances[k * clients + l] += with.squared_distance(inputs.kind, inputs.data[k], inputs.data[l], start,
                                                                  std::min(kCompared, end - start));
      };
    });
    if (!done || (work.stop && work.stop())) return false;
  }
  for (std::size_t k = 0; k < clients; ++k)
    for (std::size_t l = 0; l < k; ++l) distances[l * clients + k] = distances[k * clients + l];
  return true;
}

std::vector<std::string> instruction_sets() {
  std::vector<std::string> names;
  for (const Loops* found : available()) names.emplace_back(found->name);
  return names;
}

std::string instruction_set() { return loops().name; }

bool use_instruction_set(const std::string& name) {
  for (const Loops* found : available())
    if (found->name == name) {
      in_use() = found;
      return true;
    }
  return false;
}

}  // namespace fedmoe
