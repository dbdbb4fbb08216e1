// Noise of the sampler: Philox4x64-10 words and the Gumbel variables made of them.
// Never holds a state: a word depends on (seed, position, token) alone, as in ops/sampling.py.
#pragma once

#include "common/types.cuh"

constexpr int kWordsPerBlock = 4;  // tokens 4b .. 4b + 3 take the four words of counter b + 1
// A word gives u = ((word >> 12) + 1/2) / 2^52. The noise -ln(-ln u) lies between these.
constexpr float kLeastNoise = -3.62f;
constexpr float kMostNoise = 36.75f;
// noise_estimate and the sum that it goes into are closer to the exact values than this.
constexpr float kNoiseError = 1e-4f;

struct PhiloxBlock {
  uint64_t words[kWordsPerBlock];
};

struct Product {
  uint64_t high;
  uint64_t low;
};

__device__ __forceinline__ Product multiply_wide(uint64_t a, uint64_t b) {
  const uint32_t a0 = static_cast<uint32_t>(a), a1 = static_cast<uint32_t>(a >> 32);
  const uint32_t b0 = static_cast<uint32_t>(b), b1 = static_cast<uint32_t>(b >> 32);
  const uint64_t p00 = static_cast<uint64_t>(a0) * b0;
  const uint64_t p01 = static_cast<uint64_t>(a0) * b1 + (p00 >> 32);
  const uint64_t p10 = static_cast<uint64_t>(a1) * b0 + static_cast<uint32_t>(p01);
  const uint64_t p11 = static_cast<uint64_t>(a1) * b1 + (p01 >> 32) + (p10 >> 32);
  return {p11, (p10 << 32) | static_cast<uint32_t>(p00)};
}

// The words of tokens 4 `block` .. 4 `block` + 3.
__device__ __forceinline__ PhiloxBlock philox(uint64_t seed, uint64_t position, uint32_t block) {
  uint64_t c0 = block + 1ull, c1 = position, c2 = 0, c3 = 0;
  uint64_t k0 = seed, k1 = 0;
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const Product p0 = multiply_wide(c0, 0xD2E7470EE14C6C93ull);
    const Product p1 = multiply_wide(c2, 0xCA5A826395121157ull);
    c0 = p1.high ^ c1 ^ k0;
    c1 = p1.low;
    c2 = p0.high ^ c3 ^ k1;
    c3 = p0.low;
    k0 += 0x9E3779B97F4A7C15ull;
    k1 += 0xBB67AE8584CAA73Bull;
  }
  return {{c0, c1, c2, c3}};
}

// -ln(-ln u) to about 3e-5. Near u = 1 the inner logarithm comes from 1 - u, which is exact there.
__device__ __forceinline__ float noise_estimate(uint64_t word) {
  const bool is_upper = static_cast<int64_t>(word) < 0;
  const uint64_t bits = is_upper ? ~word : word;
  const float high = __uint2float_rn(static_cast<uint32_t>(bits >> 32));
  const float low = __uint2float_rn(static_cast<uint32_t>(bits) >> 12) + 0.5f;
  const float x = fmaf(low, 0x1p-52f, high * 0x1p-32f);  // u, or 1 - u: at most 1/2
  float inner = -__logf(is_upper ? 1.0f - x : x);
  if (is_upper && x < 0.125f) {
    inner = x * fmaf(x, fmaf(x, fmaf(x, fmaf(x, 0.2f, 0.25f), 1.0f / 3.0f), 0.5f), 1.0f);
  }
  return -__logf(inner);
}

__device__ __forceinline__ double noise(uint64_t word) {
  const double u = (static_cast<double>(word >> 12) + 0.5) * 0x1p-52;
  return -log(-log(u));
}
