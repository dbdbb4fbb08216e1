// What the BF16 and FP8 RoPE + KV append kernels share: who owns which elements, and the rotation.
// Never touches the cache: its format is the kernel's.
//
// One CTA is one token. A warp takes whole heads: lane l owns dims 4l..4l+3 and their partners
// 128+4l..128+4l+3 (half-split pairing: dim j turns with dim j + 128).
#pragma once

#include "common/ptx.cuh"
#include "common/types.cuh"

constexpr int kRopeHeadDim = 256;
constexpr int kRopeHalf = kRopeHeadDim / 2;
constexpr int kRopeThreads = 256;
constexpr int kRopeWarps = kRopeThreads / kWarpThreads;
constexpr int kRopeDims = 4;          // consecutive dims of a lane, in each half
constexpr int kRopeHeadsPerWarp = 8;  // in flight together: 64 heads over 8 warps

struct RopeParams {
  const uint16_t* q;     // bf16[T, num_heads, 256]
  const uint16_t* kv;    // bf16[T, 512], rows kv_stride apart: K then V of the token
  const int* positions;  // i32[T]
  const int* slots;      // i32[T]: KV block * 64 + offset in the block, -1: do not append
  const float* cos_sin;  // f32[max positions, 256]: cosines of the 128 angles, then sines
  int num_heads;
  int kv_stride;
};

struct RopeLane {
  float low[kRopeDims];   // dims 4l + i
  float high[kRopeDims];  // dims 128 + 4l + i
};

__device__ __forceinline__ float bf16_low_to_float(uint32_t pair) {
  return __uint_as_float(pair << 16);
}

__device__ __forceinline__ float bf16_high_to_float(uint32_t pair) {
  return __uint_as_float(pair & 0xffff0000u);
}

__device__ __forceinline__ void rope_unpack(uint2 packed, float (&values)[kRopeDims]) {
  values[0] = bf16_low_to_float(packed.x);
  values[1] = bf16_high_to_float(packed.x);
  values[2] = bf16_low_to_float(packed.y);
  values[3] = bf16_high_to_float(packed.y);
}

// The lane's elements of a head that starts at `head`.
__device__ __forceinline__ RopeLane rope_load(const uint16_t* head) {
  const int dim = threadIdx.x % kWarpThreads * kRopeDims;
  RopeLane lane;
  rope_unpack(*reinterpret_cast<const uint2*>(head + dim), lane.low);
  rope_unpack(*reinterpret_cast<const uint2*>(head + kRopeHalf + dim), lane.high);
  return lane;
}

// Cosines in `low`, sines in `high`.
__device__ __forceinline__ RopeLane rope_load_angles(const RopeParams& params, int token) {
  const int dim = threadIdx.x % kWarpThreads * kRopeDims;
  const float* row = params.cos_sin + static_cast<int64_t>(params.positions[token]) * kRopeHeadDim;
  const float4 cosines = *reinterpret_cast<const float4*>(row + dim);
  const float4 sines = *reinterpret_cast<const float4*>(row + kRopeHalf + dim);
  return {{cosines.x, cosines.y, cosines.z, cosines.w}, {sines.x, sines.y, sines.z, sines.w}};
}

__device__ __forceinline__ void rope_rotate(RopeLane& lane, const RopeLane& angles) {
#pragma unroll
  for (int i = 0; i < kRopeDims; ++i) {
    const float low = lane.low[i];
    const float high = lane.high[i];
    lane.low[i] = low * angles.low[i] - high * angles.high[i];
    lane.high[i] = high * angles.low[i] + low * angles.high[i];
  }
}

__device__ __forceinline__ uint2 rope_pack_bf16(const float (&values)[kRopeDims]) {
  return make_uint2(cvt_bf16x2(values[0], values[1]), cvt_bf16x2(values[2], values[3]));
}

__device__ __forceinline__ void rope_store_bf16(uint16_t* head, const RopeLane& lane) {
  const int dim = threadIdx.x % kWarpThreads * kRopeDims;
  *reinterpret_cast<uint2*>(head + dim) = rope_pack_bf16(lane.low);
  *reinterpret_cast<uint2*>(head + kRopeHalf + dim) = rope_pack_bf16(lane.high);
}

// Rotates this warp's heads of the token's query and hands each to `store(head, lane)`.
template <class Store>
__device__ __forceinline__ void rope_queries(const RopeParams& params, int token,
                                             const RopeLane& angles, Store store) {
  const uint16_t* queries =
      params.q + static_cast<int64_t>(token) * params.num_heads * kRopeHeadDim;
  const int warp = threadIdx.x / kWarpThreads;
  for (int first = warp; first < params.num_heads; first += kRopeWarps * kRopeHeadsPerWarp) {
    RopeLane lanes[kRopeHeadsPerWarp];
#pragma unroll
    for (int i = 0; i < kRopeHeadsPerWarp; ++i) {
      const int head = first + i * kRopeWarps;
      if (head < params.num_heads) lanes[i] = rope_load(queries + head * kRopeHeadDim);
    }
#pragma unroll
    for (int i = 0; i < kRopeHeadsPerWarp; ++i) {
      const int head = first + i * kRopeWarps;
      if (head < params.num_heads) {
        rope_rotate(lanes[i], angles);
        store(head, lanes[i]);
      }
    }
  }
}
