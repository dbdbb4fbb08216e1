// RMS normalisation of one row by one CTA, and its quantisation in 1x128 groups.
// Never touches the residual: what is normalised is handed in.
//
// Thread t of n owns the vectors t, t + n, t + 2n, ... of 8 bf16 values. Rounding is that of
// ops/norm.py: mean of squares and root in fp32, the quotient to bf16, then times the weight.
#pragma once

#include "common/ptx.cuh"
#include "common/types.cuh"
#include "fused/quantize.cuh"

template <int kWidth, int kThreads>
struct RowTile {
  static constexpr int kVectors = kWidth / (kVectorWidth * kThreads);
  static constexpr int kWarps = kThreads / kWarpThreads;
  static_assert(kVectors * kVectorWidth * kThreads == kWidth, "threads share a row evenly");
  static_assert(kThreads % kWarpThreads == 0, "whole warps");

  uint4 packed[kVectors];

  static __device__ __forceinline__ int column(int i) {
    return (threadIdx.x + i * kThreads) * kVectorWidth;
  }

  __device__ __forceinline__ void load(const uint16_t* row) {
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      packed[i] = *reinterpret_cast<const uint4*>(row + column(i));
    }
  }

  // Through L2 only: another processor has written the row.
  __device__ __forceinline__ void load_cg(const uint16_t* row) {
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      const int4 vector = ld_global_cg(reinterpret_cast<const int4*>(row + column(i)));
      packed[i] = make_uint4(vector.x, vector.y, vector.z, vector.w);
    }
  }

  __device__ __forceinline__ void store(uint16_t* row) const {
#pragma unroll
    for (int i = 0; i < kVectors; ++i) *reinterpret_cast<uint4*>(row + column(i)) = packed[i];
  }

  // The row over its root mean square, times `weight`. All threads of the CTA call it once.
  __device__ __forceinline__ void normalize(const RowTile& weight, float eps) {
    __shared__ alignas(16) float warp_sums[kWarps];
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      add_squares(packed[i].x, sum);
      add_squares(packed[i].y, sum);
      add_squares(packed[i].z, sum);
      add_squares(packed[i].w, sum);
    }
#pragma unroll
    for (int step = 1; step < kWarpThreads; step *= 2) {
      sum += __shfl_xor_sync(kFullWarp, sum, step);
    }
    if (threadIdx.x % kWarpThreads == 0) warp_sums[threadIdx.x / kWarpThreads] = sum;
    __syncthreads();
    sum = 0.0f;
#pragma unroll
    for (int i = 0; i < kWarps; ++i) sum += warp_sums[i];
    const float factor = rsqrt_approx(fmaf(sum, 1.0f / kWidth, eps));
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      packed[i].x = mul_bf16x2(scaled(packed[i].x, factor), weight.packed[i].x);
      packed[i].y = mul_bf16x2(scaled(packed[i].y, factor), weight.packed[i].y);
      packed[i].z = mul_bf16x2(scaled(packed[i].z, factor), weight.packed[i].z);
      packed[i].w = mul_bf16x2(scaled(packed[i].w, factor), weight.packed[i].w);
    }
  }

  __device__ __forceinline__ void quantize(const QuantizedRows& out, int token) const {
    const int64_t row = static_cast<int64_t>(token) * (kWidth / kVectorWidth);
    store_quantized(out, packed, row + threadIdx.x, kThreads);
  }

 private:
  static __device__ __forceinline__ void add_squares(uint32_t pair, float& sum) {
    const float low = bf16_low_to_float(pair), high = bf16_high_to_float(pair);
    sum = fmaf(low, low, sum);
    sum = fmaf(high, high, sum);
  }

  static __device__ __forceinline__ uint32_t scaled(uint32_t pair, float factor) {
    return cvt_bf16x2(bf16_low_to_float(pair) * factor, bf16_high_to_float(pair) * factor);
  }
};
