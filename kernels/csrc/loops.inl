// Included once for each instruction set, with FEDMOE_ISA (its namespace) and FEDMOE_TABLE (its table) defined.
//
// Nothing here may come from the standard library's templates: the linker keeps one copy of an inline function for all
// of the program, and that must not be the one for AVX-512. Products and sums are never contracted, and every lane does
// what the plain loop does, so that all instruction sets give the same bits.
#include "loops.h"

namespace fedmoe::FEDMOE_ISA {
namespace {

using Floats [[gnu::vector_size(64)]] = float;
using Ints [[gnu::vector_size(64)]] = std::int32_t;
constexpr std::size_t kWide = sizeof(Ints) / sizeof(std::int32_t);

#include "elements.inl"

template <class Type>
const typename Type::Stored* at(const void* data, std::size_t start) {
  return static_cast<const typename Type::Stored*>(data) + start;
}

// ---- the mean

template <class Type>
void add_one(double* sums, const void* input, double weight, std::size_t start, std::size_t count) {
  const auto* x = at<Type>(input, start);
  for (std::size_t i = 0; i < count; ++i) sums[i] += weight * static_cast<double>(Type::widen(x[i]));
}

// Four clients at a time: the sums are read and written once for them. `next`, null or four more, are fetched meanwhile.
template <class Type>
void add_four(double* __restrict sums, const void* const* inputs, const double* weights, const void* const* next,
              std::size_t start, std::size_t count) {
  const auto *a = at<Type>(inputs[0], start), *b = at<Type>(inputs[1], start), *c = at<Type>(inputs[2], start),
             *d = at<Type>(inputs[3], start);
  const double u = weights[0], v = weights[1], w = weights[2], z = weights[3];
  constexpr std::size_t kLine = 64 / sizeof(typename Type::Stored);
  const auto add = [&](std::size_t from, std::size_t to) {
    for (std::size_t i = from; i < to; ++i)
      sums[i] = (((sums[i] + u * static_cast<double>(Type::widen(a[i]))) +
                  v * static_cast<double>(Type::widen(b[i]))) +
                 w * static_cast<double>(Type::widen(c[i]))) +
                z * static_cast<double>(Type::widen(d[i]));
  };
  std::size_t i = 0;
  if (next) {
    const auto *e = at<Type>(next[0], start), *f = at<Type>(next[1], start), *g = at<Type>(next[2], start),
               *h = at<Type>(next[3], start);
    for (; i + kLine <= count; i += kLine) {
      __builtin_prefetch(e + i, 0, 2);
      __builtin_prefetch(f + i, 0, 2);
      __builtin_prefetch(g + i, 0, 2);
      __builtin_prefetch(h + i, 0, 2);
      add(i, i + kLine);
    }
  }
  add(i, count);
}

void accumulate(Kind kind, double* sums, const void* const* inputs, const double* weights, std::size_t clients,
                std::size_t start, std::size_t count) {
  of(kind, [&](auto type) {
    using Type = decltype(type);
    std::size_t k = 0;
    for (; k + 4 <= clients; k += 4)
      add_four<Type>(sums, inputs + k, weights + k, k + 8 <= clients ? inputs + k + 4 : nullptr, start, count);
    for (; k < clients; ++k) add_one<Type>(sums, inputs[k], weights[k], start, count);
  });
}

void divide(Kind kind, void* out, const double* sums, double total, std::size_t start, std::size_t count) {
  of(kind, [&](auto type) {
    using Type = decltype(type);
    auto* to = static_cast<typename Type::Stored*>(out) + start;
    for (std::size_t i = 0; i < count; ++i) to[i] = Type::narrow(static_cast<float>(sums[i] / total));
  });
}

// ---- order

template <class Type>
void row(std::int32_t* keys, const void* input, std::size_t start, std::size_t count) {
  const auto* x = at<Type>(input, start);
  if (count == kLanes) {
    for (std::size_t i = 0; i < kLanes; ++i) keys[i] = key(Type::widen(x[i]));
    return;
  }
  for (std::size_t i = 0; i < kLanes; ++i) keys[i] = i < count ? key(Type::widen(x[i])) : 0;
}

void all_keys(Kind kind, std::int32_t* keys, const void* const* inputs, std::size_t clients, std::size_t start,
              std::size_t count) {
  of(kind, [&](auto type) {
    using Type = decltype(type);
    for (std::size_t k = 0; k < clients; ++k) {
      // The next lanes of this client: no hardware prefetches for hundreds of buffers at a time.
      for (std::size_t i = 0; i < kLanes; i += 64 / sizeof(typename Type::Stored))
        __builtin_prefetch(at<Type>(inputs[k], start) + kLanes + i, 0, 2);
      row<Type>(keys + k * kLanes, inputs[k], start, count);
    }
  });
}

inline Ints smaller(Ints a, Ints b) { return a < b ? a : b; }
inline Ints larger(Ints a, Ints b) { return a > b ? a : b; }

void exchange(std::int32_t* keys, const Exchange* exchanges, std::size_t count) {
  for (std::size_t n = 0; n < count; ++n) {
    auto* low = reinterpret_cast<Ints*>(keys + exchanges[n].low * kLanes);
    auto* high = reinterpret_cast<Ints*>(keys + exchanges[n].high * kLanes);
    for (std::size_t i = 0; i < kLanes / kWide; ++i) {
      const Ints a = low[i], b = high[i];
      low[i] = smaller(a, b);
      high[i] = larger(a, b);
    }
  }
}

void select(const std::int32_t* keys, std::size_t clients, std::size_t rank, std::int32_t* found,
            std::int32_t* next) {
  const auto wanted = static_cast<std::int32_t>(rank) + 1;
  for (std::size_t i = 0; i < kLanes / kWide; ++i) {
    const auto* column = reinterpret_cast<const Ints*>(keys) + i;
    constexpr std::size_t kStep = kLanes / kWide;
    Ints low = column[0], high = column[0];
    for (std::size_t k = 1; k < clients; ++k) {
      low = smaller(low, column[k * kStep]);
      high = larger(high, column[k * kStep]);
    }
    const Ints most = high;
    for (;;) {
      const Ints open = low < high;
      bool any = false;
      for (std::size_t l = 0; l < kWide; ++l) any |= open[l] != 0;
      if (!any) break;
      const Ints middle = (low & high) + ((low ^ high) >> 1);  // rounded down, without overflow
      Ints below = {};
      for (std::size_t k = 0; k < clients; ++k) below -= column[k * kStep] <= middle;
      const Ints enough = below >= wanted;
      high = enough ? middle : high;
      low = enough ? low : middle + 1;
    }
    reinterpret_cast<Ints*>(found)[i] = low;
    if (!next) continue;
    Ints below = {}, above = most;
    for (std::size_t k = 0; k < clients; ++k) {
      const Ints x = column[k * kStep];
      below -= x <= low;
      above = (x > low) & (x < above) ? x : above;
    }
    reinterpret_cast<Ints*>(next)[i] = below > wanted ? low : above;
  }
}

void middle(Kind kind, void* out, const std::int32_t* low, const std::int32_t* high, std::size_t start,
            std::size_t count) {
  of(kind, [&](auto type) {
    using Type = decltype(type);
    auto* to = static_cast<typename Type::Stored*>(out) + start;
    for (std::size_t i = 0; i < count; ++i) to[i] = Type::narrow(middle_of(low[i], high[i]));
  });
}

void between(Kind in, Kind out_kind, void* out, const void* const* inputs, std::size_t clients, std::size_t trim,
             const std::int32_t* low, const std::int32_t* high, std::size_t start, std::size_t count) {
  alignas(64) double sums[kLanes] = {};
  alignas(64) std::int32_t lower[kLanes] = {}, upper[kLanes] = {}, keys[kLanes];
  of(in, [&](auto type) {
    for (std::size_t k = 0; k < clients; ++k) {
      row<decltype(type)>(keys, inputs[k], start, count);
      for (std::size_t i = 0; i < kLanes; ++i) {
        const bool inside = (keys[i] > low[i]) & (keys[i] < high[i]);
        const std::int32_t bits = flip(keys[i]) & -static_cast<std::int32_t>(inside);
        sums[i] += static_cast<double>(__builtin_bit_cast(float, bits));
        lower[i] += keys[i] <= low[i];
        upper[i] += keys[i] >= high[i];
      }
    }
  });
  const auto all = static_cast<double>(clients), cut = static_cast<double>(trim);
  of(out_kind, [&](auto type) {
    using Type = decltype(type);
    auto* to = static_cast<typename Type::Stored*>(out) + start;
    for (std::size_t i = 0; i < count; ++i)
      to[i] = Type::narrow(mean_between(sums[i], lower[i], upper[i], all, cut, low[i], high[i]));
  });
}

// ---- distances

double squared_distance(Kind kind, const void* a, const void* b, std::size_t start, std::size_t count) {
  alignas(64) double stripes[kStripes] = {};
  of(kind, [&](auto type) {
    using Type = decltype(type);
    const auto *x = at<Type>(a, start), *y = b ? at<Type>(b, start) : nullptr;
    const auto add = [&](std::size_t i, auto other) {
      for (std::size_t s = 0; s < kStripes; ++s) {
        const double difference = static_cast<double>(Type::widen(x[i + s])) - other(i + s);
        stripes[s] += difference * difference;
      }
    };
    const auto all = [&](auto other) {
      std::size_t i = 0;
      for (; i + kStripes <= count; i += kStripes) add(i, other);
      for (std::size_t s = 0; i < count; ++i, ++s) {
        const double difference = static_cast<double>(Type::widen(x[i])) - other(i);
        stripes[s] += difference * difference;
      }
    };
    if (y)
      all([=](std::size_t i) { return static_cast<double>(Type::widen(y[i])); });
    else
      all([](std::size_t) { return 0.0; });
  });
  for (std::size_t half = kStripes / 2; half; half /= 2)
    for (std::size_t s = 0; s < half; ++s) stripes[s] += stripes[s + half];
  return stripes[0];
}

}  // namespace
}  // namespace fedmoe::FEDMOE_ISA

namespace fedmoe {
namespace isa = FEDMOE_ISA;
const Loops FEDMOE_TABLE = {FEDMOE_NAME,   isa::accumulate, isa::divide,  isa::all_keys,        isa::exchange,
                            isa::select,   isa::middle,     isa::between, isa::squared_distance};
}  // namespace fedmoe
