// The arithmetic of aggregation for one coordinate, or one stripe of a tile: what a thread of the device does, and what
// the unit tests run on the host, where it has to give the bits of loops.inl.
#pragma once

#include <cstddef>
#include <cstdint>

#include "loops.h"

namespace fedmoe::coordinates {
namespace {

#include "elements.inl"

template <class Type>
FEDMOE_BOTH float read(const void* input, std::size_t i) {
  return Type::widen(static_cast<const typename Type::Stored*>(input)[i]);
}

template <class Type>
FEDMOE_BOTH float mean(const void* const* inputs, std::size_t clients, const double* weights, double total,
                       std::size_t i) {
  double sum = 0.0;
  for (std::size_t k = 0; k < clients; ++k) sum += weights[k] * static_cast<double>(read<Type>(inputs[k], i));
  return static_cast<float>(sum / total);
}

// The key of rank `rank`, by bisection; on the device all passes but the first find the numbers in the cache.
template <class Type>
FEDMOE_BOTH std::int32_t select(const void* const* inputs, std::size_t clients, std::size_t rank, std::size_t i) {
  std::int32_t low = INT32_MAX, high = INT32_MIN;
  for (std::size_t k = 0; k < clients; ++k) {
    const std::int32_t x = key(read<Type>(inputs[k], i));
    low = x < low ? x : low;
    high = x > high ? x : high;
  }
  while (low < high) {
    const std::int32_t middle = (low & high) + ((low ^ high) >> 1);  // rounded down, without overflow
    std::size_t below = 0;
    for (std::size_t k = 0; k < clients; ++k) below += key(read<Type>(inputs[k], i)) <= middle;
    if (below > rank)
      high = middle;
    else
      low = middle + 1;
  }
  return low;
}

template <class Type>
FEDMOE_BOTH float median(const void* const* inputs, std::size_t clients, std::size_t i) {
  const std::int32_t low = select<Type>(inputs, clients, (clients - 1) / 2, i);
  return middle_of(low, clients % 2 ? low : select<Type>(inputs, clients, clients / 2, i));
}

template <class Type>
FEDMOE_BOTH float trimmed_mean(const void* const* inputs, std::size_t clients, std::size_t trim, std::size_t i) {
  const std::int32_t low = select<Type>(inputs, clients, trim, i);
  const std::int32_t high = select<Type>(inputs, clients, clients - 1 - trim, i);
  double sum = 0.0;
  std::int32_t lower = 0, upper = 0;
  for (std::size_t k = 0; k < clients; ++k) {
    const float x = read<Type>(inputs[k], i);
    const std::int32_t own = key(x);
    if (own > low && own < high) sum += static_cast<double>(x);
    lower += own <= low;
    upper += own >= high;
  }
  return mean_between(sum, lower, upper, static_cast<double>(clients), static_cast<double>(trim), low, high);
}

// Of the tile from `start`, every kStripes-th square from `stripe` on.
template <class Type>
FEDMOE_BOTH double squared_stripe(const void* a, const void* b, std::size_t start, std::size_t count,
                                  std::size_t stripe) {
  double sum = 0.0;
  for (std::size_t i = start + stripe; i < start + count; i += kStripes) {
    const double difference = static_cast<double>(read<Type>(a, i)) - static_cast<double>(read<Type>(b, i));
    sum += difference * difference;
  }
  return sum;
}

}  // namespace
}  // namespace fedmoe::coordinates
