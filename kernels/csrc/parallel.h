// Tasks for threads: numbered from 0, taken in that order, each by whoever is free.
#pragma once

#include <atomic>
#include <chrono>
#include <cstddef>
#include <system_error>
#include <thread>
#include <vector>

namespace fedmoe {

// Calls `act()(task)` for every task, with an `act()` for each thread, until `stop` says true; whether all were done.
// Between tasks the calling thread asks `stop` every 50 ms. `act` must not throw.
template <class Act>
bool in_parallel(std::size_t tasks, unsigned threads, bool (*stop)(), Act act) {
  std::atomic<std::size_t> next{0};
  std::atomic<bool> stopped{false};
  const auto work = [&](bool asks) {
    auto one = act();
    auto asked = std::chrono::steady_clock::now();
    for (std::size_t task; !stopped.load(std::memory_order_relaxed) && (task = next.fetch_add(1)) < tasks;) {
      one(task);
      if (!asks || !stop) continue;
      if (const auto now = std::chrono::steady_clock::now(); now - asked >= std::chrono::milliseconds(50)) {
        asked = now;
        if (stop()) stopped = true;
      }
    }
  };
  std::vector<std::thread> others;
  for (unsigned n = 1; n < threads && n < tasks; ++n) {
    try {
      others.emplace_back(work, false);
    } catch (const std::system_error&) {  // as many as the system gives
      break;
    }
  }
  work(true);
  for (auto& other : others) other.join();
  return !stopped;
}

}  // namespace fedmoe
