// Included inside a namespace of its own by all that computes: how an element is stored, and what is made of it.
//
// As loops.inl, without a template of the standard library; and for the host and the device alike, for which the
// compilers are told to contract nothing.
#ifdef __CUDACC__
#define FEDMOE_BOTH __host__ __device__
#else
#define FEDMOE_BOTH
#endif

struct F32 {
  using Stored = float;
  FEDMOE_BOTH static float widen(float x) { return x; }
  FEDMOE_BOTH static float narrow(float x) { return x; }
};

struct Bf16 {
  using Stored = std::uint16_t;
  FEDMOE_BOTH static float widen(std::uint16_t x) { return __builtin_bit_cast(float, static_cast<std::uint32_t>(x) << 16); }
  FEDMOE_BOTH static std::uint16_t narrow(float x) {
    const auto bits = __builtin_bit_cast(std::uint32_t, x);
    if ((bits & 0x7fffffff) > 0x7f800000) return 0x7fc0;
    return static_cast<std::uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);  // to nearest, ties to even
  }
};

struct F16 {
  using Stored = std::uint16_t;
  FEDMOE_BOTH static float widen(std::uint16_t x) {
    const std::uint32_t sign = static_cast<std::uint32_t>(x & 0x8000) << 16, rest = static_cast<std::uint32_t>(x & 0x7fff);
    const std::uint32_t normal = (rest << 13) + (rest < 0x7c00 ? 0x38000000u : 0x70000000u);  // biases 15, 127; 31, 255
    // Below 2^-14 the fraction is that of a sum with 2^-14, which is then taken away: exact.
    const float small = __builtin_bit_cast(float, 0x38800000u + (rest << 13)) - 0x1p-14f;
    const std::uint32_t bits = rest < 0x400 ? __builtin_bit_cast(std::uint32_t, small) : normal;
    return __builtin_bit_cast(float, bits | sign);
  }
  FEDMOE_BOTH static std::uint16_t narrow(float x) {
    const auto bits = __builtin_bit_cast(std::uint32_t, x);
    const std::uint32_t sign = bits >> 16 & 0x8000, rest = bits & 0x7fffffff;
    if (rest > 0x7f800000) return static_cast<std::uint16_t>(sign | 0x7e00);
    if (rest >= 0x477ff000) return static_cast<std::uint16_t>(sign | 0x7c00);  // 65520 and more
    if (rest < 0x38800000) {  // adding 0.5 leaves multiples of 2^-24, the smallest number, rounded
      const float shifted = __builtin_bit_cast(float, rest) + 0.5f;
      return static_cast<std::uint16_t>(sign | (__builtin_bit_cast(std::uint32_t, shifted) - 0x3f000000u));
    }
    return static_cast<std::uint16_t>(sign | (rest - 0x38000000u + 0xfff + (rest >> 13 & 1)) >> 13);
  }
};

template <class Do>
auto of(Kind kind, Do&& act) {
  switch (kind) {
    case Kind::kBf16: return act(Bf16{});
    case Kind::kF16: return act(F16{});
    default: return act(F32{});
  }
}

// A number's bits as an integer of the same order, and back; NaNs are one, above infinity.
FEDMOE_BOTH inline std::int32_t flip(std::int32_t bits) { return bits ^ ((bits >> 31) & 0x7fffffff); }

FEDMOE_BOTH inline std::int32_t key(float x) {
  const auto bits = __builtin_bit_cast(std::int32_t, x);
  return (bits & 0x7fffffff) > 0x7f800000 ? 0x7fc00000 : flip(bits);
}

// A zero comes out as 0, whatever its sign, as it does of a sum.
FEDMOE_BOTH inline float number(std::int32_t key) { return __builtin_bit_cast(float, flip(key)) + 0.0f; }

// The middle between two keys' numbers.
FEDMOE_BOTH inline float middle_of(std::int32_t low, std::int32_t high) {
  const double a = number(low), b = number(high);
  return low == high ? number(low) : static_cast<float>((a + b) / 2);
}

// The mean that is left of `clients` numbers without `trim` on either side: `sum` is that of those strictly between two
// keys, `lower` and `upper` count those up to the lower key and from the upper one.
FEDMOE_BOTH inline float mean_between(double sum, std::int32_t lower, std::int32_t upper, double clients, double trim,
                                      std::int32_t low, std::int32_t high) {
  const double a = (lower - trim) * static_cast<double>(number(low));
  const double b = (upper - trim) * static_cast<double>(number(high));
  return low == high ? number(low) : static_cast<float>(((sum + a) + b) / (clients - 2 * trim));
}
