// Unit tests of aggregation without Python, which sanitizers can watch: against plain loops, for each instruction set.
#include "aggregation.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "coordinates.h"
#include "network.h"

namespace {

using fedmoe::Inputs;
using fedmoe::Kind;
using fedmoe::Output;

int failures = 0;

void expect(bool holds, const char* what, std::size_t clients, std::size_t size) {
  if (holds) return;
  ++failures;
  std::printf("FAILED %s: %zu clients of %zu, %s\n", what, clients, size, fedmoe::instruction_set().c_str());
}

bool same(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() && (a.empty() || !std::memcmp(a.data(), b.data(), a.size() * sizeof(float)));
}

// Exactly as long as they say, so that reading on is an error.
struct Drawn {
  std::vector<std::vector<float>> buffers;
  std::vector<const void*> data;
  std::vector<double> weights;

  Drawn(std::size_t clients, std::size_t size) : buffers(clients) {
    std::mt19937 random(static_cast<unsigned>(31 * clients + size));
    for (auto& buffer : buffers) {
      for (std::size_t i = 0; i < size; ++i) buffer.push_back(static_cast<float>(random() % 41) / 7.0f - 3.0f);
      buffer.shrink_to_fit();
      data.push_back(buffer.data());
      weights.push_back(1.0 + static_cast<double>(random() % 9));
    }
  }

  Inputs inputs() const { return {data, Kind::kF32, buffers[0].size()}; }
};

std::vector<float> result(std::size_t size, const auto& rule) {
  std::vector<float> out(size);
  expect(rule(Output{out.data(), Kind::kF32}), "was not stopped", 0, size);
  return out;
}

void rules(std::size_t clients, std::size_t size) {
  const Drawn drawn(clients, size);
  const Inputs inputs = drawn.inputs();
  const std::size_t trim = (clients - 1) / 3;
  std::vector<float> mean, median, trimmed;
  for (std::size_t i = 0; i < size; ++i) {
    std::vector<float> numbers;
    double sum = 0.0, total = 0.0;
    for (std::size_t k = 0; k < clients; ++k) {
      numbers.push_back(drawn.buffers[k][i]);
      sum += drawn.weights[k] * static_cast<double>(numbers.back());
      total += drawn.weights[k];
    }
    mean.push_back(static_cast<float>(sum / total));
    auto sorted = numbers;
    std::sort(sorted.begin(), sorted.end());
    const double low = sorted[(clients - 1) / 2], high = sorted[clients / 2];
    median.push_back(static_cast<float>((low + high) / 2));
    double kept = 0.0;
    for (std::size_t k = trim; k < clients - trim; ++k) kept += static_cast<double>(sorted[k]);
    trimmed.push_back(static_cast<float>(kept / static_cast<double>(clients - 2 * trim)));
  }
  for (unsigned threads : {1u, 3u}) {
    const fedmoe::Work work{threads, nullptr};
    expect(same(mean, result(size, [&](Output o) { return fedmoe::weighted_mean(o, inputs, drawn.weights, work); })),
           "mean", clients, size);
    expect(same(median, result(size, [&](Output o) { return fedmoe::median(o, inputs, work); })), "median", clients, size);
    const auto ours = result(size, [&](Output o) { return fedmoe::trimmed_mean(o, inputs, trim, work); });
    bool close = true;
    for (std::size_t i = 0; i < size; ++i) close &= std::fabs(ours[i] - trimmed[i]) <= 1e-6f;
    expect(close, "trimmed mean", clients, size);

    std::vector<double> sums(size), distances(clients * clients), norms(clients);
    expect(fedmoe::accumulate(sums.data(), inputs, drawn.weights, work), "accumulate", clients, size);
    expect(fedmoe::squared_distances(distances.data(), inputs, work), "distances", clients, size);
    expect(fedmoe::squared_norms(norms.data(), inputs, drawn.data[0], work), "norms", clients, size);
    for (std::size_t k = 0; k < clients; ++k)
      expect(std::fabs(norms[k] - distances[k]) <= 1e-9 * norms[k] && distances[k] == distances[k * clients],
             "norms are distances", clients, size);
  }
}

void sixteen_bits() {
  std::vector<std::uint16_t> all(65536), back(65536);
  for (std::size_t i = 0; i < all.size(); ++i) all[i] = static_cast<std::uint16_t>(i);
  const void* data[] = {all.data()};
  const double weights[] = {1.0};
  for (Kind kind : {Kind::kBf16, Kind::kF16}) {
    fedmoe::weighted_mean({back.data(), kind}, {data, kind, all.size()}, weights, {});
    const std::uint16_t infinity = kind == Kind::kBf16 ? 0x7f80 : 0x7c00;
    for (std::size_t i = 0; i < all.size(); ++i)  // NaN stays NaN; -0 was added to 0
      expect((i & 0x7fff) > infinity ? (back[i] & 0x7fff) > infinity : back[i] == (i == 0x8000 ? 0 : i), "16 bits", 1, i);
  }
}

// What a thread of the device does, done here, has the bits of the host's loops: of all bit patterns, NaN and infinities
// among them, and of every pair of kinds.
template <class Type, class Out>
void device_arithmetic(Kind kind, Kind out_kind, std::size_t clients, std::size_t size) {
  namespace device = fedmoe::coordinates;
  using To = typename Out::Stored;
  std::mt19937 random(static_cast<unsigned>(clients + size));
  std::vector<std::vector<typename Type::Stored>> buffers(clients);
  std::vector<const void*> data;
  std::vector<double> weights;
  double total = 0.0;
  for (auto& buffer : buffers) {
    for (std::size_t i = 0; i < size; ++i) {
      const float tied = static_cast<float>(random() % 41) / 7.0f - 3.0f;
      const float any = device::F32::widen(__builtin_bit_cast(float, static_cast<std::uint32_t>(random())));
      buffer.push_back(Type::narrow(i % 3 ? tied : any));
    }
    data.push_back(buffer.data());
    weights.push_back(0.1 + static_cast<double>(random() % 9));
    total += weights.back();
  }
  const Inputs inputs{data, kind, size};
  const std::size_t trim = (clients - 1) / 3;
  std::vector<To> out(size);
  const Output to{out.data(), out_kind};
  const auto check = [&](const char* what, auto each) {
    for (std::size_t i = 0; i < size; ++i) {
      const To ours = Out::narrow(each(i));
      const float a = Out::widen(ours), b = Out::widen(out[i]);
      expect((std::isnan(a) && std::isnan(b)) || !std::memcmp(&ours, &out[i], sizeof(To)), what, clients, i);
    }
  };
  fedmoe::weighted_mean(to, inputs, weights, {});
  check("mean on the device",
        [&](std::size_t i) { return device::mean<Type>(data.data(), clients, weights.data(), total, i); });
  fedmoe::median(to, inputs, {});
  check("median on the device", [&](std::size_t i) { return device::median<Type>(data.data(), clients, i); });
  fedmoe::trimmed_mean(to, inputs, trim, {});
  check("trimmed mean on the device",
        [&](std::size_t i) { return device::trimmed_mean<Type>(data.data(), clients, trim, i); });
}

// As a block of the device does: stripes folded in halves, tiles in their order.
template <class Type>
double squares(const void* a, const void* b, std::size_t size, std::size_t tile) {
  double sum = 0.0;
  for (std::size_t start = 0; start < size; start += tile) {
    double stripes[fedmoe::kStripes];
    for (std::size_t s = 0; s < fedmoe::kStripes; ++s)
      stripes[s] = fedmoe::coordinates::squared_stripe<Type>(a, b, start, std::min(tile, size - start), s);
    for (std::size_t half = fedmoe::kStripes / 2; half; half /= 2)
      for (std::size_t s = 0; s < half; ++s) stripes[s] += stripes[s + half];
    sum += stripes[0];
  }
  return sum;
}

template <class Type>
void device_squares(Kind kind, std::size_t size) {
  const Drawn drawn(3, size);
  std::vector<std::vector<typename Type::Stored>> buffers(3);
  std::vector<const void*> data;
  for (std::size_t k = 0; k < 3; ++k) {
    for (float x : drawn.buffers[k]) buffers[k].push_back(Type::narrow(x));
    data.push_back(buffers[k].data());
  }
  double norms[3], distances[9];
  fedmoe::squared_norms(norms, {data, kind, size}, data[2], {});
  fedmoe::squared_distances(distances, {data, kind, size}, {});
  for (std::size_t k = 0; k < 3; ++k) {
    expect(norms[k] == squares<Type>(data[k], data[2], size, fedmoe::kNormTile), "norms on the device", k, size);
    for (std::size_t l = 0; l < 3; ++l)
      expect(distances[3 * k + l] == squares<Type>(data[k], data[l], size, fedmoe::kPairTile), "distances on the device",
             k, size);
  }
}

void device() {
  using namespace fedmoe::coordinates;
  for (Kind kind : {Kind::kF32, Kind::kBf16, Kind::kF16})
    of(kind, [&](auto type) {
      using Type = decltype(type);
      for (std::size_t size : {0, 1, 15, 17, 4095, 4097, 20'001}) device_squares<Type>(kind, size);
      for (Kind out_kind : {Kind::kF32, Kind::kBf16, Kind::kF16})
        of(out_kind, [&](auto to) {
          for (std::size_t clients : {1, 2, 3, 10, 257, 300})
            device_arithmetic<Type, decltype(to)>(kind, out_kind, clients, 131);
        });
    });
}

// The 0-1 principle: a network that orders all sequences of zeros and ones orders all.
void networks() {
  for (std::size_t wires = 1; wires <= 14; ++wires)
    for (std::size_t rank = 0; rank < wires; ++rank) {
      const auto exchanges = fedmoe::network(wires, {rank});
      for (std::uint32_t bits = 0; bits < 1u << wires; ++bits) {
        std::uint32_t now = bits;
        for (auto [low, high] : exchanges)
          if ((now >> low & 1) && !(now >> high & 1)) now ^= (1u << low) | (1u << high);
        const auto zeros = wires - static_cast<std::size_t>(__builtin_popcount(bits));
        expect((now >> rank & 1) == (rank >= zeros), "network", wires, rank);
      }
    }
}

std::atomic<int> asked{0};

void stops() {
  const Drawn drawn(200, 20'000);
  std::vector<double> distances(200 * 200);
  expect(!fedmoe::squared_distances(distances.data(), drawn.inputs(), {2, [] { return ++asked > 0; }}), "stops", 200,
         20'000);
  expect(asked > 0, "asks", 200, 20'000);
}

}  // namespace

int main() {
  for (const auto& name : fedmoe::instruction_sets()) {
    fedmoe::use_instruction_set(name);
    for (std::size_t clients : {1, 2, 3, 7, 64, 257})
      for (std::size_t size : {0, 1, 63, 64, 65, 4097}) rules(clients, size);
    sixteen_bits();
  }
  device();
  networks();
  stops();
  std::printf(failures ? "%d failed\n" : "all passed\n", failures);
  return failures != 0;
}
