// Networks: K. E. Batcher, Sorting networks and their applications, 1968; pruned from the end.
#include "network.h"

#include <algorithm>
#include <bit>

namespace fedmoe {

std::vector<Exchange> network(std::size_t wires, std::initializer_list<std::size_t> ranks) {
  std::vector<Exchange> all;
  const std::size_t n = std::bit_ceil(wires);
  for (std::size_t p = 1; p < n; p *= 2)
    for (std::size_t k = p; k > 0; k /= 2)
      for (std::size_t j = k % p; j + k < n; j += 2 * k)
        for (std::size_t i = 0; i < k; ++i) {
          const std::size_t low = i + j, high = i + j + k;
          // A wire beyond the last would hold infinity, which stays where it is.
          if (low / (2 * p) == high / (2 * p) && high < wires)
            all.push_back({static_cast<std::uint32_t>(low), static_cast<std::uint32_t>(high)});
        }
  std::vector<bool> needed(wires);
  for (std::size_t rank : ranks) needed[rank] = true;
  std::vector<Exchange> kept;
  for (auto it = all.rbegin(); it != all.rend(); ++it)
    if (needed[it->low] || needed[it->high]) {
      needed[it->low] = needed[it->high] = true;
      kept.push_back(*it);
    }
  std::reverse(kept.begin(), kept.end());
  return kept;
}

}  // namespace fedmoe
