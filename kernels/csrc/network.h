// Compare-exchange networks that bring chosen ranks of K keys to the wires of these numbers.
#pragma once

#include <cstddef>
#include <initializer_list>
#include <vector>

#include "loops.h"

namespace fedmoe {

// Batcher's odd-even merge sort of `wires` keys, without what the wires `ranks` do not depend on.
std::vector<Exchange> network(std::size_t wires, std::initializer_list<std::size_t> ranks);

}  // namespace fedmoe
