// Quantisation of bf16 activations to e4m3 in groups of 1x128 with one fp32 scale each.
// Functions of vectors take 16 lanes with 8 consecutive values each for a group; those of one scale
// leave it to the caller who owns a group.
//
//   values  e4m3[T, K]       row-major
//   scales  f32[T, K / 128]  row-major: as the FP8 linear layer and the experts' dispatch read them
//
// The same function as ops/quantize.py, but for the sign of zeros: scale = amax / 448 (1 for a group of zeros),
// value = x / scale rounded once to fp32, saturated at 448 and rounded to e4m3. The exception are
// groups of magnitudes below 2^-100, which get the scale of 2^-100.
#pragma once

#include "common/ptx.cuh"
#include "common/types.cuh"

constexpr int kGroupSize = 128;
constexpr int kVectorWidth = 8;  // bf16 values of 16 bytes
constexpr int kGroupLanes = kGroupSize / kVectorWidth;
constexpr float kLargestE4m3 = 448.0f;
constexpr uint32_t kBf16PairMagnitude = 0x7fff7fffu;
constexpr float kInverseLargestE4m3 = 1.0f / 448.0f;
constexpr uint32_t kSmallestAmaxBits = 0x0d80u;  // bf16 2^-100: its reciprocal is a number

struct GroupScale {
  float scale;
  float reciprocal;
};

// The larger magnitude of each half word. Of bf16 bit patterns without sign the order is that of
// unsigned integers: infinity is above every number and NaN above infinity.
__device__ __forceinline__ uint32_t largest_magnitudes(uint4 packed) {
  return __vmaxu2(__vmaxu2(packed.x & kBf16PairMagnitude, packed.y & kBf16PairMagnitude),
                  __vmaxu2(packed.z & kBf16PairMagnitude, packed.w & kBf16PairMagnitude));
}

// x / y from an approximate reciprocal: the product and one correction. For x and y as they occur
// here, bf16 numbers and amax / 448, the result is that of a correctly rounded division even if the
// reciprocal is wrong in its last two bits (tried for all mantissas).
__device__ __forceinline__ float divide(float x, float y, float reciprocal) {
  const float quotient = x * reciprocal;
  return fmaf(fmaf(-quotient, y, x), reciprocal, quotient);
}

// Of a pair of magnitudes, the bits of the larger one.
__device__ __forceinline__ uint32_t larger_half(uint32_t pair) {
  return max(pair & 0xffffu, pair >> 16);
}

// The scale of a group whose largest magnitude has these bf16 bits.
__device__ __forceinline__ GroupScale group_scale(uint32_t bits) {
  const float amax = __uint_as_float(max(bits, kSmallestAmaxBits) << 16);
  const float scale = bits == 0 ? 1.0f : divide(amax, kLargestE4m3, kInverseLargestE4m3);
  return {scale, rcp_approx(scale)};
}

// The scales of several groups at once, so that their exchanges among the lanes overlap.
template <int kCount>
__device__ __forceinline__ void group_scales(const uint4 (&packed)[kCount],
                                             GroupScale (&scales)[kCount]) {
  uint32_t largest[kCount];
#pragma unroll
  for (int i = 0; i < kCount; ++i) largest[i] = largest_magnitudes(packed[i]);
#pragma unroll
  for (int step = 1; step < kGroupLanes; step *= 2) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      largest[i] = __vmaxu2(largest[i], __shfl_xor_sync(kFullWarp, largest[i], step));
    }
  }
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    scales[i] = group_scale(larger_half(largest[i]));
  }
}

__device__ __forceinline__ uint32_t quantize_4(uint32_t low, uint32_t high, GroupScale group) {
  return cvt_e4m3x4(divide(bf16_low_to_float(low), group.scale, group.reciprocal),
                    divide(bf16_high_to_float(low), group.scale, group.reciprocal),
                    divide(bf16_low_to_float(high), group.scale, group.reciprocal),
                    divide(bf16_high_to_float(high), group.scale, group.reciprocal));
}

// Eight values of one group.
__device__ __forceinline__ uint2 quantize_8(uint4 packed, GroupScale group) {
  return make_uint2(quantize_4(packed.x, packed.y, group), quantize_4(packed.z, packed.w, group));
}

// Where quantised rows go.
struct QuantizedRows {
  uint8_t* values;  // e4m3[T, K]
  float* scales;    // f32[T, K / 128]
};

// Quantises vectors `first`, first + stride, ... of 8 values, counted over whole rows.
template <int kCount>
__device__ __forceinline__ void store_quantized(const QuantizedRows& out,
                                                const uint4 (&packed)[kCount], int64_t first,
                                                int stride) {
  GroupScale groups[kCount];
  group_scales(packed, groups);
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const int64_t vector = first + static_cast<int64_t>(i) * stride;
    reinterpret_cast<uint2*>(out.values)[vector] = quantize_8(packed[i], groups[i]);
    if (threadIdx.x % kGroupLanes == 0) out.scales[vector / kGroupLanes] = groups[i].scale;
  }
}
