// Aggregation of K host buffers of equal length, free of Python; bit-identical for every number of threads.
#pragma once

#include <cstddef>
#include <span>
#include <string>
#include <vector>

#include "loops.h"

namespace fedmoe {

// K buffers of `size` elements.
struct Inputs {
  std::span<const void* const> data;
  Kind kind;
  std::size_t size;
};

// Where a result goes: of the inputs' size; it may be one of them, and may not overlap one partly.
struct Output {
  void* data;
  Kind kind;
};

// How the work is done: by up to `threads` threads, the caller's among them, which asks `stop` from time to time.
struct Work {
  unsigned threads = 1;
  bool (*stop)() = nullptr;
};

// Each returns false where `stop` said so; the output is then partly written.

// out[i] = (Σ_k weights[k] · inputs[k][i]) / Σ_k weights[k]: summed in fp64 in the order of k, rounded last.
bool weighted_mean(Output out, const Inputs& inputs, std::span<const double> weights, Work work);

// sums[i] += Σ_k weights[k] · inputs[k][i], in the order of k: what `weighted_mean` divides.
bool accumulate(double* sums, const Inputs& inputs, std::span<const double> weights, Work work);

// The middle number of each coordinate, or the mean of the two middle ones. NaN counts as more than infinity.
bool median(Output out, const Inputs& inputs, Work work);

// The mean of each coordinate without its `trim` lowest and highest numbers; 2 · trim < K.
bool trimmed_mean(Output out, const Inputs& inputs, std::size_t trim, Work work);

// distances[k] = ‖inputs[k] - center‖², in fp64; `center`, of the inputs' kind and size, may be null: zeros.
bool squared_norms(double* distances, const Inputs& inputs, const void* center, Work work);

// distances[k · K + l] = ‖inputs[k] - inputs[l]‖², in fp64.
bool squared_distances(double* distances, const Inputs& inputs, Work work);

// Up to this many clients are ordered by a network, more by bisection. K is all that the choice depends on.
inline constexpr std::size_t kNetwork = 256;

// The instruction sets that this processor has, the best first; and which is in use: the best, unless told otherwise.
std::vector<std::string> instruction_sets();
std::string instruction_set();
// False, and nothing changed, where there is none of that name.
bool use_instruction_set(const std::string& name);

}  // namespace fedmoe
