// The inner loops of aggregation: one table of them for each instruction set, all from loops.inl and of the same bits.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fedmoe {

// How an element is stored. All are widened to fp32, exactly, before anything is done with them.
enum class Kind : std::uint8_t { kF32, kBf16, kF16 };

// Coordinates that are ordered side by side, one a lane.
inline constexpr std::size_t kLanes = 64;

// A sum of squares is one of tiles, of so many coordinates for a norm and for a pair's distance, added in their order; a
// tile's is of as many sums as there are stripes, each of every so-manieth coordinate, folded in halves.
inline constexpr std::size_t kStripes = 16, kNormTile = 4096, kPairTile = 1024;

// Two wires of a network, as rows of [K][kLanes] keys: the smaller of the two goes to `low`.
struct Exchange {
  std::uint32_t low, high;
};

// `inputs` are the first elements of K clients' buffers; loops take the elements from `start` to `start + count`.
struct Loops {
  const char* name;
  // sums[i] += Σ_k weights[k] · inputs[k][start + i], one product and one sum after the other, in the order of k.
  void (*accumulate)(Kind, double* sums, const void* const* inputs, const double* weights, std::size_t clients,
                     std::size_t start, std::size_t count);
  // out[start + i] = sums[i] / total, rounded to fp32, and that to the kind of `out`.
  void (*divide)(Kind, void* out, const double* sums, double total, std::size_t start, std::size_t count);
  // keys[k][i]: integers in the order of the numbers (-0 before 0, NaN last); lanes from `count` on are 0.
  void (*keys)(Kind, std::int32_t* keys, const void* const* inputs, std::size_t clients, std::size_t start,
               std::size_t count);
  void (*exchange)(std::int32_t* keys, const Exchange* exchanges, std::size_t count);
  // found[i]: the key of rank `rank`, from 0, among keys[0..clients)[i], by bisection; with the next larger or equal
  // one, of rank + 1, in `next` unless that is null.
  void (*select)(const std::int32_t* keys, std::size_t clients, std::size_t rank, std::int32_t* found,
                 std::int32_t* next);
  // out[start + i] = the middle between two keys' numbers.
  void (*middle)(Kind, void* out, const std::int32_t* low, const std::int32_t* high, std::size_t start,
                 std::size_t count);
  // The mean of what lies between two keys, these included, without `trim` numbers on either side: the sum of those
  // strictly between, in the order of k, then the lower key's number and the upper's, as often as they are left.
  void (*between)(Kind in, Kind out_kind, void* out, const void* const* inputs, std::size_t clients, std::size_t trim,
                  const std::int32_t* low, const std::int32_t* high, std::size_t start, std::size_t count);
  // Σ_i (a[start + i] - b[start + i])²; `b` null stands for zeros. The sum is of kStripes interleaved ones.
  double (*squared_distance)(Kind, const void* a, const void* b, std::size_t start, std::size_t count);
};

extern const Loops kPortable;
#if defined(__x86_64__)
extern const Loops kAvx2, kAvx512;
#endif

}  // namespace fedmoe
