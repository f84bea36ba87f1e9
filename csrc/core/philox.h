// Dropout's random numbers: a pure function of (seed, batch, head, query, key), the same on every backend.
//
// Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3" (2011): Philox4x32-10. One counter gives the words of
// four consecutive keys.
#pragma once

#include <cstdint>

namespace regard {

struct Philox {
  std::uint32_t key[2];

  static constexpr std::uint32_t kMultiplier[2] = {0xD2511F53u, 0xCD9E8D57u};
  static constexpr std::uint32_t kWeyl[2] = {0x9E3779B9u, 0xBB67AE85u};

  constexpr explicit Philox(std::uint64_t seed) : key{static_cast<std::uint32_t>(seed), static_cast<std::uint32_t>(seed >> 32)} {}

  // counter[0..4) becomes four random words.
  constexpr void words(std::uint32_t (&counter)[4]) const {
    std::uint32_t k0 = key[0];
    std::uint32_t k1 = key[1];
    for (int round = 0; round < 10; ++round) {
      const std::uint64_t a = std::uint64_t{kMultiplier[0]} * counter[0];
      const std::uint64_t b = std::uint64_t{kMultiplier[1]} * counter[2];
      const std::uint32_t next[4] = {static_cast<std::uint32_t>(b >> 32) ^ counter[1] ^ k0, static_cast<std::uint32_t>(b),
                                     static_cast<std::uint32_t>(a >> 32) ^ counter[3] ^ k1, static_cast<std::uint32_t>(a)};
      for (int w = 0; w < 4; ++w) counter[w] = next[w];
      k0 += kWeyl[0];
      k1 += kWeyl[1];
    }
  }
};

// Which weights stay: those whose word is at least threshold, scaled by 1 / (1 - p).
struct Dropout {
  double p = 0;  // 0: none
  std::uint64_t seed = 0;

  constexpr bool present() const { return p > 0; }
  constexpr double kept_scale() const { return p < 1 ? 1 / (1 - p) : 0; }
  // p = 1 drops all: no word reaches 2^32.
  constexpr std::uint64_t threshold() const { return static_cast<std::uint64_t>(p * 4294967296.0 + 0.5); }

  // The counter of keys 4 * (j / 4) and the three after it; word j % 4 is key j's.
  static constexpr void counter_of(std::int64_t b, std::int64_t h, std::int64_t i, std::int64_t j, std::uint32_t (&counter)[4]) {
    counter[0] = static_cast<std::uint32_t>(j / 4);
    counter[1] = static_cast<std::uint32_t>(i);
    counter[2] = static_cast<std::uint32_t>(h);
    counter[3] = static_cast<std::uint32_t>(b);
  }

  // Multiplies the weights of n keys from j0 on by what is left of each.
  template <class T> void apply(std::int64_t b, std::int64_t h, std::int64_t i, std::int64_t j0, std::int64_t n, T* weights) const {
    const Philox random(seed);
    const std::uint64_t least = threshold();
    const T kept = static_cast<T>(kept_scale());
    std::uint32_t words[4];
    for (std::int64_t k = 0; k < n; ++k) {
      const std::int64_t j = j0 + k;
      if (k == 0 || j % 4 == 0) {
        counter_of(b, h, i, j, words);
        random.words(words);
      }
      weights[k] *= words[j % 4] >= least ? kept : T(0);
    }
  }

  // What the weight of one pair is multiplied by.
  constexpr double factor(std::int64_t b, std::int64_t h, std::int64_t i, std::int64_t j) const {
    std::uint32_t words[4] = {};
    counter_of(b, h, i, j, words);
    Philox(seed).words(words);
    return words[j % 4] >= threshold() ? kept_scale() : 0.0;
  }
};

}  // namespace regard
