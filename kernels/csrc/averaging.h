// Weighted averaging of host buffers, free of Python.
#pragma once

#include <cstddef>
#include <span>

namespace fedmoe {

// out[i] = (Σ_k weights[k] · updates[k][i]) / Σ_k weights[k], for i < size.
// Sums in fp64, in the order of `updates`, and rounds once: bit-identical for any blocking.
// `out` may be one of `updates`; it may not overlap one partly.
void weighted_mean(float* out, std::span<const float* const> updates, std::span<const double> weights,
                   std::size_t size);

}  // namespace fedmoe
